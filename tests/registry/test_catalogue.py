from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import titans_build
from titans_build.registry import RecipeError, create, list_blocks, list_rows, lookup, register, scratch, validate

BUILT_IN = {"attention", "chain", "context", "ffn", "gate", "memory", "persistent", "residual"}


class Thing:
    """A thing.

    And more about it.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def init_state(self, batch_size: int) -> None: ...

    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any: ...


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with scratch():
        yield


def test_registering():
    assert register("a_thing")(Thing) is Thing
    entry = lookup("a_thing")
    assert (entry.name, entry.cls, entry.summary, entry.fields) == ("a_thing", Thing, "A thing.", {})
    assert entry.place.startswith(__file__) and entry.place.rpartition(":")[2].isdigit()
    assert isinstance(create("a_thing", dim=4), Thing)


def test_a_duplicate_name_is_an_error_with_both_places():
    register("a_thing")(Thing)

    class Other(Thing):
        def __init__(self, dim: int) -> None: ...

    with pytest.raises(
        ValueError, match=r"'a_thing' is taken by Thing \(.*test_catalogue.py:\d+\).*Other.*test_catalogue.py:\d+"
    ):
        register("a_thing")(Other)
    assert lookup("a_thing").cls is Thing
    register("a_thing", replace=True)(Other)
    assert lookup("a_thing").cls is Other
    with pytest.raises(ValueError, match="'memory' is taken by NeuralMemory"):
        register("memory")(Other)


@pytest.mark.parametrize("name", ["", "1st", "a b", "a.b", "a/b", "ä", "x" * 101, 3, None])
def test_invalid_names(name: Any):
    with pytest.raises(ValueError, match="a name starts with a letter"):
        register(name)


def test_invalid_classes():
    with pytest.raises(TypeError, match="has no forward and no init_state"):
        register("number")(int)
    with pytest.raises(TypeError, match="is no block"):
        register("function")(lambda dim: None)  # type: ignore[arg-type,type-var]


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(RecipeError, match="unknown block 'memroy'; did you mean 'memory'"):
        lookup("memroy")


def test_lists_are_naturally_sorted_and_filtered():
    for name in ("zz10", "zz9", "zz1"):
        register(name)(Thing)
    assert list_blocks("zz*") == ["zz1", "zz9", "zz10"]
    assert list_blocks("*z9") == ["zz9"]
    assert list_blocks("nothing*") == []
    assert set(list_blocks()) >= BUILT_IN
    assert list_blocks("*mem*") == ["memora", "memory"] == titans_build.list_blocks("*mem*")


def test_scratch_restores_the_catalogue():
    with scratch():
        register("for_now")(Thing)
        assert "for_now" in list_blocks()
    assert "for_now" not in list_blocks()


Install = Callable[[str, str, dict[str, str]], None]

SOURCE = """
from titans_build.registry import register
class Base:
    def __init__(self, dim: int, *, size: int = 3) -> None: self.dim, self.size = dim, size
    def init_state(self, batch_size): ...
    def forward(self, x, state=None, *, mask=None): ...
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution with entry points on the import path: ``install(name, source, {block: target})``."""
    modules = []

    def put(name: str, source: str, points: dict[str, str]) -> None:
        folder = tmp_path / name
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{block} = {target}\n" for block, target in points.items())
        (info / "entry_points.txt").write_text(f"[titans_build.blocks]\n{lines}")
        (folder / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))
        modules.append(name)

    yield put
    for name in modules:
        sys.modules.pop(name, None)


def test_installed_blocks_are_imported_at_first_use(install: Install):
    install("plug_one", SOURCE + "register('plugged')(Base)\n", {"plugged": "plug_one:Base"})
    assert "plugged" in list_blocks()
    assert "plug_one" not in sys.modules
    assert validate({"type": "plugged", "size": 4}) == {"type": "plugged", "size": 4}
    assert lookup("plugged").source == "plug_one"
    (row,) = list_rows("plugged")
    assert (row.name, row.source, row.problem) == ("plugged", "plug_one", None)


def test_an_entry_point_may_name_a_module_or_a_class_without_decorator(install: Install):
    install(
        "plug_two", SOURCE + "register('by_module')(Base)\n", {"by_module": "plug_two", "by_class": "plug_two:Base"}
    )
    assert create("by_module", dim=2).size == 3
    assert create("by_class", dim=2).size == 3


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("import nothing_of_this_name", "plug_bad", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("raise RuntimeError('no GPU')", "plug_bad", "RuntimeError: no GPU"),
        ("x = (", "plug_bad", "SyntaxError"),
        ("", "plug_bad:Missing", "AttributeError"),
        ("", "plug_bad", "registers no block of that name"),
        ("A = int", "plug_bad:A", "int"),
        (SOURCE + "register('memory')(Base)", "plug_bad", "'memory' is taken by NeuralMemory"),
        (SOURCE + "register('memory', replace=True)(Base)", "plug_bad", "may not replace the built-in 'memory'"),
        (SOURCE + "register('extra')(Base)\nraise OSError('late')", "plug_bad", "OSError: late"),
        ("import sys; sys.exit('not for this machine')", "plug_bad", "SystemExit: not for this machine"),
    ],
)
def test_a_broken_entry_point_is_an_error(install: Install, source: str, target: str, reason: str):
    install("plug_bad", source, {"broken": target})
    memory = lookup("memory").cls
    for _ in range(2):  # and the same one when asked again
        with pytest.raises(RecipeError) as caught:
            validate({"type": "context", "attend": {"type": "broken"}}, dim=8, path="layers.a.0")
        (problem,) = caught.value.problems
        assert problem.path == "layers.a.0.attend.type"
        assert problem.message.startswith("the installed block 'broken' (plug_bad) cannot be used: ")
        assert reason in problem.message
    (row,) = list_rows("broken")
    assert row.problem is not None and reason in row.problem
    assert list_rows("memory")[0].problem is None
    assert lookup("memory").cls is memory
    assert "extra" not in list_blocks()


def test_built_in_blocks_are_not_replaced_by_packages(install: Install):
    install("plug_shadow", SOURCE, {"memory": "plug_shadow:Base"})
    assert lookup("memory").source == "titans_build"
    assert "plug_shadow" not in sys.modules
    built_in, ignored = list_rows("memory")
    assert built_in.problem is None
    assert (ignored.source, ignored.problem) == ("plug_shadow", "ignored: 'memory' is built in")


def test_two_packages_with_one_name(install: Install):
    install("plug_left", SOURCE, {"twice": "plug_left:Base"})
    install("plug_right", SOURCE, {"twice": "plug_right:Base"})
    with pytest.raises(RecipeError, match="several installed packages provide this name"):
        lookup("twice")
    (row,) = list_rows("twice")
    assert "plug_left" in row.source and "plug_right" in row.source


@pytest.mark.parametrize("first", ["greedy", "hers"])
def test_a_package_registers_its_own_names_only(install: Install, first: str):
    install("plug_greedy", SOURCE + "register('greedy')(Base)\nregister('hers')(Base)\n", {"greedy": "plug_greedy"})
    install("plug_hers", SOURCE, {"hers": "plug_hers:Base"})
    for name in (first, "hers"):
        try:
            lookup(name)
        except RecipeError:
            assert name == "greedy"
    # whichever is used first, each name is that of the package that provides it
    assert lookup("hers").cls.__module__ == "plug_hers"
    with pytest.raises(RecipeError, match=r"'greedy' \(plug_greedy\) cannot be used: .*'hers'"):
        lookup("greedy")


def test_a_pattern_must_be_text():
    with pytest.raises(TypeError, match=r"pattern: expected text with wildcards .*, got 5"):
        list_blocks(5)  # type: ignore[arg-type]


def test_scratch_keeps_built_in_blocks_that_are_imported_inside() -> None:
    code = (
        "from titans_build.registry import scratch, list_blocks\n"
        "with scratch():\n    import titans_build.blocks\n"
        "assert 'persistent' in list_blocks()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
