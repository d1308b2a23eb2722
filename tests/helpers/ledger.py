"""What clients sent and were answered, beside what reached the apps: nothing is lost, doubled or mixed up.

Each request has an id of its own, which the client sends as `X-Id`, with its name as `X-Client`. An app logs both
before it answers, and says in the answer which request it answers: a `Receipt`. `Ledger.findings` compares the ends.
"""

import json
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPMethod
from typing import Self

# RFC 9110, section 9.2.2.
IDEMPOTENT = frozenset(HTTPMethod) - {HTTPMethod.POST, HTTPMethod.PATCH, HTTPMethod.CONNECT}
RECEIPT = "x-receipt"


@dataclass(frozen=True)
class Receipt:
    """What an app says in the head of its answer: who answers whom; `count` and `connection` are its own counts."""

    app: str
    generation: int
    pid: int
    request_id: str
    client: str
    count: int
    connection: int

    @classmethod
    def read(cls, fields: Mapping[str, str]) -> Self | None:
        """Return the receipt among the fields of a response, names in lower case; None if there is none."""
        value = fields.get(RECEIPT)
        return None if value is None else cls(**json.loads(value))


@dataclass(frozen=True)
class Arrival:
    """A request that reached an app."""

    app: str
    generation: int
    method: str
    request_id: str
    client: str

    def write(self) -> bytes:
        """Return it as a line of an app's log."""
        return f"{self.app} {self.generation} {self.method} {self.request_id} {self.client}\n".encode()

    @classmethod
    def read(cls, line: str) -> Self:
        """Read a line that `write` wrote."""
        app, generation, method, request_id, client = line.split()
        return cls(app, int(generation), method, request_id, client)


@dataclass(frozen=True)
class Verdict:
    """How a request ended for its client: with a response (`status`), or visibly without a whole one (`broken`).

    A response that was cut has both. `cookie` is the affinity cookie that the response set.
    """

    status: int | None = None
    broken: str = ""
    receipt: Receipt | None = None
    cookie: str | None = None

    @property
    def is_good(self) -> bool:
        return not self.broken and self.status is not None and self.status < 400

    @property
    def name(self) -> str:
        """The status, or how it broke."""
        return self.broken or str(self.status)


@dataclass
class Entry:
    """A request that a client sent, with its verdicts: one, if all is well."""

    method: str
    client: str
    verdicts: list[Verdict]


class Ledger:
    """The requests of one test. Its ids are unlike those of any other ledger, whose arrivals it overlooks."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(4)
        self._entries: dict[str, Entry] = {}

    def begin(self, method: str, client: str) -> str:
        """Note that a client sends a request, and return its id."""
        request_id = f"{self._prefix}-{len(self._entries)}"
        self._entries[request_id] = Entry(method, client, [])
        return request_id

    def end(self, request_id: str, verdict: Verdict) -> Verdict:
        """Note how a request ended, and return the verdict."""
        self._entries[request_id].verdicts.append(verdict)
        return verdict

    def __len__(self) -> int:
        return len(self._entries)

    def count(self, clients: Iterable[str] | None = None) -> Counter[str]:
        """Count the requests, of all clients or of some, by how they ended."""
        return Counter(verdict.name for verdict in self._verdicts(clients))

    def errors(self, clients: Iterable[str] | None = None) -> Counter[str]:
        """Count those that did not end well."""
        return Counter(verdict.name for verdict in self._verdicts(clients) if not verdict.is_good)

    def _verdicts(self, clients: Iterable[str] | None) -> Iterator[Verdict]:
        only = None if clients is None else set(clients)
        for entry in self._entries.values():
            if only is None or entry.client in only:
                yield from entry.verdicts

    def repeated(self, arrivals: Iterable[Arrival]) -> dict[str, int]:
        """Return how often each request arrived that arrived more than once."""
        counts = Counter(arrival.request_id for arrival in self._own(arrivals))
        return {request_id: count for request_id, count in counts.items() if count > 1}

    def findings(self, arrivals: Iterable[Arrival]) -> list[str]:
        """Return a line for each way in which the two ends disagree; none if nothing was lost, doubled or mixed up."""
        own = list(self._own(arrivals))
        return [*self._lost(), *self._doubled(own), *self._mixed_up(own)]

    def _own(self, arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
        return (arrival for arrival in arrivals if arrival.request_id.startswith(f"{self._prefix}-"))

    def _lost(self) -> Iterator[str]:
        for request_id, entry in self._entries.items():
            if len(entry.verdicts) != 1:
                yield f"{entry.method} {request_id} of {entry.client} has {len(entry.verdicts)} verdicts"

    def _doubled(self, arrivals: list[Arrival]) -> Iterator[str]:
        for request_id, count in self.repeated(arrivals).items():
            entry = self._entries.get(request_id)
            if entry is not None and entry.method not in IDEMPOTENT:
                apps = ", ".join(arrival.app for arrival in arrivals if arrival.request_id == request_id)
                yield f"{entry.method} {request_id} of {entry.client} arrived {count} times: {apps}"

    def _mixed_up(self, arrivals: list[Arrival]) -> Iterator[str]:
        for arrival in arrivals:
            entry = self._entries.get(arrival.request_id)
            if entry is None or (entry.method, entry.client) != (arrival.method, arrival.client):
                yield f"nobody sent what arrived: {arrival}"
        arrived = set(arrivals)
        for request_id, entry in self._entries.items():
            for verdict in entry.verdicts:
                receipt = verdict.receipt
                if receipt is None:
                    if verdict.is_good:
                        yield f"no app says that it answered {request_id} with {verdict.name}"
                elif (receipt.request_id, receipt.client) != (request_id, entry.client):
                    yield f"{request_id} of {entry.client} was answered what is meant for another: {receipt}"
                elif Arrival(receipt.app, receipt.generation, entry.method, request_id, entry.client) not in arrived:
                    yield f"{request_id} of {entry.client} was answered where it did not arrive: {receipt}"
