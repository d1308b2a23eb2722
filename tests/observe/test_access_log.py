"""The access log: its two formats, and that nothing that happens to it reaches the event loop."""

import errno
import json
import logging
import os
import re
import select
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic, sleep

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stickyproxy import config
from stickyproxy.errors import UsageError
from stickyproxy.observe import access_log, sink
from stickyproxy.observe.access_log import FIELD_BYTES, AccessLog, format_combined, format_json
from stickyproxy.observe.record import Record

DEADLINE_S = 30
AT = datetime(2026, 3, 9, 7, 5, 3, 45_678, tzinfo=UTC)
EXCHANGE = Record(
    kind="exchange",
    request_id="00ff",
    client="192.0.2.7",
    method=b"GET",
    target=b"/a?b=c",
    host=b"example.com",
    status=200,
    upstream="app-1",
    affinity="hit",
    attempts=1,
    duration_s=0.0123456789,
    received_bytes=3,
    sent_bytes=1234,
    referer=b"http://example.com/",
    user_agent=b"curl/8",
)
TUNNEL = replace(EXCHANGE, kind="tunnel", status=101, close_code=1001, initiator="client", cause="close_frame")
COMBINED = re.compile(
    r'(?P<client>\S+) - - \[(?P<time>[^\]]+)\] "(?P<request>[^"]*)" (?P<status>\d+) (?P<size>\d+)'
    r' "(?P<referer>[^"]*)" "(?P<agent>[^"]*)"'
)


def wait_for(condition: Callable[[], object]) -> None:
    until = monotonic() + DEADLINE_S
    while not condition():
        assert monotonic() < until, "the condition did not come true in time"
        sleep(0.005)


# The formats


def test_json_has_the_facts_of_an_exchange() -> None:
    assert json.loads(format_json(AT, EXCHANGE)) == {
        "time": "2026-03-09T07:05:03.045Z",
        "kind": "exchange",
        "request_id": "00ff",
        "client": "192.0.2.7",
        "method": "GET",
        "target": "/a?b=c",
        "host": "example.com",
        "status": 200,
        "upstream": "app-1",
        "affinity": "hit",
        "attempts": 1,
        "duration_s": 0.012346,
        "received_bytes": 3,
        "sent_bytes": 1234,
        "referer": "http://example.com/",
        "user_agent": "curl/8",
        "error": "",
    }


def test_json_says_more_of_a_tunnel() -> None:
    more = {"kind": "tunnel", "status": 101, "close_code": 1001, "initiator": "client", "cause": "close_frame"}
    assert json.loads(format_json(AT, TUNNEL)) == json.loads(format_json(AT, EXCHANGE)) | more


def test_combined_is_what_the_tools_for_apache_and_nginx_read() -> None:
    assert format_combined(AT, EXCHANGE) == (
        '192.0.2.7 - - [09/Mar/2026:07:05:03 +0000] "GET /a?b=c HTTP/1.1" 200 1234 "http://example.com/" "curl/8"'
    )


def test_combined_has_a_dash_for_what_is_not_known() -> None:
    unreadable = replace(EXCHANGE, client="", method=b"", target=b"", referer=b"", user_agent=b"", status=400)
    assert format_combined(AT, unreadable) == '- - - [09/Mar/2026:07:05:03 +0000] "-" 400 1234 "-" "-"'


@pytest.mark.parametrize(
    ("raw", "in_json", "in_combined"),
    [
        (b"\x00", r"\u0000", r"\x00"),
        (b"\n", r"\n", r"\x0A"),
        (b"\x1b[2J", r"\u001b[2J", r"\x1B[2J"),
        (b"\x7f", r"\u007f", r"\x7F"),
        (b'"', r"\"", r"\x22"),
        (b"\\", r"\\", r"\x5C"),
        ("é".encode(), r"\u00c3\u00a9", r"\xC3\xA9"),
        (b"\xff", r"\u00ff", r"\xFF"),
        (b"~ !#[]", "~ !#[]", "~ !#[]"),
    ],
)
def test_bytes_are_escaped(raw: bytes, in_json: str, in_combined: str) -> None:
    record = replace(EXCHANGE, user_agent=raw)
    assert f'"user_agent":"{in_json}"' in format_json(AT, record)
    assert format_combined(AT, record).endswith(f' "{in_combined}"')


