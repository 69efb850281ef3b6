"""Models on a device mesh: the losses, gradients and states of one process."""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import titans_build as tb
from titans_build.blocks.collectives import Ranks
from titans_build.recipes.loading import base_names
from titans_build.tools.training.optimizer import parameter_groups

MEMORY = {"type": "memory", "heads": 2, "expansion": 2, "chunk": 4}
ATTENTION = {"type": "attention", "heads": 2, "window": 4}
MATRIX = {"type": "memory", "heads": 2, "depth": 1, "norm": False, "clip": None}
POLYNOMIAL = {"type": "polynomial", "degree": 2}
ANCHOR = {**MEMORY, "chunk": 16, "retrieve": "anchor"}
AFFINE = {
    "gated_delta_net": {"type": "gated_delta_net", "heads": 2},
    "kda": {"type": "kda", "heads": 2},
    "gla": {"type": "gla", "heads": 2},
    "momentum_delta": {"type": "momentum_delta", "heads": 2},
    "delta_product": {"type": "delta_product", "heads": 2},
    "chunks": {**MATRIX, "chunk": 5},
    "channels": {**MATRIX, "chunk": 4, "retention": "channel", "retrieve": "before"},
    "anchor": {**MATRIX, "chunk": 8, "retrieve": "anchor", "momentum": False},
    "features": {**MATRIX, "chunk": 4, "clip": 1.0, "objective": "dot", "features": POLYNOMIAL},
    "two momentums": {**MATRIX, "chunk": 4, "optimizer": {"type": "momentum", "order": 2}, "learn_momentum": True},
    "no convolution": {**MATRIX, "conv": 0, "chunk": 1},
}
CHUNKS = {
    "momentum": ANCHOR,
    "channels": {**ANCHOR, "chunk": 64, "retention": "channel"},
    "no gates": {**ANCHOR, "momentum": False, "forgetting": False},
    "short": {**ANCHOR, "chunk": 5},
    "lact": {"type": "lact", "heads": 2, "chunk": 16},
    "lact without momentum": {"type": "lact", "heads": 2, "chunk": 64, "momentum": False},
    "atlas": {"type": "atlas", "heads": 2, "chunk": 16, "retrieve": "anchor", "window": 1, "features": None},
    "moneta": {"type": "moneta", "heads": 2, "chunk": 16, "retrieve": "anchor"},
}
BLOCK = {
    "mag": {"type": "persistent", "tokens": 2, "of": {"type": "gate", "branches": [ATTENTION, MEMORY]}},
    "mac": {
        "type": "context",
        "segment": 5,
        "persistent": 2,
        "memory": MEMORY,
        "attend": {"type": "attention", "heads": 2},
    },
    "reset": {**MEMORY, "chunk": 2, "reset": 4, "query": "projected", "momentum": False},
    "linear": "delta_net",
    "chain": [ATTENTION, MEMORY],
    "gates of chunks": {**MEMORY, "gates": "chunk"},
    "full attention": {"type": "attention", "heads": 2},
    "anchor": ANCHOR,
    "affine": {**MATRIX, "chunk": 4},
    "grouped heads": {"type": "attention", "heads": 4, "kv_heads": 2, "window": 4},
    "keys": {**MEMORY, "keys": 2, "momentum": False, "features": {"type": "polynomial", "degree": 2}},
    "custom": "running_sum",
    "custom inside": {"type": "context", "segment": 5, "memory": MEMORY, "attend": "running_sum"},
}


class RunningSum(tb.Block):
    """Adds up tokens without a state: it does not obey the laws, and is right only where it is given all tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.scale = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 0.1)

    def forward(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        x = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
        return x.cumsum(1) * self.scale, None


def recipe_of(*blocks: Any) -> tb.recipes.Recipe:
    layers = {f"layer{i}": [block, "ffn"] for i, block in enumerate(blocks)}
    return tb.load_recipe({"version": 1, "dim": 16, "vocab": 11, "layers": layers, "stack": list(layers)})


def slots_in_use(state: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a state by name. A cache that grows may have unused slots, which padding leaves."""
    found = dict(tb.state.named_tensors(state))
    for name in [name for name in found if name.endswith("cached")]:
        for part in ("keys", "values"):
            at = name.replace("cached", part)
            used = int(found[name].max())
            found[at] = found[at][:, found[at].shape[1] - used :]
    return list(found.items())


