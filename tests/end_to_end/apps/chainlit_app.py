"""A Chainlit chat that says which process answers; run by the interpreter that has Chainlit.

It is mounted at ``/chat`` in a FastAPI app under uvicorn with one worker. Run as a script, the file serves itself:
Chainlit loads it a second time as the module that holds the chat's handlers. Where a file holds the app's version, the
process waits until there is no file of that name with the suffix ``.hold``.
"""

import argparse
import os
import time
from pathlib import Path

import chainlit as cl
import uvicorn
from chainlit.utils import mount_chainlit
from fastapi import FastAPI

PID = os.getpid()
VERSION = "CHAT_VERSION"  # in the environment, for the module that has the handlers


async def answer(message: cl.Message) -> None:
    """Count the messages of this session, which only this process knows."""
    count = cl.user_session.get("count", 0) + 1
    cl.user_session.set("count", count)
    version, upstream = os.environ.get(VERSION), os.environ.get("STICKYPROXY_UPSTREAM")
    deployed = f" version={version} upstream={upstream}" if version else ""
    files = f" files={len(message.elements)}" if message.elements else ""
    await cl.Message(content=f"{message.content}: reply {count} pid={PID}{deployed}{files}").send()


def healthz() -> dict[str, int]:
    return {"pid": PID}


def serve() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--version-file", type=Path, help="which version a process is of that starts now")
    arguments = parser.parse_args()
    if arguments.version_file:
        os.environ[VERSION] = arguments.version_file.read_text()
        while arguments.version_file.with_suffix(".hold").exists():
            time.sleep(0.05)
    app = FastAPI()
    app.get("/healthz")(healthz)
    mount_chainlit(app, target=__file__, path="/chat")
    uvicorn.run(app, host="127.0.0.1", port=arguments.port)


if __name__ == "__main__":
    serve()
else:
    cl.on_message(answer)
