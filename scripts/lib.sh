# What the scripts share: messages, installing what is missing, the virtual environment, the build.
# Sourced by bash with the project as working directory. Never asks anything; quiet unless something is done.

export DEBIAN_FRONTEND=noninteractive PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONDONTWRITEBYTECODE # or every command and server would compile all its modules anew, up to a third of its start
venv=$PWD/.venv
python=/usr/bin/python3 # Debian's own: the version that nbdkit embeds

say() { printf '%s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Needed to build and run, and to test as well. nbdfuse is a package of its own in later releases.
# shellcheck disable=SC2034 # used by those who source this
run_packages=(fio fuse3 gcc libc6-dev libfuse3-dev liblz4-dev libnbd-bin libxxhash-dev libzstd-dev mount nbdkit
    nbdkit-plugin-python pkg-config procps python3 python3-dev python3-libnbd python3-venv util-linux)
# The second line is what guests need: see tests/guest.
# shellcheck disable=SC2034
test_packages=(acl attr bindfs btrfs-progs e2fsprogs tmux xfsprogs
    busybox-static kmod nbd-client openssl qemu-system-x86 redis-server redis-tools '?user-mode-linux')
# What is measured beside ours, besides bindfs.
# shellcheck disable=SC2034
bench_packages=(git mergerfs redis-server)

# packages NAME...: installs what is missing, touching the network only then. ?NAME is left out where there is none.
packages() {
    local missing=() name
    for name; do
        [[ $(dpkg-query -W -f='${db:Status-Abbrev}' "${name#\?}" 2>/dev/null) == ii* ]] || missing+=("$name")
    done
    if ((${#missing[@]} == 0)) && command -v nbdfuse >/dev/null; then
        return
    fi
    command -v apt-get >/dev/null || die "apt-get is missing: install ${missing[*]} by hand"
    local root=()
    if ((EUID != 0)); then
        command -v sudo >/dev/null || die "run this as root once: it has to install ${missing[*]}"
        root=(sudo)
    fi
    say "installing ${missing[*]:-nbdfuse}"
    local apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300
        -o Acquire::Retries=3)
    "${apt[@]}" update </dev/null || say "the package lists could not all be fetched, going on"
    if ! command -v nbdfuse >/dev/null && apt-cache show nbdfuse >/dev/null 2>&1; then
        missing+=(nbdfuse)
    fi
    local wanted=()
    for name in "${missing[@]}"; do
        [[ $name != \?* ]] || apt-cache show "${name#\?}" >/dev/null 2>&1 || continue
        wanted+=("${name#\?}")
    done
    local log
    log=$(mktemp)
    if ! "${apt[@]}" install -y --no-install-recommends "${wanted[@]}" </dev/null >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        die "apt-get could not install ${missing[*]}"
    fi
    rm -f "$log"
}

# environment: makes .venv, again if it is broken, moved or of another Python.
environment() {
    local probe='import sys, os; print(sys.version_info[:3], os.path.realpath(sys.prefix))'
    local wanted found
    wanted="$("$python" -c 'import sys; print(sys.version_info[:3])') $(realpath -m "$venv")"
    found=$("$venv/bin/python" -c "$probe" 2>/dev/null || true)
    if [[ $found == "$wanted" ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        grep -q 'include-system-site-packages = true' "$venv/pyvenv.cfg"; then
        return
    fi
    say "making $venv"
    rm -rf "$venv"
    "$python" -m venv --system-site-packages "$venv"
}

# build_key: names what is built. The path too: an editable install points at where the project was.
build_key() {
    {
        pwd -P
        cat pyproject.toml setup.py
        find backends/native -type f -name '*.[ch]' -print0 | sort -z | xargs -0 cat
    } | sha256sum | cut -d' ' -f1
}

# built EXTRAS: says whether the build is up to date; what was built for the tests is good enough to run.
built() {
    local stamp key
    [[ -e backends/_native.abi3.so && -e $venv/tmem-build ]] || return 1
    stamp=$(<"$venv/tmem-build") key=$(build_key)
    [[ $stamp == "$key test" || $stamp == "$key $1" ]]
}

# build EXTRAS STRICT: installs the package in place unless nothing has changed since.
build() {
    local extras=$1 strict=$2
    if built "$extras"; then
        return
    fi
    say "building"
    rm -rf "$venv/tmem-build" build
    # A new file, never the old one rewritten: running servers have that mapped.
    rm -f backends/_native.abi3.so
    TMEM_STRICT=$strict "$venv/bin/python" -m pip install --quiet -e ".${extras:+[$extras]}" </dev/null ||
        die "the build failed: see above"
    printf '%s %s\n' "$(build_key)" "$extras" >"$venv/tmem-build"
}
