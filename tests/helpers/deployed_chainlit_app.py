"""A Chainlit chat whose replies tell the version that they are of, and their number in the session.

Run by the interpreter that has Chainlit, which loads the file a second time as the module that holds the chat's
handlers. The version is what the file held when the process started, which waits as long as there is a file
of that name with the suffix `.hold`.
"""

import argparse
import os
import time
from pathlib import Path

import chainlit as cl
import uvicorn
from chainlit.utils import mount_chainlit
from fastapi import FastAPI

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--port", type=int, required=True)
PARSER.add_argument("--version-file", type=Path, required=True)
ARGUMENTS = PARSER.parse_args()
VERSION = ARGUMENTS.version_file.read_text()


async def answer(message: cl.Message) -> None:
    """Count the messages of this session, which only this process knows."""
    count = cl.user_session.get("count", 0) + 1
    cl.user_session.set("count", count)
    upstream = os.environ["STICKYPROXY_UPSTREAM"]
    await cl.Message(content=f"{message.content}: reply {count} version={VERSION} upstream={upstream}").send()


def healthz() -> dict[str, str]:
    return {"version": VERSION}


def serve() -> None:
    while ARGUMENTS.version_file.with_suffix(".hold").exists():
        time.sleep(0.05)
    app = FastAPI()
    app.get("/healthz")(healthz)
    mount_chainlit(app, target=__file__, path="/chat")
    uvicorn.run(app, host="127.0.0.1", port=ARGUMENTS.port)


if __name__ == "__main__":
    serve()
else:
    cl.on_message(answer)
