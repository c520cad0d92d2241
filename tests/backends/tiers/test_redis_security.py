"""TLS and passwords, against servers that demand them."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tmem.backends.tiers.redis_tier import RedisTier
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.errors import TierDownError

from .contract import IDENTITY, check, records
from .servers import Cluster, Tls, single

SECRET = "sesame, open/wide@8"
WRONG = "open sesame"


def opened(url: str) -> RedisTier:
    return RedisTier(RedisAddress.parse(url), IDENTITY, True)


def use(url: str) -> None:
    tier = opened(url)
    tier.check()
    tier.retain([])
    check(tier, tier.write(records(0, 600)), records(0, 600))  # 1 MB, more than goes at a time
    tier.destroy()


def is_refused(url: str, reason: str) -> None:
    tier = opened(url)
    with pytest.raises(TierDownError, match=reason) as refusal:
        tier.check()
    with pytest.raises(TierDownError, match=reason):
        tier.read([64])
    assert SECRET not in str(refusal.value)
    assert WRONG not in str(refusal.value)
    tier.close()


def test_passwords(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    conf.write_text(f'requirepass "{SECRET}"\n')
    secret, wrong = tmp_path / "secret", tmp_path / "wrong"
    secret.write_text(SECRET + "\n")
    wrong.write_text(WRONG)
    with single(tmp_path / "server", config=conf) as server:
        place = f"{server.address}/0?replicas=0&timeout=1"
        use(f"redis://:{quote(SECRET, safe='')}@{place}")
        use(f"redis://{place}&password_file={secret}")
        use(f"redis://{place}&user=default&password_file={secret}")
        is_refused(f"redis://{place}", "(?i)auth")
        is_refused(f"redis://:{quote(WRONG)}@{place}", "(?i)password")
        is_refused(f"redis://{place}&password_file={wrong}", "(?i)password")
        is_refused(f"redis://{place}&password_file={tmp_path}/none", "No such file")
        rotating = opened(f"redis://{place}&password_file={wrong}")
        wrong.write_text(SECRET)  # read again at the next connect
        rotating.check()
        rotating.close()


def test_tls(tmp_path: Path, certificates: Path) -> None:
    ca, other = certificates / "ca.pem", certificates / "other.pem"
    own = f"tls_cert={certificates}/cert.pem&tls_key={certificates}/cert.key"
    with single(tmp_path / "good", tls=Tls(certificates)) as server:
        place = f"{server.address}/0?replicas=0&timeout=1"
        use(f"rediss://{place}&tls_ca={ca}&{own}")
        is_refused(f"rediss://{place}&tls_ca={other}&{own}", "(?i)certificate")
        is_refused(f"rediss://{place}&{own}", "(?i)certificate")
        is_refused(f"rediss://{place}&tls_ca={ca}", "(?i)closed|certificate|reset|EOF|pipe")
        is_refused(f"redis://{place}", "(?i)closed|reset|pipe")
    with single(tmp_path / "strange", tls=Tls(certificates, "stranger")) as server:
        place = f"{server.address}/0?replicas=0&timeout=1"
        is_refused(f"rediss://{place}&tls_ca={ca}&{own}", "(?i)certificate")
        use(f"rediss://{place}&tls_ca={ca}&{own}&tls_hostname=no")


@pytest.fixture
def closed_cluster(tmp_path: Path, certificates: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, 1, 1)
    yield cluster
    cluster.end()


def test_a_cluster_with_a_password(closed_cluster: Cluster) -> None:
    for server in closed_cluster.servers:
        server.ask("CONFIG", "SET", "masterauth", SECRET, "requirepass", SECRET)
    scheme, _, place = closed_cluster.url.partition("://")
    use(f"{scheme}://:{quote(SECRET, safe='')}@{place}?timeout=2")
    is_refused(f"{scheme}://{place}?timeout=0.5", "(?i)auth")
