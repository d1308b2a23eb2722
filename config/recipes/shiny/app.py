"""A count, an upload and a download, in the memory of the process that serves this page."""

import os
from collections.abc import Iterator

from shiny.express import input, render, ui

PROCESS = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")  # such as g1-2

ui.input_action_button("count", "Count")


@render.text
def counted() -> str:
    """Show how often the button was clicked."""
    return f"{input.count()} counted by {PROCESS}"


ui.input_file("file", "A file")


@render.text
def uploaded() -> str:
    """Show how large the uploaded file is."""
    return "".join(f"{file['size']} bytes uploaded to {PROCESS}" for file in input.file() or ())


@render.download_button(label="Download", filename="report.txt")
def report() -> Iterator[str]:
    """Give the count as a file."""
    yield f"{input.count()} counted by {PROCESS}\n"
