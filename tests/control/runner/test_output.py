"""The output of app processes: names, colours, and that nobody who does not read it holds up the event loop."""

from __future__ import annotations

import io
import os
import pty
import re
import threading
import tty
from contextlib import contextmanager
from functools import partial
from time import monotonic, sleep
from typing import TYPE_CHECKING, TextIO

import pytest

from stickyproxy.control.runner import output as module
from stickyproxy.control.runner.output import QUEUE_CHARACTERS, QUEUE_LINES, Output
from tests.helpers.loops import no_leak

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 30
PIPE_BYTES = 65_536


def wait_for(condition: Callable[[], object]) -> None:
    until = monotonic() + DEADLINE_S
    while not condition():
        assert monotonic() < until, "the condition did not come true in time"
        sleep(0.005)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with no_leak():
        yield
        wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("output")])


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


class Reader:
    """The end that reads; `data` is what has come so far."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.data = b""
        self.packets: list[bytes] = []
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while some := os.read(self.descriptor, 1 << 16):
                self.packets.append(some)
                self.data += some
        except OSError:  # so a terminal says that nobody is there any more
            pass

    def join(self) -> str:
        assert self._thread is not None
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the other end is still open"
        return self.data.decode()


@contextmanager
def pipe(flags: int = 0) -> Iterator[tuple[TextIO, Reader]]:
    reading, writing = os.pipe2(flags)
    stream = os.fdopen(writing, "w", encoding="utf-8")
    try:
        yield stream, Reader(reading)
    finally:
        stream.close()
        os.close(reading)


@contextmanager
def terminal() -> Iterator[tuple[TextIO, Reader]]:
    reading, writing = pty.openpty()
    tty.setraw(writing)
    stream = os.fdopen(writing, "w", encoding="utf-8")
    try:
        yield stream, Reader(reading)
    finally:
        stream.close()
        os.close(reading)


def written(opened: tuple[TextIO, Reader], *lines: tuple[str, str], names_width: int = 4) -> str:
    """Return all that lines become."""
    stream, reader = opened
    reader.start()
    output = Output(stream, names_width)
    for upstream_id, line in lines:
        output.write(upstream_id, line)
    output.close()
    assert output.dropped == 0
    stream.close()
    return reader.join()


# What is written


def test_each_line_has_its_name() -> None:
    with pipe() as opened:
        text = written(opened, ("g1-1", "one"), ("g1-2", ""), ("g1-1", "  two\t é \udcff"))
    assert text == "g1-1 | one\ng1-2 | \ng1-1 |   two\t é \\udcff\n"


def test_names_are_padded_to_the_longest() -> None:
    with pipe() as opened:
        text = written(opened, ("g1-1", "a"), ("g12-10", "b"), ("g1-1", "c"), names_width=5)
    assert text == "g1-1  | a\ng12-10 | b\ng1-1   | c\n"


def test_on_a_terminal_the_names_have_six_colours() -> None:
    with terminal() as opened:
        text = written(opened, *((f"g1-{number}", "x") for number in range(1, 8)), ("other", "x"))
    colours = re.findall(r"\x1b\[(3[1-6])m(?:g1-\d|other) *\|\x1b\[0m x\n", text)
    assert len(colours) == 8
    assert len(set(colours[:6])) == 6
    assert colours[6] == colours[0], "the seventh has that of the first again"


def test_a_process_keeps_its_colour_in_the_next_generation() -> None:
    with terminal() as opened:
        first, second = written(opened, ("g1-3", "x"), ("g9-3", "x")).splitlines()
    assert first == second.replace("g9-3", "g1-3")


def test_a_colour_that_the_app_left_on_ends_with_its_line() -> None:
    with terminal() as opened:
        text = written(opened, ("g1-1", "\x1b[31mred"), ("g1-1", "plain"))
    red, plain = text.splitlines()
    assert red.endswith(" \x1b[31mred\x1b[0m")
    assert plain.endswith(" plain")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with terminal() as opened:
        assert written(opened, ("g1-1", "x")) == "g1-1 | x\n"


def test_an_empty_no_color_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """So no-color.org says, and so it can be undone for one command."""
    monkeypatch.setenv("NO_COLOR", "")
    with terminal() as opened:
        assert "\x1b" in written(opened, ("g1-1", "x"))


def test_lines_come_without_a_close() -> None:
    with pipe() as (stream, reader):
        output = Output(stream)
        reader.start()
        output.write("g1-1", "now")
        wait_for(lambda: reader.data == b"g1-1 | now\n")
        output.write("g1-1", "then")
        wait_for(lambda: reader.data == b"g1-1 | now\ng1-1 | then\n")
        output.close()
        stream.close()
        reader.join()


def test_nothing_is_written_after_the_end() -> None:
    with pipe() as (stream, reader):
        output = Output(stream)
        output.close()
        output.write("g1-1", "late")
        output.close()
        assert output.dropped == 1
        stream.close()
        reader.start()
        assert reader.join() == ""


def test_whole_lines_are_written_at_once() -> None:
    """Others write to the same pipe; what they write does not come within a line of up to PIPE_BUF bytes."""
    lines = [("g1-1", "x" * (number * 37 % 1500)) for number in range(500)]
    with pipe(os.O_DIRECT) as opened:  # a pipe that keeps apart what is written at once: pipe(2)
        text = written(opened, *lines)
        packets = opened[1].packets
    assert text == "".join(f"{name} | {line}\n" for name, line in lines)
    assert all(packet.endswith(b"\n") for packet in packets)
    assert 1 < len(packets) < len(lines), "not each line by itself"


def test_a_line_longer_than_a_pipe_takes_at_once_comes_whole() -> None:
    with pipe() as opened:
        text = written(opened, ("g1-1", "é" * 8192), ("g1-2", "x"))
    assert text == f"g1-1 | {'é' * 8192}\ng1-2 | x\n"


# Nobody reads


def check_lines(text: str, count: int) -> int:
    """Check that lines `g1-1 | <number>....` are whole and in order; return how many there are."""
    lines = text.splitlines(keepends=True)
    numbers = [int(match[1]) for line in lines if (match := re.fullmatch(r"g1-1 \| (\d{8})\.{500}\n", line))]
    assert len(numbers) == len(lines), "a line is not whole"
    assert numbers == sorted(set(numbers))
    assert numbers[-1] < count
    return len(numbers)


def test_a_full_pipe_drops_lines_and_counts_them(caplog: pytest.LogCaptureFixture) -> None:
    count = QUEUE_LINES + 1000
    with pipe() as (stream, reader):
        output = Output(stream)
        for number in range(count):
            output.write("g1-1", f"{number:08d}{'.' * 500}")  # would wait here for ever, did it write by itself
        assert output.dropped > 0
        reader.start()
        wait_for(lambda: "were dropped: nobody read them in time" in caplog.text)
        output.close()
        stream.close()
        assert check_lines(reader.join(), count) + output.dropped == count
        assert f"{output.dropped} lines of app processes were dropped" in caplog.text


def test_the_control_a_reader_in_time_gets_every_line(caplog: pytest.LogCaptureFixture) -> None:
    count = 4 * PIPE_BYTES // 500
    with pipe() as (stream, reader):
        output = Output(stream)
        reader.start()
        for number in range(count):
            output.write("g1-1", f"{number:08d}{'.' * 500}")
        output.close()
        stream.close()
        assert check_lines(reader.join(), count) == count
        assert output.dropped == 0
    assert caplog.text == ""


def test_the_end_comes_though_nobody_reads() -> None:
    count = 4 * PIPE_BYTES // 500
    with pipe() as (stream, reader):
        output = Output(stream)
        for number in range(count):
            output.write("g1-1", f"{number:08d}{'.' * 500}")
        output.close()
        assert output.dropped > 0
        stream.close()
        reader.start()
        text = reader.join()
        whole, _, _ = text.rpartition("\n")
        assert check_lines(f"{whole}\n", count) + output.dropped == count


def test_the_queue_is_bounded_by_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_LINES", 1 << 60)
    with pipe() as (stream, _):
        output = Output(stream)
        fitting = (QUEUE_CHARACTERS + PIPE_BYTES) // 8192
        for _ in range(fitting + 10):
            output.write("g1-1", "x" * 8192)
        assert 0 < output.dropped <= 10 + PIPE_BYTES // 8192
        output.close()


def test_a_stopped_terminal_drops_lines() -> None:
    with terminal() as (stream, _):
        output = Output(stream)
        for _ in range(QUEUE_LINES + 1000):
            output.write("g1-1", "x" * 500)
        assert output.dropped > 0
        output.close()


def has_dropped(output: Output, count: int) -> bool:
    return output.dropped == count


def test_a_reader_that_went_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        output = Output(stream)
        for number in range(3):
            output.write("g1-1", "x")
            wait_for(partial(has_dropped, output, number + 1))
        output.close()
    assert caplog.text.count("cannot write the output of app processes: broken pipe") == 1


def test_a_write_that_takes_nothing_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have made the terminal non-blocking, which is the same for all who have it open."""
    refused: list[int] = []

    def write(descriptor: int, data: memoryview, into: Callable[[int, memoryview], int] = os.write) -> int:
        if len(refused) < 3:
            refused.append(descriptor)
            raise BlockingIOError
        return into(descriptor, data[:5])

    monkeypatch.setattr(os, "write", write)
    with pipe() as opened:
        assert written(opened, ("g1-1", "x" * 100), ("g1-2", "y")) == f"g1-1 | {'x' * 100}\ng1-2 | y\n"
    assert len(refused) == 3


