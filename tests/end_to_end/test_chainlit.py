"""Chainlit, whose client polls first and then upgrades: each session stays with the process that has it."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Response

from tests.end_to_end.pages import ChatPage
from tests.end_to_end.peers import Peer, start_peer
from tests.helpers.apps import CHAINLIT, Fleet
from tests.helpers.browser import Answer, Tab, Visitors
from tests.helpers.browser_relay import Relay
from tests.helpers.processes import Children, StickyProxy

pytestmark = pytest.mark.browser

VISITORS = 8
CUT_S = 5.0


@pytest.fixture(scope="module")
def fleet(children: Children) -> Fleet:
    return Fleet(children, CHAINLIT)


@pytest.fixture(scope="module")
def peer(children: Children, fleet: Fleet) -> Peer:
    return start_peer(children, fleet.upstreams)


@pytest.fixture
def round_robin(children: Children, fleet: Fleet) -> Iterator[Peer]:
    peer = start_peer(children, fleet.upstreams, sticky=False, name="round-robin")
    yield peer
    peer.child.stop()


@pytest.fixture
def mortal_fleet(fleet: Fleet) -> Iterator[Fleet]:
    yield fleet
    fleet.restore()


def open_chats(visitors: Visitors, site_url: str, count: int = VISITORS) -> list[ChatPage]:
    """Let visitors come one after the other; each says something at once."""
    chats = [ChatPage(visitors.new(site_url)) for _ in range(count)]
    for chat in chats:
        chat.open()
        chat.say("message 1")
    return chats


def say(chats: list[ChatPage], number: int) -> list[int]:
    """Let all say something at the same time; return the pids that reply."""
    for chat in chats:
        chat.say(f"message {number}")
    return pids_of_replies(chats, number)


def pids_of_replies(chats: list[ChatPage], number: int) -> list[int]:
    return [chat.pid_of_reply(number) for chat in chats]


def socketio_answers(tab: Tab) -> list[Answer]:
    return [answer for answer in tab.answers() if "/ws/socket.io/" in answer.url]


def cookies_until_handshake(answers: list[Answer]) -> list[str]:
    """Return the affinity cookies that are set up to the answer that opens the next Engine.IO session."""
    is_handshake = ["transport=polling" in answer.url and "sid=" not in answer.url for answer in answers]
    values = [answer.cookie("stickyproxy") for answer in answers[: is_handshake.index(True) + 1]]
    return [value for value in values if value is not None]


def test_each_visitor_talks_with_one_process(visitors: Visitors, peer: Peer, fleet: Fleet) -> None:
    chats = open_chats(visitors, peer.url, 12)
    pids = pids_of_replies(chats, 1)

    assert say(chats, 2) == pids
    assert say(chats, 3) == pids
    assert set(pids) == fleet.pids
    for chat in chats:
        chat.tab.assert_undisturbed()
        statuses = [answer.status for answer in socketio_answers(chat.tab)]
        assert statuses[0] == 200, "Chainlit's client begins with polling"
        assert statuses.count(101) == 1
    if isinstance(peer, StickyProxy):
        assert peer.metric("affinity_total", outcome="new") >= len(chats)
        assert peer.metric("affinity_breaks_total") == 0
        assert peer.metric("tunnels_total") >= len(chats)


def test_without_affinity_the_chat_does_not_work(visitors: Visitors, round_robin: Peer) -> None:
    """The control: this is what the other tests would see if affinity did not work."""
    chats = [ChatPage(visitors.new(round_robin.url)) for _ in range(VISITORS)]
    refusals: list[Response] = []

    def keep_refusal(response: Response) -> None:
        if response.status == 400:
            refusals.append(response)

    def refused(status: int) -> int:
        return sum(status in {answer.status for answer in socketio_answers(chat.tab)} for chat in chats)

    for chat in chats:
        chat.tab.page.on("response", keep_refusal)
        chat.open()
    chats[0].tab.wait_until(lambda: refused(400) >= VISITORS // 2, "half of the visitors are refused")
    chats[0].tab.wait_until(lambda: any(chat.shows_connection_lost() for chat in chats), "a visitor is told of it")
    assert "Invalid session" in refusals[-1].text()
    print(f"of {VISITORS} visitors: {refused(400)} saw 400 Invalid session, {refused(403)} saw 403")


def test_an_upload_reaches_the_process_of_the_session(
    visitors: Visitors, peer: Peer, fleet: Fleet, tmp_path: Path
) -> None:
    file = tmp_path / "upload.txt"
    file.write_text("text " * 200_000)
    chats = open_chats(visitors, peer.url)
    pids = pids_of_replies(chats, 1)

    for chat in chats:
        chat.attach(file)
        chat.say("what does it say?")
    assert [chat.pid_of_reply(2, files=1) for chat in chats] == pids
    assert set(pids) == fleet.pids
    for chat in chats:
        chat.tab.assert_undisturbed()


def test_two_tabs_of_one_visitor_share_a_process(visitors: Visitors, peer: Peer, fleet: Fleet) -> None:
    first_tabs = open_chats(visitors, peer.url)
    second_tabs = [ChatPage(chat.visitor) for chat in first_tabs]
    for chat in second_tabs:
        chat.open()
        chat.say("message 1")

    pids = pids_of_replies(first_tabs, 1)
    assert pids_of_replies(second_tabs, 1) == pids
    assert say(first_tabs, 2) == pids
    assert set(pids) == fleet.pids
    for chat in first_tabs + second_tabs:
        chat.tab.assert_undisturbed()


def test_a_session_goes_on_after_a_cut_of_the_network(visitors: Visitors, peer: Peer, fleet: Fleet) -> None:
    with Relay(peer.url) as relay:
        chats = open_chats(visitors, relay.url)
        pids = pids_of_replies(chats, 1)
        relay.cut()
        for chat in chats:
            assert chat.tab.wait_for_websocket_close() == 1006
            chat.expect_connection_lost()
        chats[0].tab.sleep(CUT_S)
        relay.mend()

        assert say(chats, 2) == pids
        assert set(pids) == fleet.pids
        for chat in chats:
            chat.expect_no_banner()
            chat.tab.assert_lost_nothing()


def test_the_visitors_of_a_process_that_ends_go_to_others(visitors: Visitors, peer: Peer, mortal_fleet: Fleet) -> None:
    chats = open_chats(visitors, peer.url)
    pids = pids_of_replies(chats, 1)
    assert say(chats, 2) == pids
    victim = pids[0]
    moved = [chat for chat, pid in zip(chats, pids, strict=True) if pid == victim]
    others = [chat for chat in chats if chat not in moved]
    old_cookies = [chat.visitor.cookie("stickyproxy") for chat in moved]
    answered_before = [len(chat.tab.answers()) for chat in moved]

    child = mortal_fleet.send(victim, signal.SIGTERM)
    for chat in moved:
        assert chat.tab.wait_for_websocket_close() == 1012
    child.wait()

    new_pids = say(moved, 1)
    assert victim not in new_pids
    assert set(new_pids) <= mortal_fleet.pids
    for chat, before, old_cookie in zip(moved, answered_before, old_cookies, strict=True):
        chat.expect_no_banner()
        assert chat.tab.page_loads == 1
        new_cookies = cookies_until_handshake(chat.tab.answers()[before:])
        assert new_cookies
        assert old_cookie not in new_cookies
        assert chat.visitor.cookie("stickyproxy") == new_cookies[-1]
    assert say(others, 3) == [pid for pid in pids if pid != victim]
    for chat in others:
        chat.tab.assert_undisturbed()
    if isinstance(peer, StickyProxy):
        assert peer.metric("affinity_breaks_total") >= len(moved)
        assert peer.metric("tunnel_closes_total", code="1012") >= len(moved)
