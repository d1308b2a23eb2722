"""A `stickyproxy serve` of one's own, with any configuration and options: for tests of how it starts and stops."""

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.processes import Child, Children, free_port, http_status, wait_until

REPOSITORY = Path(__file__).parents[2]


def can_listen(port: int) -> bool:
    """Say whether nobody listens on a port of 127.0.0.1; connections that linger in TIME_WAIT do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


class Serving:
    """A proxy on `port`, its admin listener on `admin_port`; `options` follow `serve` on its command line.

    `configuration` is laid over a file with these two addresses and nothing else; None starts it without a file.
    """

    def __init__(
        self,
        children: Children,
        configuration: Mapping[str, Any] | None,
        *,
        name: str = "proxy",
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self.home = children.directory / f"{name}-home"
        self.home.mkdir(exist_ok=True)
        file = children.directory / f"{name}.yaml"
        words: list[str | Path] = ["serve", *options]
        if configuration is not None:
            basis = {"listeners": [f"127.0.0.1:{self.port}"], "admin": {"address": f"127.0.0.1:{self.admin_port}"}}
            self.configuration = {**basis, **configuration}
            file.write_text(yaml.safe_dump(self.configuration, sort_keys=False))
            words += ["--config", file]
        homes = {"HOME": str(self.home), "XDG_STATE_HOME": str(self.home)}
        self.child: Child = children.start_stickyproxy(name, *words, env={**homes, **(env or {})})

    @property
    def log(self) -> str:
        """Everything that it has printed so far."""
        return self.child.log.read_text()

    def ready_status(self) -> int | None:
        """Return the status of /readyz, None where nobody answers."""
        return http_status(f"http://127.0.0.1:{self.admin_port}/readyz")

    def wait_for_log(self, text: str) -> None:
        """Wait until it has printed a text."""
        wait_until(lambda: text in self.log or not self.child.is_running(), f"the log says {text!r}")
        assert text in self.log, self.log

    def wait_until_serving(self) -> None:
        """Wait until it accepts clients; an upstream may be lacking."""
        self.wait_for_log("serving ")
