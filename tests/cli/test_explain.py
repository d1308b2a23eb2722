"""What `explain` prints, by a file, of a stub's answer, and of a running proxy, of which nothing changes."""

from __future__ import annotations

import http.client
import json
import shutil
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typing_extensions import override

from stickyproxy.affinity.choose import BreakReason, Outcome
from stickyproxy.affinity.snapshot import upstream_digest
from stickyproxy.affinity.token import Token, TokenCodec
from stickyproxy.cli.explain import _WHY, describe
from stickyproxy.control.runtime import control_path
from stickyproxy.control.secret import load_or_make_secret
from tests.cli.running import run, run_process
from tests.cli.stub import Answer, StubProxy
from tests.helpers.processes import Children, StickyProxy, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType
    from typing import Self

FILE = """\
upstreams:
  - {id: app-1, url: "http://127.0.0.1:8001"}
  - {id: app-2, url: "https://app.internal:8443", tls: {ca: /nowhere/ca.pem}}
affinity:
  policy: round_robin
  keys:
    - {name: sid, mode: learn, query: sid, learn: [{in: response, json: sid, on: /start}]}
    - {name: hash, mode: hash, query: h, member: h, on: ["?h=", /join]}
state_directory: STATE
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give a file whose state directory holds nothing yet."""
    path = tmp_path / "stickyproxy.yaml"
    path.write_text(FILE.replace("STATE", str(tmp_path / "state")))
    return path


def answer(**facts: Any) -> dict[str, Any]:
    """Return an answer as the proxy gives it: a new client that the policy places."""
    return {
        "request": "GET /",
        "host": "localhost",
        "cluster": "default",
        "ladder": [policy(decides=True)],
        "lacks_body": False,
        "outcome": "new",
        "broken": None,
        "upstream": upstream(),
        "sets_cookie": "",
        **facts,
    }


def upstream(**facts: Any) -> dict[str, Any]:
    usual = {"id": "a", "address": "127.0.0.1:1", "admin": "ready", "health": "healthy"}
    return {**usual, "is_refused": False, "is_closing": False, **facts}


def policy(**facts: Any) -> dict[str, Any]:
    usual = {"rung": "policy", "policy": "random", "choices": ["a", "b"], "is_guarded": False}
    return {**usual, "decides": False, "disagrees": False, **facts}


def rung(name: str, state: str, upstream_id: str | None = None, **facts: Any) -> dict[str, Any]:
    key = {} if name == "cookie" else {"key": "sid", "value": "abc"}
    return {"rung": name, "state": state, "upstream": upstream_id, "decides": False, "disagrees": False, **key, **facts}


def line(name: str, shown: list[str]) -> str:
    """Return what stands behind a name, with the lines below that have none."""
    [at] = [at for at, one in enumerate(shown) if one.startswith(f"{name:10}")]
    below = takewhile(lambda one: one.startswith(" "), shown[at + 1 :])
    return "\n".join(one[10:] for one in (shown[at], *below))


# By a file


def test_a_new_client_by_a_file(file: Path) -> None:
    result = run("explain", "--config", file, "GET /socket.io/?sid=abc", "-H", "Host: site.example:81", "--https")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "request   GET /socket.io/?sid=abc for site.example:81",
        "cluster   default",
        "ladder        learned  sid abc: not known",
        "          =>  policy   round_robin of app-1, app-2",
        "upstream  app-2 at app.internal:8443, ready, not probed",
        "why       new: a client without a pin: the policy places it, the next one elsewhere",
        "cookie    stickyproxy=TOKEN; Path=/; HttpOnly; SameSite=Lax; Secure",
    ]


@pytest.mark.parametrize("given", [["/?h=abc"], ["POST /join", "-d", '{"h": "abc"}'], ["/join", "-d", '{"h":"abc"}']])
def test_a_key_of_the_client_in_the_line_or_in_the_body(file: Path, given: list[str]) -> None:
    result = run("explain", "--config", file, *given)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "=>  hashed  hash abc: not known\n" in result.stdout
    assert "a key may be in it" not in result.stdout


def test_a_body_that_is_missing_is_asked_for(file: Path) -> None:
    assert "\nbody      a key may be in it: give it with -d\n" in run("explain", "--config", file, "POST /join").stdout


def test_the_answer_as_json(file: Path) -> None:
    result = run("explain", "--config", file, "--json", "/?h=%1b%5b")
    said = json.loads(result.stdout)
    assert (said["outcome"], said["ladder"][0]["value"]) == ("hashed", "\x1b[")
    assert result.stdout.isascii()
    assert "\x1b" not in result.stdout


