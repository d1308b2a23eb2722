"""A NiceGUI page: a counter in the memory of the process that made the page, and a name that outlives the page."""

import os

from nicegui import app, ui

PROCESS = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")  # such as g1-2


@ui.page("/")
def page() -> None:
    """Make a page of its own for each visit."""
    count = 0

    def count_up() -> None:
        nonlocal count
        count += 1
        label.set_text(f"You have clicked {count} times.")

    ui.label(f"This page lives in {PROCESS}.")
    label = ui.label("You have not clicked yet.")
    ui.button("Click", on_click=count_up)
    ui.input("Your name").bind_value(app.storage.user, "name")


ui.run(
    host="127.0.0.1",
    port=int(os.environ.get("PORT", "8000")),  # stickyproxy gives each process a port of its own
    storage_secret=os.environ.get("STORAGE_SECRET", "for development only"),
    reload=False,  # else this process would only watch another one; for development: stickyproxy run --reload
    show=False,
    show_welcome_message=False,  # it names the address of one process, which is not for visitors
)
