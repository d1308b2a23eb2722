"""What is said of a request that nobody sends: each rung of the ladder, each reason, and that nothing comes of it."""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from stickyproxy.affinity.health import HealthEvent
from stickyproxy.affinity.keys import Found
from stickyproxy.affinity.snapshot import AdminState, Snapshot, upstream_digest
from stickyproxy.affinity.token import Token, TokenCodec
from stickyproxy.config import load_text
from stickyproxy.control.explain import Asked, State, explain
from stickyproxy.control.routing import Routing
from stickyproxy.errors import UsageError
from stickyproxy.proxy.key_table import KeyTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECRET = "0123456789abcdef0123456789abcdef"
CLIENT = b"a client id"[:10]
LEARNED = "{name: sid, mode: learn, query: sid, learn: [{in: response, json: sid}]}"
GONE = "{name: sid, mode: learn, query: sid, learn: [{in: response, json: sid}], gone: {status: 410, body: away}}"
HASHED = "{name: hash, mode: hash, query: h}"
IN_BODY = "{name: member, mode: hash, member: h, on: /join}"


def token(upstream_id: str, *, age_s: int = 0, secret: str = SECRET) -> str:
    """Return the Cookie field of a client that is pinned to an upstream."""
    at = int(time.time()) - age_s  # noqa: TID251 -- as the plane reads it
    value = TokenCodec([secret.encode()]).write(Token(upstream_digest(upstream_id), CLIENT, at, at))
    return f"Cookie: app=1; stickyproxy={value.decode()}"


@dataclass
class Site:
    """A cluster of three upstreams, a, b and c, with the keys that a proxy would have learned."""

    affinity: str = ""
    more: str = ""
    upstreams: str = "[{id: a, url: 'http://127.0.0.1:1'}, {id: b, url: 'unix:/run/b.sock'}, {id: c, url: 'https://c'}]"
    keys: KeyTable = field(default_factory=lambda: KeyTable.create(100))
    sessions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        written = f"{{upstreams: {self.upstreams}, affinity: {{secrets: ['env:S'], {self.affinity}}}{self.more}}}"
        self.config = load_text(written, {"S": SECRET})
        self.routing = Routing(self.config, lambda *_: None)

    def learn(self, name: str, value: bytes, upstream_id: str) -> None:
        """Let a key be known to lead to an upstream."""
        key = next(one.compile() for one in self.config.affinity.keys if one.name == name)
        self.keys.learn(Found(key, value).stored, upstream_digest(upstream_id), 60.0, time.monotonic())

    def close_process(self, upstream_id: str) -> None:
        """Publish that an upstream is closing, as an app process whose time to drain is over."""
        before = self.routing.snapshots["default"]
        states = tuple(replace(one, is_closing=one.id == upstream_id) for one in before.upstreams)
        self.routing.snapshots["default"] = Snapshot(before.cluster, states, before.rules)

    def ask(self, line: str, *headers: str, body: bytes = b"", is_https: bool = False) -> dict[str, Any]:
        """Return what is said of a request."""
        snapshots = tuple(self.routing.snapshots.values())
        secrets = self.config.affinity.secrets
        state = State(self.config, snapshots, self.routing.endpoints, secrets, self.keys, self.sessions)
        return explain(Asked(line, headers, body, is_https), state)


@pytest.fixture
def make() -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(*arguments: Any, **keywords: Any) -> Site:
        sites.append(Site(*arguments, **keywords))
        return sites[-1]

    yield make
    for site in sites:
        site.keys.close()


def keys(*written: str) -> str:
    return f"keys: [{', '.join(written)}]"


def deciding(answer: dict[str, Any]) -> list[str]:
    """Return the rungs that decide, of which there is one at most."""
    return [one["rung"] for one in answer["ladder"] if one["decides"]]


