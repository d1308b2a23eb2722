"""A Gradio page: a count, slow work and an upload, in the memory of the process that made the page."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

PROCESS = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")  # such as g1-2


def count(number: int) -> tuple[int, str]:
    """Count one further."""
    return number + 1, f"{number + 1} counted by {PROCESS}"


def work() -> Iterator[str]:
    """Say how far the work is, step by step."""
    for step in range(1, 6):
        yield f"step {step} of 5 by {PROCESS}"
        time.sleep(0.5)


def measure(path: str) -> str:
    """Say how large an uploaded file is."""
    return f"{Path(path).stat().st_size} bytes uploaded to {PROCESS}"


with gr.Blocks(title="Count") as demo:
    number = gr.State(0)  # one for each page
    counted = gr.Markdown(f"0 counted by {PROCESS}")
    gr.Button("Count").click(count, number, [number, counted])

    progress = gr.Markdown()
    gr.Button("Work").click(work, None, progress)

    file = gr.File(label="A file")
    size = gr.Markdown()
    file.upload(measure, file, size)

demo.launch()
