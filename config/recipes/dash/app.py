"""A Dash page that counts twice: in the page itself, which any process can do, and in the memory of this process."""

import os
from itertools import count

from dash import Dash, Input, Output, State, callback, dcc, html

PROCESS = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")  # such as g1-2
PREFIX = "/tool/"  # where the site shows the app: pages, scripts and callbacks are all below it

app = Dash(__name__, requests_pathname_prefix=PREFIX, routes_pathname_prefix=PREFIX, title="Dash in several processes")
server = app.server
app.layout = html.Div(
    [
        dcc.Store(id="clicks", data=0),
        html.Button("Count", id="count"),
        html.P("0 counted by nobody", id="counted"),
        html.P(id="remembered"),
    ]
)
calls = count(1)  # what a cache is, too: each process has its own


@callback(
    Output("clicks", "data"),
    Output("counted", "children"),
    Output("remembered", "children"),
    Input("count", "n_clicks"),
    State("clicks", "data"),
    prevent_initial_call=True,
)
def answer(_: int, clicks: int) -> tuple[int, str, str]:
    """Count in the page, as Dash wants it, and in this process."""
    return clicks + 1, f"{clicks + 1} counted by {PROCESS}", f"{PROCESS} has answered {next(calls)} times"


@server.get("/healthz")
def healthz() -> dict[str, str]:
    """Tell that this process serves."""
    return {"process": PROCESS}