def test_the_queue_has_room_again_for_what_was_written() -> None:
    with pipe() as (stream, reader):
        reader.start()
        output = Output(stream)
        for _ in range(3):
            for _ in range(QUEUE_CHARACTERS // 8192 - 10):
                output.write("g1-1", "x" * 8192)
            wait_for(lambda: not output._queue)
        assert output.dropped == 0
        output.close()
        stream.close()
        assert reader.join().count("\n") == 3 * (QUEUE_CHARACTERS // 8192 - 10)


def test_what_is_left_when_the_time_is_over_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a reader that takes some now and then."""
    monkeypatch.setattr(module, "_GATHER_S", DEADLINE_S)
    monkeypatch.setattr(module, "_FLUSH_S", 0.0)
    with pipe() as (stream, reader):
        reader.start()
        output = Output(stream)
        for _ in range(10):
            output.write("g1-1", "x")
        output.close()
        wait_for(lambda: not output._thread.is_alive)
        stream.close()
        assert reader.join() == ""
        assert output.dropped == 10


@pytest.mark.parametrize("kind", ["none", "of no file", "closed"])
def test_without_a_stream_lines_are_counted_only(kind: str) -> None:
    stream: TextIO | None = None if kind == "none" else io.StringIO()
    if stream is not None and kind == "closed":
        stream.close()
    output = Output(stream)
    output.write("g1-1", "x")
    assert output.dropped == 1
    output.close()
    assert output.dropped == 1
