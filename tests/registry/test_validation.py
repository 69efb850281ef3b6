from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from titans_build.registry import (
    Needs,
    RecipeError,
    Spec,
    check_settings,
    create,
    fields_of,
    register,
    scratch,
    validate,
)


class Thing:
    """The least that counts as a block."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def init_state(self, batch_size: int) -> None:
        return None

    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any:
        return x, state


class Store(Thing):
    """Something that remembers."""

    def __init__(
        self,
        dim: int,
        *,
        depth: Annotated[int, Field(ge=1, le=8, description="layers")] = 2,
        kind: Literal["plain", "gated"] = "plain",
        rate: float = 0.5,
        width: int | None = None,
        pair: tuple[int, int] = (1, 2),
        on: bool = True,
    ) -> None:
        super().__init__(dim)
        self.depth, self.kind, self.rate, self.width, self.pair, self.on = depth, kind, rate, width, pair, on

    def read(self, x: Any, state: Any) -> Any: ...

    def write(self, x: Any, state: Any, mask: Any = None) -> Any: ...


class Heads(Thing):
    """Something with heads."""

    def __init__(self, dim: int, *, heads: Annotated[int, Field(ge=1)] = 4) -> None:
        super().__init__(dim)
        self.heads = heads

    @classmethod
    def problems(cls, dim: int | None, fields: dict[str, Any]) -> Any:
        if dim is not None and dim % fields["heads"]:
            yield "heads", f"{fields['heads']} heads do not divide the width {dim}"


class Chain(Thing):
    """One after the other."""

    def __init__(self, dim: int, *, of: Annotated[list[Spec], Field(min_length=1)]) -> None:
        super().__init__(dim)
        self.of = [create(spec, dim=dim) for spec in of]


class Reader(Thing):
    """Needs a memory, and may have a body."""

    def __init__(
        self,
        dim: int,
        *,
        memory: Annotated[Spec, Needs("read", "write"), Field(description="what is read")],
        body: Spec | None = None,
        pair: Annotated[list[Spec], Field(min_length=2, max_length=2)] | None = None,
    ) -> None:
        super().__init__(dim)
        self.memory = create(memory, dim=dim)
        self.body = None if body is None else create(body, dim=dim)


@pytest.fixture(autouse=True)
def things():
    with scratch():
        for name, cls in {"store": Store, "heads": Heads, "chain": Chain, "reader": Reader}.items():
            register(name, replace=True)(cls)
        yield


def problems(node: Any, dim: int | None = 8, path: str = "") -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        validate(node, dim=dim, path=path)
    assert str(caught.value).count("\n") == len(caught.value.problems)
    return dict(caught.value.problems)


def test_a_bare_name_gets_its_defaults():
    expected = {"type": "store", "depth": 2, "kind": "plain", "rate": 0.5, "width": None, "pair": [1, 2], "on": True}
    assert validate("store") == expected
    assert validate({"type": "store", "pair": [1, 2]}) == expected
    assert validate(expected) == expected


def test_a_list_is_a_chain():
    checked = validate({"type": "reader", "memory": "store", "body": ["store", {"type": "store", "depth": 3}]})
    assert checked["body"]["type"] == "chain"
    assert [item["depth"] for item in checked["body"]["of"]] == [2, 3]
    assert validate(checked) == checked


def test_arguments_are_not_modified():
    node = {"type": "reader", "memory": "store", "body": ["store"]}
    validate(node)
    assert node == {"type": "reader", "memory": "store", "body": ["store"]}


def test_create_passes_python_values():
    block = create({"type": "reader", "memory": {"type": "store", "rate": 1, "pair": [3, 4]}}, dim=8)
    assert block.memory.pair == (3, 4)
    assert block.memory.rate == 1.0 and isinstance(block.memory.rate, float)
    assert block.dim == block.memory.dim == 8


def test_a_built_block_is_passed_through():
    built = Store(8)
    assert create(built, dim=8) is built
    assert create({"type": "reader", "memory": built}, dim=8).memory is built
    assert "dim 8" in problems({"type": "reader", "memory": Store(4)})["memory"]
    assert "'Heads', which has no read and no write" in problems({"type": "reader", "memory": Heads(8)})["memory"]


def test_all_problems_at_once_with_paths_and_nearest_names():
    found = problems(
        {
            "type": "reader",
            "memory": {"type": "store", "depht": 3, "kind": "gatde", "rate": "fast"},
            "body": ["stoer", {"type": "heads", "heads": 3}, {"type": "store", "depth": 9}],
            "bdoy": 1,
        },
        path="layers.mac.0",
    )
    assert set(found) == {
        "layers.mac.0.bdoy",
        "layers.mac.0.memory.depht",
        "layers.mac.0.memory.kind",
        "layers.mac.0.memory.rate",
        "layers.mac.0.body.0",
        "layers.mac.0.body.1.heads",
        "layers.mac.0.body.2.depth",
    }
    assert "'depth'" in found["layers.mac.0.memory.depht"]
    assert "'gated'" in found["layers.mac.0.memory.kind"]
    assert "'store'" in found["layers.mac.0.body.0"]
    assert "'body'" in found["layers.mac.0.bdoy"]
    assert "3 heads do not divide the width 8" in found["layers.mac.0.body.1.heads"]
    assert "integer from 1 to 8" in found["layers.mac.0.body.2.depth"] and "got 9" in found["layers.mac.0.body.2.depth"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depth", "2"),
        ("depth", 2.0),
        ("depth", True),
        ("depth", None),
        ("depth", 0),
        pytest.param("depth", 10**5000, id="huge"),
        ("depth", [2]),
        ("rate", float("nan")),
        ("rate", float("inf")),
        ("rate", True),
        ("width", "none"),
        ("width", 2**63),
        ("pair", [1]),
        ("pair", [1, "2"]),
        pytest.param("pair", [1, 10**5000], id="huge in a pair"),
        ("on", 1),
        ("kind", 3),
        ("kind", {"type": "store"}),
    ],
)
def test_values_are_not_converted(field: str, value: Any):
    found = problems({"type": "store", field: value})
    assert all(path.split(".")[0] == field for path in found), found
    assert all("got" in message and len(message) < 300 for message in found.values())


@pytest.mark.parametrize(
    ("node", "fragment"),
    [
        ({}, "needs a type"),
        ({"tpye": "store"}, "did you mean 'type'"),
        ({"type": 3}, "expected the name of a block"),
        ({"type": "reader"}, "needs the field 'memory'"),
        ({"type": "reader", "memory": None}, "expected a block"),
        ({"type": "reader", "memory": 3}, "expected a block"),
        (
            {"type": "reader", "memory": "heads"},
            "expected a block with read and write (memory, self_modifying, store; or ",
        ),
        ({"type": "reader", "memory": ["store"]}, "'chain', which has no read"),
        ({"type": "reader", "memory": "store", "pair": ["store"]}, "at least 2"),
        ({"type": "reader", "memory": "store", "pair": "store"}, "list"),
        ({"type": "chain", "of": []}, "at least 1"),
        ([], "empty list"),
        ({"type": "store", "dim": 8}, "given once"),
        ({"type": "store", 3: 4}, "expected field names to be text"),
        ("no such thing\x1b[2J", "unknown block"),
        (3, "expected a block"),
    ],
)
def test_malformed_nodes(node: Any, fragment: str):
    messages = " / ".join(problems(node).values())
    assert fragment in messages
    assert "\x1b" not in messages


def test_cross_field_checks_run_on_valid_fields_only():
    assert list(problems({"type": "heads", "heads": "x"})) == ["heads"]
    assert validate({"type": "heads", "heads": 3})["heads"] == 3  # width not known


def test_limits_of_nesting_and_number():
    deep: Any = "store"
    for _ in range(40):
        deep = {"type": "chain", "of": [deep]}
    assert any("nested more than" in message for message in problems(deep).values())
    assert any("more than 1024 blocks" in message for message in problems(["store"] * 20_000).values())


def test_an_error_of_a_constructor_is_a_recipe_error():
    with scratch():

        @register("moody")
        class Moody(Thing):
            def __init__(self, dim: int) -> None:
                raise ValueError("not today")

        with pytest.raises(RecipeError, match="moody: not today"):
            create("moody", dim=8)


def test_inherited_conditions_do_not_fit_a_constructor_with_fewer_fields():
    with scratch():

        @register("two_heads")
        class TwoHeads(Heads):
            def __init__(self, dim: int, *, length: int = 1) -> None:
                super().__init__(dim, heads=2)

        @register("long_heads")
        class LongHeads(Heads):
            def __init__(self, dim: int, *, heads: int = 4, length: int = 1) -> None:
                super().__init__(dim, heads=heads)

        assert create("two_heads", dim=6).heads == 2
        with pytest.raises(RecipeError, match="4 heads do not divide the width 6"):
            create("long_heads", dim=6)


@pytest.mark.parametrize("dim", [0, -1, True, 2.0, "8"])
def test_create_needs_a_width(dim: Any):
    with pytest.raises(RecipeError, match="dim"):
        create("store", dim=dim)


class Wrapper(Thing):
    """Reads and writes by asking what it wraps."""

    delegates = ("of",)

    def __init__(self, dim: int, *, of: list[Spec]) -> None:
        super().__init__(dim)
        self.of = [create(spec, dim=dim) for spec in of]

    def read(self, x: Any, state: Any) -> Any: ...

    def write(self, x: Any, state: Any, mask: Any = None) -> Any: ...


def test_a_wrapper_has_the_methods_of_the_blocks_inside():
    register("wrapper")(Wrapper)

    def reader(*of: Any) -> Any:
        return {"type": "reader", "memory": {"type": "wrapper", "of": list(of)}}

    for good in (["store"], ["store", {"type": "wrapper", "of": ["store"]}]):
        create(reader(*good), dim=8)
        create({"type": "reader", "memory": create({"type": "wrapper", "of": good}, dim=8)}, dim=8)
    found = problems(reader("store", "heads", {"type": "wrapper", "of": ["heads"]}))
    assert list(found) == ["memory.of.1", "memory.of.2.of.0"]
    assert "got 'heads', which has no read and no write" in found["memory.of.1"]
    assert (
        "(memory, self_modifying, store; or" in found["memory.of.1"]
        and "wrapper with nothing else" in found["memory.of.1"]
    )
    assert "memory.of" in problems({"type": "reader", "memory": create({"type": "wrapper", "of": ["heads"]}, dim=8)})
    # anywhere else it may wrap what it likes
    create({"type": "wrapper", "of": ["heads"]}, dim=8)


class Settings:
    def __init__(
        self, *, size: Annotated[int, Field(ge=1)], shape: tuple[int, int] = (2, 3), name: str = "x"
    ) -> None: ...


def test_settings_of_other_classes():
    fields = fields_of(Settings, None)
    given = {"size": 4, "shape": [5, 6]}
    assert check_settings("thing", fields, given) == {"size": 4, "shape": (5, 6), "name": "x"}
    assert given == {"size": 4, "shape": [5, 6]}
    assert fields_of(object, None) == {}


def test_all_problems_of_settings_at_once():
    with pytest.raises(RecipeError) as caught:
        check_settings("thing", fields_of(Settings, None), {"nam": 1, "shape": [5]}, "train.data")
    assert str(caught.value).splitlines() == [
        "thing: 3 problems",
        "  train.data.nam: unknown field of thing; did you mean 'name'? (fields: size, shape, name)",
        "  train.data: thing needs the field 'size' (integer >= 1)",
        "  train.data.shape: expected list of (integer, integer), got [5]",
    ]
    with pytest.raises(RecipeError, match=r"size: expected integer >= 1, got 0"):
        check_settings("thing", fields_of(Settings, None), {"size": 0})
    with pytest.raises(RecipeError, match=r"size: thing needs the field 'size'"):
        check_settings("thing", fields_of(Settings, None), {})
