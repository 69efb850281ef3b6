"""The names of a plugin: made from its block's, and refused where they would be in the way."""

from __future__ import annotations

import keyword

import pytest

import titans_build as tb
from titans_build.registry import scratch
from titans_build.tools.scaffolding import Names, names_of
from titans_build.tools.terminal import UsageError


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ("moving_average", Names("moving_average", "moving-average-block", "moving_average_block", "MovingAverage")),
        ("gla-2", Names("gla-2", "gla-2-block", "gla_2_block", "Gla2")),
        ("A__b-", Names("A__b-", "a-b-block", "a_b_block", "AB")),
        ("json", Names("json", "json-block", "json_block", "Json")),
        ("none", Names("none", "none-block", "none_block", "NoneBlock")),
        ("exception", Names("exception", "exception-block", "exception_block", "ExceptionBlock")),
        ("field", Names("field", "field-block", "field_block", "FieldBlock")),
    ],
)
def test_everything_is_called_after_the_block(block: str, names: Names) -> None:
    assert names_of(block) == names
    assert names.module.isidentifier() and names.cls.isidentifier()
    assert not keyword.iskeyword(names.module) and not keyword.iskeyword(names.cls)


@pytest.mark.parametrize("block", ["", "1st", "a b", "a.b", "a/b", "../a", "_a", "ä", "x" * 101, "-x"])
def test_what_cannot_be_a_blocks_name(block: str) -> None:
    with pytest.raises(UsageError, match=r"^NAME .*: a name starts with a letter and has only letters, digits"):
        names_of(block)


@pytest.mark.parametrize("block", ["null", "true", "False"])
def test_what_a_recipe_would_not_read_as_a_name(block: str) -> None:
    with pytest.raises(UsageError, match=f"NAME {block}: a recipe would read that as (null|true|false), not as a name"):
        names_of(block)


def test_a_name_that_is_taken() -> None:
    with pytest.raises(UsageError, match=r"NAME memory: there is a block of that name \(from titans_build; .*describe"):
        names_of("memory")
    with scratch():

        @tb.register("mine")
        class Mine(tb.Block):
            """A block of one's own."""

        with pytest.raises(UsageError, match=r"NAME mine: there is a block of that name \(from tests"):
            names_of("mine")
    assert names_of("mine").cls == "Mine"
