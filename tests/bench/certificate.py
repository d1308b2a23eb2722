"""The certificate that every target over TLS shows: EC P-256, made anew for each run, believed by nobody else."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.bench.programs import path_of

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """The files: the chain, its private key, and both in one, as HAProxy wants them."""

    chain: Path
    key: Path
    both: Path


def make_certificate(directory: Path) -> Certificate:
    """Write a certificate for localhost and 127.0.0.1 below `directory`; raise CalledProcessError if openssl fails."""
    files = Certificate(directory / "chain.pem", directory / "key.pem", directory / "both.pem")
    command = [path_of("openssl"), "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(
        [*command, "-keyout", files.key, "-out", files.chain], check=True, capture_output=True, timeout=30, text=True
    )
    files.both.write_bytes(files.chain.read_bytes() + files.key.read_bytes())
    files.key.chmod(0o600)
    files.both.chmod(0o600)
    return files


def client_context() -> ssl.SSLContext:
    """Return what a load connects with: TLS 1.3 and nothing older, as wrk without a check of the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def server_context(chain: str, key: str) -> ssl.SSLContext:
    """Return what the floor accepts with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(chain, key)
    return context
