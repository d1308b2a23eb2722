"""What came of many sessions of clients without cookies; programs in other interpreters count with it too."""

import json
from dataclasses import asdict, dataclass, field
from typing import Final

SHOWN: Final = 5  # texts of each kind that are kept


class WrongProcessError(Exception):
    """The answer of a process that does not know the session; the text is what it said."""


class UnexpectedAnswerError(Exception):
    """An answer that neither goes on with the session nor says that it is unknown."""


@dataclass
class Outcome:
    """Counts of all sessions together.

    `wrong` are requests that met a process that does not know their session, told by the answer itself; `failed` are
    those that failed in another way. `errors` has the first texts of both. `served` are the processes that were named.
    """

    exchanges: int = 0
    sessions: int = 0
    wrong: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    served: set[str] = field(default_factory=set)

    @property
    def processes(self) -> int:
        """How many processes served sessions."""
        return len(self.served)

    def note_wrong(self, text: str) -> None:
        """Count a request that met a process that does not know its session."""
        self.wrong += 1
        if self.wrong <= SHOWN:
            self.errors.append(f"wrong process: {text}")

    def note_failed(self, text: str) -> None:
        """Count a request that failed in another way."""
        self.failed += 1
        if self.failed <= SHOWN:
            self.errors.append(f"failed: {text}")

    def dump(self) -> str:
        """Return it as JSON."""
        return json.dumps({**asdict(self), "served": sorted(self.served)})

    @classmethod
    def load(cls, text: str) -> "Outcome":
        """Return what a program has printed."""
        values = json.loads(text)
        return cls(**{**values, "served": set(values["served"])})
