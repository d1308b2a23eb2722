"""Configurations that have every key, and for each key another value with the line that tells of the change.

Any of the changes to one of them can be made together; the keys that name the items of lists, such as the id of an
upstream, are not among them. `run` does not go with `upstreams`, so it has a configuration of its own.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

from stickyproxy.config.cluster import OF_THE_PROXY
from stickyproxy.config.document import read_document
from stickyproxy.config.schema import Config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stickyproxy.config.errors import PathInFile

_KEYS = """[
  {mode: hash, cookie: app},
  {mode: hash, header: X-Key, header_pattern: (a)},
  {name: k, mode: learn, query: sid, on: /, gone: {},
   learn: [{in: response, json: id}, {in: request, pattern: a(b)}]},
]"""

TEXT = """
listeners:
  - address: 0.0.0.0:443
    tls: {certificates: [{certificate: /a.pem, key: /a.key}, /b.pem], client_ca: /ca.pem}
  - {address: ":80", proxy_protocol: true}
upstreams:
  - {id: app-1, url: "https://a:1", tls: {certificate: /c.pem, key: /c.key}}
  - {url: "http://127.0.0.1:8002"}
affinity:
  cookie: {}
  secrets: [first-secret-0123456789-0123456789]
  keys: KEYS
health: {probe: {path: /healthz}}
clusters:
  shop:
    upstreams:
      - {id: shop-1, url: "https://b:1", tls: {certificate: /c.pem, key: /c.key}}
      - {url: "http://127.0.0.1:8102"}
    affinity:
      cookie: {}
      keys: KEYS
    health: {probe: {path: /healthz}}
routes:
  - {host: shop.example.org, path: /tool, cluster: shop, cookie: {http_only: true}}
  - {path: /more, cluster: shop}
admin: {token: first-token-0123456789}
trusted_proxies: [10.0.0.0/8, unix]
websocket: {origins: [same-host, "https://*.example.org"], ping: {}}
access_log: {format: json}
""".replace("KEYS", _KEYS)

RUN_TEXT = """
run:
  command: [prog, --port, "{port}"]
  processes: {min: 2, max: 8, sessions_each: 50}
  env: {A: a-secret-0123456789, B: b-secret-0123456789}
  ready: {path: /healthz}
  reload: {directories: [/srv]}
