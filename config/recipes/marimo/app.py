"""A marimo notebook that counts: button and count live in a kernel, which one process runs for each page."""

# Cells are functions as marimo itself writes them.
# ruff: noqa: ANN001, ANN202, PLC0415

import marimo

app = marimo.App(app_title="A notebook in several processes")


@app.cell
def _():
    import os

    import marimo as mo

    process = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")  # such as g1-2
    return mo, process


@app.cell
def _(mo):
    button = mo.ui.button(label="Count", value=0, on_click=lambda count: count + 1)
    factor = mo.ui.slider(1, 9, label="Factor", show_value=True)
    mo.vstack([button, factor])
    return button, factor


@app.cell
def _(button, factor, mo, process):
    mo.md(f"{button.value} counted by {process}, times {factor.value} is {button.value * factor.value}")


if __name__ == "__main__":
    app.run()
