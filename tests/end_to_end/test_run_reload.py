"""`stickyproxy run --reload`: who develops an app saves a file, and the next request meets the new version."""

import os
import re
import signal
import sys
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.processes import HTTP, STOP_TIMEOUT_S, Child, Children, free_port, wait_until
from tests.helpers.serving import REPOSITORY

APP = """
import os, sys, time
sys.dont_write_bytecode = False  # as it is for whoever has not set a variable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from page import TEXT

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/hold":
            open("held.txt", "w").close()
            while not os.path.exists("released.txt"):
                time.sleep(0.05)
        body = TEXT.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
RUN = ("-w", "2", "--reload")


class Development:
    """An app in a directory, `stickyproxy run` there, and who saves its files."""

    def __init__(self, directory: Path) -> None:
        self._home = directory / "home"
        self.directory = directory / "app"
        for one in (self._home, self.directory):
            one.mkdir()
        self._children = Children(self.directory)
        self.proxy: Child
        self._port = free_port()
        self.save("first")
        (self.directory / "main.py").write_text(APP)

    def save(self, text: str, *, is_broken: bool = False) -> None:
        """Save the module of the page; texts differ in their length, or a compiled file might pass for the new one."""
        (self.directory / "page.py").write_text(f"TEXT = {text!r}{' (' if is_broken else ''}\n")

    def begin(self, *options: str, modules: Path = REPOSITORY) -> None:
        """Start the proxy; `modules` is a directory that Python looks into first."""
        command = [sys.executable, "main.py", "{port}"]
        listen = ["--listen", f"127.0.0.1:{self._port}", "--admin", "off", "--control", "off"]
        homes = {"HOME": str(self._home), "XDG_STATE_HOME": str(self._home), "XDG_RUNTIME_DIR": str(self._home)}
        arguments = [sys.executable, "-m", "stickyproxy", "run", *listen, *options, "--", *command]
        self.proxy = self._children.start("proxy", arguments, {**homes, "PYTHONPATH": f"{modules}:{REPOSITORY}"})

    def run(self, *options: str) -> None:
        """Start the proxy, and wait until it serves."""
        self.begin(*options)
        self.logged("serving ")

    @property
    def log(self) -> str:
        return self.proxy.log.read_text(errors="replace")

    def logged(self, text: str, times: int = 1) -> None:
        """Wait until the proxy has said something so often."""
        wait_until(lambda: self.log.count(text) >= times or not self.proxy.is_running(), f"{text!r} in the log")
        assert self.log.count(text) >= times, self.log

    def ask(self, path: str = "/") -> str:
        """Return what a new visitor gets: the page, or the status of an error."""
        try:
            with HTTP.open(f"http://127.0.0.1:{self._port}{path}", timeout=60) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            error.close()
            return str(error.code)

    def serves(self, text: str) -> None:
        """Wait until new visitors get a page."""
        wait_until(lambda: self.ask() == text, f"{text!r} is served\n{self.log}")

    @property
    def deploys(self) -> int:
        """How many have begun."""
        return len(re.findall(r"deploy: generation \d+ starts", self.log))

    @property
    def watchers(self) -> int:
        """How many threads of the proxy the system tells of files."""
        threads = Path(f"/proc/{self.proxy.pid}/task")
        return sum("notify" in path.read_text() for path in threads.glob("*/comm"))

    def end(self) -> None:
        """End the proxy as Ctrl-C does; nothing may be left."""
        os.kill(self.proxy.pid, signal.SIGINT)
        assert self.proxy.wait(STOP_TIMEOUT_S * 4) == 0, self.log
        assert "Traceback" not in self.log.partition("stopping: ")[2], self.log
        wait_until(lambda: not self._processes(), "no process is left")

    def _processes(self) -> list[str]:
        """Return what has been started in the directory of the app and still runs."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "cwd").readlink() == self.directory:
                    found.append(entry.name)
            except OSError:
                continue
        return found

    def close(self) -> None:
        self._children.__exit__(None, None, None)


@pytest.fixture
def development(tmp_path: Path) -> Iterator[Development]:
    one = Development(tmp_path)
    try:
        yield one
    finally:
        one.close()


