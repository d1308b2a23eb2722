"""Flask with Socket.IO: a counter for each connection, in the memory of the process that has it."""

import os

from flask import Flask, request
from flask_socketio import SocketIO, emit

PROCESS = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")  # such as g1-2
PAGE = """<!doctype html>
<title>Flask-SocketIO in several processes</title>
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

app = Flask(__name__)
socketio = SocketIO(app, async_mode="threading")  # simple-websocket gives it WebSockets; without, it only polls
counts: dict[str, int] = {}


@app.get("/")
def page() -> str:
    """Give the page, which opens the connection."""
    return PAGE


@app.get("/healthz")
def healthz() -> dict[str, str]:
    """Tell that this process serves."""
    return {"process": PROCESS}


@socketio.on("connect")
def connect() -> None:
    """Begin a session, which this process alone knows."""
    counts[request.sid] = 0
    emit("welcome", PROCESS)


@socketio.on("disconnect")
def disconnect(_reason: str) -> None:
    """Forget the session."""
    counts.pop(request.sid, None)


@socketio.on("click")
def click() -> None:
    """Count a click."""
    counts[request.sid] += 1
    emit("count", counts[request.sid])
