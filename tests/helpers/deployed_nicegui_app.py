"""A NiceGUI page that tells the version that it is of, and a counter that lives in its process only.

Run by the interpreter that has NiceGUI. The version is what the file held when the process started, which waits as
long as there is a file of that name with the suffix `.hold`.
"""

import argparse
import os
import time
from pathlib import Path

from nicegui import app, ui

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--port", type=int, required=True)
PARSER.add_argument("--version-file", type=Path, required=True)
ARGUMENTS = PARSER.parse_args()
VERSION = ARGUMENTS.version_file.read_text()
# NiceGUI forgets a page 3 s after its socket broke. More patience here, so that a slow machine does not decide how a
# test ends.
RECONNECT_TIMEOUT_S = 20.0


def page() -> None:
    ui.label(f"version={VERSION}").props("data-testid=version")
    ui.label(f"upstream={os.environ['STICKYPROXY_UPSTREAM']}").props("data-testid=upstream")
    count = ui.label("count=0").props("data-testid=count")

    def increment() -> None:
        count.set_text(f"count={int(count.text.removeprefix('count=')) + 1}")

    ui.button("inc", on_click=increment)
    tick = ui.label("tick=0").props("data-testid=tick")
    ui.timer(0.5, lambda: tick.set_text(f"tick={int(tick.text.removeprefix('tick=')) + 1}"))


def healthz() -> dict[str, str]:
    return {"version": VERSION}


def main() -> None:
    while ARGUMENTS.version_file.with_suffix(".hold").exists():
        time.sleep(0.05)
    app.get("/healthz")(healthz)
    ui.page("/")(page)
    ui.run(
        host="127.0.0.1",
        port=ARGUMENTS.port,
        reconnect_timeout=RECONNECT_TIMEOUT_S,
        storage_secret=os.environ["STORAGE_SECRET"],
        tailwind=False,
        reload=False,
        show=False,
    )


main()
