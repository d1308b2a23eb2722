"""What a process group uses: all of its members, nobody else, and each shared page once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

import pytest

from stickyproxy.control.runner import usage as module
from stickyproxy.control.runner.usage import Meter, Usage, measure_group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

DEADLINE_S = 60
MIB = 1 << 20
TOUCHED = 64 * MIB
READY = "print('ready', flush=True); sys.stdin.read()"
PLAIN = f"import sys; {READY}"
LARGE = f"import sys; memory = bytearray({TOUCHED}); memory[::4096] = b'x' * len(memory[::4096]); {READY}"
BUSY = f"import sys, time\nwhile time.process_time() < 0.4: pass\n{READY}"


@contextmanager
def running(program: str) -> Iterator[int]:
    """Give the process group of a program that has printed a line; it reads its input until it is to end."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], object]) -> None:
    until = monotonic() + DEADLINE_S
    while not condition():
        assert monotonic() < until, "the condition did not come true in time"
        sleep(0.01)


def usage_of(group_id: int) -> Usage:
    usage = measure_group(group_id)
    assert usage is not None
    return usage


def test_memory_is_what_a_process_has_touched() -> None:
    with running(PLAIN) as plain, running(LARGE) as large:
        difference_bytes = usage_of(large).memory_bytes - usage_of(plain).memory_bytes
    assert 0.9 * TOUCHED < difference_bytes < 1.2 * TOUCHED


def test_time_is_what_a_process_has_used() -> None:
    with running(PLAIN) as plain, running(BUSY) as busy:
        assert usage_of(busy).cpu_s >= 0.38, "0.4 s, less the ticks that are cut off"
        assert usage_of(plain).cpu_s < usage_of(busy).cpu_s


def test_children_count() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', {LARGE!r}])"
    with running(PLAIN) as plain, running(parent) as group:
        assert usage_of(group).memory_bytes > TOUCHED + usage_of(plain).memory_bytes / 2


def test_a_child_that_has_ended_has_used_its_time() -> None:
    busy = BUSY.replace(READY, "")
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', {busy!r}]); {READY}"
    with running(parent) as group:
        assert usage_of(group).cpu_s >= 0.38