def test_what_a_terminal_would_obey_is_written_out(file: Path) -> None:
    result = run("explain", "--config", file, "/?h=%1b%5b31m%e2%80%ae")
    assert r"hash \x1b[31m\u202e: not known" in result.stdout
    assert all(one.isprintable() for one in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["GET"], "stickyproxy: expected a request such as 'GET /path', got 'GET'\n"),
        (["GET /", "-H", "X"], "stickyproxy: expected a header such as 'Cookie: name=value', got 'X'\n"),
        (
            ["/\x1b[0m"],
            "stickyproxy: the proxy would refuse the request with 400: an invalid method or request target\n",
        ),
        (["/", "-d", "\udcff"], "stickyproxy: the body is not UTF-8\n"),
        (["/\udcff"], "stickyproxy: the request is not UTF-8\n"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_said(file: Path, arguments: list[str], said: str) -> None:
    result = run("explain", "--config", file, *arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("upstreams: 1\nworkerz: 1\n", ": line 1: upstreams: "),
        ("run: {command: app}\n", "the file lists no upstreams; with run, ask the running proxy"),
        ("", "the file lists no upstreams"),
    ],
)
def test_a_file_that_cannot_be_used(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    result = run("explain", "--config", file, "/")
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = run("explain", "--config", tmp_path / "none.yaml", "/")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "none.yaml: cannot read the file: No such file" in result.stderr


def test_a_file_and_a_proxy_cannot_both_be_asked(file: Path) -> None:
    result = run("explain", "--config", file, "--control", "/nowhere", "/")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--config asks a file, --control a running proxy: name one of them" in result.stderr


def test_the_route_of_a_request(file: Path) -> None:
    more = """\
clusters: {shop: {upstreams: [http://127.0.0.1:8101]}}
routes:
  - {host: shop.example, path: /tool, cluster: shop, strip_prefix: true}
  - {host: "*.example", cluster: shop}
"""
    file.write_text(file.read_text() + more)
    shown = run("explain", "--config", file, "/tool/x", "-H", "Host: shop.example").stdout.splitlines()
    assert shown[1].startswith("route     ")
    assert (shown[1].endswith(", sent as /x"), shown[2]) == (True, "cluster   shop")
    assert "sent as" not in run("explain", "--config", file, "/tool/x", "-H", "Host: a.example").stdout


def test_where_no_route_leads(file: Path) -> None:
    shown = describe(answer(cluster="", outcome="none", upstream=None, status=404, reason="no app is here"))
    assert shown[-1] == "answer    404: no app is here"
    assert line("cluster", shown) == "none: no route leads to it"


# The secret that is kept


def test_without_a_secret_it_is_said_that_no_cookie_can_be_verified(file: Path) -> None:
    state = file.parent / "state"
    result = run("explain", "--config", file, "/", "-H", "cookie: stickyproxy=v1.x")
    assert (result.exit_code, line("ladder", result.stdout.splitlines()).splitlines()[0]) == (
        0, "    cookie  forged, cut or signed with another secret",
    )  # fmt: skip
    assert result.stderr == f"stickyproxy: no secret is kept in {state}: no cookie can be verified\n"
    assert not state.exists()  # and none is made


def test_a_cookie_of_the_secret_that_is_kept(file: Path) -> None:
    at = int(time.time())  # noqa: TID251 -- as the plane reads it
    pinned = Token(upstream_digest("app-1"), b"0123456789", at, at)
    value = TokenCodec([load_or_make_secret(file.parent / "state")]).write(pinned).decode()
    result = run("explain", "--config", file, "/", "-H", f"Cookie: stickyproxy={value}")
    assert (result.exit_code, result.stderr) == (0, "")
    assert line("ladder", result.stdout.splitlines()).startswith("=>  cookie  app-1\n")
    assert "cookie    as it is\n" in result.stdout


def test_the_secret_is_read_only_where_there_is_a_cookie(file: Path) -> None:
    (file.parent / "state" / "secret").mkdir(parents=True)
    assert run("explain", "--config", file, "/").exit_code == 0
    result = run("explain", "--config", file, "/", "-H", "Cookie: stickyproxy=v1.x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "cannot read the secret" in result.stderr


def test_with_secrets_in_the_file_the_kept_one_is_not_looked_for(file: Path) -> None:
    file.with_name("key").write_text("0123456789abcdef0123456789abcdef")
    file.write_text(file.read_text().replace("affinity:", f"affinity:\n  secrets: ['file:{file.with_name('key')}']"))
    result = run("explain", "--config", file, "/", "-H", "Cookie: stickyproxy=v1.x")
    assert (result.exit_code, result.stderr) == (0, "")


# What is printed


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("broken", [None, *BreakReason])
def test_each_outcome_has_its_words(outcome: Outcome, broken: BreakReason | None) -> None:
    shown = describe(answer(outcome=outcome, broken=broken, wait_s=7.5))
    assert line("why", shown).startswith(f"{outcome}: ")
    assert "{" not in "".join(shown)


def test_no_outcome_is_spoken_of_that_there_is_not() -> None:
    assert set(_WHY) == {str(one) for one in Outcome}


def test_the_rung_that_decides_is_marked_and_who_disagrees_is_told() -> None:
    ladder = [
        rung("learned", "unknown"),
        rung("learned", "known", "a", decides=True, value="x" * 64 + "..."),
        rung("cookie", "known", "b", disagrees=True),
        rung("hashed", "gone", disagrees=True),
        {"rung": "address", "value": "127.0.0.1", "decides": False, "disagrees": False},
        policy(),
    ]
    assert (
        line("ladder", describe(answer(outcome="learned", ladder=ladder)))
        == f"""\
    learned  sid abc: not known
=>  learned  sid {"x" * 64}...: a
    cookie   b, which disagrees and does not count
    hashed   sid abc: an upstream that is no longer there, which disagrees and does not count
    address  127.0.0.1, as an example
    policy   random of a, b"""
    )


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, "random of a, b"),
        ({"is_guarded": True}, "random of a, b, though none is healthy"),
        ({"choices": [], "is_guarded": True}, "random of none"),
    ],
)
def test_who_the_policy_chooses_from(facts: Mapping[str, Any], said: str) -> None:
    assert line("ladder", describe(answer(ladder=[policy(**facts)]))).split("policy  ")[1] == said


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, "a at 127.0.0.1:1, ready, healthy"),
        ({"admin": "drain", "health": "unhealthy"}, "a at 127.0.0.1:1, drain, unhealthy"),
        ({"health": "unknown"}, "a at 127.0.0.1:1, ready, not probed"),
        ({"is_refused": True}, "a at 127.0.0.1:1, ready, refused"),
        ({"is_closing": True, "address": "unix:/run/a"}, "a at unix:/run/a, ready, healthy, closing"),
    ],
)
def test_how_the_upstream_stands(facts: Mapping[str, Any], said: str) -> None:
    assert line("upstream", describe(answer(upstream=upstream(**facts)))) == said


