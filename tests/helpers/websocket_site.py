"""Where a WebSocket case is played: an address of the upstream, and a `stickyproxy` process in front of it."""

from __future__ import annotations


@dataclass
class Site:
    """An address where the upstream of a case listens, and a proxy in front of it."""

    listening: socket.socket
    proxy: StickyProxy

    def __post_init__(self) -> None:
        self.first_memory_kib = self.peak_memory_kib()

    @property
    def direct(self) -> Door:
        host, port = self.listening.getsockname()
        return host, port

    @property
    def proxied(self) -> Door:
        return "127.0.0.1", int(self.proxy.url.rpartition(":")[2])

    def peak_memory_kib(self) -> int:
        """Return the most memory that the proxy has had so far (VmHWM)."""
        status = Path(f"/proc/{self.proxy.child.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+([0-9]+) kB", status)[0])

    async def compare(self, case: Case) -> tuple[Verdict, dict[str, tuple[Any, Any]]]:
        """Play a case both ways; return the direct verdict, and what is different through the proxy."""
        direct = await observe(case, self.listening, self.direct)
        proxied = await observe(case, self.listening, self.proxied)
        return direct, differences(direct, proxied)

    async def same(self, case: Case) -> Verdict:
        """Play a case both ways and return its verdict, which must be the same."""
        verdict, different = await self.compare(case)
        assert different == {}
        return verdict


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    # The socket listens all the time, and each case serves it for a while. Probes would be clients of the case.
    # The protocol is named because asyncio sets TCP_NODELAY only where it is.
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening,
        Children(tmp_path_factory.mktemp("matrix")) as children,
    ):
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        upstream = "http://{}:{}".format(*listening.getsockname())
        yield Site(listening, StickyProxy(children, {"app": upstream}, more={"health": {"probe": False}}))


class Blocked:
    """A conversation in which `side` sends 64 MiB to an end that does not read until it `may_read`."""

    def __init__(self, site: Site, side: str, door: Door) -> None:
        self.sent = 0
        self.may_read = asyncio.Event()
        self._door = door
        self._url = "ws://{}:{}/other".format(*site.direct)
        self._side = side
        self._block = content(MIB)
        scripts = {side: self.give, far_from(side): self.take}
        self._conversation = Conversation(Case(scripts["client"], scripts["server"]), site.listening, door)

    async def give(self, end: End) -> None:
        if await self.is_other(end):
            return
        for number in range(LARGE // MIB):
            await end.send(self._block[number:] + self._block[:number])
            self.sent += 1

    async def take(self, end: End) -> None:
        if await self.is_other(end):
            return
        end.connection.transport.pause_reading()
        await self.may_read.wait()
        end.connection.transport.resume_reading()
        await end.receive_all()

    async def is_other(self, end: End) -> bool:
        assert end.connection.request is not None
        if end.connection.request.path != "/other":
            return False
        await end.echo()
        return True

    async def stand_still(self) -> int:
        """Wait until nothing more is taken from the sender while another client has 50 answers; return what was."""
        before = -1
        while before != self.sent or not before:
            before = self.sent
            async with connect(self._url, host=self._door[0], port=self._door[1], proxy=None) as other:
                for _ in range(50):
                    await other.send("still there?")
                    await other.recv()
        return before

    async def play(self) -> Verdict:
        async with asyncio.timeout(DEADLINE_S), self._conversation.serving, asyncio.TaskGroup() as group:
            slow = group.create_task(self._conversation.open("/slow"))
            assert 0 < await self.stand_still() < LARGE // MIB
            self.may_read.set()
        return slow.result()