def test_a_member_whose_parent_has_ended_counts() -> None:
    orphan = f"import os, sys\nif os.fork(): os._exit(0)\n{LARGE}"
    with running(orphan) as group:
        wait_for(lambda: Path(f"/proc/{group}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        assert usage_of(group).memory_bytes > TOUCHED


def test_shared_pages_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = READY.replace("print", "os.fork() and print")
    with running(f"import os; {LARGE.replace(READY, ready)}") as group:
        usage = usage_of(group)
        monkeypatch.setattr(module, "_read_pss", lambda _: None)
        control = usage_of(group)
    assert TOUCHED < usage.memory_bytes < 1.5 * TOUCHED
    assert control.memory_bytes > 1.9 * TOUCHED, "the resident sets have them twice"


def test_the_resident_set_stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As it is with the process of another user, and before Linux 4.14."""
    with running(LARGE) as group:
        there = tmp_path / str(group)
        there.mkdir()
        there.joinpath("stat").write_bytes(Path(f"/proc/{group}/stat").read_bytes())
        monkeypatch.setattr(module, "_PROC", tmp_path)
        assert TOUCHED < usage_of(group).memory_bytes < 2 * TOUCHED
        there.joinpath("smaps_rollup").write_bytes(b"00 ---p [rollup]\nRss:  9 kB\nPss:  7 kB\nPss_Dirty:  1 kB\n")
        assert usage_of(group).memory_bytes == 7 * 1024, "the control"
        for unreadable in (b"", b"Pss:\n", b"Pss: x kB\n"):
            there.joinpath("smaps_rollup").write_bytes(unreadable)
            assert usage_of(group).memory_bytes > TOUCHED


def test_several_groups_are_measured_apart() -> None:
    with running(PLAIN) as plain, running(LARGE) as large:
        meter = Meter()
        found = meter.measure(iter((plain, large, plain)))
        assert set(found) == {plain, large}
        assert found[plain].memory_bytes < TOUCHED < found[large].memory_bytes
    assert meter.measure((plain, large)) == {}
    assert meter._seen == {}, "what has ended is forgotten"


@pytest.mark.parametrize("group_id", [0, -1])
def test_what_is_no_group_has_no_usage(group_id: int) -> None:
    """0 is the group of the kernel's threads, which nobody may be told to use anything."""
    assert measure_group(group_id) is None


def test_without_proc_there_is_no_usage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert measure_group(os.getpgrp()) is not None, "the control"
    monkeypatch.setattr(module, "_PROC", tmp_path / "none")
    assert measure_group(os.getpgrp()) is None


@pytest.mark.parametrize("stat", [b"", b"1 (x) S 1 2", b"1 (x) " + b"x " * 50, None])
def test_what_cannot_be_read_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stat: bytes | None
) -> None:
    for name in ("self", "meminfo", "4194305", "٣"):  # the last two: nobody's, and no digit of ASCII
        (tmp_path / name).mkdir()
    (there := tmp_path / str(os.getpid())).mkdir()
    if stat is not None:
        there.joinpath("stat").write_bytes(stat)
    monkeypatch.setattr(module, "_PROC", tmp_path)
    assert measure_group(os.getpgrp()) is None


# Again and again


class Proc:
    """A /proc with this process alone in it; `reads` counts how often its pages are walked over."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._own = directory / str(os.getpid())
        self._own.mkdir()
        self.reads = 0
        self.now = 1000.0
        monkeypatch.setattr(module, "_PROC", directory)
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        read = module._read_pss

        def read_and_count(process_id: int) -> int | None:
            self.reads += 1
            return read(process_id)

        monkeypatch.setattr(module, "_read_pss", read_and_count)
        self.write()

    def write(self, *, pages: int = 1000, pss_kib: int = 3000, started: int = 7, name: str = "x") -> None:
        fields = ["S", *map(str, range(1, 19)), str(started), "0", str(pages), "0"]
        self._own.joinpath("stat").write_text(f"{os.getpid()} ({name}) {' '.join(fields)}\n")
        self._own.joinpath("smaps_rollup").write_text(f"Pss: {pss_kib} kB\n")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    return Proc(tmp_path, monkeypatch)


def memory_of(meter: Meter) -> int:
    return meter.measure((os.getpgrp(),))[os.getpgrp()].memory_bytes


def test_what_stays_as_it_is_is_walked_over_once(proc: Proc) -> None:
    meter = Meter()
    assert [memory_of(meter) for _ in range(5)] == [3000 * 1024] * 5
    assert proc.reads == 1
    for _ in range(5):
        measure_group(os.getpgrp())
    assert proc.reads == 6, "the control: without a memory of it, each time"


def test_a_little_more_counts_without_a_walk(proc: Proc) -> None:
    meter = Meter()
    memory_of(meter)
    for pages in (1031, 969):
        proc.write(pages=pages)
        assert memory_of(meter) == 3000 * 1024 + (pages - 1000) * os.sysconf("SC_PAGE_SIZE")
    assert proc.reads == 1


@pytest.mark.parametrize("pages", [1032, 968, 2000, 1])
def test_what_has_moved_is_walked_over(proc: Proc, pages: int) -> None:
    meter = Meter()
    memory_of(meter)
    proc.write(pages=pages, pss_kib=10)
    assert memory_of(meter) == 10 * 1024
    assert proc.reads == 2


def test_after_a_while_it_is_walked_over_anyway(proc: Proc) -> None:
    """With whom its pages are shared may have changed."""
    meter = Meter()
    memory_of(meter)
    proc.write(pss_kib=10)
    proc.now += 29.0
    assert memory_of(meter) == 3000 * 1024
    proc.now += 1.0
    assert memory_of(meter) == 10 * 1024


def test_another_process_with_the_same_id_is_another(proc: Proc) -> None:
    meter = Meter()
    memory_of(meter)
    proc.write(started=8, pss_kib=10)
    assert memory_of(meter) == 10 * 1024


@pytest.mark.parametrize("name", ["a) S 1 2 (b", ")))", ") ) )", "x\ny", " ", ""])
def test_a_program_may_have_any_name(proc: Proc, name: str) -> None:
    control = measure_group(os.getpgrp())
    assert control == Usage(3000 * 1024, (11 + 12 + 13 + 14) / os.sysconf("SC_CLK_TCK"))
    proc.write(name=name)
    assert measure_group(os.getpgrp()) == control


def test_one_that_has_ended_has_no_memory(proc: Proc) -> None:
    proc.write(pages=0)
    assert memory_of(Meter()) == 0
    assert proc.reads == 0