@given(st.binary(max_size=40), st.binary(max_size=40), st.text(max_size=20))
def test_any_bytes_stay_one_printable_line(first: bytes, second: bytes, text: str) -> None:
    record = replace(
        TUNNEL, method=first, target=second, host=first, referer=second, user_agent=first, client=text, error=text
    )
    for line in (format_json(AT, record), format_combined(AT, record)):
        assert line.isascii()
        assert line.isprintable()
    assert json.loads(format_json(AT, record))["target"].encode("latin-1") == second
    assert json.loads(format_json(AT, record))["error"] == text


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_no_field_can_forge_another(target: bytes, user_agent: bytes) -> None:
    line = format_combined(AT, replace(EXCHANGE, target=target, user_agent=user_agent, referer=target))
    match = COMBINED.fullmatch(line)
    assert match is not None
    assert match["status"] == "200"
    assert match["client"] == "192.0.2.7"


@pytest.mark.parametrize("name", ["method", "target", "host", "referer", "user_agent"])
def test_fields_are_cut(name: str) -> None:
    fields = {name: b"x" * (FIELD_BYTES + 1)}
    record = replace(EXCHANGE, **fields)  # type: ignore[arg-type]
    assert json.loads(format_json(AT, record))[name] == "x" * FIELD_BYTES
    assert "x" * (FIELD_BYTES + 1) not in format_combined(AT, record)


@pytest.mark.parametrize("name", ["client", "error"])
def test_texts_are_cut(name: str) -> None:
    fields = {name: "x" * (FIELD_BYTES + 1)}
    record = replace(EXCHANGE, **fields)  # type: ignore[arg-type]
    assert json.loads(format_json(AT, record))[name] == "x" * FIELD_BYTES
    assert "x" * (FIELD_BYTES + 1) not in format_combined(AT, record)


# The file


@pytest.fixture
def make_log() -> Iterator[Callable[..., AccessLog]]:
    logs: list[AccessLog] = []

    def make(path: Path | str, log_format: str = "json") -> AccessLog:
        logs.append(AccessLog(config.AccessLog.model_validate({"path": str(path), "format": log_format})))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


def _has_lines(path: Path, count: int) -> bool:
    return len(path.read_text().splitlines()) == count


def read_targets(path: Path) -> list[str]:
    return [json.loads(line)["target"] for line in path.read_text().splitlines()]


def targets(count: int, first: int = 0) -> list[Record]:
    return [replace(EXCHANGE, target=b"/%d" % number) for number in range(first, first + count)]


def test_records_are_appended_in_order_and_flushed_at_the_end(
    tmp_path: Path, make_log: Callable[..., AccessLog]
) -> None:
    path = tmp_path / "access.log"
    path.write_text('{"target": "before"}\n')
    log = make_log(path)
    log.start()
    for record in targets(2500):
        log.write(record)
    log.close()
    assert read_targets(path) == ["before", *(f"/{number}" for number in range(2500))]
    assert log.dropped == 0
    assert "access log" not in {thread.name for thread in threading.enumerate()}


