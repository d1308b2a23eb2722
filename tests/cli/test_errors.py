"""What an error of each kind looks like, and its exit status."""

import pytest

from stickyproxy.cli.errors import clear_errors, complain
from stickyproxy.control.client import ControlError, ControlUnreachable
from stickyproxy.demo.launcher import DemoError
from stickyproxy.errors import AppError, ChannelError, UsageError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("no"), 2),
        (ControlUnreachable("no"), 2),
        (ControlError("no"), 1),
        (AppError("no"), 1),
        (ChannelError("no"), 1),
        (DemoError("no"), 1),
    ],
)
def test_an_error_is_a_line_and_a_status(error: Exception, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, clear_errors():
        raise error
    assert caught.value.code == status
    assert tuple(capsys.readouterr()) == ("", "stickyproxy: no\n")


def test_a_bug_is_no_error_of_the_operator() -> None:
    with pytest.raises(ZeroDivisionError), clear_errors():
        raise ZeroDivisionError


def test_each_line_has_the_name_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    complain("a: wrong\nb: wrong")
    assert tuple(capsys.readouterr()) == ("", "stickyproxy: a: wrong\nstickyproxy: b: wrong\n")
