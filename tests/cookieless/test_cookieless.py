"""Clients that keep no cookie, over three processes of a real app and two workers: all meet their own process.

Each kind of client has its control: without the preset of its framework, requests go astray.
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import pytest

from tests.cookieless.chainlit import drive_chainlit
from tests.cookieless.engineio import drive_engineio
from tests.cookieless.fleet import PROCESSES, Fleet, run_program
from tests.cookieless.gradio import drive_gradio, drive_gradio_calls, drive_gradio_curl
from tests.cookieless.marimo import drive_marimo
from tests.cookieless.mcp import drive_mcp
from tests.cookieless.nicegui import drive_nicegui
from tests.cookieless.outcome import Outcome
from tests.cookieless.shiny import drive_shiny
from tests.cookieless.streamlit import drive_streamlit
from tests.helpers.processes import Children, StickyProxy

EXCHANGES: Final = 10_000
FEW: Final = 400  # of a control, and of clients that take long
WORKERS: Final = 2

Drive = Callable[..., Awaitable[Outcome]]


@dataclass(frozen=True)
class Clients:
    """One kind of client: `drive` speaks its protocol, `exchanges` many in all.

    A session that `is_one_connection` cannot go astray; what is seen is that no preset is in its way.
    """

    name: str
    drive: Drive
    exchanges: int = EXCHANGES
    is_one_connection: bool = False


@dataclass(frozen=True)
class Framework:
    """An app of the fleet, the preset that it needs, and the clients that come to it."""

    app: str
    preset: str
    clients: tuple[Clients, ...]
    more: dict[str, Any] = field(default_factory=dict)


FRAMEWORKS: Final = (
    Framework(
        "fastapi-socketio",
        "engineio",
        (
            Clients("Engine.IO by polling", partial(drive_engineio, transport="polling")),
            Clients("Engine.IO by polling, then WebSocket", partial(drive_engineio, transport="upgrade")),
            Clients("Engine.IO by WebSocket", partial(drive_engineio, transport="websocket"), is_one_connection=True),
        ),
    ),
    Framework(
        "chainlit",
        "chainlit",
        (Clients("Chainlit", drive_chainlit),),
        more={"health": {"probe": {"path": "/chat/health"}}},
    ),
    Framework(
        "nicegui",
        "nicegui",
        (
            Clients("NiceGUI by WebSocket", partial(drive_nicegui, transport="websocket")),
            Clients("NiceGUI by polling", partial(drive_nicegui, transport="polling")),
        ),
    ),
    Framework("streamlit", "streamlit", (Clients("Streamlit", drive_streamlit),)),
    Framework(
        "gradio",
        "gradio",
        (
            Clients("Gradio", drive_gradio),
            Clients("Gradio's calls in two steps", drive_gradio_calls),
            Clients("curl", drive_gradio_curl, 40),
        ),
    ),
    Framework("shiny", "shiny", (Clients("Shiny", drive_shiny),)),
    Framework("marimo", "marimo", (Clients("marimo", drive_marimo, 2_000),)),
    Framework("mcp", "mcp", (Clients("MCP", drive_mcp),)),
)
CASES: Final = [(framework, clients) for framework in FRAMEWORKS for clients in framework.clients]


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Run the processes of an app, which tests name as the parameter of this fixture."""
    with Children(tmp_path_factory.mktemp(request.param)) as children:
        yield Fleet(children, request.param)


def start_proxy(children: Children, fleet: Fleet, framework: Framework, presets: list[str]) -> StickyProxy:
    """Start a proxy before the fleet; it sets its cookie, which no client here keeps."""
    name = f"proxy-{len(list(children.directory.glob('proxy-*.yaml')))}"
    more = {"presets": presets, "workers": WORKERS, **framework.more}
    return StickyProxy(children, fleet.upstreams, more=more, name=name)


@pytest.mark.parametrize(
    ("fleet", "framework", "clients"),
    [pytest.param(one.app, one, clients, id=clients.name) for one, clients in CASES],
    indirect=["fleet"],
)
async def test_no_request_goes_astray(children: Children, fleet: Fleet, framework: Framework, clients: Clients) -> None:
    proxy = start_proxy(children, fleet, framework, [framework.preset])
    outcome = await clients.drive(proxy.url, exchanges=clients.exchanges)
    assert (outcome.wrong, outcome.failed, outcome.errors) == (0, 0, [])
    assert outcome.exchanges >= clients.exchanges
    assert outcome.processes == PROCESSES
    proxy.child.stop()
    if clients.is_one_connection:
        return
    proxy = start_proxy(children, fleet, framework, [])  # the control
    outcome = await clients.drive(proxy.url, exchanges=FEW)
    assert outcome.wrong > 0
    proxy.child.stop()


@dataclass(frozen=True)
class Program:
    """Clients of a framework itself, run by the Python of an `environment`."""

    app: str
    environment: str
    name: str
    words: tuple[str, ...] = ()


PROGRAMS: Final = (
    Program("fastapi-socketio", "nicegui", "socketio_program", ("polling",)),
    Program("fastapi-socketio", "nicegui", "socketio_program", ("upgrade",)),
    Program("fastapi-socketio", "nicegui", "socketio_program", ("websocket",)),
    Program("gradio", "gradio", "gradio_program"),
    Program("mcp", "mcp", "mcp_program"),
)


@pytest.mark.parametrize(
    ("fleet", "program"),
    [pytest.param(one.app, one, id=" ".join((one.name, *one.words))) for one in PROGRAMS],
    indirect=["fleet"],
)
def test_the_clients_of_the_frameworks_themselves_go_on(children: Children, fleet: Fleet, program: Program) -> None:
    [framework] = [one for one in FRAMEWORKS if one.app == program.app]
    proxy = start_proxy(children, fleet, framework, [framework.preset])
    outcome = run_program(children, program.environment, program.name, proxy.url, *program.words, str(FEW))
    assert (outcome.wrong, outcome.failed, outcome.errors) == (0, 0, [])
    assert outcome.processes == PROCESSES
    proxy.child.stop()
