"""The proxies that are compared: for each its program, configuration, command and version.

All do the same work: two upstreams, connections to them reused, `X-Forwarded-For` added, clients pinned by an affinity
cookie; `sets_cookie` says where that cannot be (nginx without its paid edition pins by address, the floor for tunnels
not at all). `stickyproxy-keys` looks for the keys of all presets, too. Each has one thread or process for the data,
besides what Go's runtime starts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.bench.apps import BACKLOG, NGINX_BASE, NGINX_FILES
from tests.bench.programs import ROOT, find_program, package_version, path_of, program_version

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.bench.certificate import Certificate


@dataclass(frozen=True)
class Site:
    """Where a target listens, the two ports behind it, and a directory for its files."""

    directory: Path
    port: int
    admin_port: int
    upstream_ports: tuple[int, int]
    is_websocket: bool
    certificate: Certificate | None = None  # None: plain

    def write(self, name: str, text: str) -> str:
        """Write a file and return its path."""
        file = self.directory / name
        file.write_text(text)
        return str(file)


@dataclass(frozen=True)
class Target:
    """One proxy. `program` None: it runs by this Python. `ask_version` are the arguments, or the packages, to ask."""

    name: str
    program: str | None
    command: Callable[[Site], list[str]]
    ask_version: tuple[str, ...]
    sets_cookie: tuple[bool, bool] = (True, True)  # with HTTP, with WebSocket
    is_asked_for: bool = False  # compared only where it is named

    def is_installed(self) -> bool:
        return self.program is None or find_program(self.program) is not None

    def version(self) -> str:
        """Return what the program says of itself in one line."""
        if self.program is None:
            return ", ".join(f"{package} {package_version(package)}" for package in self.ask_version)
        return program_version([path_of(self.program), *self.ask_version])


def environment(directory: Path) -> dict[str, str]:
    """Return what the environment of a target must hold: this source tree, and a home of its own below `directory`."""
    homes = ("HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    return {"PYTHONPATH": str(ROOT), **dict.fromkeys(homes, str(directory))}


def haproxy_config(site: Site) -> str:
    first, second = site.upstream_ports
    tls = f" ssl crt {site.certificate.both} ssl-min-ver TLSv1.3" if site.certificate else ""
    return f"""\
global
  nbthread 1
  maxconn 9000
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout tunnel 1h
  option forwardfor
frontend clients
  bind 127.0.0.1:{site.port}{tls}
  default_backend application
backend application
  balance leastconn
  http-reuse always
  cookie SP insert indirect nocache httponly
  server a 127.0.0.1:{first} cookie a
  server b 127.0.0.1:{second} cookie b
"""


def nginx_config(site: Site) -> str:
    first, second = site.upstream_ports
    tls = ""
    if site.certificate:
        tls = f"""
    ssl_certificate {site.certificate.chain};
    ssl_certificate_key {site.certificate.key};
    ssl_protocols TLSv1.3;"""
    rest = f"""\
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  upstream application {{
    hash $remote_addr consistent;
    server 127.0.0.1:{first};
    server 127.0.0.1:{second};
    keepalive 128;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{site.port} backlog={BACKLOG}{" ssl" if tls else ""};{tls}
    location / {{
      proxy_pass http://application;
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_read_timeout 1h;
    }}
  }}"""
    return NGINX_BASE.format(directory=site.directory, name="nginx", files=NGINX_FILES, rest=rest)


def caddy_config(site: Site) -> str:
    first, second = site.upstream_ports
    tls = servers = ""
    if site.certificate:
        servers = """
  servers {
    protocols h1
  }"""
        tls = f"""
  tls {site.certificate.chain} {site.certificate.key} {{
    protocols tls1.3 tls1.3
  }}"""
    return f"""\
{{
  admin off
  auto_https off
  persist_config off{servers}
}}
{"https://" if tls else ""}:{site.port} {{
  bind 127.0.0.1{tls}
  reverse_proxy 127.0.0.1:{first} 127.0.0.1:{second} {{
    lb_policy cookie SP secret
    transport http {{
      keepalive_idle_conns_per_host 128
    }}
  }}
}}
"""


def stickyproxy_config(site: Site, presets: str = "") -> str:
    first, second = site.upstream_ports
    tls = ""
    if site.certificate:
        files = f"certificate: {site.certificate.chain}, key: {site.certificate.key}"
        tls = f"\n    tls: {{certificates: [{{{files}}}]}}"
    return f"""\
workers: 1
presets: [{presets}]
listeners:
  - address: 127.0.0.1:{site.port}{tls}
upstreams:
  - url: http://127.0.0.1:{first}
  - url: http://127.0.0.1:{second}
affinity:
  secrets: ["a-secret-of-the-benchmark-of-32-bytes-or-more"]
admin:
  address: 127.0.0.1:{site.admin_port}
grace: 1s
"""


def _haproxy(site: Site) -> list[str]:
    return [path_of("haproxy"), "-f", site.write("haproxy.cfg", haproxy_config(site))]


def _nginx(site: Site) -> list[str]:
    return [path_of("nginx"), "-e", "stderr", "-c", site.write("nginx.conf", nginx_config(site))]


def _caddy(site: Site) -> list[str]:
    file = site.write("Caddyfile", caddy_config(site))
    return [path_of("caddy"), "run", "--config", file, "--adapter", "caddyfile"]


def _floor(site: Site) -> list[str]:
    module = "tests.bench.floor_tunnel" if site.is_websocket else "tests.bench.floor_http"
    files = [str(site.certificate.chain), str(site.certificate.key)] if site.certificate else []
    return [sys.executable, "-m", module, str(site.port), str(site.upstream_ports[0]), *files]


def _stickyproxy(site: Site) -> list[str]:
    return _serve(site.write("stickyproxy.yaml", stickyproxy_config(site)))


def _stickyproxy_keys(site: Site) -> list[str]:
    return _serve(site.write("stickyproxy.yaml", stickyproxy_config(site, "auto")))


def _serve(file: str) -> list[str]:
    return [sys.executable, "-m", "stickyproxy", "serve", "--config", file]


TARGETS = {
    target.name: target
    for target in (
        Target("haproxy", "haproxy", _haproxy, ("-v",)),
        Target("nginx", "nginx", _nginx, ("-v",), sets_cookie=(False, False)),
        Target("caddy", "caddy", _caddy, ("version",)),
        Target("floor", None, _floor, ("uvloop", "httptools"), sets_cookie=(True, False)),
        Target("stickyproxy", None, _stickyproxy, ("stickyproxy", "uvloop")),
        Target("stickyproxy-keys", None, _stickyproxy_keys, ("stickyproxy", "uvloop"), is_asked_for=True),
    )
}
