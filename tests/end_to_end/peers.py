"""The proxy under test, or HAProxy in its place: `STICKYPROXY_E2E_PEER=haproxy` runs the same scenarios through it."""

import os
import shutil
from collections.abc import Mapping
from typing import Any, Protocol

from tests.helpers.apps import lacking
from tests.helpers.processes import Child, Children, StickyProxy, free_port

# Health is asked for often and with little patience: no scenario may lose a client to it.
PROBE = {"path": "/healthz", "interval": "1s", "timeout": "2s", "rise": 1, "fall": 2}
NO_AFFINITY: Mapping[str, Any] = {"policy": "round_robin", "cookie": False, "client_address": False}

HAPROXY = """
defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 60s
  timeout tunnel 1h
  timeout check {timeout}
  log stdout format raw daemon
  option httplog
listen site
  bind 127.0.0.1:{port}
  monitor-uri /monitor
  option httpchk GET {path}
  default-server check inter {interval} rise {rise} fall {fall}
  {affinity}
  {servers}
"""
# A server that fails its probes keeps its clients (persist); one that refuses a connection loses them (redispatch).
# Without `persist` the clients of a process that blocks are moved, and their sessions are gone.
HAPROXY_AFFINITY = """
  balance leastconn
  cookie stickyproxy insert indirect nocache
  option persist
  option redispatch 1
"""


class Peer(Protocol):
    """A proxy at `url`, run by `child`."""

    url: str
    child: Child


class HAProxy:
    """An HAProxy of its own, with or without its cookie, in front of `upstreams` (id to URL)."""

    def __init__(self, children: Children, upstreams: Mapping[str, str], *, sticky: bool, name: str) -> None:
        program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            lacking("no haproxy: install the package of that name")
        port = free_port()
        self.url = f"http://localhost:{port}"
        servers = [f"server {key} {url.removeprefix('http://')} cookie {key}" for key, url in upstreams.items()]
        affinity = HAPROXY_AFFINITY if sticky else "balance roundrobin"
        file = children.directory / f"{name}.cfg"
        file.write_text(HAPROXY.format(port=port, affinity=affinity, servers="\n  ".join(servers), **PROBE))
        self.child = children.start(name, [program, "-db", "-f", file])
        self.child.wait_until_ready(f"http://127.0.0.1:{port}/monitor")


def start_peer(children: Children, upstreams: Mapping[str, str], *, sticky: bool = True, name: str = "proxy") -> Peer:
    """Start the proxy that the scenarios run through; not `sticky` is the control that has to fail."""
    if os.environ.get("STICKYPROXY_E2E_PEER") == "haproxy":
        return HAProxy(children, upstreams, sticky=sticky, name=name)
    return StickyProxy(children, upstreams, affinity={} if sticky else NO_AFFINITY, probe=PROBE, name=name)