@pytest.mark.parametrize(("cookie", "said"), [(None, "none"), ("", "as it is"), ("s=TOKEN; Path=/", "s=TOKEN; Path=/")])
def test_what_becomes_of_the_cookie(cookie: str | None, said: str) -> None:
    assert line("cookie", describe(answer(sets_cookie=cookie))) == said


def test_a_request_that_waits() -> None:
    shown = describe(answer(outcome="wait", broken="maint", upstream=None, wait_s=10.0))
    assert shown[-2:] == [
        "upstream  none now",
        "why       wait: its own upstream is in maint: the request waits for it 10 s at most, and is placed anew then",
    ]


def test_a_request_that_is_answered() -> None:
    shown = describe(answer(outcome="refused", broken="refused", upstream=None, status=503, reason="so it is"))
    assert shown[-2:] == [
        "answer    503: so it is",
        "why       refused: its own upstream refuses connections, and on_unavailable is refuse",
    ]


def test_a_long_line_is_cut() -> None:
    assert describe(answer(request="GET /" + "x" * 5000))[0] == f"request   GET /{'x' * 155}... for localhost"


# Of a proxy


def test_a_proxy_is_asked_for_what_was_given(proxy: StubProxy) -> None:
    proxy.answer("POST", "/api/v1/explain", answer())
    arguments = ["GET /a", "-H", "A: 1", "-H", "B: 2", "-d", "{é}", "--https"]
    result = run("explain", *arguments, "--control", proxy.path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == describe(answer())
    asked = {"line": "GET /a", "headers": ["A: 1", "B: 2"], "body": "{é}", "is_https": True}
    assert proxy.calls == [("POST", "/api/v1/explain", asked)]


def test_a_mistake_is_said_before_a_proxy_is_asked(proxy: StubProxy) -> None:
    assert run("explain", "nonsense", "--control", proxy.path).exit_code == 2
    assert proxy.calls == []


def test_what_the_proxy_refuses_is_the_operators_mistake(proxy: StubProxy) -> None:
    proxy.answer("POST", "/api/v1/explain", Answer(422, {"error": "the proxy would refuse the request with 400: no"}))
    result = run("explain", "/", "--control", proxy.path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "stickyproxy: the proxy would refuse the request with 400: no\n"


def test_without_a_proxy_it_is_said(tmp_path: Path) -> None:
    result = run("explain", "/", "--control", tmp_path / "none")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no proxy listens at" in result.stderr


# Of a running one


class CountingApp:
    """An app that makes a sid at /start, and counts the connections and the requests that come to it."""

    def __init__(self) -> None:
        self.connections = self.requests = 0
        app = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            @override
            def setup(self) -> None:
                app.connections += 1
                super().setup()

            def do_GET(self) -> None:
                app.requests += 1
                body = b'{"sid": "learned-one"}'
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            @override
            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join(60)
        self._server.server_close()


@pytest.fixture
def apps() -> Iterator[dict[str, CountingApp]]:
    with CountingApp() as one, CountingApp() as two:
        yield {"app-1": one, "app-2": two}


@pytest.fixture
def running(apps: dict[str, CountingApp]) -> Iterator[StickyProxy]:
    directory = Path(tempfile.mkdtemp(prefix="sp-"))  # a short path, for that of its control socket
    keys = [
        {"name": "sid", "mode": "learn", "query": "sid", "learn": [{"in": "response", "json": "sid", "on": "/start"}]},
        {"name": "hash", "mode": "hash", "query": "h"},
    ]
    try:
        with Children(directory) as children:
            urls = {name: app.url for name, app in apps.items()}
            more = {"health": {"probe": False}}
            yield StickyProxy(children, urls, affinity={"keys": keys}, more=more)
    finally:
        shutil.rmtree(directory)


def get(proxy: StickyProxy, target: str, cookie: str = "") -> str:
    """Send a request through the proxy, and return the cookie that is set."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
    try:
        connection.request("GET", target, headers={"Cookie": cookie} if cookie else {})
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        return (response.getheader("Set-Cookie") or "").partition(";")[0]
    finally:
        connection.close()


def counted(proxy: StickyProxy) -> dict[str, float]:
    """Return all that the proxy counts, but for its own process, its clocks and who asks for this."""
    passing = ("process_", "python_", "stickyproxy_worker_last_tick", "stickyproxy_event_loop_lag")
    return {f"{one.name}{one.labels}": one.value for one in proxy.metrics() if not one.name.startswith(passing)}


def test_of_a_running_proxy_nothing_changes(
    running: StickyProxy, apps: dict[str, CountingApp], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(running.file.with_name("stickyproxy-home")))
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    control = control_path(running.child.pid)
    cookie = get(running, "/start")
    get(running, "/again", cookie)  # and it is a session
    [made] = [name for name, app in apps.items() if app.requests]
    [other] = apps.keys() - {made}
    wait_until(lambda: running.metric("sessions_active", upstream=made) == 1, "the session is counted")
    wait_until(lambda: running.metric("keys_learned_total") == 1, "the key is counted")
    wait_until(lambda: running.metric("downstream_connections") == 0, "the client is gone")
    wait_until(lambda: running.metric("upstream_connections", state="idle") == 0, "the idle connection is closed")

    def look() -> tuple[Any, ...]:
        return counted(running), running.state()["clusters"], [(one.connections, one.requests) for one in apps.values()]

    def ask(*arguments: str) -> dict[str, Any]:
        result = run("explain", *arguments, "--control", control, "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        said: dict[str, Any] = json.loads(result.stdout)
        return said

    before, log = look(), running.child.log.read_text()
    learned = ask("/?sid=learned-one")
    assert (learned["outcome"], learned["upstream"]["id"]) == ("learned", made)
    pinned = ask("/", "-H", f"Cookie: {cookie}")
    assert (pinned["outcome"], pinned["upstream"]["id"]) == ("hit", made)
    for _ in range(2):  # the second time it would be known
        hashed = ask("/?h=client")
        assert (hashed["outcome"], hashed["ladder"][0]["state"]) == ("hashed", "unknown")
    assert ask("/start")["outcome"] == "new"
    result = run("explain", "/?sid=learned-one", "--control", control)
    assert f"=>  learned  sid learned-one: {made}\n" in result.stdout
    assert look() == before
    assert running.child.log.read_text() == log

    # The control: a request is seen by all of it.
    get(running, "/?h=client")
    wait_until(lambda: running.metric("keys_learned_total") == 2, "the key of the client is counted")
    assert ask("/?h=client")["ladder"][0]["state"] == "known"
    after = look()
    assert after[0] != before[0]
    assert after[2] != before[2]
    assert running.child.log.read_text() != log

    running.set_state(made, "maint")
    moved = ask("/", "-H", f"Cookie: {cookie}")
    assert (moved["outcome"], moved["broken"], moved["upstream"]["id"]) == ("redispatched", "maint", other)
    assert "was moved" not in running.child.log.read_text()


def test_in_a_process_of_its_own(file: Path) -> None:
    result = run_process("explain", "--config", str(file), "GET /?h=abc")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\nladder    =>  hashed  hash abc: not known\n" in result.stdout
