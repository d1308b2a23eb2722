"""pydantic's own errors, worded for a person."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import ValidationError

from stickyproxy.config.explain import explain, read_sections
from stickyproxy.config.fields import AlsoWritten, Flag, OrFalse, Section


class Leaf(Section):
    weight: Literal["low", "high", "none"] = "low"
    flag: Flag
    count: int = 0


class Tree(Section):
    leaf: OrFalse[Leaf] = None
    other: int = 0
    leaves: tuple[Annotated[Leaf, AlsoWritten({"type": "string"})], ...] = ()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"leaf": {}}, [(("leaf",), "the key 'flag' is missing")]),
        ({"leaf": {"flag": None}}, [(("leaf",), "the key 'flag' is missing")]),
        ({"leaf": {"flag": 1}}, [(("leaf", "flag"), "expected true or false, got 1")]),
        (
            {"leaf": {"flag": True, "wieght": 1}},
            [(("leaf", "wieght"), "unknown key 'wieght'; did you mean 'weight'?")],
        ),
        ({"x": 1}, [(("x",), "unknown key 'x'; known here: leaf, other, leaves")]),
        ({"x\n" * 50: 1}, [(("x\n" * 50,), "unknown key '" + "x\\n" * 20 + "...'; known here: leaf, other, leaves")]),
        (
            {"leaf": {"flag": True, "weight": "top"}},
            [(("leaf", "weight"), "expected low, high or none, got 'top'")],
        ),
        (
            {"leaves": [{"flag": True}, {"flag": True, "wieght": 1}]},
            [(("leaves", 1, "wieght"), "unknown key 'wieght'; did you mean 'weight'?")],
        ),
        ({"leaf": 7}, [(("leaf",), "expected a mapping of keys, got a number")]),
        (
            {"leaf": {"flag": True, "count": []}, "other": []},
            [
                (("leaf", "count"), "Input should be a valid integer"),  # no field of ours comes here
                (("other",), "Input should be a valid integer"),
            ],
        ),
    ],
)
def test_each_error_has_a_path_and_a_sentence(raw: object, expected: object) -> None:
    with pytest.raises(ValidationError) as raised:
        Tree.model_validate(raw)
    assert list(explain(raised.value, Tree)) == expected


def test_sections_of_a_list_are_read_one_by_one() -> None:
    leaves = [Leaf(flag=True), Leaf(flag=False)]
    assert read_sections([{"flag": True}, leaves[1]], Leaf, lambda _: ()) == tuple(leaves)
    with pytest.raises(ValidationError) as raised:
        read_sections([{}, {"flag": True}, {"flag": 7}], Leaf, lambda found: [((one,), "again") for one in found])
    assert [(details["loc"], details["msg"]) for details in raised.value.errors()] == [
        ((0,), "the key 'flag' is missing"),
        ((2, "flag"), "expected true or false, got 7"),
        ((1,), "again"),
    ]
