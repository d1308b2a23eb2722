"""The tables of the reports, for a terminal or as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stickyproxy.cli.words import table

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def write_table(rows: Sequence[Sequence[str]], left: Collection[int], *, is_markdown: bool) -> list[str]:
    """Return the lines of a table, whose first row names the columns.

    The columns at the places in `left` are aligned left, the others, which hold figures, right.
    """
    if is_markdown:
        rule = ["---" if place in left else "---:" for place in range(len(rows[0]))]
        return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    named = [row for row in rows if any(row)]  # the columns may have no names
    return table(named, right=set(range(len(rows[0]))) - set(left))
