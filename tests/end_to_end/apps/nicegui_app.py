"""A NiceGUI page that shows which process serves it; run by the interpreter that has NiceGUI.

Its state (the counter, the tick, the uploaded file) lives in this process only, as NiceGUI makes it. ``/healthz`` is
what a probe asks for: a probe of ``/`` would make a page for nobody, which NiceGUI keeps for a minute. Where a file
holds the app's version, the process waits until there is no file of that name with the suffix ``.hold``.
"""

import argparse
import os
import time
from pathlib import Path

from nicegui import app, events, ui

PID = os.getpid()
UPSTREAM = os.environ.get("STICKYPROXY_UPSTREAM", "")
BLOCK_S = 8
PARSER = argparse.ArgumentParser()
PARSER.add_argument("--port", type=int, required=True)
PARSER.add_argument("--reconnect-timeout-s", type=float, default=3.0, help="NiceGUI's own default is 3")
PARSER.add_argument("--version-file", type=Path, help="which version a process is of that starts now")
ARGUMENTS = PARSER.parse_args()
VERSION = ARGUMENTS.version_file.read_text() if ARGUMENTS.version_file else ""


def page() -> None:
    for name, value in (("pid", PID), ("version", VERSION), ("upstream", UPSTREAM)):
        ui.label(f"{name}={value}").props(f"data-testid={name}")

    count = ui.label("count=0").props("data-testid=count")

    def increment() -> None:
        count.set_text(f"count={int(count.text.removeprefix('count=')) + 1}")

    ui.button("inc", on_click=increment)

    tick = ui.label("tick=0").props("data-testid=tick")
    ui.timer(0.5, lambda: tick.set_text(f"tick={int(tick.text.removeprefix('tick=')) + 1}"))

    ui.button("block", on_click=block_the_event_loop)

    uploaded = ui.label("nothing uploaded").props("data-testid=uploaded")

    def show_upload(event: events.UploadEventArguments) -> None:
        uploaded.set_text(f"uploaded by pid={PID} size={event.file.size()}")

    ui.upload(on_upload=show_upload, auto_upload=True, label="upload")


def block_the_event_loop() -> None:
    """Do what a careless handler does: nobody on this process is served meanwhile."""
    time.sleep(BLOCK_S)


def healthz() -> dict[str, int]:
    return {"pid": PID}


def main() -> None:
    while ARGUMENTS.version_file and ARGUMENTS.version_file.with_suffix(".hold").exists():
        time.sleep(0.05)
    app.get("/healthz")(healthz)
    ui.page("/")(page)
    ui.run(
        host="127.0.0.1",
        port=ARGUMENTS.port,
        reconnect_timeout=ARGUMENTS.reconnect_timeout_s,
        storage_secret=os.environ["STORAGE_SECRET"],
        tailwind=False,
        reload=False,
        show=False,
        uvicorn_logging_level="info",
    )


main()