class Case:
    """Two calls of a model, of which the second goes on from the first, and a loss that depends on all outputs."""

    def __init__(self, recipe: Any, data: int, time: int, options: str = "", through_state: bool = True) -> None:
        make, rows = torch.Generator().manual_seed(1), 2 * data
        self.recipe, self.data, self.through_state = recipe, data, through_state
        self.tokens, self.targets = torch.randint(recipe.vocab, (2, rows, time), generator=make)
        self.options: dict[str, Tensor] = {}
        if "documents" in options:
            begins = torch.randint(time, (rows, 5, 1), generator=make)
            self.options["documents"] = (torch.arange(time) >= begins).sum(1)
        if "mask" in options:
            self.options["mask"] = torch.rand(rows, time, generator=make) > 0.3
            self.options["mask"][0, time // 2 :] = False
        for side, part in (("left", slice(3)), ("right", slice(time - 3, None))):
            if side in options:  # padding of the first rank only, or of the last
                self.options["mask"] = torch.ones(rows, time, dtype=torch.bool)
                self.options["mask"][0, part] = False

    def run(self, model: Any, group: int) -> tuple[Any, Tensor]:
        rows, state, total = slice(2 * group, 2 * group + 2), None, torch.zeros((), dtype=torch.float64)
        for part in torch.arange(self.tokens.shape[1]).chunk(2):
            options = {name: x[rows][:, part] for name, x in self.options.items()}
            out = model(self.tokens[rows][:, part], state, targets=self.targets[rows][:, part], **options)
            state, total = out.state, total + out.loss + 0.1 * out.logits.square().mean()
        if self.through_state:
            total = total + sum(x.square().mean() for _, x in slots_in_use(state) if x.is_floating_point())
        return out, total

    def compare(self, mesh: Any, **options: Any) -> None:
        """Raises ``AssertionError`` where a model on the mesh differs from one process."""
        plain, model = (tb.build(self.recipe, dtype=torch.float64, seed=0) for _ in range(2))
        tb.parallelize(model, mesh, **options)
        group = mesh.get_local_rank("data") if self.data > 1 else 0
        out, total = self.run(model, group)
        total.backward()
        for each in range(self.data):
            found, loss = self.run(plain, each)
            (loss / self.data).backward()
            if each == group:
                torch.testing.assert_close(total, loss, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(out.logits, found.logits, rtol=1e-10, atol=1e-12)
                for (name, x), (_, y) in zip(slots_in_use(out.state), slots_in_use(found.state)):
                    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12, msg=lambda text, at=name: f"{at}: {text}")
        for (name, p), q in zip(plain.named_parameters(), model.parameters()):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None and q.grad is not None:
                scale = float(p.grad.abs().max())
                torch.testing.assert_close(
                    q.grad.full_tensor(), p.grad, rtol=1e-9, atol=1e-11 * max(scale, 1e-3),
                    msg=lambda text, at=name: f"{at}: {text}",
                )  # fmt: skip


def _rank(rank: int, port: int, sizes: dict[str, int], program: Any, arguments: Any) -> None:
    world = 1
    for size in sizes.values():
        world *= size
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    warnings.simplefilter("ignore")
    tb.register("running_sum")(RunningSum)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    program(init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes)), *arguments)
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def on_ranks(sizes: dict[str, int], program: Any, *arguments: Any) -> None:
    """``program(mesh, *arguments)`` in as many processes as the mesh has."""
    world = 1
    for size in sizes.values():
        world *= size
    mp.start_processes(_rank, args=(free_port(), sizes, program, arguments), nprocs=world, start_method="fork")


def compare_all(mesh: Any, blocks: Any, time: int, options: tuple[str, ...]) -> None:
    data = dict(zip(mesh.mesh_dim_names, mesh.shape)).get("data", 1)
    for each in options:
        Case(recipe_of(*blocks), data, time, each).compare(mesh)


