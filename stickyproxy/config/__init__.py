"""The configuration: YAML in, one frozen `Config` out, or every mistake with its line.

Others import from here. `load.py` is the entry, `schema.py` the whole; `document.py` reads YAML, `preset.py` puts what
frameworks need under it; `fields.py`, `units.py`, `address.py` and `secret.py` read single values, `explain.py` words
the mistakes. `source.py` says what a configuration is made from, so that it can be made again; `difference.py` what has
changed then, in the words of `written.py`.
"""

from stickyproxy.config.address import Address, parse_listener, parse_upstream_url
from stickyproxy.config.affinity import Affinity, Cookie, OnUnavailable
from stickyproxy.config.cluster import DEFAULT_CLUSTER, Cluster
from stickyproxy.config.difference import Change, Unreloadable, find_changes, find_unreloadable
from stickyproxy.config.errors import ConfigError, ConfigErrors
from stickyproxy.config.health import Health, Probe, StatusRange
from stickyproxy.config.limits import Limits, Timeouts
from stickyproxy.config.listener import Listener
from stickyproxy.config.load import json_schema, load_file, load_text
from stickyproxy.config.loaded import Loaded
from stickyproxy.config.overrides import with_overrides
from stickyproxy.config.preset import PRESETS, describe_preset, preset_text
from stickyproxy.config.route import Route, RouteCookie
from stickyproxy.config.run import MAX_PROCESSES, Command, PortRange, Processes, Ready, Run, Stop, read_pace
from stickyproxy.config.schema import AccessLog, Admin, Config
from stickyproxy.config.source import ConfigSource
from stickyproxy.config.tls import Certificate, ListenerTls, UpstreamTls
from stickyproxy.config.trust import Forwarded, TrustedProxies
from stickyproxy.config.units import parse_duration, parse_size
from stickyproxy.config.upstream import Upstream
from stickyproxy.config.websocket import Ping, WebSocket

__all__ = [
    "DEFAULT_CLUSTER",
    "MAX_PROCESSES",
    "PRESETS",
    "AccessLog",
    "Address",
    "Admin",
    "Affinity",
    "Certificate",
    "Change",
    "Cluster",
    "Command",
    "Config",
    "ConfigError",
    "ConfigErrors",
    "ConfigSource",
    "Cookie",
    "Forwarded",
    "Health",
    "Limits",
    "Listener",
    "ListenerTls",
    "Loaded",
    "OnUnavailable",
    "Ping",
    "PortRange",
    "Probe",
    "Processes",
    "Ready",
    "Route",
    "RouteCookie",
    "Run",
    "StatusRange",
    "Stop",
    "Timeouts",
    "TrustedProxies",
    "Unreloadable",
    "Upstream",
    "UpstreamTls",
    "WebSocket",
    "describe_preset",
    "find_changes",
    "find_unreloadable",
    "json_schema",
    "load_file",
    "load_text",
    "parse_duration",
    "parse_listener",
    "parse_size",
    "parse_upstream_url",
    "preset_text",
    "read_pace",
    "with_overrides",
]
