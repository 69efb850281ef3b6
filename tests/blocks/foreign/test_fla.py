"""Layers of flash-linear-attention as blocks: on a GPU where there is one, and else in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import titans_build as tb
from titans_build.blocks.foreign import AdaptedState
from titans_build.blocks.state import concatenate, named_tensors
from titans_build.kernels.triton_runtime import refuse_interpreter
from titans_build.registry import Unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFUSED = refuse_interpreter() if DEVICE == "cpu" else None
refused_by_the_interpreter = pytest.mark.xfail(REFUSED is not None, reason=str(REFUSED), raises=Unavailable)
NAMES = tb.list_blocks("fla_*")
FEW = {"fla_gsa": {"slots": 16}, "fla_mamba2": {"state_size": 16}, "fla_momentum_deltanet": {"conv": 0}}
SLOW = pytest.mark.slow
MARKS: dict[str, Any] = {
    "fla_gated_deltanet": refused_by_the_interpreter,
    "fla_hgrn2": refused_by_the_interpreter,
    "fla_mamba2": (),
    "fla_momentum_deltanet": (),
}


def small(name: str) -> dict[str, Any]:
    return {"type": name, "heads": 2, **FEW.get(name, {})}


def recipe(block: Any) -> dict[str, Any]:
    return {"version": 1, "dim": 32, "layers": {"one": [block]}, "stack": ["one"]}


@pytest.fixture(scope="module", autouse=True)
def defined() -> None:
    """Defines the kernels while ``TRITON_INTERPRET`` is set, which some tests delete."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("fla.layers")


@pytest.mark.parametrize("name", NAMES)
def test_shapes_on_the_meta_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tb.build(recipe(small(name)), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) > 3 * 32 * 32
    state = model.init_state(3)
    assert all(tensor.shape[0] == 3 and tensor.is_meta for _, tensor in named_tensors(state.layers))
    (block,) = model.layers[0].blocks
    assert block.state_bytes() > 0 and block.flops(10) > 0 and not block.grows


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_a_device_without_kernels_is_an_error_at_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    loaded = tb.load_recipe(recipe(["fla_gla", "fla_gla", "fla_kda"]))
    with pytest.raises(Unavailable) as refused:
        tb.build(loaded)
    assert [problem.message.partition(":")[0] for problem in refused.value.problems] == ["fla_gla", "fla_kda"]
    assert "run on a GPU, not on cpu: build it with device cuda" in str(refused.value)


def test_a_missing_library_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fla", None)
    loaded = tb.load_recipe(recipe("fla_gla"))
    assert tb.describe("fla_gla").fields[0].name == "heads"
    expected = "fla_gla: needs flash-linear-attention, which is not installed: pip install 'titans-build[fla]'"
    for device in ("meta", DEVICE):
        with pytest.raises(Unavailable) as refused:
            tb.build(loaded, device=device)
        assert [problem.message for problem in refused.value.problems] == [expected]


