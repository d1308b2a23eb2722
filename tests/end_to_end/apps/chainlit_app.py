"""A Chainlit chat that says which process answers; run by the interpreter that has Chainlit.

It is mounted at ``/chat`` in a FastAPI app under uvicorn with one worker. Run as a script, the file serves itself:
Chainlit loads it a second time as the module that holds the chat's handlers.
"""

import argparse
import os

import chainlit as cl
import uvicorn
from chainlit.utils import mount_chainlit
from fastapi import FastAPI

PID = os.getpid()


async def answer(message: cl.Message) -> None:
    """Count the messages of this session, which only this process knows."""
    count = cl.user_session.get("count", 0) + 1
    cl.user_session.set("count", count)
    files = f" files={len(message.elements)}" if message.elements else ""
    await cl.Message(content=f"reply {count} pid={PID}{files}").send()


def healthz() -> dict[str, int]:
    return {"pid": PID}


def serve() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    app = FastAPI()
    app.get("/healthz")(healthz)
    mount_chainlit(app, target=__file__, path="/chat")
    uvicorn.run(app, host="127.0.0.1", port=arguments.port)


if __name__ == "__main__":
    serve()
else:
    cl.on_message(answer)
