"""The chat of the browser tests as an ASGI application: `chat_app:app`, for servers run by Chainlit's Python.

It is the same for each of them; `/healthz` says which process answers.
"""

import os
from pathlib import Path

from chainlit.utils import mount_chainlit
from fastapi import FastAPI

PID = os.getpid()
CHAT = Path(__file__).parents[2] / "end_to_end" / "apps" / "chainlit_app.py"


def healthz() -> dict[str, int]:
    return {"pid": PID}


app = FastAPI()
app.get("/healthz")(healthz)
mount_chainlit(app, target=str(CHAT), path="/chat")