def test_the_time_is_that_of_the_write(tmp_path: Path, make_log: Callable[..., AccessLog]) -> None:
    log = make_log(tmp_path / "access.log")
    log.start()
    before = datetime.now(UTC)
    log.write(EXCHANGE)
    after = datetime.now(UTC)
    log.close()
    written = datetime.fromisoformat(json.loads((tmp_path / "access.log").read_text())["time"])
    assert before.replace(microsecond=before.microsecond // 1000 * 1000) <= written <= after


def test_lines_appear_while_it_runs_in_the_format_of_the_file(
    tmp_path: Path, make_log: Callable[..., AccessLog]
) -> None:
    path = tmp_path / "access.log"
    log = make_log(path, "combined")
    log.start()
    for number in range(3):
        log.write(EXCHANGE)
        wait_for(partial(_has_lines, path, number + 1))
    assert COMBINED.fullmatch(path.read_text().splitlines()[0])


def test_the_file_is_opened_anew_when_it_was_moved_or_removed(
    tmp_path: Path, make_log: Callable[..., AccessLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "_REOPEN_S", 0.0)
    path = tmp_path / "access.log"
    log = make_log(path)
    log.start()
    log.write(replace(EXCHANGE, target=b"/1"))
    wait_for(path.read_text)
    path.rename(tmp_path / "access.log.1")
    log.write(replace(EXCHANGE, target=b"/2"))
    wait_for(lambda: path.exists() and path.read_text())
    path.rename(tmp_path / "access.log.2")
    path.touch()
    log.write(replace(EXCHANGE, target=b"/3"))
    wait_for(path.read_text)
    assert [read_targets(tmp_path / f"access.log{end}") for end in (".1", ".2", "")] == [["/1"], ["/2"], ["/3"]]


def test_a_file_that_is_in_place_is_not_opened_anew(
    tmp_path: Path, make_log: Callable[..., AccessLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "_REOPEN_S", 0.0)
    path = tmp_path / "access.log"
    log = make_log(path)
    log.start()
    opened: list[str] = []
    real_open = os.open

    def note_and_open(name: str, flags: int, mode: int) -> int:
        opened.append(name)
        return real_open(name, flags, mode)

    monkeypatch.setattr(os, "open", note_and_open)
    for number in range(3):
        log.write(EXCHANGE)
        wait_for(partial(_has_lines, path, number + 1))
    assert str(path) not in opened


def test_a_file_that_cannot_be_opened_is_an_error_of_the_operator(
    tmp_path: Path, make_log: Callable[..., AccessLog]
) -> None:
    with pytest.raises(UsageError, match=r"cannot open the access log .*/missing/a: no such file or directory"):
        make_log(tmp_path / "missing" / "a").start()


# Trouble


def test_a_pipe_that_nobody_reads_drops_lines_and_never_blocks(
    monkeypatch: pytest.MonkeyPatch, make_log: Callable[..., AccessLog], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access_log, "QUEUE_RECORDS", 5000)
    reader, writer = os.pipe()
    monkeypatch.setattr(sink, "STDOUT", writer)
    monkeypatch.setattr(access_log, "_FLUSH_S", 0.1)
    monkeypatch.setattr(sink, "_STUCK_S", 0.1)
    log = make_log("-")
    log.start()
    for record in targets(1000):  # some 300 KB: more than a pipe holds
        log.write(record)
    written = 1000
    wait_for(lambda: "cannot write the access log: nobody reads it" in caplog.text)
    while log.dropped == 0:
        log.write(EXCHANGE)
        written += 1
    log.close()  # returns although nobody has read
    os.set_blocking(reader, False)
    text = b""
    while select.select([reader], [], [], 0)[0]:
        text += os.read(reader, 1 << 20)
    os.close(reader)
    os.close(writer)
    whole = text.count(b"\n")
    assert whole > 0
    assert whole + log.dropped == written
    assert all(json.loads(line) for line in text.splitlines()[:whole])


def test_a_pipe_that_is_read_again_gets_all_that_was_not_dropped(
    monkeypatch: pytest.MonkeyPatch, make_log: Callable[..., AccessLog]
) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(sink, "STDOUT", writer)
    log = make_log("-")
    log.start()
    for record in targets(2000):  # some 600 KB: more than a pipe holds
        log.write(record)
    wait_for(lambda: not select.select([], [writer], [], 0)[1])
    text = b""
    while text.count(b"\n") < 2000:
        text += os.read(reader, 1 << 16)
    log.close()
    os.close(reader)
    os.close(writer)
    assert [json.loads(line)["target"] for line in text.splitlines()] == [f"/{number}" for number in range(2000)]
    assert log.dropped == 0


def test_a_reader_that_has_gone_costs_only_lines(
    monkeypatch: pytest.MonkeyPatch, make_log: Callable[..., AccessLog], caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(sink, "STDOUT", writer)
    os.close(reader)
    log = make_log("-")
    log.start()
    log.write(EXCHANGE)
    wait_for(lambda: log.dropped == 1)
    log.write(EXCHANGE)
    wait_for(lambda: log.dropped == 2)
    log.close()
    os.close(writer)
    assert caplog.text.count("cannot write the access log: broken pipe") == 1


def test_a_fifo_may_have_no_reader_yet(tmp_path: Path, make_log: Callable[..., AccessLog]) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    log = make_log(path)
    log.start()
    log.write(replace(EXCHANGE, target=b"/lost"))
    wait_for(lambda: log.dropped == 1)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log.write(replace(EXCHANGE, target=b"/read"))
    wait_for(lambda: select.select([reader], [], [], 0)[0])
    assert json.loads(os.read(reader, 1 << 16))["target"] == "/read"
    os.close(reader)


class Disk:
    """Stands in for os.write: takes `room` bytes, then the disk is full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.text = b""

    def write(self, _: int, data: bytes | memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = bytes(data[: self.room])
        self.text += taken
        self.room -= len(taken)
        return len(taken)


def test_a_full_disk_drops_lines_and_the_next_whole_line_stands_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_log: Callable[..., AccessLog],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    line_bytes = len(format_json(AT, EXCHANGE)) + 1
    disk = Disk(line_bytes + 10)
    monkeypatch.setattr(os, "write", disk.write)
    log = make_log(tmp_path / "access.log")
    for _ in range(3):
        log.write(EXCHANGE)  # all in one batch: the thread does not run yet
    log.start()
    wait_for(lambda: log.dropped == 2)
    disk.room = 10 * line_bytes
    log.write(replace(EXCHANGE, target=b"/again"))
    wait_for(lambda: disk.text.endswith(b"}\n") and disk.text.count(b"\n") == 3)
    first, cut, last = disk.text.splitlines()
    assert json.loads(first)["target"] == "/a?b=c"
    assert len(cut) == 10
    assert json.loads(last)["target"] == "/again"
    assert log.dropped == 2
    wait_for(lambda: "the access log is written again" in caplog.text)
    assert caplog.text.count("no space left on device") == 1


def test_a_write_that_would_block_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_log: Callable[..., AccessLog]
) -> None:
    real_write, refusals = os.write, iter((True, False))

    def write(descriptor: int, data: bytes) -> int:
        if next(refusals, False):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    log = make_log(tmp_path / "access.log")
    log.start()
    log.write(EXCHANGE)
    log.close()
    assert read_targets(tmp_path / "access.log") == ["/a?b=c"]


def test_a_record_that_cannot_be_formatted_does_not_end_the_log(
    tmp_path: Path, make_log: Callable[..., AccessLog], caplog: pytest.LogCaptureFixture
) -> None:
    log = make_log(tmp_path / "access.log")
    log.start()
    log.write(replace(EXCHANGE, duration_s="long"))  # type: ignore[arg-type]
    wait_for(lambda: log.dropped == 1)
    log.write(EXCHANGE)
    log.close()
    assert read_targets(tmp_path / "access.log") == ["/a?b=c"]
    assert "a line of the access log cannot be made" in caplog.text


# The queue


def test_a_full_queue_drops_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_log: Callable[..., AccessLog]
) -> None:
    monkeypatch.setattr(access_log, "QUEUE_RECORDS", 3)
    log = make_log(tmp_path / "access.log")
    for record in targets(5):
        log.write(record)
    assert log.dropped == 2
    log.start()
    log.close()
    assert read_targets(tmp_path / "access.log") == ["/0", "/1", "/2"]
    assert log.dropped == 2


def test_the_queue_does_not_hold_what_is_not_logged(tmp_path: Path, make_log: Callable[..., AccessLog]) -> None:
    log = make_log(tmp_path / "access.log")
    log.write(EXCHANGE)
    log.write(replace(EXCHANGE, user_agent=b"x" * 60_000, target=b"y" * 16_000))
    (_, kept), (_, cut) = log._queue
    assert kept is EXCHANGE
    assert (len(cut.user_agent), len(cut.target), cut.status) == (FIELD_BYTES, FIELD_BYTES, 200)


def test_a_record_after_the_end_is_dropped(tmp_path: Path, make_log: Callable[..., AccessLog]) -> None:
    log = make_log(tmp_path / "access.log")
    log.start()
    log.close()
    log.write(EXCHANGE)
    log.close()
    assert log.dropped == 1
    assert (tmp_path / "access.log").read_text() == ""


def test_a_log_that_was_never_started_is_closed(tmp_path: Path, make_log: Callable[..., AccessLog]) -> None:
    log = make_log(tmp_path / "access.log")
    log.write(EXCHANGE)
    log.close()
    assert log.dropped == 1
