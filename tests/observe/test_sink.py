"""The thread that writes, and where it writes to; what the logs that use both do is shown with them."""

import os
import signal
import threading
from pathlib import Path

import pytest

from stickyproxy.observe.sink import Sink, WriterThread

DEADLINE_S = 30.0
NAME = "a writer of the test"


def test_what_was_added_is_written_and_the_rest_at_the_end() -> None:
    written, has_written = list[int](), threading.Event()
    queue = [1]

    def write() -> None:
        written.extend(queue)
        queue.clear()
        has_written.set()

    thread = WriterThread(NAME, write, gather_s=0.0)
    assert not thread.has_started
    thread.start()
    thread.wake()
    assert has_written.wait(DEADLINE_S)
    assert thread.is_alive
    queue.append(2)  # nobody wakes it for that
    thread.close(DEADLINE_S)
    assert written == [1, 2]
    assert (thread.is_closing, thread.is_alive, thread.has_started) == (True, False, True)


def test_a_thread_that_gathers_writes_once_for_many() -> None:
    calls: list[None] = []
    thread = WriterThread(NAME, lambda: calls.append(None), gather_s=DEADLINE_S)
    thread.start()
    for _ in range(100):
        thread.wake()
    thread.close(DEADLINE_S)
    assert len(calls) == 2, "when it has gathered, and at the end"


def test_a_write_that_hangs_is_left_behind() -> None:
    may_end = threading.Event()

    def hang() -> None:
        may_end.wait(DEADLINE_S)

    thread = WriterThread(NAME, hang, gather_s=0.0)
    thread.start()
    thread.wake()
    thread.close(0.0)
    assert thread.is_alive
    may_end.set()


def test_signals_are_left_to_the_main_thread() -> None:
    held: list[set[int]] = []
    thread = WriterThread(NAME, lambda: held.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))), gather_s=0.0)
    thread.start()
    thread.close(DEADLINE_S)
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2} <= held[0]


def test_one_that_never_began_is_closed_at_once() -> None:
    thread = WriterThread(NAME, lambda: None, gather_s=0.0)
    thread.close(DEADLINE_S)
    assert thread.is_closing


def test_a_line_that_was_cut_off_is_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    sink = Sink("the test", descriptor=writing)
    real_write, room = os.write, 3

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(28, "No space left on device")
        taken = real_write(descriptor, data[:room])
        room -= taken
        return taken

    monkeypatch.setattr(os, "write", write)
    sink.write([b"first\n", b"second\n"])
    assert (sink.lost, sink.is_failing) == (2, True)
    room = 100
    sink.write([b"third\n"])
    assert os.read(reading, 100) == b"fir\nthird\n"
    assert (sink.lost, sink.is_failing) == (2, False)
    sink.close()
    os.close(writing)  # it was given: still open
    os.close(reading)


def test_a_file_is_its_own(tmp_path: Path) -> None:
    sink = Sink("the test", str(tmp_path / "lines"))
    sink.open()
    sink.write([b"one\n"])
    sink.close()
    sink.close()
    assert (tmp_path / "lines").read_bytes() == b"one\n"
