"""A Shiny page with an upload and a dynamic route, whose count and process it tells; run by a Python that has Shiny."""

import argparse
import os

from shiny import App, Inputs, Outputs, Session, render, ui  # type: ignore[import-not-found]
from starlette.requests import Request  # type: ignore[import-not-found]
from starlette.responses import JSONResponse  # type: ignore[import-not-found]

PROCESS = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")


def server(input: Inputs, _output: Outputs, session: Session) -> None:  # noqa: A002  # Shiny's own word
    count = 0

    def answer(_: Request) -> JSONResponse:
        nonlocal count
        count += 1
        return JSONResponse({"count": count, "process": PROCESS})

    url: str = session.dynamic_route("count", answer)

    def route() -> str:
        return url

    def uploaded() -> str:
        return "".join(f"{file['size']} bytes" for file in input.file() or ())

    render.text(route)
    render.text(uploaded)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    page = ui.page_fluid(ui.input_file("file", "A file"), ui.output_text("route"), ui.output_text("uploaded"))
    App(page, server).run(host="127.0.0.1", port=parser.parse_args().port)


main()
