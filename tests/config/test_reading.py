"""Files of the configuration: what is put together, and what is refused, with its line."""

from pathlib import Path

import pytest

from tmem.config import reading
from tmem.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def refusal(path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        reading.load(write(path, text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tmem.toml"


def test_drop_ins_change_it_key_by_key_in_the_order_of_their_names(file: Path) -> None:
    write(file, '[start]\nmemory = "2G"\nrealtime = true\n[client.web1]\nweight = 200\n')
    write(file.parent / "tmem.d" / "20.toml", '[start]\nmemory = "4G"\n[client.web2]\ncap = 4096\n')
    write(file.parent / "tmem.d" / "10.toml", '[start]\nmemory = "3G"\n[client.web1]\ncap = "1M"\n')
    write(file.parent / "tmem.d" / "30.toml.bak", "nonsense")
    config = reading.load(file)
    assert [source.name for source in config.sources] == ["tmem.toml", "10.toml", "20.toml"]
    assert config.section("default", "start") == {"memory": "4G", "realtime": True}
    assert config.client("default", "web1") == {"weight": 200, "cap_bytes": 1 << 20}
    assert config.client("default", "web2") == {"cap_bytes": 4096}
    assert config.client("default", "web3") == {}


def test_another_segment_has_tables_of_its_own(file: Path) -> None:
    write(
        file,
        '[start]\nmemory = "2G"\n[segment.fast.start]\nrealtime = true\n'
        '[client.web1]\nweight = 1\n[segment.fast.client.web1]\nfloor = "8K"\n'
        '[segment.fast.client.web1.swap]\nsize = "64M"\n',
    )
    config = reading.load(file)
    assert config.section("fast", "start") == {"realtime": True}
    assert config.client("fast", "web1") == {"floor_bytes": 8192}
    assert config.section("fast", "client", "web1", "swap") == {"size": "64M"}
    assert config.section("default", "client", "web1", "swap") == {}
    assert config.section("other", "start") == {}


def test_no_files_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "DEFAULT_PATH", tmp_path / "tmem.toml")
    assert reading.load() == reading.Config()
    with pytest.raises(ConfigError, match="there is no configuration"):
        reading.load(tmp_path / "other.toml")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("# a\n\n[start]\nmemroy = '1G'\n", 4, "there is no 'memroy' in [start]: did you mean 'memory'?"),
        ("[strat]\nmemory = '1G'\n", 1, "there is no 'strat' in the file: did you mean 'start'?"),
        ("[start]\nxyz = 1\n", 2, "it may have memory, realtime"),
        ("[start]\nmemory = 'much'\n", 2, "start.memory cannot be 'much': write a size"),
        ("[start]\nmemory = true\n", 2, "start.memory cannot be True"),
        ("[start]\nmemory = -1\n", 2, "start.memory cannot be -1"),
        ("[start]\nrealtime = 'yes'\n", 2, "write true or false"),
        ("[start.memory]\nsize = 1\n", 1, "start.memory cannot be a table"),
        ("start = 7\n", 1, "start is a table: write [start]"),
        ("[swap]\npriority = 40000\n", 2, "a whole number from -1 to 32767"),
        ("[swap]\npriority = 1.5\n", 2, "swap.priority cannot be 1.5"),
        ("[swap]\ntls-psk = 'x'\n", 2, "did you mean 'tls_psk'?"),
        ("[mount]\noptions = 'ro'\n", 2, "a list of options"),
        ("[mount]\noptions = [\n  'ro',\n  7,\n]\n", 2, "mount.options cannot be"),
        ("[client.web1]\nwieght = 3\n", 2, "did you mean 'weight'?"),
        ("[client.web1]\ncompress = 'zip'\n", 2, 'one of "auto"'),
        ("[client]\nweight = 3\n", 2, "client.weight is a table"),
        ("\n[client.'a/b']\nweight = 3\n", 2, "'a/b' is no client name"),
        ("[client.'*']\nweight = 3\n", 1, "'*' is no client name"),
        ("[client.a.swap]\ntcp = 'nowhere'\n", 2, "client.a.swap.tcp cannot be 'nowhere'"),
        ("[segment.fast.start]\n\n# b\nmemory = 1.5\n", 4, "segment.fast.start.memory"),
        ("[segment.fast.segment.slow]\n", 1, "there is no 'segment'"),
        ("start = { memory = '1G',  real = true }\n", 1, "'real'"),
        ("x = '''\n[start]\n'''\n", 1, "there is no 'x'"),
        ("[start]\nrealtime = true\n[swap]\n# [start]\nx = '''\nrealtime\n'''\n", 5, "there is no 'x'"),
        ("[start]\nmemory = \n", 2, "no TOML: Invalid value"),
        ("[start]\nmemory = '1G'\nmemory = '2G'\n", 3, "no TOML: Cannot overwrite"),
        ("[start]\nmemory = '''\n", 2, "no TOML"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(file: Path, text: str, line: int, says: str) -> None:
    said = refusal(file, text)
    assert said.startswith(f"{file}:{line}: ")
    assert says in said


def test_a_fault_in_a_drop_in_names_the_drop_in(file: Path) -> None:
    dropin = write(file.parent / "tmem.d" / "a.toml", "[start]\nmemory = 1.5\n")
    assert refusal(file, "[start]\nmemory = '1G'\n").startswith(f"{dropin}:2: ")


def test_what_is_no_text_is_refused(file: Path) -> None:
    file.write_bytes(b"[start]\nmemory = '\xff'\n")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        reading.load(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        reading.load(file)


def test_lines_of_every_ending(file: Path) -> None:
    assert refusal(file, "# a\r\n[start]\r\nmemory = 'x'\r\n").startswith(f"{file}:3: ")
