"""An MCP server over streamable HTTP, whose tool counts its calls for each session, in the memory of this process."""

import os
from weakref import WeakKeyDictionary

from mcp.server.fastmcp import Context, FastMCP
from mcp.server.session import ServerSession

PROCESS = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")  # such as g1-2

mcp = FastMCP("A server in several processes")  # not stateless_http, with which there would be no session to keep
counts: WeakKeyDictionary[ServerSession, int] = WeakKeyDictionary()


@mcp.tool()
def count(context: Context) -> str:
    """Count one further."""
    counts[context.session] = counts.get(context.session, 0) + 1
    return f"{counts[context.session]} counted by {PROCESS}"


app = mcp.streamable_http_app()
