"""One line that is rewritten on a terminal; elsewhere, a line for each change."""

import io
import os

import pytest
from typing_extensions import override

from stickyproxy.cli.progress import Progress, Screen


class Terminal(io.StringIO):
    @override
    def isatty(self) -> bool:
        return True


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the terminal have 20 columns, of which the last one stays free."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((20, 5)))


def screen_of(text: str, columns: int = 20) -> list[str]:
    """Return the lines that a terminal shows after this text; of its escape sequences those that are used here."""
    lines, at = [""], 0
    while text:
        if text.startswith("\x1b[K"):
            lines[-1], text = lines[-1][:at], text[3:]
        elif text[0] == "\r":
            at, text = 0, text[1:]
        elif text[0] == "\n":
            lines, at, text = [*lines, ""], 0, text[1:]
        else:
            assert at < columns, "the line wraps"
            lines[-1], at, text = lines[-1][:at] + text[0] + lines[-1][at + 1 :], at + 1, text[1:]
    return lines


@pytest.mark.usefixtures("narrow")
def test_on_a_terminal_one_line_is_rewritten_and_gone_in_the_end() -> None:
    stream = Terminal()
    with Progress(stream) as progress:
        for text, detail, shown in [
            ("1 of 2", "", "1 of 2"),
            ("37 sessions left", ", about 3m", "37 sessions left, a"),
            ("2", " of 2", "2 of 2"),
        ]:
            progress.show(text, detail)
            assert screen_of(stream.getvalue()) == [shown]
    assert screen_of(stream.getvalue()) == [""]


def test_elsewhere_each_change_is_a_line() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        for text, detail in [
            ("1 of 2", ""),
            ("1 of 2", ""),
            ("left: 5", ", 9 s"),
            ("left: 5", ", 8 s"),
            ("left: 4", ""),
        ]:
            progress.show(text, detail)
    assert stream.getvalue() == "1 of 2\nleft: 5, 9 s\nleft: 4\n"


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_without_progress_nothing_is_written(stream: io.StringIO) -> None:
    with Progress(stream):
        pass
    assert stream.getvalue() == ""


def test_standard_output_is_where_it_stands_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.show("a", "b")
    Screen().draw("c")
    assert capsys.readouterr().out == "ab\nc\n"


def test_a_text_is_drawn_in_its_own_place() -> None:
    stream = Terminal()
    screen = Screen(stream)
    screen.draw("one\ntwo")
    screen.draw("three")
    assert stream.getvalue() == "\x1b[Hone\x1b[K\ntwo\x1b[K\n\x1b[J\x1b[Hthree\x1b[K\n\x1b[J"


def test_elsewhere_texts_follow_each_other() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    screen.draw("one\ntwo")
    screen.draw("three")
    assert stream.getvalue() == "one\ntwo\n\nthree\n"