def compare_ways(mesh: Any, way: str, blocks: Any, options: tuple[str, ...]) -> None:
    time = 48
    case = Case(recipe_of(*blocks), 1, time, "")
    model = tb.parallelize(tb.build(case.recipe, seed=0), mesh, context=way)
    assert set(model.parallel.plan(time // 2).values()) == {way}
    for each in options:
        Case(case.recipe, 1, time, each).compare(mesh, context=way, recompute="recompute" in each)


def test_two_ranks_run_affine_memories_side_by_side() -> None:
    blocks = [AFFINE[name] for name in ("gated_delta_net", "chunks", "features")]
    on_ranks({"context": 2}, compare_ways, "affine", blocks, ("", "documents"))


def test_two_ranks_sum_what_they_write_in_a_chunk() -> None:
    on_ranks({"context": 2}, compare_ways, "chunk", [CHUNKS["momentum"], CHUNKS["lact"]], ("",))


@pytest.mark.slow
@pytest.mark.parametrize("name", AFFINE)
def test_affine_memories_equal_one_process(name: str) -> None:
    on_ranks({"context": 4}, compare_ways, "affine", [AFFINE[name]], ("", "documents", "mask", "recompute"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHUNKS)
def test_sums_over_chunks_equal_one_process(name: str) -> None:
    on_ranks({"context": 4}, compare_ways, "chunk", [CHUNKS[name]], ("", "documents", "mask", "recompute"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "block"), [("affine", AFFINE["chunks"]), ("chunk", CHUNKS["lact"]), ("pipelined", MEMORY)], ids=str
)
def test_recomputation_on_ranks_of_context_and_tensor(way: str, block: Any) -> None:
    on_ranks({"context": 2, "tensor": 2}, compare_ways, way, [block], ("", "recompute", "documents recompute"))


def documents_after_nan(mesh: Any) -> None:
    recipe = recipe_of(AFFINE["gated_delta_net"])
    plain, model = (tb.build(recipe, dtype=torch.float64, seed=0) for _ in range(2))
    tb.parallelize(model, mesh, context="affine")
    x, documents = torch.randn(1, 24, 16, dtype=torch.float64), (torch.arange(24) >= 15).long()[None]
    x[0, 3] = torch.nan
    for each in (plain, model):
        out = each(embeddings=x, documents=documents, check_finite=False)
        assert out.logits[0, 3:15].isnan().all() and out.logits[0, 15:].isfinite().all()
        assert all(w.isfinite().all() for _, w in tb.state.named_tensors(out.state))


def test_nan_does_not_reach_the_next_document_on_another_rank() -> None:
    on_ranks({"context": 2}, documents_after_nan)


def test_two_ranks_of_context_equal_one_process() -> None:
    on_ranks({"context": 2}, compare_all, [BLOCK["mag"], BLOCK["mac"], BLOCK["reset"]], 24, ("", "documents"))


def test_two_ranks_of_tensor_equal_one_process() -> None:
    on_ranks({"tensor": 2}, compare_all, [BLOCK["mag"], BLOCK["mac"], BLOCK["reset"]], 24, ("documents",))


def test_two_ranks_of_context_with_padding_and_a_custom_block() -> None:
    on_ranks({"context": 2}, compare_all, [BLOCK["chain"], BLOCK["custom"]], 24, ("mask",))


def send_expanded(mesh: Any) -> None:
    ranks = Ranks(mesh.get_group(), mesh.get_local_rank(), 2)
    for shape in ((1,), (1, 1), (3,), (0,)):
        given = torch.full((), ranks.rank + 1.0).expand(shape)
        ranks.send([given], 1 - ranks.rank)
        (found,) = ranks.receive([given], 1 - ranks.rank)
        assert torch.equal(found, torch.full(shape, 2.0 - ranks.rank))


def test_expanded_tensors_are_sent() -> None:
    on_ranks({"context": 2}, send_expanded)


def send_and_forget(mesh: Any) -> None:
    ranks = Ranks(mesh.get_group(), mesh.get_local_rank(), 2)
    if ranks.first:
        ranks.send([torch.ones(3)], 1)
    else:
        sleep(0.5)  # until the sender has freed what it sent with
        (found,) = ranks.receive([torch.empty(3)], 0)
        assert torch.equal(found, torch.ones(3))


def test_messages_arrive_after_the_sender_has_freed_its_model() -> None:
    on_ranks({"context": 2}, send_and_forget)


def test_padding_on_one_of_two_ranks() -> None:
    on_ranks({"context": 2}, compare_all, [BLOCK["mag"], BLOCK["reset"]], 24, ("left", "right"))


def rewound(mesh: Any) -> None:
    recipe, tokens = recipe_of(BLOCK["mag"], BLOCK["reset"]), torch.arange(48).view(2, 24) * 7 % 11
    plain, model = (tb.build(recipe, dtype=torch.float64, seed=0) for _ in range(2))
    tb.parallelize(model, mesh)
    ids, ends = torch.arange(24).expand(2, 24) // 9, torch.tensor([0, 5, 13, 14, 24])
    for count, rows, options in (
        (13, 2, {}), ([5, 18], 2, {}), (1, 2, {}), (0, 2, {}),
        (13, 2, {"documents": ids}), ([9, 20], 2, {"documents": ids}),
        (13, 1, {"cu_seqlens": ends}), (7, 1, {"cu_seqlens": ends}),
    ):  # fmt: skip
        states = []
        for each in (plain, model):
            each.zero_grad()
            state = each(tokens[:rows], rewindable=True, **options).rewind(count)
            sum(x.square().mean() for _, x in slots_in_use(state) if x.is_floating_point()).backward()
            states.append(slots_in_use(state))
        for (name, x), (_, y) in zip(*states):
            torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-12, msg=lambda text, at=(count, name): f"{at}: {text}")
        for p, q in zip(plain.parameters(), model.parameters()):
            if p.grad is not None:
                torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-9, atol=1e-12)


def test_going_back_on_a_mesh() -> None:
    on_ranks({"context": 2}, rewound)


def refuse_auxiliary_losses(mesh: Any) -> None:
    model = tb.parallelize(tb.build(recipe_of(BLOCK["mag"]), seed=0), mesh)
    for loss in (tb.memory_loss, tb.write_cost):
        with pytest.raises(ValueError, match="share tokens or heads"):
            loss(torch.nn.Sequential(model))


@pytest.mark.parametrize("dimension", ["context", "tensor"])
def test_auxiliary_losses_are_refused_where_ranks_share_tokens_or_heads(dimension: str) -> None:
    on_ranks({dimension: 2}, refuse_auxiliary_losses)


def test_ranks_that_begin_at_a_reset_need_no_tokens_before() -> None:
    reset = {**BLOCK["reset"], "conv": 0}
    on_ranks({"context": 2}, compare_resets, [reset, BLOCK["reset"]])


def compare_resets(mesh: Any, blocks: Any) -> None:
    case = Case(recipe_of(*blocks), 1, 32, "")
    model = tb.parallelize(tb.build(case.recipe, seed=0), mesh)
    assert set(model.parallel.plan(16).values()) == {"window"}
    model(case.tokens[:, :16])
    four_tokens = 2 * 4 * 16 * 4  # bytes of two rows of width 16, for the convolution of one block
    assert model.parallel.context.sent.get("state", 0) == (four_tokens if dist.get_rank() == 0 else 0)
    case.compare(mesh)


def parts(mesh: Any, folder: Path) -> None:
    """Each rank stores its part of what has heads; of parameters, gradients and optimizer states."""
    recipe = recipe_of(BLOCK["mag"], BLOCK["mac"], BLOCK["grouped heads"], BLOCK["custom"])
    plain, model = (tb.build(recipe, dtype=torch.float64, seed=0) for _ in range(2))
    tb.parallelize(model, mesh)
    tokens, norms = torch.arange(24).view(2, 12) % 11, list[Any]()
    for each in (plain, model):
        optimizer = torch.optim.AdamW(parameter_groups(each, 0.1), lr=0.1)
        each(tokens, targets=tokens).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(each.parameters(), 0.5))
        optimizer.step()
    assert norms[0] > 1 and float(norms[1].full_tensor()) == pytest.approx(float(norms[0]), rel=1e-12)
    whole = ("norm", "tokens", "persistent", "gate.gain", "scale")
    for (name, p), q in zip(plain.named_parameters(), model.named_parameters()):
        torch.testing.assert_close(q[1].full_tensor(), p, rtol=1e-9, atol=1e-11)
        share = 1 if any(part in name and "norm_gain" not in name for part in whole) else mesh.size()
        for stored in (q[1], q[1].grad, optimizer.state[q[1]]["exp_avg"], optimizer.state[q[1]]["exp_avg_sq"]):
            assert stored.to_local().untyped_storage().nbytes() * share == p.nbytes, name
    generated, expected = (each.generate(tokens, 3) for each in (model, plain))
    assert torch.equal(generated.tokens, expected.tokens)
    for name, x in tb.state.named_tensors(model(tokens[:, :0]).state):
        torch.testing.assert_close(x, dict(tb.state.named_tensors(plain(tokens[:, :0]).state))[name], msg=name)
    tb.save(model, folder)
    for p, q in zip(tb.load(folder).parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    other = tb.parallelize(tb.build(recipe, seed=1), mesh)
    message = "the first process could not save the model" if dist.get_rank() else "another model is saved there"
    with pytest.raises(tb.recipes.StorageError, match=message):
        tb.save(other, folder)


def test_two_ranks_of_tensor_store_a_half_each(tmp_path: Path) -> None:
    on_ranks({"tensor": 2}, parts, tmp_path / "model")


@pytest.mark.slow
def test_ranks_that_share_heads_and_rows_equal_one_process() -> None:
    blocks = [BLOCK[name] for name in ("mag", "mac", "grouped heads", "custom")]
    on_ranks({"tensor": 2, "data": 2}, compare_all, blocks, 24, ("documents",))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"context": 4}, {"data": 2, "context": 2}, {"context": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", BLOCK)
def test_four_ranks_equal_one_process(name: str, sizes: dict[str, int]) -> None:
    on_ranks(sizes, compare_all, [BLOCK[name]], 48, ("", "documents", "mask", "documents mask"))


def compare_recipe(mesh: Any, name: str) -> None:
    recipe = tb.load_recipe(name, {"dim": 32, "stack.0.repeat": 1})
    Case(recipe, 1, 64, "documents").compare(mesh)


@pytest.mark.slow
@pytest.mark.parametrize("dimension", ["context", "tensor"])
@pytest.mark.parametrize("name", base_names())
def test_packaged_recipes_on_two_ranks(name: str, dimension: str) -> None:
    on_ranks({dimension: 2}, compare_recipe, name)


def expect(message: str, call: Any, *arguments: Any, **named: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(*arguments, **named)


def refused(mesh: Any) -> None:
    def build(**changes: Any) -> Any:
        return tb.build(tb.load_recipe("lmm", {"dim": 24, "stack.0.repeat": 1, **changes}), seed=0)

    expect("expected a torch DeviceMesh, got str", tb.parallelize, build(), "context")
    rows = init_device_mesh("cpu", (2,), mesh_dim_names=("rows",))
    expect("expected mesh_dim_names of 'data', 'context' or 'tensor', got 'rows'", tb.parallelize, build(), rows)
    expect("got 'none'", tb.parallelize, build(), init_device_mesh("cpu", (2,)))
    heads = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    odd = build(**{"layers.lmm.0.heads": 3})
    message = r"^layers\.0\.blocks\.0\.heads: 3 cannot be shared by the 2 ranks of the mesh's tensor"
    expect(message, tb.parallelize, odd, heads)
    replaced = build()
    torch.nn.utils.parametrizations.weight_norm(replaced.layers[0].blocks[0].output)
    expect(
        r"^layers\.0\.blocks\.0\.output: expected a torch.nn.Linear, .*Parametrized", tb.parallelize, replaced, heads
    )
    expect("the meta device", tb.parallelize, tb.build(odd.recipe, device="meta"), mesh)
    expect("model: expected a LanguageModel, got Linear", tb.parallelize, nn.Linear(2, 2), mesh)
    other = build(**{"layers.lmm.0.chunk": 8 + dist.get_rank()})
    expect("rank 1 has another recipe than rank 0", tb.parallelize, other, mesh)
    other = tb.build(build().recipe, seed=dist.get_rank())
    expect("rank 1 has other parameters than rank 0: build the model with the same seed", tb.parallelize, other, mesh)
    frozen = build().requires_grad_(dist.get_rank() == 0)
    expect("rank 1 has other parameters than rank 0", tb.parallelize, frozen, mesh)
    ways = "context: expected one of auto, affine, chunk, pipelined, got 'ring'"
    expect(ways, tb.parallelize, build(), mesh, context="ring")
    model = tb.parallelize(build(), mesh)
    expect("model: it is shared out already", tb.parallelize, model, mesh)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    cache = tb.PrefixCache(1 << 20)
    expect("prefix_cache: a model on a mesh .* cannot use one", model.generate, tokens, prefix_cache=cache)
    model.layers[0].adapter = nn.Linear(2, 2, bias=False)
    expect(r"model: it has \d+ parameters, and had \d+ in parallelize", model, torch.zeros(1, 4, dtype=torch.int64))
    del model.layers[0].adapter
    expect("a sequence of 1 tokens is shorter than the 2 ranks", model, tokens[:, :1])
    expect("a sequence of 3 tokens cannot be shared by the 2 ranks of the mesh's context", model, tokens)


def test_meshes_and_inputs_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titans_build.blocks.parallel.WAIT", 0.0)
    on_ranks({"context": 2}, refused)


def generated(mesh: Any) -> None:
    recipe = recipe_of(BLOCK["mag"], BLOCK["mac"])
    plain, model = (tb.build(recipe, dtype=torch.float64, seed=0) for _ in range(2))
    tb.parallelize(model, mesh)
    prompt = torch.arange(7)[None]
    assert torch.equal(model.generate(prompt, 5).tokens, plain.generate(prompt, 5).tokens)
    # only calls in which a segment of 5 tokens begins use the persistent tokens; padding delays the beginning
    tokens, mask = torch.arange(24).view(1, 24).repeat(2, 1) % 11, torch.ones(2, 24, dtype=torch.bool)
    for padded in (False, True):
        mask[:, 7] = not padded
        unused: list[list[set[str]]] = []
        for each in (tb.build(recipe_of(BLOCK["mac"]), dtype=torch.float64, seed=0) for _ in range(2)):
            if unused:
                tb.parallelize(each, mesh)
            state, found = None, []
            for part in (slice(k, k + 4) for k in range(0, 24, 4)):
                each.zero_grad()
                given = {"mask": mask[:, part]} if padded else {}
                out = each(tokens[:, part], state, targets=tokens[:, part], **given)
                out.loss.backward()
                state = tb.state.detach(out.state)
                found.append({name for name, p in each.named_parameters() if p.grad is None})
            unused.append(found)
        assert unused[0] == unused[1]
        assert any(unused[0]) and not all(unused[0])


def test_generation_and_used_parameters_on_a_mesh() -> None:
    on_ranks({"context": 2}, generated)


def by_every_option(mesh: Any) -> None:
    recipe, tokens = recipe_of(BLOCK["mag"], BLOCK["mac"]), torch.arange(24)[None] % 11
    plain, model = (tb.build(recipe, dtype=torch.float64, seed=0) for _ in range(2))
    tb.parallelize(model, mesh, gather_outputs=False, recompute=True)
    ends = torch.tensor([0, 0, 5, 12, 19, 24])
    out, found = model(tokens, cu_seqlens=ends), plain(tokens, cu_seqlens=ends)
    mine = slice(12 * mesh.get_local_rank(), 12 * mesh.get_local_rank() + 12)
    torch.testing.assert_close(out.logits, found.logits[:, mine])
    torch.testing.assert_close(out.loss, found.loss)
    out.loss.backward()
    found.loss.backward()
    for p, q in zip(plain.parameters(), model.parameters()):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad)


def _page(rank: int, port: int, code: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="4")
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["out"].logits.shape == (2, 24, 256)
    assert all(p.grad is not None for p in scope["model"].parameters())


@pytest.mark.slow
def test_program_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")
    code = page.split("```py\n")[1].split("```")[0]
    mp.start_processes(_page, args=(free_port(), code), nprocs=4, start_method="fork")


def from_fresh_states(mesh: Any) -> None:
    recipe, tokens = recipe_of(BLOCK["mag"], BLOCK["mac"]), torch.arange(48).view(2, 24) % 11
    plain, model = (tb.build(recipe, dtype=torch.float64, seed=0) for _ in range(2))
    tb.parallelize(model, mesh)
    for each in (plain, model):
        out = each(tokens[:, :12], each.init_state(2), targets=tokens[:, :12])
        state = tb.state.reset(out.state, torch.tensor([True, False]), each.init_state(2))
        (out.loss + each(tokens[:, 12:], state, targets=tokens[:, 12:]).loss).backward()
    for p, q in zip(plain.parameters(), model.parameters()):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dimension", ["context", "tensor"])
def test_gradients_through_fresh_states(dimension: str) -> None:
    on_ranks({dimension: 2}, from_fresh_states)


def test_outputs_of_this_rank_recomputation_and_cu_seqlens() -> None:
    on_ranks({"context": 2}, by_every_option)
