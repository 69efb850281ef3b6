"""FSDP2 on two processes: a sharded model gives the outputs, states and gradients of a whole one."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import titans_build as tb

warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # about operations in place on outputs
torch.set_num_threads(1)
dist.init_process_group("gloo")
name, what = sys.argv[1:]
mesh = init_device_mesh("cpu", (2,))
plain, model = (tb.build(tb.load_recipe(name, overrides={"dim": 32}), dtype=torch.float64, seed=0) for _ in range(2))
for layer in model.layers if what != "model" else ():
    fully_shard(layer if what == "layers" else layer.blocks[0].memory, mesh=mesh)
fully_shard(model, mesh=mesh)
tokens = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


if what == "memory":
    try:
        model(tokens)
    except RuntimeError as error:
        assert "NeuralMemory.init_state: the parameters are sharded" in str(error), error
    else:
        raise AssertionError("no error")
    sys.exit()
with torch.no_grad():
    expected = plain(tokens).logits
    close(model(tokens, model.init_state(2)).logits, expected)
    for first in (1, 17, 29):
        close(model(tokens[:, first:], model(tokens[:, :first]).state).logits, expected[:, first:])
    wanted, got = plain.generate(tokens, 4), model.generate(tokens, 4)
    assert torch.equal(got.tokens, wanted.tokens)
    close(got.logits, wanted.logits)
for module in (plain, model):
    state = module(tokens[:, :13]).state
    module(tokens[:, 13:], state, targets=tokens[:, 13:]).loss.backward()
for (name, parameter), sharded in zip(plain.named_parameters(), model.parameters()):
    close(sharded.grad.full_tensor(), parameter.grad)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe, what", [("mac", "layers"), ("mag", "model"), ("mac", "memory")])
def test_fully_sharded_models(recipe, what, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "program.py", recipe, what],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
