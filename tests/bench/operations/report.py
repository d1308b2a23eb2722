"""The results as text or Markdown: what must be zero, the pauses, and what was held before and after."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.bench.operations.ledger import both
from tests.bench.operations.pauses import spread
from tests.bench.tables import write_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.operations.run import Result

# What ends connections: only those of the process that was killed may end, and what was under way on them.
_KILLS: Final = frozenset({"kill-worker", "kill-supervisor"})
_SATURATED: Final = 0.9  # of the cores
_DISTURBED: Final = 0.2  # cores that all else takes
_SHOWN: Final = 10


@dataclass(frozen=True)
class Line:
    """One fact. `must_be_zero` makes it a failure where it is not; `note` stands beside it."""

    name: str
    value: int | str
    must_be_zero: bool = False
    note: str = ""

    @property
    def is_bad(self) -> bool:
        return self.must_be_zero and self.value != 0


def verdicts(result: Result) -> list[Line]:
    """Return the counts that are judged, in the order in which they are shown."""
    tally, requests, is_kill = result.tally, result.requests, result.plan.operation in _KILLS
    ways = (tally.up, tally.down)
    ends = ", ".join(f"{how}: {number}" for how, number in tally.ends.most_common(_SHOWN))
    lines = [
        Line("operations that failed", len(result.problems), True),
        Line("disconnects", len(tally.cuts), not is_kill, ends),
    ]
    if is_kill:
        lines.append(Line("disconnects of others than the killed process's", result.strange_cuts, True))
        lines.append(Line("messages gone with their connections", both(tally, "gone")))
    for name in ("lost", "doubled", "corrupt", "reordered", "strayed"):
        up, down = (getattr(way, name) for way in ways)
        lines.append(Line(f"messages {name}", up + down, True, f"up {up}, down {down}" if up + down else ""))
    lines += [
        Line("control frames that neither end sent", tally.controls, not is_kill),
        Line("tunnels that only one end knows", tally.unknown, True),
        Line("failed requests", requests["failed"], not is_kill, _counted(requests["errors"])),
        Line("requests that reached an app twice", len(requests["repeated"]), True),
        Line("requests mixed up or without an end", len(requests["mixed_up"]), True),
        Line("sessions moved", result.moved, True),
        Line("cookies set anew", result.new_cookies, True),
        Line("handshakes refused", sum(result.refused.values()), not is_kill, _counted(result.refused)),
        Line("processes left over", result.left, True, "after the proxy was stopped"),
        Line(
            "processes more than before", max(0, result.after.processes - result.before.processes), True,
            "after the last operation",
        ),
    ]  # fmt: skip
    return lines


def is_good(result: Result) -> bool:
    """Say whether all is zero that must be."""
    return not any(line.is_bad for line in verdicts(result))


def measures(result: Result) -> list[Line]:
    """Return what was measured and is not judged."""
    rates, before, after = result.rates, result.before, result.after
    used = sum(rates.cores.values())
    cores = ", ".join(f"{name} {value:.2f}" for name, value in rates.cores.items())
    seconds = spread([outcome.seconds for outcome in result.outcomes])
    lines = [
        Line("tunnels", result.tally.tunnels),
        Line("messages sent", result.tally.up.sent + result.tally.down.sent),
        Line(
            "messages in a second, quiet", f"{rates.up:,.0f} up, {rates.down:,.0f} down",
            note=f"not sent for lack of time, in all: {result.shortfall:.1%}",
        ),
        Line(
            "requests", result.requests["requests"],
            note=f"{rates.requests:,.0f}/s quiet, {result.requests['connections']} connections, "
                 f"slowest {result.requests['slowest_s'] * 1e3:,.0f} ms",
        ),
        Line("cores used, quiet", f"{used:.2f}", note=f"{cores}; others {rates.others:.2f}"),
        Line("CPU for a message", f"{rates.load_us:.1f} us load and apps, {rates.proxy_us:.1f} us proxy"),
        Line("operations", _counted(Counter(outcome.name for outcome in result.outcomes))),
        Line("time of an operation", f"p50 {seconds.p50:.2f} s, p99 {seconds.p99:.2f} s, worst {seconds.worst:.2f} s"),
    ]  # fmt: skip
    if result.reopened_s:
        reopened = spread(result.reopened_s)
        lines.append(Line("cut tunnels open again after", f"p50 {reopened.p50:.2f} s, worst {reopened.worst:.2f} s"))
    lines += [
        Line("memory (PSS)", f"{before.pss_kib / 1024:.1f} MiB before, {after.pss_kib / 1024:.1f} MiB after"),
        Line("descriptors", f"{before.descriptors} before, {after.descriptors} after"),
        Line("processes", f"{before.processes} before, {after.processes} after"),
    ]
    if result.plan.faults:
        lines.append(Line("faults of the relay", result.struck, note=", ".join(result.plan.faults)))
    return lines


def pauses(result: Result) -> list[list[str]]:
    """Return the table of pauses and delays (ms): of each stretch, and of each tunnel and direction."""
    rows = [["ms", "quiet p50", "quiet p99", "quiet worst", "operations p50", "operations p99", "operations worst"]]
    for name, quiet, busy in (
        ("worst pause of any tunnel, for each operation", [w.pause_ms for w in result.quiet],
         [w.pause_ms for w in result.busy]),
        ("worst delay of any message, for each operation", [w.delay_ms for w in result.quiet],
         [w.delay_ms for w in result.busy]),
        ("worst pause, for each tunnel and direction", result.tunnels_quiet["pause"], result.tunnels_busy["pause"]),
        ("worst delay, for each tunnel and direction", result.tunnels_quiet["delay"], result.tunnels_busy["delay"]),
    ):  # fmt: skip
        cells = [f"{value:.0f}" for one in map(spread, (quiet, busy)) for value in (one.p50, one.p99, one.worst)]
        rows.append([name, *cells])
    return rows


def remarks(result: Result, cores: int) -> list[str]:
    """Return what a reader must know to judge the figures, and what went wrong."""
    used = sum(result.rates.cores.values())
    found = [*result.problems]
    if result.rates.others > _DISTURBED:
        found.append(f"other work took {result.rates.others:.2f} cores meanwhile: the pauses are worthless")
    if used > _SATURATED * cores:
        found.append(
            f"the machine is saturated without any operation: {used:.2f} of {cores} cores; the pauses are its own. "
            "A longer --period or fewer --tunnels leave room"
        )
    found += [f"{how}, tunnel {tunnel}" for _, tunnel, _, how in result.tally.cuts[:_SHOWN]]
    found += [text for _, text in result.requests["failures"][:_SHOWN]]
    found += result.requests["repeated"][:_SHOWN]
    found += result.requests["mixed_up"][:_SHOWN]
    bad = [f"{line.name}: {line.value}" for line in verdicts(result) if line.is_bad]
    found.append(f"NOT GOOD: {'; '.join(bad)}" if bad else "good: all is zero that must be")
    return found


def write_report(result: Result, facts: Sequence[str], cores: int, *, is_markdown: bool) -> str:
    """Return the whole report."""
    counts = [["", "", ""], *([line.name, _value(line), line.note] for line in (*verdicts(result), *measures(result)))]
    parts = [
        [f"- {fact}" if is_markdown else fact for fact in facts],
        write_table(counts, (0,), is_markdown=is_markdown),
        write_table(pauses(result), (0,), is_markdown=is_markdown),
        remarks(result, cores),
    ]
    return "\n\n".join(("\n\n" if is_markdown and part is parts[-1] else "\n").join(part) for part in parts)


def _value(line: Line) -> str:
    text = f"{line.value:,}" if isinstance(line.value, int) else line.value
    return f"{text} (!)" if line.is_bad else text


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in counts.items())