@pytest.mark.parametrize(
    "block, message",
    [
        ({"type": "fla_gated_deltanet", "heads": 3}, "heads: 3 heads do not divide the width 32; head_dim gives them"),
        ({"type": "fla_kda", "heads": 2, "expand_v": 1.3}, "expand_v: 1.3 times 16, the width of a head, is no whole"),
        ({"type": "fla_gla", "heads": 32}, "expand_k: 32 heads do not divide 0.5 times the width 32"),
        ({"type": "fla_hgrn2", "heads": 5}, "heads: 5 heads do not divide the width 32"),
        ({"type": "fla_mamba2", "heads": 5}, "heads: 5 heads do not divide the inner width 64"),
        ({"type": "fla_kda", "hedas": 2}, "hedas: unknown field of fla_kda; did you mean 'heads'"),
    ],
)
def test_invalid_fields_are_errors_of_the_recipe(block: dict[str, Any], message: str) -> None:
    with pytest.raises(tb.RecipeError, match=f"layers.one.0.{message}"):
        tb.load_recipe(recipe(block))


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, SLOW)) for name in NAMES])
def test_split_and_padded_rows_equal_single_rows(name: str) -> None:
    """Two pieces. The first has left, right and inner padding, so that the rows are at different positions after it."""
    torch.manual_seed(0)
    block = tb.build_block(small(name), dim=32, device=DEVICE)
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1, 0]], device=DEVICE).bool()
    x, more = torch.randn(3, 4, 32, device=DEVICE), torch.randn(3, 1, 32, device=DEVICE)
    with torch.no_grad():
        y, state = block(x, mask=mask)
        kept = [tensor.clone() for _, tensor in named_tensors(state)]
        z, after = block(more, state)
        assert all(torch.equal(one, other) for one, (_, other) in zip(kept, named_tensors(state)))
        rows = [block(torch.cat([x[row, mask[row]], more[row]])[None]) for row in range(3)]
    assert not y[~mask].any() and state.position.tolist() == [2, 2, 3]
    for row, (expected, _) in enumerate(rows):
        torch.testing.assert_close(torch.cat([y[row, mask[row]], z[row]]), expected[0], rtol=1e-4, atol=1e-5)
    expected_state: AdaptedState = concatenate([ended for _, ended in rows])
    for (_, one), (_, other) in zip(named_tensors(after), named_tensors(expected_state)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@SLOW
# gated_deltaproduct does not support float32, and the interpreter does not run it in bfloat16
@pytest.mark.parametrize("name", [name for name in NAMES if name != "fla_gated_deltaproduct"])
def test_laws_without_gradients(name: str) -> None:
    """The interpreter does not run every backward kernel. The kernels compute in float32."""
    laws = ["meta", "step", "row", "mask", "dtype", "position"]
    tb.check_block(small(name), dim=32, dtype=torch.float32, laws=laws, length=6, cuts=2, device=DEVICE)


@refused_by_the_interpreter
def test_an_unsupported_dtype_is_an_error() -> None:
    block = tb.build_block(small("fla_gated_deltaproduct"), dim=32, device=DEVICE)
    with pytest.raises(ValueError, match=r"GatedDeltaProduct.* torch.float32: .*float32"):
        block(torch.randn(1, 3, 32, device=DEVICE))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_kernels_that_are_defined_without_the_interpreter_are_an_error(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(
        "import os, fla.layers, titans_build as tb\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "tb.build_block({'type': 'fla_gla', 'heads': 2}, dim=32)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.stderr.endswith("the kernels are not interpreted: set TRITON_INTERPRET=1 before Python starts\n")


def projected(layer: Any, x: Tensor, which: str, width: int) -> Tensor:
    """Queries, keys or values of a layer: projection, causal convolution, SiLU."""
    y = getattr(layer, f"{which}_proj")(x).transpose(1, 2)
    taps = getattr(layer, f"{which}_conv1d").weight
    y = F.conv1d(F.pad(y, (taps.shape[-1] - 1, 0)), taps, groups=taps.shape[0])
    return F.silu(y).transpose(1, 2).unflatten(-1, (-1, width))


@refused_by_the_interpreter
def test_gated_deltanet_against_the_reference_of_the_library(fla_reference: Callable[[str], ModuleType]) -> None:
    torch.manual_seed(0)
    block = tb.build_block({**small("fla_gated_deltanet"), "expand_v": 0.5}, dim=32, device=DEVICE)
    layer, x = block.inner, torch.randn(2, 7, 32, device=DEVICE)
    with torch.no_grad():
        y, state = block(x)
        q, k = (F.normalize(projected(layer, x, which, 16), dim=-1) for which in "qk")
        v = projected(layer, x, "v", 8)
        decay = -layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias)
        o, matrix = fla_reference("gated_delta_rule").naive_recurrent_gated_delta_rule(
            q, k, v, layer.b_proj(x).sigmoid(), decay, output_final_state=True
        )
        normed = F.rms_norm(o, (8,), eps=layer.o_norm.eps) * layer.o_norm.weight
        expected = layer.o_proj((normed * F.silu(layer.g_proj(x).unflatten(-1, (-1, 8)))).flatten(2))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.carried.recurrent, matrix.transpose(-1, -2), rtol=1e-4, atol=1e-4)
