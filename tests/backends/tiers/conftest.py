"""Certificates, and clusters that not every test needs."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .servers import Cluster, Tls


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ca.pem, of another authority other.pem, and what the first has signed: cert.pem for
    127.0.0.1, stranger.pem for another name, and expired.pem."""
    directory = tmp_path_factory.mktemp("tls")
    for name in ("ca", "other"):
        openssl(
            directory, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2",
        )  # fmt: skip
    ours, others = "subjectAltName=IP:127.0.0.1\n", "subjectAltName=DNS:elsewhere\n"
    for name, alternative, days in (("cert", ours, 2), ("stranger", others, 2), ("expired", ours, -1)):
        (directory / "extensions").write_text(f"{alternative}basicConstraints=critical,CA:FALSE\n")
        openssl(
            directory, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", f"{name}.key", "-out", "request.pem", "-subj", f"/CN={name}",
        )  # fmt: skip
        openssl(
            directory, "x509", "-req", "-in", "request.pem", "-out", f"{name}.pem", "-days", str(days),
            "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "extensions",
        )  # fmt: skip
    return directory


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def shared_wide_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("wide"), 3, 2)
    yield cluster
    cluster.end()


@pytest.fixture
def wide_cluster(shared_wide_cluster: Cluster) -> Cluster:
    """Three primaries with two replicas each, whatever the test before did to them."""
    shared_wide_cluster.mend()
    return shared_wide_cluster


@pytest.fixture(scope="module")
def shared_tls_cluster(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("tls-cluster"), 2, 1, tls=Tls(certificates))
    yield cluster
    cluster.end()


@pytest.fixture
def tls_cluster(shared_tls_cluster: Cluster) -> Cluster:
    """Two primaries and two replicas that speak TLS alone, whatever the test before did to them."""
    shared_tls_cluster.mend()
    return shared_tls_cluster
