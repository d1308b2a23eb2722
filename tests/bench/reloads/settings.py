"""The configuration files: those of `tests.bench.targets` with what a reload changes.

That is a response header that numbers the configuration, and the upstreams. nginx pins by a cookie of its own here, so
that its clients are spread, and runs in the background.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.reloads.look import HEADER
from tests.bench.targets import Site, caddy_config, haproxy_config, nginx_config, stickyproxy_config

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Setting:
    """One configuration. `extra` is a line of the proxy's own language, and `generation` the number it is known by."""

    generation: int
    upstreams: tuple[tuple[str, int], ...]  # name and port
    extra: str = ""


def replace_once(text: str, old: str, new: str) -> str:
    """Return `text` with its one `old` replaced; raise ValueError if it has none or several."""
    if text.count(old) != 1:
        raise ValueError(f"{text.count(old)} times: {old!r}")
    return text.replace(old, new)


def haproxy_text(site: Site, setting: Setting) -> str:
    head, _, _ = haproxy_config(site).partition("  server ")
    head = replace_once(head, "global\n", f"global\n  {setting.extra}\n")
    back = "  default_backend application\n"
    head = replace_once(head, back, f"{_header('http-response set-header', setting)}{back}")
    return head + "".join(f"  server {name} 127.0.0.1:{port} cookie {name}\n" for name, port in setting.upstreams)


def nginx_text(site: Site, setting: Setting) -> str:
    text = replace_once(nginx_config(site), "daemon off;", "daemon on;")  # else it takes no SIGUSR2
    first, second = (f"    server 127.0.0.1:{port};\n" for port in site.upstream_ports)
    text = replace_once(
        text, first + second, "".join(f"    server 127.0.0.1:{port};\n" for _, port in setting.upstreams)
    )
    text = replace_once(text, "hash $remote_addr", "hash $pin")
    text = replace_once(
        text,
        "  upstream application",
        "  map $cookie_sp $pin { default $cookie_sp; '' $request_id; }\n  upstream application",
    )
    cookie = '      add_header Set-Cookie "SP=$pin; Path=/; HttpOnly" always;\n'
    header = f"      add_header {HEADER} {setting.generation} always;\n"
    text = replace_once(text, "    location / {\n", f"    location / {{\n{cookie}{header}")
    return f"{setting.extra}\n{text}"


def caddy_text(site: Site, setting: Setting) -> str:
    first, second = site.upstream_ports
    upstreams = " ".join(f"127.0.0.1:{port}" for _, port in setting.upstreams)
    text = replace_once(caddy_config(site), f"127.0.0.1:{first} 127.0.0.1:{second} {{", f"{upstreams} {{")
    text = replace_once(text, "admin off", f"admin 127.0.0.1:{site.admin_port}")
    text = replace_once(text, "  bind 127.0.0.1\n", f"  bind 127.0.0.1\n{_header('header', setting)}")
    if setting.extra.startswith("grace_period"):
        return replace_once(text, "  auto_https off\n", f"  auto_https off\n  {setting.extra}\n")
    return replace_once(text, "    lb_policy ", f"    {setting.extra}\n    lb_policy ")


def stickyproxy_text(site: Site, setting: Setting) -> str:
    lines = [f"  - url: http://127.0.0.1:{port}\n" for port in site.upstream_ports]
    upstreams = "".join(f"  - url: http://127.0.0.1:{port}\n" for _, port in setting.upstreams)
    text = replace_once(stickyproxy_config(site), "".join(lines), upstreams)
    return f"{text}timeouts: {{response: {300 + setting.generation}s}}\ncontrol: {control_path(site)}\n"


def _header(directive: str, setting: Setting) -> str:
    return f"  {directive} {HEADER} {setting.generation}\n"


def control_path(site: Site) -> Path:
    return site.directory / "control"


def writer(name: str, text: Callable[[Site, Setting], str]) -> Callable[[Site, Setting], None]:
    """Return what writes a configuration in one step, so that nobody reads half of it."""

    def write(site: Site, setting: Setting) -> None:
        Path(site.write(f"{name}.new", text(site, setting))).replace(site.directory / name)

    return write
