from __future__ import annotations

import enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from titans_build.blocks.published_learners import LEARNERS
from titans_build.registry import Needs, Spec, describe, list_blocks, lookup, register, scratch
from titans_build.registry.schema import describe_type, fields_of


class Thing:
    def init_state(self, batch_size: int) -> None: ...

    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any: ...


class Color(enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "integer"),
        (float, "number"),
        (bool, "true or false"),
        (str, "text"),
        (int | None, "integer or null"),
        (Annotated[int, Field(ge=1)], "integer >= 1"),
        (Annotated[int, Field(ge=1, le=8)], "integer from 1 to 8"),
        (Annotated[float, Field(gt=0, lt=1)], "number > 0 < 1"),
        (Annotated[int | None, Field(ge=1)], "integer >= 1 or null"),
        (Annotated[int, Field(ge=1)] | None, "integer >= 1 or null"),
        (Literal["a", "b"], "'a' | 'b'"),
        (list[int], "list of integer"),
        (tuple[int, float], "list of (integer, number)"),
        (dict[str, int], "mapping of text to integer"),
        (Spec, "block"),
        (Spec | None, "block or null"),
        (list[Spec], "list of block"),
        (Annotated[Spec, Needs("read", "write")], "block with read, write"),
        (Annotated[list[Spec], Field(min_length=2, max_length=2)], "list of block (exactly 2)"),
        (Annotated[list[Spec], Field(min_length=2, max_length=26)], "list of block (2 to 26)"),
        (Annotated[list[Spec], Field(min_length=1)], "list of block (at least 1)"),
    ],
)
def test_descriptions_of_types(annotation: Any, text: str):
    assert describe_type(annotation) == text


def bad_signatures() -> list[tuple[Any, str]]:
    class NoDim(Thing):
        def __init__(self, width: int) -> None: ...

    class Hidden(Thing):
        def __init__(self, dim: int, **fields: int) -> None: ...

    class Rest(Thing):
        def __init__(self, dim: int, *fields: int) -> None: ...

    class Untyped(Thing):
        def __init__(self, dim: int, *, depth=3) -> None: ...  # type: ignore[no-untyped-def]

    class Typed(Thing):
        def __init__(self, dim: int, *, type: str = "x") -> None: ...

    class Strange(Thing):
        def __init__(self, dim: int, *, thing: Thing | None = None) -> None: ...

    class Forgotten(Thing):
        def __init__(self, dim: int, *, thing: NoSuchName = None) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    return [
        (NoDim, "the first parameter must be dim"),
        (Hidden, "hides the schema"),
        (Rest, "hides the schema"),
        (Untyped, "depth has no annotation"),
        (Typed, "cannot be called 'type'"),
        (Strange, "thing has a type no recipe can hold"),
        (Forgotten, "name 'NoSuchName' is not defined"),
    ]


@pytest.mark.parametrize(("cls", "fragment"), bad_signatures())
def test_invalid_signatures(cls: Any, fragment: str):
    with pytest.raises(TypeError, match=fragment):
        fields_of(cls)
    with scratch(), pytest.raises(TypeError, match=fragment):
        register("bad_one")(cls)


def test_conversion_to_plain_data_and_back():
    class Rich(Thing):
        def __init__(
            self,
            dim: int,
            *,
            color: Color = Color.RED,
            pair: tuple[int, ...] = (),
            table: dict[str, float] | None = None,
        ) -> None: ...

    fields = fields_of(Rich)
    assert fields["color"].check("red", "color") == ("red", [])
    assert fields["color"].to_python("red") is Color.RED
    assert fields["pair"].check([1, 2], "pair") == ([1, 2], []) and fields["pair"].to_python([1, 2]) == (1, 2)
    assert fields["table"].check({"a": 1}, "table") == ({"a": 1.0}, [])
    (problem,) = fields["table"].check({"a": "x"}, "table")[1]
    assert "number" in problem.message


def test_describe():
    class Documented(Thing):
        """One line.

        Some more.
        """

        def __init__(
            self,
            dim: int,
            *,
            memory: Annotated[Spec, Needs("read"), Field(description="what is read")],
            depth: Annotated[int, Field(ge=1, description="layers")] = 2,
        ) -> None: ...

    with scratch():
        register("documented")(Documented)
        description = describe("documented")
    assert (description.name, description.summary, description.doc) == (
        "documented",
        "One line.",
        "One line.\n\nSome more.",
    )
    assert [(f.name, f.type, f.required, f.default, f.description) for f in description.fields] == [
        ("memory", "block with read", True, None, "what is read"),
        ("depth", "integer >= 1", False, 2, "layers"),
    ]
    assert description.protocols == []


@pytest.mark.parametrize("name", list_blocks())
def test_all_blocks_and_fields_have_descriptions(name: str):
    description = describe(name)
    assert description.summary.endswith(".") or description.summary.endswith(":")
    assert all(field.description for field in description.fields), [
        f.name for f in description.fields if not f.description
    ]
    assert lookup(name).place.rpartition(":")[2].isdigit()
    assert ("memory" in description.protocols) == (name in ("memory", "self_modifying", *LEARNERS))
