"""The learners and tasks that ``reproduce`` compares, and what was published about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ...recipes import Recipe, load_recipe, packaged_names, read_value
from ...recipes.parse import recipe_error
from ...registry import list_blocks, lookup, nearest, show

# -- learners ----------------------------------------------------------------------------------------------------------

Kind = Literal["attention", "linear", "deep"]

LEARNERS: dict[str, tuple[Kind, str | dict[str, Any]]] = {
    "transformer": ("attention", {"type": "attention"}),
    "linear_attention": ("linear", "linear_attention"),
    "retnet": ("linear", "retnet"),
    "gla": ("linear", "gla"),
    "mamba2": ("linear", "hf_mamba2"),
    "delta_net": ("linear", "delta_net"),
    "gated_delta_net": ("linear", "gated_delta_net"),
    "kda": ("linear", "kda"),
    "delta_product": ("linear", "delta_product"),
    "momentum_delta": ("linear", "momentum_delta"),
    "ttt_linear": ("linear", "ttt_linear"),
    "swla": ("linear", "swla"),
    "titans_linear": ("linear", {"type": "memory", "depth": 1}),
    "titans": ("deep", {"type": "memory", "depth": 2}),
    "titans_channel": ("deep", "titans_channel"),
    "ttt_mlp": ("deep", "ttt_mlp"),
    "moneta": ("deep", "moneta"),
    "yaad": ("deep", "yaad"),
    "memora": ("deep", "memora"),
    "dla": ("deep", "dla"),
    "omega_net": ("deep", "omega_net"),
    "atlas": ("deep", "atlas"),
    "lact": ("deep", {"type": "lact", "chunk": 16}),  # its own chunk is longer than the rows
    "self_modifying": ("linear", "self_modifying"),
}
"""Each learner's kind and its block, or the name of a block or of a packaged recipe. Linear: its memory is a matrix."""
QUICK_LEARNERS = (
    "transformer", "linear_attention", "gla", "delta_net", "gated_delta_net", "kda", "delta_product", "momentum_delta",
    "ttt_linear", "titans_linear", "titans", "ttt_mlp", "yaad", "omega_net",
)  # fmt: skip
SLOW = ("moneta", "memora", "atlas")
"""Those whose step on a CPU takes more than ten times that of ``titans``: no form has them unless they are named."""


def recipe_of(learner: str | dict[str, Any], dim: int, layers: int = 2) -> Recipe:
    """A model of ``layers`` layers of width ``dim``, each with the learner and a feed-forward network.

    ``learner``: a block, or the name of a block or of a recipe, whose stack is then repeated ``layers`` times. Raises
    ``RecipeError`` if there is none of that name.
    """
    if isinstance(learner, str) and learner in packaged_names():
        recipe = load_recipe(learner, {"dim": dim, "vocab": 1})
        repeated = [{**part, "repeat": layers} if isinstance(part, dict) else part for part in recipe.stack]
        return load_recipe({**recipe.to_dict(), "stack": repeated})
    if isinstance(learner, str) and learner not in list_blocks():
        if learner.endswith((".yaml", ".yml", ".json")):
            return load_recipe(learner, {"dim": dim, "vocab": 1})
        known = [*list_blocks(), *packaged_names()]
        raise recipe_error(learner, f"this version has no block or recipe of that name{nearest(learner, known)}")
    block = {"type": learner} if isinstance(learner, str) else learner
    fields = lookup(str(block.get("type"))).fields
    if "heads" in fields:
        block = {"heads": 4, **block}
    network = {"type": "ffn", "hidden": 4 * dim}
    stack = [{"repeat": layers, "of": ["layer"]}]
    return load_recipe({"version": 1, "dim": dim, "vocab": 1, "layers": {"layer": [block, network]}, "stack": stack})


def learners_named(names: list[str] | tuple[str, ...]) -> dict[str, tuple[Kind | None, str | dict[str, Any]]]:
    """The learners of a command line: names of ``LEARNERS``, of blocks and of recipes, and NAME=BLOCK.

    Raises ``RecipeError`` for a block that is none.
    """
    found: dict[str, tuple[Kind | None, str | dict[str, Any]]] = {}
    for text in names:
        name, equals, given = text.partition("=")
        if not equals:
            found[name] = LEARNERS.get(name, (None, name))
            continue
        block = read_value(given)
        if not isinstance(block, (str, dict)):
            raise recipe_error(name, f"expected a block or the name of one, got {show(block)}")
        found[name] = (None, block)
    return found


# -- tasks -------------------------------------------------------------------------------------------------------------


class Benchmark(NamedTuple):
    """A task, in its published size and in that of the quick form."""

    data: dict[str, Any]
    """What ``open_source`` takes."""
    quick: dict[str, Any] | None = None
    """The fields that differ in the quick form; ``None``: it is not in it."""
    longer: tuple[int, ...] = ()
    """Multiples of the length in which the model is tested, too, at the positions that it has not been trained on."""
    bottleneck: bool = False
    """Whether the second half of a row is said from the features at one position."""

    def at(self, multiple: int) -> dict[str, Any]:
        """The data for a test beyond the length that the model was trained on."""
        length = self.data["length"]
        return {**self.data, "length": multiple * length, "first": length}


