"""The pages of the recipes for Streamlit, Gradio, Panel and Shiny as a visitor sees and uses them."""

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from playwright.sync_api import Locator, Request, expect
from typing_extensions import override

from tests.end_to_end.recipe_pages import TIMEOUT_MS, RecipePage
from tests.helpers.browser import Answer, Visitor

# Lets a test close the WebSockets of a page, as a cut of the network does.
KEEP_WEBSOCKETS: Final = """
window.websockets = [];
window.WebSocket = class extends window.WebSocket {
  constructor(...given) { super(...given); window.websockets.push(this); }
};
"""
CLOSE_WEBSOCKETS: Final = "websockets.forEach(websocket => websocket.close())"


class DataAppPage(RecipePage):
    """A button that counts; `3 counted by g1-2` is shown beside it."""

    path = "/"

    def __init__(self, visitor: Visitor) -> None:
        super().__init__(visitor)
        self.tab.page.add_init_script(KEEP_WEBSOCKETS)

    @override
    def open(self) -> None:
        self.tab.page.goto(f"{self.tab.site_url}{self.path}")

    @override
    def act(self) -> None:
        self.tab.page.get_by_role("button", name="Count").click()

    @override
    def wait_for_count(self, count: int) -> None:
        expect(self._counted).to_contain_text(re.compile(rf"\b{count} counted by "), timeout=TIMEOUT_MS)

    @override
    def process(self) -> str:
        return self._read_process(self._counted, "counted by PROCESS")

    @abstractmethod
    def do_all(self, file: Path) -> set[str]:
        """Do what the page offers beside its button; return the processes in which it was done."""

    @abstractmethod
    def rely_on_affinity(self, file: Path) -> None:
        """Do what fails in a process that does not know this page, and wait for the outcome, whatever it is."""

    def cut(self) -> None:
        """Close the WebSocket of the page, and wait until it has another one."""
        before = self.tab.websockets_opened
        self.tab.page.evaluate(CLOSE_WEBSOCKETS)
        self.tab.wait_until(lambda: self.tab.websockets_opened > before, "the page has connected again")

    def download(self) -> str:
        """Download the count; return the process that has written it."""
        with self.tab.page.expect_download() as download:
            self.tab.page.get_by_text("Download").click()
        written = re.fullmatch(rf"{self._done} counted by (\S+)\n", download.value.path().read_text())
        assert written
        return written[1]

    @property
    def _counted(self) -> Locator:
        return self.tab.page.get_by_text("counted by")


class UploadingPage(DataAppPage):
    """A page with a field for a file, whose size and process it shows."""

    upload_path: str

    def upload(self, file: Path) -> str:
        """Upload a file; return the process that has it."""
        self._choose(file)
        text = self.tab.page.get_by_text("bytes uploaded to")
        return self._read_process(text, rf"\b{file.stat().st_size} bytes uploaded to PROCESS")

    @override
    def do_all(self, file: Path) -> set[str]:
        return {self.upload(file), self.download()}

    @override
    def rely_on_affinity(self, file: Path) -> None:
        self._choose(file)
        self.tab.wait_until(lambda: bool(self._uploads()), "the upload is answered")

    @override
    def has_lost_its_session(self) -> bool:
        return any(answer.status in {400, 404} for answer in self._uploads())

    def _choose(self, file: Path) -> None:
        self.tab.page.locator("input[type=file]").set_input_files(file)

    def _uploads(self) -> list[Answer]:
        return [answer for answer in self.tab.answers() if self.upload_path in answer.url]


class StreamlitPage(UploadingPage):
    """Counts over a WebSocket, uploads by PUT, downloads from /media."""

    upload_path = "/_stcore/upload_file/"


class GradioPage(UploadingPage):
    """Counts by a POST to the queue, whose answer comes as an event stream."""

    upload_path = "/gradio_api/upload?"

    def work(self) -> None:
        """Begin the work that tells of each of its steps."""
        self.tab.page.get_by_role("button", name="Work").click()

    def wait_for_step(self, step: int) -> None:
        expect(self.tab.page.get_by_text(f"step {step} of 5")).to_be_visible(timeout=TIMEOUT_MS)

    @override
    def do_all(self, file: Path) -> set[str]:
        return {self.upload(file)}

    @override
    def rely_on_affinity(self, file: Path) -> None:
        self.act()
        is_counted = self.tab.page.get_by_text("1 counted by").is_visible
        self.tab.wait_until(lambda: is_counted() or self.has_lost_its_session(), "it is counted or not")

    @override
    def has_lost_its_session(self) -> bool:
        """Say whether the page has loaded itself again, which it does after an answer that breaks off."""
        return self.tab.page_loads > 1


class PanelPage(DataAppPage):
    """Counts over a WebSocket, whose session the page itself has begun."""

    path = "/app"

    def __init__(self, visitor: Visitor) -> None:
        super().__init__(visitor)
        self._elsewhere: list[str] = []
        self.tab.page.on("request", self._on_request)

    @override
    def do_all(self, file: Path) -> set[str]:
        return set()

    @override
    def rely_on_affinity(self, file: Path) -> None:
        self.use()
        self.use()
        self.cut()
        self.tab.wait_until(self._counts_on, "it counts again")

    @override
    def has_lost_its_session(self) -> bool:
        """Say whether there was a second session.

        It begins to count anew; and it knows nothing of the page, so that its style sheets come from a CDN.
        """
        return bool(self._elsewhere) or int((self._counted.text_content() or "0").split()[0]) < self._done

    def _counts_on(self) -> bool:
        """Count, and say whether that is seen: a page that has only just connected again loses a click."""
        self.act()
        return "2 counted by" not in (self._counted.text_content() or "")

    def _on_request(self, request: Request) -> None:
        if request.url.startswith("https:"):
            self._elsewhere.append(request.url)


class ShinyPage(UploadingPage):
    """Counts over a WebSocket, uploads by POST, downloads from a path of the session."""

    upload_path = "/upload/"

    def __init__(self, visitor: Visitor) -> None:
        super().__init__(visitor)
        # Chromium asks for an icon, which Shiny does not have.
        self.tab.page.route("**/favicon.ico", lambda route: route.fulfill(status=204))


PAGES: Final[Mapping[str, Callable[[Visitor], DataAppPage]]] = {
    "streamlit": StreamlitPage,
    "gradio": GradioPage,
    "panel": PanelPage,
    "shiny": ShinyPage,
}
