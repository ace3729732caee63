"""Debian's nginx in front of a gateway, as a child process on loopback, with its defaults but for what a test names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from tests.servers import eventually, free_port

PREFIX = "/vision"
STOP_S = 20.0
PAGE = Path(__file__).parents[2] / "docs" / "operate.md"


@dataclass(frozen=True, slots=True)
class Nginx:
    """A running proxy's addresses.

    `plain`: nothing but `proxy_pass`. `stripped`, `whole`: https below a prefix that it takes off the path, or leaves.
    `impatient`, `hasty`: wait 6 s and 2 s for an answer. `authority`: the file of who signed its certificate.
    """

    plain: str
    stripped: str
    whole: str
    impatient: str
    hasty: str
    authority: Path


@contextmanager
def nginx(gateway_url: str, directory: Path) -> Iterator[Nginx]:
    """Run one."""
    program = nginx_program()
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(directory / "authority.pem"))
    certificate.private_key_and_cert_chain_pem.write_to_path(str(directory / "server.pem"))
    plain, stripped, whole, impatient, hasty = (free_port() for _ in range(5))
    tls = f"ssl_certificate {directory}/server.pem; ssl_certificate_key {directory}/server.pem;"
    temporary = " ".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    location = location_of(PAGE.read_text("utf-8")).replace("http://127.0.0.1:8000", gateway_url)
    configuration = directory / "nginx.conf"
    configuration.write_text(f"""
        daemon off; master_process off; pid {directory}/nginx.pid; error_log {directory}/error.log;
        events {{}}
        http {{
            access_log off; {temporary}
            server {{ listen 127.0.0.1:{plain}; location / {{ proxy_pass {gateway_url}; }} }}
            server {{ listen 127.0.0.1:{stripped} ssl; {tls} {location} }}
            server {{ listen 127.0.0.1:{whole} ssl; {tls} {location.replace(f"{gateway_url}/;", f"{gateway_url};")} }}
            server {{ listen 127.0.0.1:{impatient};
                      location / {{ proxy_pass {gateway_url}; proxy_read_timeout 6s; }} }}
            server {{ listen 127.0.0.1:{hasty};
                      location / {{ proxy_pass {gateway_url}; proxy_read_timeout 2s; }} }}
        }}
    """)
    process = subprocess.Popen([program, "-e", str(directory / "error.log"), "-c", str(configuration)])
    try:
        eventually(lambda: process.poll() is not None or (directory / "nginx.pid").exists(), what="nginx listens")
        assert process.poll() is None, (directory / "error.log").read_text()
        yield Nginx(
            plain=f"http://127.0.0.1:{plain}",
            stripped=f"https://127.0.0.1:{stripped}{PREFIX}",
            whole=f"https://127.0.0.1:{whole}{PREFIX}",
            impatient=f"http://127.0.0.1:{impatient}",
            hasty=f"http://127.0.0.1:{hasty}",
            authority=directory / "authority.pem",
        )
    finally:
        process.terminate()
        process.wait(STOP_S)


def nginx_program() -> str:
    """Return where nginx is. A laptop without it skips, CI fails."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None and not os.environ.get("CI"):
        pytest.skip("no nginx on this machine")
    assert program is not None, "no nginx on this machine"
    return program


def location_of(page: str) -> str:
    """Return what docs/operate.md says to write into nginx' configuration."""
    found = re.search(rf"^location {PREFIX}/ {{\n.*?^}}$", page, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found.group()