def _states(group: str, quick: dict[str, Any] | None = None) -> Benchmark:
    return Benchmark({"task": "state_tracking", "group": group, "length": 40}, quick, longer=(2, 4))


_MAD = {"examples": 12800}
BENCHMARKS: dict[str, Benchmark] = {
    "recall": Benchmark({"task": "recall", **_MAD}, {"length": 48, "vocab": 12}),
    "noisy_recall": Benchmark({"task": "recall", "vocab": 32, "noise": 0.2, **_MAD}),
    "fuzzy_recall": Benchmark({"task": "recall", "motif": 3, **_MAD}),
    "selective_copy": Benchmark({"task": "selective_copy", **_MAD}, {"length": 40, "copied": 6, "vocab": 10}),
    "compression": Benchmark({"task": "compression", "length": 62, **_MAD}, bottleneck=True),
    "memorization": Benchmark({"task": "memorization", "examples": 256}),
    "mqar": Benchmark({"task": "mqar", "examples": 10000}, {"length": 24, "vocab": 16, "pairs": 3}),
    "parity": _states("Z2", quick={"length": 12}),
    "modular_sums": _states("Z5"),
    "S3": _states("S3", quick={"length": 8}),
    "A5": _states("A5"),
    "automaton": Benchmark({"task": "automaton", "length": 256}),
    "el_nino": Benchmark({"task": "forecast", "series": "el_nino"}),
    "sunspots": Benchmark({"task": "forecast", "series": "sunspots", "length": 40}),
}
"""The six tasks of MAD (arXiv 2403.17844), recall (2312.04927), state tracking, languages in context, time series."""


def with_bottleneck(recipe: Recipe, after: int) -> Recipe:
    """``recipe`` as the encoder of the compression task: the decoder reads its features at position ``after`` alone."""
    blocks = [block for name in recipe.expand() for block in recipe.layers[name]]
    layers = {
        "encoder": [{"type": "bottleneck", "of": blocks, "after": after}],
        "decoder": [{"type": "ffn", "kind": "gelu", "hidden": recipe.dim}],
    }
    stack = ["encoder", {"repeat": 2, "of": ["decoder"]}]
    imports = [*recipe.imports, "titans_build.tools.tasks.bottleneck"]
    return load_recipe({**recipe.to_dict(), "imports": imports, "layers": layers, "stack": stack}, allow_imports=True)


# -- what was published ------------------------------------------------------------------------------------------------

MAD = ("compression", "recall", "noisy_recall", "fuzzy_recall", "selective_copy", "memorization")
MAD_AVERAGE = "MAD average"


def mad_average(accuracies: Mapping[str, float]) -> float | None:
    """The mean over MAD as in the published tables, where recall with and without noise are one of five columns."""
    if any(task not in accuracies for task in MAD):
        return None
    recall = (accuracies["recall"] + accuracies["noisy_recall"]) / 2
    return (recall + sum(accuracies[task] for task in MAD if "recall" not in task or task == "fuzzy_recall")) / 5


def _mad(compression: float, recall: float, fuzzy: float, copying: float, memorization: float) -> dict[str, float]:
    both = {"recall": recall, "noisy_recall": recall}
    found = {**both, "compression": compression, "fuzzy_recall": fuzzy, "selective_copy": copying}
    found["memorization"] = memorization
    return {task: round(percent / 100, 4) for task, percent in found.items()}


PUBLISHED: dict[str, dict[str, float]] = {
    "transformer": {**_mad(49.4, 100, 48.2, 95.9, 83.8), MAD_AVERAGE: 0.7546, "mqar": 1.0, "parity": 0.464},
    "titans": {**_mad(49.6, 100, 49.7, 99.4, 83.5), MAD_AVERAGE: 0.7644},
    "gated_delta_net": {**_mad(44.8, 100, 32.5, 96.2, 81.7), MAD_AVERAGE: 0.7104, "mqar": 0.99},
    "gla": {"mqar": 0.95},
    "mamba2": {"mqar": 0.83},
    "omega_net": {MAD_AVERAGE: 0.7898},
    "atlas": {MAD_AVERAGE: 0.7950},
    "self_modifying": {"parity": 1.0, "modular_sums": 1.0},
}
"""Accuracies by learner and task, of the sizes and the training in the papers.

MAD: Titans (arXiv 2501.00663) as presented at NeurIPS, and ATLAS (2505.23735). MQAR: Zoology (2312.04927) and later
papers, at a state of about 66,000 numbers. State tracking: HOPE (Nested Learning, 2512.24695), which has memories in
place of feed-forward networks.
"""
