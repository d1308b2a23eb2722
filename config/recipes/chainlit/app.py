"""A Chainlit chat that counts messages and reads uploads, in the process that has the session."""

import os
from pathlib import Path

import chainlit as cl

PROCESS = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")  # such as g1-2


@cl.on_chat_start
async def begin() -> None:
    """Begin a session, which this process alone knows."""
    cl.user_session.set("count", 0)
    cl.user_session.set("files", [])
    await cl.Message(f"This chat lives in {PROCESS}. Say something, or attach a text.").send()


@cl.on_message
async def answer(message: cl.Message) -> None:
    """Tell which message of the session this is, and how long its uploads are, old ones too."""
    count = cl.user_session.get("count") + 1
    files = cl.user_session.get("files") + message.elements
    cl.user_session.set("count", count)
    cl.user_session.set("files", files)
    await cl.Message("; ".join([f"Message {count}, answered by {PROCESS}", *map(describe, files)])).send()


def describe(file: cl.File) -> str:
    """Read an upload, which Chainlit keeps on the disk."""
    return f"{file.name} has {len(Path(file.path).read_text())} characters"