"""


class Row(NamedTuple):
    """A key, the value that it gets, and the line that tells of it."""

    path: PathInFile
    value: object
    line: str


_PROBE = "health.probe"
_COOKIE = "routes.shop.example.org/tool.cookie"
_ROWS: list[tuple[str, object, str]] = [
    ("presets", ["engineio"], "presets: engineio added"),
    ("listeners.0.tls.certificates.0.key", "/x.key",
     "listeners.0.0.0.0:443.tls.certificates./a.pem.key: /a.key -> /x.key"),
    ("listeners.0.tls.minimum_version", 1.3, "listeners.0.0.0.0:443.tls.minimum_version: '1.2' -> '1.3'"),
    ("listeners.0.tls.client_ca", "/x y.pem", "listeners.0.0.0.0:443.tls.client_ca: /ca.pem -> /x y.pem"),
    ("listeners.0.tls.client_certificates", "optional",
     "listeners.0.0.0.0:443.tls.client_certificates: required -> optional"),
    ("listeners.1.proxy_protocol", False, "listeners.:80.proxy_protocol: true -> false"),
    ("listeners.1.redirect_to_https", 8443, "listeners.:80.redirect_to_https: false -> 8443"),
    ("upstreams.0.url", "https://[::1]", "upstreams.app-1.url: https://a:1 -> https://[::1]:443"),
    ("upstreams.0.weight", 2, "upstreams.app-1.weight: 1 -> 2"),
    ("upstreams.0.tls.ca", "/ca.pem", "upstreams.app-1.tls.ca: null -> /ca.pem"),
    ("upstreams.0.tls.verify", False, "upstreams.app-1.tls.verify: true -> false"),
    ("upstreams.0.tls.server_name", "B.example", "upstreams.app-1.tls.server_name: null -> b.example"),
    ("upstreams.0.tls.certificate", "/é.pem", 'upstreams.app-1.tls.certificate: /c.pem -> "/\\xE9.pem"'),
    ("upstreams.0.tls.key", "/d.key", "upstreams.app-1.tls.key: /c.key -> /d.key"),
    ("upstreams.1.max_sessions", 500, "upstreams.127.0.0.1:8002.max_sessions: null -> 500"),
    ("affinity.cookie.name", "pin", "affinity.cookie.name: null -> pin"),
    ("affinity.cookie.path", "/a: b", "affinity.cookie.path: / -> '/a: b'"),
    ("affinity.cookie.domain", "example.org", "affinity.cookie.domain: null -> example.org"),
    ("affinity.cookie.max_age", "30d", "affinity.cookie.max_age: null -> 30d"),
    ("affinity.cookie.http_only", False, "affinity.cookie.http_only: true -> false"),
    ("affinity.cookie.same_site", "none", "affinity.cookie.same_site: lax -> none"),
    ("affinity.cookie.secure", True, "affinity.cookie.secure: auto -> true"),
    ("affinity.cookie.partitioned", True, "affinity.cookie.partitioned: false -> true"),
    ("affinity.secrets", ["second-secret-0123456789-0123456789"], "affinity.secrets: changed"),
    ("affinity.policy", "random", "affinity.policy: least_sessions -> random"),
    ("affinity.on_unavailable", {"wait": "90s"}, "affinity.on_unavailable: redispatch -> {wait: 90s}"),
    ("affinity.client_address", True, "affinity.client_address: false -> true"),
    ("affinity.keys.0.mode", "learn", "affinity.keys.cookie app.mode: hash -> learn"),
    ("affinity.keys.1.header", ["X-Key", "X-Sid"], "affinity.keys.header X-Key.header: X-Sid added"),
    ("affinity.keys.1.header_pattern", "a: (.*)", "affinity.keys.header X-Key.header_pattern: (a) -> 'a: (.*)'"),
    ("affinity.keys.2.query", ["sid", "a[]"], "affinity.keys.k.query: a[] added"),
    ("affinity.keys.2.path", "/a/{id}", "affinity.keys.k.path: /a/{id} added"),
    ("affinity.keys.2.cookie", "app", "affinity.keys.k.cookie: app added"),
    ("affinity.keys.2.member", ["é"], "affinity.keys.k.member: é added"),
    ("affinity.keys.2.on", ["/", "/x?"], "affinity.keys.k.on: /x? added"),
    ("affinity.keys.2.idle", "2m", "affinity.keys.k.idle: 1d -> 2m"),
    ("affinity.keys.2.learn.0.json", "sid", "affinity.keys.k.learn.response.json: id -> sid"),
    ("affinity.keys.2.learn.1.pattern", "(.): b", "affinity.keys.k.learn.request.pattern: a(b) -> '(.): b'"),
    ("affinity.keys.2.learn.1.on", ["/x"], "affinity.keys.k.learn.request.on: /x added"),
    ("affinity.keys.2.learn.1.given", "A: b", "affinity.keys.k.learn.request.given: null -> 'A: b'"),
    ("affinity.keys.2.learn.1.within", "1MiB", "affinity.keys.k.learn.request.within: 4KiB -> 1MiB"),
    ("affinity.keys.2.gone.status", 410, "affinity.keys.k.gone.status: 400 -> 410"),
    ("affinity.keys.2.gone.content_type", "a/b",
     "affinity.keys.k.gone.content_type: text/plain; charset=utf-8 -> a/b"),
    ("affinity.keys.2.gone.body", "x: y", "affinity.keys.k.gone.body: '' -> 'x: y'"),
    ("affinity.max_keys", 1, "affinity.max_keys: 65536 -> 1"),
    ("affinity.max_idle", "1h", "affinity.max_idle: null -> 1h"),
    ("affinity.max_life", "1500ms", "affinity.max_life: null -> 1500ms"),
    ("affinity.session_idle", 0, "affinity.session_idle: 5m -> 0s"),
    (f"{_PROBE}.path", "/?a", f"{_PROBE}.path: /healthz -> /?a"),
    (f"{_PROBE}.expect", ["200-399", 404], f"{_PROBE}.expect: 404 added"),
    (f"{_PROBE}.interval", "7s", f"{_PROBE}.interval: 5s -> 7s"),
    (f"{_PROBE}.timeout", "0.5ms", f"{_PROBE}.timeout: 2s -> 0.5ms"),
    (f"{_PROBE}.rise", 1, f"{_PROBE}.rise: 2 -> 1"),
    (f"{_PROBE}.fall", 1, f"{_PROBE}.fall: 3 -> 1"),
    (f"{_PROBE}.jitter", 0, f"{_PROBE}.jitter: 10 -> 0"),
    ("routes.0.cluster", "default", "routes.shop.example.org/tool.cluster: shop -> default"),
    ("routes.0.strip_prefix", True, "routes.shop.example.org/tool.strip_prefix: false -> true"),
    ("routes.0.cookie.path", "/tool", f"{_COOKIE}.path: null -> /tool"),
    ("routes.0.cookie.domain", "example.org", f"{_COOKIE}.domain: null -> example.org"),
    ("routes.0.cookie.max_age", "1h", f"{_COOKIE}.max_age: null -> 1h"),
    ("routes.0.cookie.http_only", False, f"{_COOKIE}.http_only: true -> false"),
    ("routes.0.cookie.same_site", "none", f"{_COOKIE}.same_site: null -> none"),
    ("routes.0.cookie.secure", True, f"{_COOKIE}.secure: null -> true"),
    ("routes.0.cookie.partitioned", True, f"{_COOKIE}.partitioned: null -> true"),
    ("admin.address", "[::1]:9090", "admin.address: 127.0.0.1:9090 -> '[::1]:9090'"),
    ("admin.token", "second-token-0123456789", "admin.token: changed"),
    ("trusted_proxies", ["10.0.0.0/8", "::1", "unix"], "trusted_proxies: ::1/128 added"),
    ("forwarded.forwarded", True, "forwarded.forwarded: false -> true"),
    ("forwarded.prefix", "/app", "forwarded.prefix: null -> /app"),
    ("timeouts.tls_handshake", "1s", "timeouts.tls_handshake: 10s -> 1s"),
    ("timeouts.head", "1s", "timeouts.head: 10s -> 1s"),
    ("timeouts.body_idle", "off", "timeouts.body_idle: 1m -> off"),
    ("timeouts.keep_alive", 0, "timeouts.keep_alive: 75s -> 0s"),
    ("timeouts.send", "1s", "timeouts.send: 1m -> 1s"),
    ("timeouts.connect", "1s", "timeouts.connect: 5s -> 1s"),
    ("timeouts.response", "off", "timeouts.response: 5m -> off"),
    ("timeouts.response_idle", "1s", "timeouts.response_idle: 5m -> 1s"),
    ("timeouts.websocket_handshake", "1s", "timeouts.websocket_handshake: 1m -> 1s"),
    ("timeouts.upstream_keep_alive", "1s", "timeouts.upstream_keep_alive: 4s -> 1s"),
    ("timeouts.tunnel_idle", "1s", "timeouts.tunnel_idle: off -> 1s"),
    ("timeouts.tunnel_max_age", "1d", "timeouts.tunnel_max_age: off -> 1d"),
    ("timeouts.tunnel_max_age_jitter", 0, "timeouts.tunnel_max_age_jitter: 10 -> 0"),
    ("timeouts.linger", "1s", "timeouts.linger: 2s -> 1s"),
    ("limits.head", "1MiB", "limits.head: 128KiB -> 1MiB"),
    ("limits.line", "1000B", "limits.line: 64KiB -> 1000B"),
    ("limits.fields", 1024, "limits.fields: 200 -> 1024"),
    ("limits.target", "1KiB", "limits.target: 16KiB -> 1KiB"),
    ("limits.handshake", "1KiB", "limits.handshake: 128KiB -> 1KiB"),
    ("limits.body", 0, "limits.body: off -> 0B"),
    ("limits.trailers", 0, "limits.trailers: 8KiB -> 0B"),
    ("limits.chunk_extensions", "1KiB", "limits.chunk_extensions: 4KiB -> 1KiB"),
    ("limits.buffer", "1MiB", "limits.buffer: 64KiB -> 1MiB"),
    ("limits.connections", 9, "limits.connections: auto -> 9"),
    ("limits.connections_per_address", 9, "limits.connections_per_address: off -> 9"),
    ("limits.upstream_idle_connections", 0, "limits.upstream_idle_connections: 256 -> 0"),
    ("websocket.origins", ["same-host", "https://*.example.org", "null"], "websocket.origins: null added"),
    ("websocket.ping.interval", "1s", "websocket.ping.interval: 30s -> 1s"),
    ("websocket.ping.timeout", "off", "websocket.ping.timeout: 20s -> off"),
    ("dns_refresh", "off", "dns_refresh: 10s -> off"),
    ("access_log.format", "combined", "access_log.format: json -> combined"),
    ("access_log.path", "/var/log/x", "access_log.path: '-' -> /var/log/x"),
    ("log_level", "debug", "log_level: info -> debug"),
    ("grace", "1s", "grace: 30s -> 1s"),
    ("state_directory", "/x", "state_directory: null -> /x"),
    ("workers", "auto", "workers: 1 -> auto"),
    ("control", False, "control: null -> false"),
    ("hand_over", "/run/h.sock", "hand_over: null -> /run/h.sock"),
    ("reload_on_change", True, "reload_on_change: false -> true"),
]  # fmt: skip

_RUN_ROWS: list[tuple[str, object, str]] = [
    ("run.command", "prog 'a b' {socket}", "run.command: prog --port {port} -> prog 'a b' {socket}"),
    ("run.processes.min", 1, "run.processes.min: 2 -> 1"),
    ("run.processes.max", 256, "run.processes.max: 8 -> 256"),
    ("run.processes.sessions_each", 100, "run.processes.sessions_each: 50 -> 100"),
    ("run.env", {"A": "a-secret-0123456789", "B": "c-secret-0123456789"}, "run.env.B: changed"),
    ("run.cwd", "/srv/{id}", "run.cwd: null -> /srv/{id}"),
    ("run.ports", "1024-65535", "run.ports: 20000-29999 -> 1024-65535"),
    ("run.ready.path", "/ready", "run.ready.path: /healthz -> /ready"),
    ("run.ready.timeout", "2m", "run.ready.timeout: 1m -> 2m"),
    ("run.ready.expect", ["200-399", 404], "run.ready.expect: 404 added"),
    ("run.restart", "never", "run.restart: always -> never"),
    ("run.stop.signal", "INT", "run.stop.signal: TERM -> INT"),
    ("run.stop.timeout", 0, "run.stop.timeout: 10s -> 0s"),
    ("run.max_memory", "512MiB", "run.max_memory: off -> 512MiB"),
    ("run.max_age", "7d", "run.max_age: off -> 7d"),
    ("run.drain_timeout", "off", "run.drain_timeout: 30m -> off"),
    ("run.pace", 0.5, "run.pace: 20/s -> 0.5/s"),
    ("run.reload.directories", ["/srv", "/srv/app"], "run.reload.directories: /srv/app added"),
    ("run.reload.include", ["*.html"], "run.reload.include: *.html added"),
]  # fmt: skip


def _with_cluster(table: list[tuple[str, object, str]]) -> list[tuple[str, object, str]]:
    """Return the rows with those of a cluster, which are like those at the top of the file, in front of `routes`."""
    at = next(number for number, row in enumerate(table) if row[0].startswith("routes."))
    # What no two clusters may have.
    other: dict[str, tuple[object, str]] = {
        "upstreams.0.url": ("https://[::2]", "upstreams.shop-1.url: https://b:1 -> https://[::2]:443"),
        "affinity.cookie.name": ("pin-2", "affinity.cookie.name: null -> pin-2"),
    }
    of_cluster = []
    for path, value, line in table:
        key = path.removeprefix("affinity.")
        if path.startswith(("upstreams.", "affinity.", "health.")) and key not in OF_THE_PROXY:
            value_, line_ = other.get(path, (value, line.replace("app-1", "shop-1").replace("8002", "8102")))
            of_cluster.append((f"clusters.shop.{path}", value_, f"clusters.shop.{line_}"))
    return [*table[:at], *of_cluster, *table[at:]]


def _rows(table: Iterable[tuple[str, object, str]]) -> list[Row]:
    return [
        Row(tuple(int(key) if key.isdigit() else key for key in path.split(".")), value, line)
        for path, value, line in table
    ]


ROWS = _rows(_with_cluster(_ROWS))
RUN_ROWS = _rows(_RUN_ROWS)


def config_with(rows: Iterable[Row], text: str = TEXT) -> Config:
    """Return the configuration of a text with these values in place of its own."""
    raw: Any = read_document(text).value
    for path, value, _ in rows:
        place = raw
        for key in path[:-1]:
            place = place[key] if isinstance(key, int) else place.setdefault(key, {})
        place[path[-1]] = deepcopy(value)
    return Config.model_validate(raw)
