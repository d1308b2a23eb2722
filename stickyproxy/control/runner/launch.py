"""The program that becomes an app process, once the supervisor says so: `launch.py KEPT DIRECTORY WORD...`.

It imports nothing that is not needed, since its start delays that of each app process: `typing` alone took 8 ms. It has
a session of its own, so that its process id is the id of its group, whatever it starts itself. On its descriptor 3, a
socket of the supervisor, it says that it is there, and waits for the word. End of file instead says that the supervisor
is gone: it ends, as nobody else would end it. Where it cannot become the app it says why, as `<errno> <step>`; else the
socket closes by itself.
"""

from __future__ import annotations

import errno
import os
import signal
import sys

LINK = 3
NOT_FOUND = 127  # exit statuses as of a shell
NOT_EXECUTABLE = 126


def main() -> int:
    """Wait for the word, then become the app; return an exit status where that does not come to pass."""
    locale, directory, *words = sys.argv[1:]
    os.set_inheritable(LINK, False)
    if os.getpgrp() != os.getpid():  # where a process cannot be started in a session of its own
        os.setsid()
    try:
        os.write(LINK, b".")
        if not os.read(LINK, 1):
            return 0
    except OSError:
        return 0
    if not locale:  # Python itself may have set it
        os.environ.pop("LC_CTYPE", None)
    return become(directory, words)


def become(directory: str, words: list[str]) -> int:
    """Execute a command, found by PATH, in a directory; report the error, and return the exit status, if it cannot."""
    step = "chdir"
    try:
        if directory:
            os.chdir(directory)
        step = "exec"
        reset_signals()
        os.execvpe(words[0], words, os.environ)  # noqa: S606 -- the command of the operator, without a shell
    except (OSError, ValueError) as error:  # the latter for a word without a letter
        number = getattr(error, "errno", errno.ENOENT)
        if step == "exec" and number == errno.ENOENT and os.path.exists(words[0]):  # noqa: PTH110 -- slow to import
            step = "interpreter"
        os.write(LINK, f"{number} {step}".encode())
        return NOT_FOUND if number == errno.ENOENT else NOT_EXECUTABLE


def reset_signals() -> None:
    """Let each signal do what it does by default, and block none: Python, nohup and the supervisor change some."""
    for number in signal.valid_signals():
        if number not in {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


if __name__ == "__main__":
    sys.exit(main())
