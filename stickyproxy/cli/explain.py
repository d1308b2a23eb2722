"""The command that says where a request would go, and why, without sending anything."""

from __future__ import annotations

import asyncio
import json
import os
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from stickyproxy.cli.control import control_option, refusals, speak
from stickyproxy.cli.errors import clear_errors, complain
from stickyproxy.cli.words import table
from stickyproxy.config import load_file
from stickyproxy.control.explain import Asked, State
from stickyproxy.control.explain import explain as explain_request
from stickyproxy.control.routing import Routing
from stickyproxy.control.secret import load_secret, state_directory
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stickyproxy.config import Config
    from stickyproxy.control.client import ControlClient

_SHOWN: Final = 160  # characters of a line that were given
_WHY: Final = {
    "hit": "its cookie is pinned there, and a pin holds until its upstream is gone",
    "learned": "the app has made this key there",
    "hashed": "this key leads there, from whatever client it comes",
    "address": "hashed from the client's address: others may lead elsewhere",
    "new": "a client without a pin: the policy places it, the next one elsewhere",
    "invalid": "its cookie is forged, cut or signed with another secret: placed as a new client",
    "expired": "its cookie is older than max_idle or max_life: placed as a new client",
    "unpinned": "there is no affinity cookie: the policy places each request anew",
    "redispatched": "its own upstream {broken}: placed anew",
    "wait": "its own upstream {broken}: the request waits for it {wait_s:g} s at most, and is placed anew then",
    "refused": "its own upstream {broken}, and on_unavailable is refuse",
    "gone": "all that its key stands for is lost: its own upstream {broken}",
    "full": "each upstream for new clients holds max_sessions",
    "none": "no upstream takes new clients: all are in drain or maint",
}
_BROKEN: Final = {
    "refused": "refuses connections",
    "removed": "is no longer there",
    "maint": "is in maint",
    "closed": "is closing and keeps only who has something open there",
}
_STATES: Final = {
    "unknown": "not known",
    "gone": "an upstream that is no longer there",
    "invalid": "forged, cut or signed with another secret",
    "expired": "expired",
}


@click.command()
@click.argument("request")
@click.option(
    "--config", "file", metavar="FILE", type=click.Path(path_type=Path),
    help="Explain by this file; without it, the running proxy is asked, with its keys and its health.",
)  # fmt: skip
@click.option("-H", "--header", "headers", metavar="'NAME: VALUE'", multiple=True, help="A field; may be repeated.")
@click.option("-d", "--data", "body", metavar="TEXT", default="", help="The body, where a key is in it.")
@click.option("--https", "is_https", is_flag=True, help="The client comes over TLS.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@control_option
def explain(  # noqa: PLR0913, PLR0917 -- options
    request: str,
    file: Path | None,
    headers: tuple[str, ...],
    body: str,
    is_https: bool,  # noqa: FBT001 -- an option
    as_json: bool,  # noqa: FBT001 -- an option
    control: Path | None,
) -> None:
    """Say where a request would go, which rung of the ladder decides, and why. Nothing is sent.

    REQUEST is a method and a path: 'GET /socket.io/?EIO=4&transport=polling&sid=abc'.
    """
    if file is not None and control is not None:
        raise click.UsageError("--config asks a file, --control a running proxy: name one of them")
    with clear_errors():
        asked = Asked(request, headers, _encode(body), is_https)
        asked.write_head()
        answer = _ask(control, asked) if file is None else asyncio.run(_read(load_file(file, os.environ), asked))
    click.echo(json.dumps(answer, indent=2) if as_json else "\n".join(describe(answer)))


def _encode(body: str) -> bytes:
    try:
        return body.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the body is not UTF-8") from error


def _ask(control: Path | None, asked: Asked) -> Any:
    """Ask the running proxy."""
    body = {"line": asked.line, "headers": list(asked.headers), "body": asked.body.decode(), "is_https": asked.is_https}

    async def talk(client: ControlClient) -> Any:
        with refusals():
            return await client.post("/api/v1/explain", body)

    return speak(control, talk)


async def _read(config: Config, asked: Asked) -> Any:
    """Explain by a file: every upstream is taken for ready, and no key is known."""
    if config.run is not None or not config.every_upstream:
        raise UsageError("the file lists no upstreams; with run, ask the running proxy (leave --config out)")
    routing = Routing(config, lambda *_: None)  # without TLS contexts, since nobody is connected to
    snapshots = tuple(routing.snapshots.values())
    return explain_request(asked, State(config, snapshots, routing.endpoints, _find_secrets(config, asked)))


def _find_secrets(config: Config, asked: Asked) -> tuple[bytes, ...]:
    """Return the secrets of a file, or the one that is kept, which is read only where there is a cookie to verify."""
    secrets = config.affinity.secrets
    if secrets or not any(one.lower().startswith("cookie:") for one in asked.headers):
        return secrets
    kept = load_secret(config.state_directory)
    if not kept:
        complain(f"no secret is kept in {state_directory(config.state_directory)}: no cookie can be verified")
    return kept


def describe(answer: Any) -> list[str]:
    """Return the lines for people, without anything that a terminal would obey."""
    return [_make_plain(line) for line in _describe(answer)]


def _describe(answer: Any) -> Iterator[str]:
    yield f"request   {_cut(answer['request'])} for {answer['host']}"
    if answer.get("route") is not None:
        sent = "" if answer["request"].endswith(f" {answer['sent_as']}") else f", sent as {_cut(answer['sent_as'])}"
        yield f"route     {answer['route']}{sent}"
    yield f"cluster   {answer['cluster'] or 'none: no route leads to it'}"
    rungs = [("=>" if one["decides"] else "", one["rung"], _describe_rung(one)) for one in answer["ladder"]]
    for name, line in zip_longest(["ladder"], table(rungs), fillvalue=""):
        yield f"{name:9} {line}"
    if answer["lacks_body"]:
        yield "body      a key may be in it: give it with -d"
    if answer["upstream"] is not None:
        yield f"upstream  {_describe_upstream(answer['upstream'])}"
    elif answer["outcome"] == "wait":
        yield "upstream  none now"
    else:
        yield f"answer    {answer['status']}: {answer['reason']}"
    if not answer["cluster"]:
        return
    facts = answer | {"broken": _BROKEN.get(answer["broken"], "cannot be used")}
    yield f"why       {answer['outcome']}: {_WHY[answer['outcome']].format_map(facts)}"
    if answer["upstream"] is not None:
        cookie = answer["sets_cookie"]
        yield f"cookie    {'none' if cookie is None else cookie or 'as it is'}"


def _describe_upstream(upstream: Any) -> str:
    health = {"unknown": "not probed"}.get(upstream["health"], upstream["health"])
    states = [upstream["admin"], "refused" if upstream["is_refused"] else health]
    return ", ".join([f"{upstream['id']} at {upstream['address']}", *states, *["closing"] * upstream["is_closing"]])


def _describe_rung(rung: Any) -> str:
    match rung["rung"]:
        case "policy":
            doubt = ", though none is healthy" if rung["is_guarded"] and rung["choices"] else ""
            return f"{rung['policy']} of {', '.join(rung['choices']) or 'none'}{doubt}"
        case "address":
            return f"{rung['value']}, as an example"
        case name:
            leads = rung["upstream"] or _STATES[rung["state"]]
            key = "" if name == "cookie" else f"{rung['key']} {_cut(rung['value'])}: "
            return f"{key}{leads}{', which disagrees and does not count' if rung['disagrees'] else ''}"


def _make_plain(line: str) -> str:
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
