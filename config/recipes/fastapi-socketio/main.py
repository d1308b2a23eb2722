"""FastAPI with Socket.IO: a counter for each connection, in the memory of the process that has it."""

import os

import socketio
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

PROCESS = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")  # such as g1-2
PAGE = """<!doctype html>
<title>Socket.IO in several processes</title>
<link rel="icon" href="data:,">
<p id="process">Connecting ...</p>
<p id="count"></p>
<button onclick="socket.emit('click')">Click</button>
<script src="https://cdn.socket.io/4.8.1/socket.io.min.js"></script>
<script>
  const show = (id, text) => { document.getElementById(id).textContent = text; };
  const socket = io();  // as it comes: HTTP polling first, then a WebSocket for the same session
  socket.on("welcome", (process) => show("process", `This connection lives in ${process}.`));
  socket.on("count", (count) => show("count", `You have clicked ${count} times.`));
  socket.on("connect_error", (error) => show("process", `Not connected: ${error.message}`));
</script>
"""

sio = socketio.AsyncServer(async_mode="asgi")
api = FastAPI()
app = socketio.ASGIApp(sio, api)


@api.get("/", response_class=HTMLResponse)
async def page() -> str:
    """Give the page, which opens the connection."""
    return PAGE


@api.get("/healthz")
async def healthz() -> dict[str, str]:
    """Tell that this process serves."""
    return {"process": PROCESS}


@sio.event
async def connect(sid: str, _environ: dict[str, object]) -> None:
    """Begin a session, which this process alone knows."""
    await sio.save_session(sid, {"count": 0})
    await sio.emit("welcome", PROCESS, to=sid)


@sio.event
async def click(sid: str) -> None:
    """Count a click."""
    async with sio.session(sid) as session:
        session["count"] += 1
        await sio.emit("count", session["count"], to=sid)
