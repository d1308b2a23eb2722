"""A marimo notebook: a button that counts, and the process that counted; run by a Python that has marimo."""

# Cells are functions as marimo writes them: what they import and show is the notebook's.
# ruff: noqa: ANN001, ANN202, B018, B021, PLC0415
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"

import marimo  # type: ignore[import-not-found]

app = marimo.App()


@app.cell
def _():
    import os

    import marimo as mo

    return mo, os


@app.cell
def _(mo):
    button = mo.ui.button(label="Count", value=0, on_click=lambda count: count + 1)
    button
    return (button,)


@app.cell
def _(button, os):
    f"{button.value} counted by {os.environ.get('STICKYPROXY_UPSTREAM', 'the only process')}"


if __name__ == "__main__":
    app.run()