def test_what_is_saved_is_served_and_a_mistake_leaves_the_version_before(development: Development) -> None:
    development.run(*RUN)
    assert development.ask() == "first"
    development.save("second one")
    development.serves("second one")
    development.logged("live reload: page.py changed")
    development.logged("has taken over from all before")
    development.save("third", is_broken=True)
    development.logged("is taken back, the old one serves on: ")
    development.logged("SyntaxError: ")
    development.logged("live reload: waiting for the next change")
    assert development.ask() == "second one"
    development.save("third and mended")
    development.serves("third and mended")
    development.end()


def test_without_the_option_nothing_that_is_saved_is_served(development: Development) -> None:
    """The control of the test above: it is not the app that reads its files anew."""
    development.run("-w", "1")
    development.save("second one")
    assert development.ask() == "first"
    assert development.watchers == 0  # so that nothing comes of it later either
    development.end()
    assert development.deploys == 0


def test_a_burst_is_one_deploy_and_what_the_app_writes_is_none(development: Development) -> None:
    development.run(*RUN)
    for number in range(40):
        (development.directory / f"module_{number}.py").write_text("pass")
        (development.directory / f"upload_{number}.txt").write_text("data")
    development.save("second one")
    development.serves("second one")
    development.logged("has taken over from all before")
    assert (development.directory / "__pycache__").exists()
    development.logged("live reload: module_0.py, module_1.py, module_10.py and 38 more changed")
    development.save("third one, after that")
    development.serves("third one, after that")
    assert development.deploys == 2, development.log
    development.end()


def test_an_app_that_does_not_start_is_waited_for(development: Development) -> None:
    development.save("first", is_broken=True)
    development.run(*RUN)
    development.logged("the app does not start, waiting for a change of its files: ")
    development.logged("SyntaxError: ")
    assert development.ask() == "503"
    development.save("mended at last")
    development.serves("mended at last")
    development.end()


def test_a_response_under_way_is_not_cut(development: Development) -> None:
    development.run(*RUN)
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(development.ask, "/hold")
        try:
            wait_until((development.directory / "held.txt").exists, "the request is at the app")
            development.save("second one")
            development.serves("second one")
            assert not holding.done()
        finally:
            (development.directory / "released.txt").touch()
        assert holding.result() == "first"
    development.end()


def test_an_upgrade_watches_on(development: Development) -> None:
    development.run(*RUN)
    os.kill(development.proxy.pid, signal.SIGUSR2)
    development.logged("upgraded from version ")
    wait_until(lambda: development.watchers == 1, "the new image watches")
    development.save("second one")
    development.serves("second one")
    development.logged("has taken over from all before")
    assert development.deploys == 1
    development.end()


def test_a_reload_turns_it_on_and_off(development: Development) -> None:
    file = development.directory.parent / "proxy.yaml"

    def write(reload: str) -> None:
        file.write_text(f"run: {{command: unused, reload: {reload}}}\n")
        os.kill(development.proxy.pid, signal.SIGHUP)

    file.write_text("run: {command: unused}\n")
    development.run("--config", str(file))
    write("{include: ['*.txt']}")
    development.logged("reloaded: run.reload: false -> {include: ['*.txt']}")
    wait_until(lambda: development.watchers == 1, "it watches")
    (development.directory / "note.txt").write_text("1")
    development.logged("live reload: note.txt changed")
    development.save("second one")
    development.serves("second one")
    write("off")
    development.logged("-> false")
    wait_until(lambda: development.watchers == 0, "it watches no more")
    development.end()


NO_WATCHFILES = "import sys\nsys.modules['watchfiles'] = None\n"


def test_where_the_package_is_missing_it_is_named_and_nothing_starts(development: Development, tmp_path: Path) -> None:
    without = tmp_path / "without"
    without.mkdir()
    (without / "sitecustomize.py").write_text(NO_WATCHFILES)
    development.begin(*RUN, modules=without)
    assert development.proxy.wait() == 2
    said = "to watch files needs the package watchfiles: pip install 'stickyproxy[reload]'"
    assert development.log == f"stickyproxy: --reload: {said}\n"
    development.begin("-w", "1", modules=without)
    development.logged("serving ")
    assert development.ask() == "first"
    development.end()


def test_a_directory_that_is_not_there_is_named(development: Development) -> None:
    development.begin(*RUN, "--reload-dir", "nowhere")
    assert development.proxy.wait() == 2
    nowhere = development.directory / "nowhere"
    assert f"stickyproxy: cannot watch {nowhere}: there is no such directory\n" in development.log
    assert "Traceback" not in development.log