def rungs(answer: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return what each rung but the policy says."""
    return [
        (one["rung"], one.get("state"), one.get("upstream"), one["disagrees"])
        for one in answer["ladder"]
        if one["rung"] != "policy"
    ]


def id_of(answer: dict[str, Any]) -> str:
    return str(answer["upstream"]["id"])


# The ladder


async def test_a_new_client_is_placed_by_the_policy_and_gets_a_cookie(make: Callable[..., Site]) -> None:
    answer = make("policy: round_robin").ask("GET /path?q=1", "Host: site.example:8080")
    assert answer.pop("upstream") in [
        {"id": one, "address": address, "admin": "ready", "health": "unknown", "is_refused": False, "is_closing": False}
        for one, address in (("a", "127.0.0.1:1"), ("b", "unix:/run/b.sock"), ("c", "c:443"))
    ]
    policy = {"rung": "policy", "policy": "round_robin", "choices": ["a", "b", "c"], "is_guarded": False}
    assert answer == {
        "request": "GET /path?q=1",
        "host": "site.example:8080",
        "route": None,
        "sent_as": "/path?q=1",
        "cluster": "default",
        "ladder": [policy | {"decides": True, "disagrees": False}],
        "lacks_body": False,
        "outcome": "new",
        "broken": None,
        "sets_cookie": "stickyproxy=TOKEN; Path=/; HttpOnly; SameSite=Lax",
    }


async def test_over_https_the_cookie_is_secure(make: Callable[..., Site]) -> None:
    assert make().ask("/", is_https=True)["sets_cookie"].endswith("; Secure")


@pytest.mark.parametrize("upstream_id", ["a", "b", "c"])
async def test_a_cookie_leads_to_its_upstream(make: Callable[..., Site], upstream_id: str) -> None:
    answer = make().ask("/", token(upstream_id))
    assert (answer["outcome"], id_of(answer), answer["sets_cookie"]) == ("hit", upstream_id, "")
    assert rungs(answer) == [("cookie", "known", upstream_id, False)]
    assert deciding(answer) == ["cookie"]


@pytest.mark.parametrize(
    ("cookie", "outcome"),
    [
        (token("a", secret="another secret of 32 bytes length"), "invalid"),
        ("Cookie: stickyproxy=v1.cut", "invalid"),
        (token("a", age_s=7200), "expired"),
    ],
    ids=["of another secret", "cut", "old"],
)
async def test_a_cookie_that_is_worth_nothing(make: Callable[..., Site], cookie: str, outcome: str) -> None:
    answer = make("max_idle: 1h").ask("/", cookie)
    assert (answer["outcome"], rungs(answer), deciding(answer)) == (
        outcome, [("cookie", outcome, None, False)], ["policy"],
    )  # fmt: skip
    assert answer["sets_cookie"].startswith("stickyproxy=TOKEN;")
    assert make().ask("/", token("a", age_s=7200))["outcome"] == "hit"  # without max_idle


async def test_without_a_secret_no_cookie_is_believed(make: Callable[..., Site]) -> None:
    site = make()
    state = State(site.config, tuple(site.routing.snapshots.values()), site.routing.endpoints, ())
    assert explain(Asked("/", (token("a"),)), state)["outcome"] == "invalid"
    assert explain(Asked("/", (token("a"),)), replace(state, secrets=[SECRET.encode()]))["outcome"] == "hit"


async def test_without_an_affinity_cookie_none_is_read_and_none_set(make: Callable[..., Site]) -> None:
    answer = make("cookie: false").ask("/", token("a"))
    assert (answer["outcome"], answer["sets_cookie"], rungs(answer)) == ("unpinned", None, [])


async def test_a_learned_key_wins_over_the_cookie_that_disagrees(make: Callable[..., Site]) -> None:
    site = make(keys(LEARNED))
    site.learn("sid", b"abc", "b")
    answer = site.ask("/?sid=abc", token("c"))
    assert (answer["outcome"], id_of(answer), answer["sets_cookie"]) == ("learned", "b", "")
    assert rungs(answer) == [("learned", "known", "b", False), ("cookie", "known", "c", True)]
    assert deciding(answer) == ["learned"]
    agreeing = site.ask("/?sid=abc", token("b"))
    assert rungs(agreeing) == [("learned", "known", "b", False), ("cookie", "known", "b", False)]


async def test_a_learned_key_that_nobody_knows_leaves_it_to_the_cookie(make: Callable[..., Site]) -> None:
    answer = make(keys(LEARNED)).ask("/?sid=abc", token("c"))
    assert (answer["outcome"], id_of(answer)) == ("hit", "c")
    assert rungs(answer) == [("learned", "unknown", None, False), ("cookie", "known", "c", False)]


async def test_the_cookie_wins_over_a_key_of_the_client(make: Callable[..., Site]) -> None:
    site = make(keys(HASHED))
    site.learn("hash", b"abc", "b")
    answer = site.ask("/?h=abc", token("c"))
    assert (answer["outcome"], id_of(answer)) == ("hit", "c")
    assert rungs(answer) == [("cookie", "known", "c", False), ("hashed", "known", "b", True)]
    assert id_of(site.ask("/?h=abc")) == "b"


async def test_a_key_of_the_client_leads_to_one_upstream_each_time(make: Callable[..., Site]) -> None:
    site = make(keys(HASHED))
    answers = [site.ask(f"/?h={number}") for number in range(20)]
    assert {(one["outcome"], *deciding(one)) for one in answers} == {("hashed", "hashed")}
    assert {id_of(one) for one in answers} == {"a", "b", "c"}
    assert [id_of(site.ask(f"/?h={number}")) for number in range(20)] == [id_of(one) for one in answers]
    assert answers[0]["ladder"][0]["state"] == "unknown"


@pytest.mark.parametrize(("given", "outcome"), [(b'{"h": "abc"}', "hashed"), (b"no JSON", "new")])
async def test_a_key_in_the_body(make: Callable[..., Site], given: bytes, outcome: str) -> None:
    site = make(keys(IN_BODY))
    answer = site.ask("POST /join", body=given)
    assert (answer["outcome"], answer["lacks_body"]) == (outcome, False)
    assert site.ask("/join", body=given)["request"] == "POST /join"
    assert site.ask("POST /elsewhere", body=given)["outcome"] == "new"


@pytest.mark.parametrize(("line", "lacks"), [("POST /join", True), ("GET /join", False), ("POST /elsewhere", False)])
async def test_a_body_that_is_missing_is_asked_for(make: Callable[..., Site], line: str, lacks: bool) -> None:  # noqa: FBT001
    assert make(keys(IN_BODY)).ask(line)["lacks_body"] is lacks


async def test_a_body_that_a_pin_spares_is_not_looked_into(make: Callable[..., Site]) -> None:
    answer = make(keys(IN_BODY)).ask("POST /join", token("a"), body=b'{"h": "abc"}')
    assert rungs(answer) == [("cookie", "known", "a", False)]


async def test_the_address_of_the_client_but_for_a_navigation(make: Callable[..., Site]) -> None:
    site = make("client_address: true")
    answer = site.ask("/")
    assert (answer["outcome"], deciding(answer)) == ("address", ["address"])
    assert answer["ladder"][0]["value"] == "127.0.0.1"
    navigation = site.ask("/", "Sec-Fetch-Dest: document")
    assert (navigation["outcome"], rungs(navigation)) == ("new", [])


async def test_a_value_is_text_and_cut(make: Callable[..., Site]) -> None:
    site = make(keys(HASHED))
    values = [site.ask(f"/?h={one}")["ladder"][0]["value"] for one in ("%C3%A9", "%ff", "x" * 65)]
    assert values == ["é", r"\xff", "x" * 64 + "..."]


# Routes

SHOP = f"""
clusters: {{shop: {{upstreams: [{{id: s, url: 'http://s'}}], affinity: {{{keys(HASHED)}}}}}}},
routes: [{{host: shop.example, path: /tool, cluster: shop, strip_prefix: true, cookie: {{path: /tool}}}}]"""


async def test_the_route_says_which_cluster_and_how_the_path_is_sent(make: Callable[..., Site]) -> None:
    site = make(more=f", {SHOP}")
    answer = site.ask("/tool/x?h=abc", "Host: shop.example:81")
    assert (answer["cluster"], answer["sent_as"], id_of(answer)) == ("shop", "/x?h=abc", "s")
    assert "shop.example" in answer["route"]
    assert (answer["outcome"], deciding(answer)) == ("hashed", ["hashed"])
    assert answer["sets_cookie"].startswith("stickyproxy-shop=TOKEN; Path=/tool;")
    elsewhere = site.ask("/tool/x?h=abc")
    assert (elsewhere["cluster"], elsewhere["route"], elsewhere["outcome"]) == ("default", None, "new")


async def test_a_pin_of_another_app_is_none_here(make: Callable[..., Site]) -> None:
    site = make(more=f", {SHOP}")
    cookie = token("a").replace("stickyproxy=", "stickyproxy-shop=")
    answer = site.ask("/tool/", "Host: shop.example", cookie)
    assert (answer["outcome"], answer["broken"], id_of(answer), deciding(answer)) == ("new", None, "s", ["policy"])
    assert rungs(answer) == [("cookie", "known", "a", False)]


async def test_where_no_route_leads_nobody_answers(make: Callable[..., Site]) -> None:
    answer = make(upstreams="[]", more=f", {SHOP}").ask("/")
    assert (answer["cluster"], answer["status"], answer["reason"]) == ("", 404, "no app is here")


# Upstreams that cannot be used


@pytest.mark.parametrize(
    ("rule", "outcome", "upstream", "decides"),
    [
        ("redispatch", "redispatched", True, ["policy"]),
        ("refuse", "refused", False, ["cookie"]),
        ("{wait: 7s}", "wait", False, ["cookie"]),
    ],
)
async def test_a_pin_that_is_broken(
    make: Callable[..., Site], rule: str, outcome: str, upstream: bool, decides: list[str]  # noqa: FBT001
) -> None:  # fmt: skip
    site = make(f"on_unavailable: {rule}")
    site.routing.set_admin_state("a", AdminState.MAINT)
    answer = site.ask("/", token("a"))
    assert (answer["outcome"], answer["broken"], deciding(answer)) == (outcome, "maint", decides)
    assert (answer["upstream"] is not None) is upstream
    if upstream:
        assert id_of(answer) in {"b", "c"}
        assert answer["sets_cookie"].startswith("stickyproxy=TOKEN;")
    elif outcome == "wait":
        assert answer["wait_s"] == 7
    else:
        assert (answer["status"], answer["reason"]) == (503, "no upstream can take the request")


async def test_reasons_for_which_a_pin_breaks(make: Callable[..., Site]) -> None:
    site = make()
    assert site.ask("/", token("removed"))["broken"] == "removed"
    assert rungs(site.ask("/", token("removed"))) == [("cookie", "gone", None, False)]
    site.routing.report("a", HealthEvent.REFUSED)
    assert site.ask("/", token("a"))["broken"] == "refused"
    site.close_process("b")
    assert site.ask("/", token("b"))["broken"] == "closed"


async def test_a_drain_and_failing_probes_keep_the_pin_and_take_nobody(make: Callable[..., Site]) -> None:
    site = make()
    site.routing.set_admin_state("a", AdminState.DRAIN)
    for _ in range(10):
        site.routing.report("b", HealthEvent.PROBE_FAILED)
    for upstream_id, admin, health in (("a", "drain", "unknown"), ("b", "ready", "unhealthy")):
        answer = site.ask("/", token(upstream_id))
        assert (answer["outcome"], answer["broken"], id_of(answer)) == ("hit", None, upstream_id)
        assert (answer["upstream"]["admin"], answer["upstream"]["health"]) == (admin, health)
        assert answer["ladder"][-1]["choices"] == ["c"]


async def test_when_none_is_healthy_it_is_said(make: Callable[..., Site]) -> None:
    site = make()
    for upstream_id in "abc":
        for _ in range(10):
            site.routing.report(upstream_id, HealthEvent.PROBE_FAILED)
    assert site.ask("/")["ladder"][-1]["is_guarded"] is True


@pytest.mark.parametrize("state", [AdminState.DRAIN, AdminState.MAINT])
async def test_no_upstream_takes_new_clients(make: Callable[..., Site], state: AdminState) -> None:
    site = make()
    for upstream_id in "abc":
        site.routing.set_admin_state(upstream_id, state)
    answer = site.ask("/")
    assert (answer["outcome"], answer["upstream"], answer["status"], deciding(answer)) == ("none", None, 503, [])


async def test_upstreams_that_are_full(make: Callable[..., Site]) -> None:
    upstreams = "[{id: a, url: 'http://a', max_sessions: 2}, {id: b, url: 'http://b', max_sessions: 3}]"
    site = make(upstreams=upstreams)
    site.sessions = {upstream_digest("a").hex(): 2, upstream_digest("b").hex(): 2}
    answer = site.ask("/")
    assert (id_of(answer), answer["ladder"][-1]["choices"]) == ("b", ["b"])
    site.sessions[upstream_digest("b").hex()] = 3
    full = site.ask("/")
    assert (full["outcome"], full["status"], full["ladder"][-1]["choices"]) == ("full", 503, [])
    assert id_of(site.ask("/", token("a"))) == "a"


async def test_the_sessions_count_for_the_policy(make: Callable[..., Site]) -> None:
    site = make()
    for most in ("ab", "bc", "ac"):
        site.sessions = {upstream_digest(one).hex(): 5 for one in most}
        assert {id_of(site.ask("/")) for _ in range(3)} == set("abc") - set(most)


async def test_a_key_whose_upstream_is_gone(make: Callable[..., Site]) -> None:
    placed_anew, answered = make(keys(LEARNED)), make(keys(GONE))
    for site in (placed_anew, answered):
        site.learn("sid", b"abc", "removed")
    answer = placed_anew.ask("/?sid=abc")
    assert (answer["outcome"], answer["broken"], deciding(answer)) == ("redispatched", "removed", ["policy"])
    answer = answered.ask("/?sid=abc", token("a"))
    assert (answer["outcome"], answer["broken"], deciding(answer)) == ("gone", "removed", ["learned"])
    assert (answer["status"], answer["reason"]) == (410, "the upstream of this sid is gone")
    assert rungs(answer) == [("learned", "gone", None, False), ("cookie", "known", "a", True)]


# What is no request


@pytest.mark.parametrize(
    "line", ["", " ", "GET", "GET path", "GET / HTTP/2", "GET / HTTP/1.1 x", "GET /a b", "/a\nHost: x", "G3T /"]
)
def test_what_is_no_request_line(line: str) -> None:
    with pytest.raises(UsageError, match="expected a request such as 'GET /path', got ") as caught:
        Asked(line).write_head()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("header", ["", "x", ": x", "a b: x", "X: 1\r\nHost: y", "X: 1\nY: 2", "\x1b"])
def test_what_is_no_header(header: str) -> None:
    with pytest.raises(UsageError, match="expected a header such as 'Cookie: name=value', got ") as caught:
        Asked("/", (header,)).write_head()
    assert str(caught.value).isprintable()


def test_what_is_named_is_cut() -> None:
    with pytest.raises(UsageError) as caught:
        Asked("x" * 10_000).write_head()
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(("line", "headers"), [("/\udcff", ()), ("/", ("X: \ud800",))])
def test_what_is_no_text(line: str, headers: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="the request is not UTF-8"):
        Asked(line, headers).write_head()


@pytest.mark.parametrize(
    ("asked", "head"),
    [
        (Asked("/a"), "GET /a HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (Asked("  post   /a  HTTP/1.0 "), "POST /a HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (Asked("OPTIONS *"), "OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (Asked("/a", ("hOST:b:1", "X:")), "GET /a HTTP/1.1\r\nhOST: b:1\r\nX: \r\n\r\n"),
        (Asked("/a", (), b"12"), "POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"),
        (Asked("/a", ("Host: b", "Transfer-Encoding: chunked"), b"12"),
         "POST /a HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ],
)  # fmt: skip
def test_the_head_is_as_a_client_would_send_it(asked: Asked, head: str) -> None:
    assert asked.write_head() == head.encode()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (Asked("/é"), "400: an invalid method or request target"),
        (Asked("/\x01"), "400: "),
        (Asked("/", ("X: \x00",)), "400: "),
        (Asked("/", ("Host: a", "Host: b")), "400: several Host fields"),
        (Asked("/" + "x" * 100_000), "414: "),
    ],
)
async def test_what_the_proxy_would_refuse(make: Callable[..., Site], asked: Asked, reason: str) -> None:
    with pytest.raises(UsageError, match=f"the proxy would refuse the request with {reason}"):
        make().ask(asked.line, *asked.headers)


async def test_an_absolute_target_names_the_host(make: Callable[..., Site]) -> None:
    answer = make().ask("GET http://site.example:81/path?q")
    assert (answer["request"], answer["host"]) == ("GET /path?q", "site.example:81")


# Nothing comes of it


async def test_nothing_is_sent_learned_or_logged(make: Callable[..., Site], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        port = listening.getsockname()[1]
        site = make(keys(LEARNED, HASHED), upstreams=f"[{{id: a, url: 'http://127.0.0.1:{port}'}}]")
        site.learn("sid", b"abc", "removed")
        memory = bytes(site.keys._memory)
        caplog.clear()
        outcomes = [site.ask(line)["outcome"] for line in ("/?h=new", "/?sid=abc", "/", "/?h=new")]
        assert outcomes == ["hashed", "redispatched", "new", "hashed"]
        with pytest.raises(BlockingIOError):
            listening.accept()
    assert bytes(site.keys._memory) == memory
    assert (site.keys.learned, site.keys.evicted) == (1, 0)
    assert caplog.messages == []
    logger = logging.getLogger("stickyproxy.proxy.placement")
    assert logger.isEnabledFor(logging.DEBUG)  # again


async def test_a_key_that_is_asked_for_is_not_renewed(make: Callable[..., Site]) -> None:
    site = make(keys(LEARNED))
    key = site.config.affinity.keys[0].compile()
    stored, now = Found(key, b"abc").stored, time.monotonic()
    site.keys.learn(stored, upstream_digest("a"), 60.0, now)  # and `idle` is a day: a use would renew it
    memory = bytes(site.keys._memory)
    assert site.ask("/?sid=abc")["outcome"] == "learned"
    assert bytes(site.keys._memory) == memory
    site.keys.find(stored, now, key.idle_s)
    assert bytes(site.keys._memory) != memory  # the control: a use


async def test_the_log_is_restored_after_a_mistake(make: Callable[..., Site]) -> None:
    with pytest.raises(UsageError):
        make().ask("/\x01")
    assert logging.getLogger("stickyproxy.proxy").level == logging.NOTSET
