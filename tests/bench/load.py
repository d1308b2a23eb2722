"""The load on one target that listens: one visit for its affinity cookie, then wrk or the WebSocket load.

Every request is that of a browser, headers and cookie included, because what a proxy must parse is part of the price.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.bench.certificate import client_context
from tests.bench.process import cpu_s
from tests.bench.programs import ROOT, path_of
from tests.bench.results import RunError, Sample
from tests.bench.scenarios import Load

if TYPE_CHECKING:
    from tests.bench.scenarios import Scenario

BROWSER: Final = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/130.0 Safari/537.36",
    "Accept": "text/html,application/xhtml+xml",
    "Accept-Language": "en-US,en;q=0.5",
    "Accept-Encoding": "gzip, deflate, br",
    "Referer": "http://localhost/",
}
_WARM_UP_S: Final = 1
_GRACE_S: Final = 90.0  # what a load may take beyond its seconds, to open its connections and to end
_VISIT_TIMEOUT_S: Final = 5.0
_IN_US: Final = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6, "h": 3600e6}


@dataclass(frozen=True)
class Answer:
    """What one visit was answered with; `cookie` is what to send back, empty if none was set."""

    status: int
    body_bytes: int
    cookie: str


@dataclass(frozen=True)
class WrkOutput:
    """What wrk printed."""

    requests: int
    per_s: float
    p50_us: float
    p99_us: float
    socket_errors: int
    refused: int  # responses with a status of 400 or more


def visit(port: int, path: str, *, is_tls: bool = False) -> Answer:
    """GET `path` as a browser would; raise OSError or HTTPException if that cannot be."""
    if is_tls:
        context = client_context()
        link: http.client.HTTPConnection = http.client.HTTPSConnection(
            "127.0.0.1", port, timeout=_VISIT_TIMEOUT_S, context=context
        )
    else:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=_VISIT_TIMEOUT_S)
    try:
        link.request("GET", path, headers=BROWSER)
        response = link.getresponse()
        body = response.read()
        cookies = response.headers.get_all("Set-Cookie", [])
        return Answer(response.status, len(body), "; ".join(cookie.split(";")[0] for cookie in cookies))
    finally:
        link.close()


def parse_wrk(text: str) -> WrkOutput:
    """Return the facts of wrk's output with `--latency`; raise RunError if it is none."""

    def number(pattern: str) -> str:
        match = re.search(pattern, text)
        if match is None:
            raise RunError(f"wrk printed no {pattern!r}:\n{text}")
        return match[1]

    def time_us(percent: int) -> float:
        value, unit = re.findall(r"[\d.]+|[a-z]+", number(rf"\b{percent}%\s+([\d.]+(?:us|ms|s|m|h))\b"))
        return float(value) * _IN_US[unit]

    socket_errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    return WrkOutput(
        requests=int(number(r"(\d+) requests in")),
        per_s=float(number(r"Requests/sec:\s+([\d.]+)")),
        p50_us=time_us(50),
        p99_us=time_us(99),
        socket_errors=sum(map(int, socket_errors.groups())) if socket_errors else 0,
        refused=int(refused[1]) if refused else 0,
    )


def wrk_command(scenario: Scenario, port: int, cookie: str, seconds: int) -> list[str]:
    """Return the command; wrk's seconds are whole."""
    headers = dict(BROWSER)
    if cookie:
        headers["Cookie"] = cookie
    if scenario.is_close:
        headers["Connection"] = "close"
    fields = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    shape = ["-t1", f"-c{scenario.connections}", f"-d{seconds}", "--latency"]
    scheme = "https" if scenario.is_tls else "http"
    return [path_of("wrk"), *shape, *fields, f"{scheme}://127.0.0.1:{port}{scenario.path}"]


def run_load(scenario: Scenario, port: int, cookie: str, pid: int, seconds: float) -> Sample:
    """Load the target on `port`, whose process is `pid`; raise RunError if what came back counts for nothing."""
    if scenario.load is Load.HTTP:
        return _run_wrk(scenario, port, cookie, pid, math.ceil(seconds))
    return _run_websockets(scenario, port, cookie, pid, seconds)


def _run_wrk(scenario: Scenario, port: int, cookie: str, pid: int, seconds: int) -> Sample:
    _output_of(wrk_command(scenario, port, cookie, _WARM_UP_S), _WARM_UP_S)
    before_s = cpu_s(pid)
    text = _output_of(wrk_command(scenario, port, cookie, seconds), seconds)
    used_s = cpu_s(pid) - before_s
    output = parse_wrk(text)
    if output.refused or not output.requests:
        raise RunError(f"{output.refused} of {output.requests} responses were not 2xx")
    return Sample(
        cpu_us=used_s / output.requests * 1e6,
        per_s=output.per_s,
        p50_us=output.p50_us,
        p99_us=output.p99_us,
        errors=output.socket_errors,
    )


def _run_websockets(scenario: Scenario, port: int, cookie: str, pid: int, seconds: float) -> Sample:
    command = [sys.executable, "-m", "tests.bench.ws_load", str(port)]
    command += ["--size", str(scenario.size_bytes), "--connections", str(scenario.connections)]
    command += ["--seconds", str(seconds), "--watch", str(pid), f"--cookie={cookie}"]
    if scenario.load is Load.HOLD:
        command.append("--hold")
    if scenario.is_tls:
        command.append("--tls")
    return Sample(**json.loads(_output_of(command, seconds)))


def _output_of(command: list[str], seconds: float) -> str:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds + _GRACE_S
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"the load did not end within {error.timeout:g} s") from error
    if done.returncode:
        raise RunError(f"the load failed: {done.stderr[-2000:].strip() or done.stdout[-2000:].strip()}")
    return done.stdout
