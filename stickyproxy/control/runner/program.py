"""How the small programs of this folder are started, which import neither this package nor any other."""

from __future__ import annotations

import fcntl
import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ABOVE: Final = 16  # all numbers that a program is given
_STANDARD: Final = 3


def start_program(
    name: str, arguments: Sequence[str], environment: Mapping[str, str], descriptors: Mapping[int, int]
) -> int:
    """Start the file `name` of this folder, and return its process id.

    It has a session of its own where the system can start one so; else it must make one. `descriptors` says, for each
    that it has, which one of this process it is; of 0, 1 and 2 those that are not named are /dev/null. It has no other.
    Raises OSError, and ValueError for what no program can be given, as a NUL.
    """
    command = [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name(name)), *arguments]
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_CLOSE, one) for one in _list_inheritable()]
    actions += [
        (os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0)
        for number in range(_STANDARD)
        if number not in descriptors
    ]
    with ExitStack() as stack:
        for theirs, ours in descriptors.items():
            # A number that is one of theirs would be overwritten, or, if it is the very same, closed by the execution.
            lifted = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
            stack.callback(os.close, lifted)
            actions.append((os.POSIX_SPAWN_DUP2, lifted, theirs))
        try:
            return os.posix_spawn(command[0], command, environment, file_actions=actions, setsid=True)
        except NotImplementedError:
            return os.posix_spawn(command[0], command, environment, file_actions=actions)


def _list_inheritable() -> list[int]:
    """Return the descriptors that a program would inherit: those, for instance, that this process has inherited."""
    found = []
    with suppress(OSError):
        for name in os.listdir("/dev/fd"):  # noqa: PTH208 -- names, no paths
            with suppress(OSError):  # that of the listing itself
                if int(name) >= _STANDARD and os.get_inheritable(int(name)):
                    found.append(int(name))
    return found
