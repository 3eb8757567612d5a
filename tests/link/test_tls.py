"""Whichever module is imported first, gRPC is loaded after TLS older than 1.3 has been excluded."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtune.errors import ConfigError
from fedtune.link.server.server import check_cipher_suites

HANDSHAKES = """
import importlib, socket, ssl, sys
from concurrent.futures import ThreadPoolExecutor

for name in sys.argv[1].split(","):
    importlib.import_module(name)
import grpc

key, certificate = (open(name, "rb").read() for name in sys.argv[2:])
server = grpc.server(ThreadPoolExecutor(1))
port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
server.start()
for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
    context = ssl.create_default_context(cadata=certificate.decode())
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    with socket.create_connection(("127.0.0.1", port)) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as tls:
                print(tls.version())
        except (ssl.SSLError, ConnectionError):
            print("refused")
server.stop(0)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the files of a key and of its certificate for localhost."""
    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key").write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    (folder / "certificate").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(encoding))
    return folder / "key", folder / "certificate"


def versions(first: str, pair: tuple[Path, Path]) -> list[str]:
    """Return what TLS 1.2 and 1.3 lead to in a fresh process that imports a module first."""
    return run(HANDSHAKES, first, *map(str, pair))


def run(code: str, *arguments: str) -> list[str]:
    """Return the words that a fresh process prints, whose environment says nothing of gRPC."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


@pytest.mark.parametrize(
    "first",
    [
        "fedtune.deployment.coordinator",
        "fedtune.cli.federation,fedtune.deployment.coordinator",  # what `fedtune serve` does
        "fedtune.flower,flwr.app",
    ],
)
def test_tls_1_2_is_refused_whatever_is_imported_first(first: str, pair: tuple[Path, Path]) -> None:
    assert versions(first, pair) == ["refused", "TLSv1.3"]


def test_without_the_link_grpc_speaks_tls_1_2(pair: tuple[Path, Path]) -> None:
    assert versions("grpc", pair) == ["TLSv1.2", "TLSv1.3"]


def test_a_server_does_not_start_where_grpc_came_first() -> None:
    assert run("import grpc, fedtune.link; print(fedtune.link.SET_IN_TIME)") == ["False"]
    assert run("import fedtune.link, grpc; print(fedtune.link.SET_IN_TIME)") == ["True"]
    with pytest.raises(ConfigError, match=r"expected TLS 1\.3 alone; got .* grpc .*; import fedtune\.link before"):
        check_cipher_suites(False)
    check_cipher_suites(True)
