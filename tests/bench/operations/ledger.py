"""Both ends of all tunnels, compared: what was sent at one and what came at the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    Ends = Mapping[str, Mapping[str, Any]]  # what `End.report` gives, by the tunnel's number


@dataclass
class Way:
    """One direction of all tunnels. `gone` were sent on tunnels that were cut, and did not come."""

    sent: int = 0
    received: int = 0
    lost: int = 0
    doubled: int = 0
    corrupt: int = 0
    reordered: int = 0
    strayed: int = 0
    gone: int = 0

    def add(self, sender: Mapping[str, Any], receiver: Mapping[str, Any], *, is_cut: bool) -> None:
        """Count one tunnel."""
        self.sent += sender["sent"]
        for name in ("received", "doubled", "corrupt", "reordered", "strayed"):
            setattr(self, name, getattr(self, name) + receiver[name])
        missing = sender["sent"] - receiver["received"]
        if is_cut:
            self.gone += missing
        else:
            # What came damaged has a number that nobody can read: it is corrupt, and not lost too.
            self.lost += max(0, missing - receiver["corrupt"])


@dataclass
class Tally:
    """All tunnels. `cuts` are those that ended before the load ended them: when (ns), tunnel, port, and how."""

    up: Way = field(default_factory=Way)
    down: Way = field(default_factory=Way)
    tunnels: int = 0
    cuts: list[tuple[int, int, int, str]] = field(default_factory=list)
    unknown: int = 0  # open tunnels that only one of the two ends knows
    controls: int = 0  # control frames that neither end sent

    @property
    def ends(self) -> Counter[str]:
        """How the tunnels ended that were cut, with the number of each."""
        return Counter(how for _, _, _, how in self.cuts)


def compare(clients: Ends, apps: Ends) -> Tally:
    """Compare what the clients' ends report with what those of all apps do."""
    tally = Tally(tunnels=len(clients))
    for number, client in clients.items():
        app = apps.get(number)
        if client["lost_ns"] or (app is not None and app["lost_ns"]):
            # The side that saw it first is nearer to the cause; but how it ended is told by what the client saw.
            when_ns = client["lost_ns"] or (app["lost_ns"] if app else 0)
            how = client["end"] or f"at the app: {app['end'] if app else ''}"
            tally.cuts.append((when_ns, int(number), client["port"], how))
        elif app is None:
            tally.unknown += 1
        tally.controls += client["controls"] + (app["controls"] if app else 0)
        if app is not None:
            is_cut = bool(client["lost_ns"] or app["lost_ns"])
            tally.up.add(client, app, is_cut=is_cut)
            tally.down.add(app, client, is_cut=is_cut)
    # A handshake that was cut may have reached an app; a tunnel that is still open may not.
    tally.unknown += sum(number not in clients and not app["lost_ns"] for number, app in apps.items())
    return tally


def both(tally: Tally, name: str) -> int:
    """Return a count of both directions."""
    return int(getattr(tally.up, name)) + int(getattr(tally.down, name))
