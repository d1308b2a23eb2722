"""The tables of the reports, for a terminal or as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def write_table(rows: Sequence[Sequence[str]], left: Collection[int], *, is_markdown: bool) -> list[str]:
    """Return the lines of a table, whose first row names the columns.

    The columns at the places in `left` are aligned left, the others, which hold figures, right.
    """
    if is_markdown:
        rule = ["---" if place in left else "---:" for place in range(len(rows[0]))]
        return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
        if any(row)  # the columns may have no names
    ]
