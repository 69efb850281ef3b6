"""Every operator that stands for an opaque backend, by PyTorch's own checks and against the backend itself."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import titans_build as tb
import titans_build.kernels
from titans_build.kernels import custom_op
from titans_build.kernels.attention import Prefix, attention
from titans_build.kernels.attention.decode import Cache, Form
from titans_build.kernels.cpu_runtime import library
from titans_build.kernels.custom_op import OPAQUE_OPERATIONS, serialize
from titans_build.kernels.memory import MemoryState, Options, Tokens, titans_memory
from titans_build.kernels.memory.learner import make_rule
from titans_build.kernels.memory.self_modifying import Matrices
from titans_build.kernels.norm_gate import form, rms_norm
from titans_build.kernels.short_conv.decode import Layers


def new(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def state(batch=2, heads=2, d=4, position=(0, 3)):
    weights = tuple(new(batch, heads, out, width) for out, width in ((6, d), (d, 6)))
    momentum, anchor = (tuple(new(*w.shape) for w in weights) for _ in range(2))
    return MemoryState(weights, momentum, anchor, torch.tensor(position))


def memory(time=9, mask=None, momentum=True, threshold=None):
    """The arguments of a backend of the memory."""
    q, k, v = (new(2, time, 2, 4) for _ in range(3))
    gates = [torch.rand(2, time, 2, dtype=torch.float64).requires_grad_() for _ in range(3)]
    before = state()
    if not momentum:
        gates[1], before = None, before._replace(momentum=())
    return (Tokens(q, k, v, *gates), before, new(2, 4), mask, Options(4, "gelu", 1.0, "after", threshold=threshold)), {}


def learner():
    """The arguments of the operator of a learner whose features have learned coefficients."""
    rule = make_rule(chunk=4, window=3, features="polynomial", retention="kl").with_tensors(
        [("features", "coefficients", torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True))]
    )
    given, _ = memory()
    tokens, before, norm, *_ = given
    weights = tuple(w.detach().softmax(-1).requires_grad_() for w in before.weights)
    before = MemoryState(weights, before.momentum, weights, torch.zeros(2, dtype=torch.int64))
    parts = (rule.text, rule.tensors, tuple(sorted(rule.parts_of_state)), rule.window, False, None)
    return (*parts, *tokens[:6], before, norm, MASK, None, None, None, None, None, "auto"), {}


def self_modifying():
    before = Matrices(new(2, 5, 2, 4, 4), new(2, 5, 2, 4, 4), torch.tensor([0, 3]))
    return (new(2, 9, 2, 4), new(2, 9, 2, 4), before, MASK, new(2, 2, 4), new(2, 2), 4, 0.5), {}


def cache():
    keys, values, first_keys, first_values = (new(2, n, 2, 4, grad=False) for n in (5, 5, 3, 3))
    return Cache(keys, values, torch.tensor([2, 5]), torch.tensor([2, 9]), first_keys, first_values)


MASK = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
CASES = {
    "attention": ("native", lambda: ((new(2, 5, 4, 4), new(2, 7, 2, 4), new(2, 7, 2, 4), 3, None, None, 1), {})),
    "attention, all of it": (
        "native",
        lambda: (
            (new(2, 3, 4, 4), new(2, 7, 2, 4), new(2, 7, 2, 4), 3, torch.tensor([0, 2]),
             Prefix(new(2, 3, 4, 4), new(2, 2, 2, 4), new(2, 2, 2, 4)), 2),
            {},
        ),
    ),
    "memory": ("native", memory),
    "memory, of surprising tokens": ("native", lambda: memory(threshold=9.0)),
    "memory, masked": ("native", lambda: memory(mask=MASK)),
    "memory, in PyTorch": ("torch", memory),
    "memory, without momentum": ("torch", lambda: memory(momentum=False)),
    "learn": ("learn", learner),
    "self_modifying": ("chunks", self_modifying),
    "memory_read": ("native", lambda: ((new(2, 5, 2, 4), state().weights, "gelu", new(2, 4), None), {})),
    "rms_norm": ("native", lambda: ((form.Form(form.NORM, 3, 4, 4, 1e-6), new(2, 5, 3, 4), None, new(3, 4), None), {})),
    "l2_norm": ("native", lambda: ((form.Form(form.NORM, 1, 4, 1, 1e-6), new(2, 5, 4), None, None, None), {})),
    "gate": (
        "native",
        lambda: ((form.Form(form.GATE, 1, 4, 4, 1e-6), new(2, 5, 4), new(2, 5, 4), new(4), new(4)), {}),
    ),
    "gated_norm": (
        "native",
        lambda: ((form.Form(form.GATED_NORM, 2, 4, 4, 1e-6), new(2, 5, 2, 4), new(2, 5, 8), new(2, 4), None), {}),
    ),
    "swiglu": ("native", lambda: ((new(2, 5, 8),), {})),
    "rotary": ("reference", lambda: ((new(2, 3, 2, 4), torch.tensor([[5, 6, 7]]), 10000.0), {})),
    "query": ("native", lambda: ((new(2, 5, 8), new(24, 3), new(2, 2, 24), 2), {})),
    "query_key_value": ("native", lambda: ((new(2, 5, 24), new(24, 3), new(2, 2, 24), 2, torch.tensor([5, 3])), {})),
    "cached_attention": (
        "native",
        lambda: ((new(2, 1, 8, 4, grad=False), new(6, 4, grad=False), cache(), Form(4, 6, 10000.0, 1)), {}),
    ),
    "gated_projection": (
        "native",
        lambda: (
            (*(new(*shape, grad=False) for shape in ((1, 1, 16), (32, 16), (32, 16), (16, 32))), None, None),
            {},
        ),
    ),
    "memory_inputs": (
        "native",
        lambda: (
            (new(1, 1, 16, grad=False), new(1, 2, 48, grad=False),
             Layers(new(48, 16, grad=False), new(48, 3, grad=False), 2, new(6, 16, grad=False), new(6, grad=False))),
            {},
        ),
    ),
}  # fmt: skip


def test_every_operation_with_an_opaque_backend_is_checked():
    assert {name.split(",")[0] for name in CASES} == set(OPAQUE_OPERATIONS)


def arguments(name, grad=True):
    backend, make = CASES[name]
    given, options = make()
    tensors, numbers = [], []
    text = serialize((backend, given, options), tensors, numbers)
    wanted = [i for i, x in enumerate(tensors) if grad and x.requires_grad]
    return OPAQUE_OPERATIONS[name.split(",")[0]].runs[backend], given, options, (tensors, numbers, text, wanted)


@pytest.mark.c_kernels
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    _, _, _, given = arguments(name)
    torch.library.opcheck(custom_op.operator(name.split(",")[0]), given)


@pytest.mark.c_kernels
@pytest.mark.parametrize("name", CASES)
def test_the_operator_equals_the_backend(name):
    run, given, options, (tensors, numbers, text, wanted) = arguments(name)
    found = custom_op.operator(name.split(",")[0])(tensors, numbers, text, wanted)
    expected = list(custom_op._tensors(run(*given, **options)))
    torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=0)
    if not wanted:
        return
    seeds = [torch.randn_like(y) for y in expected if y.requires_grad]
    asked = [tensors[i] for i in wanted]

    def gradients(outputs):
        outputs = [y for y, like in zip(outputs, expected) if like.requires_grad]
        return torch.autograd.grad(outputs, asked, seeds, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(gradients(found), gradients(expected), rtol=0, atol=0)


@pytest.mark.c_kernels
@pytest.mark.parametrize("name", ["memory", "attention, all of it"])
def test_backward_after_saved_tensors_were_copied(name):
    """Who keeps saved tensors elsewhere gives back a copy of the byte that stands for the recording."""
    _, _, _, (tensors, numbers, text, wanted) = arguments(name)
    operator, asked = custom_op.operator(name.split(",")[0]), [tensors[i] for i in wanted]

    def gradients():
        loss = sum(y.square().sum() for y in operator(tensors, numbers, text, wanted) if y.requires_grad)
        return torch.autograd.grad(loss, asked, allow_unused=True, materialize_grads=True)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        torch.testing.assert_close(gradients(), expected, rtol=0, atol=0)


@pytest.mark.c_kernels
def test_a_recording_is_freed_with_its_saved_tensors():
    _, _, _, (tensors, numbers, text, wanted) = arguments("memory")
    found = custom_op.operator("memory")(tensors, numbers, text, wanted)
    assert len(custom_op._RECORDINGS) == 1
    del found
    assert len(custom_op._RECORDINGS) == 0


def test_arguments_as_text_and_back():
    given = (Prefix(torch.ones(1), torch.ones(2), torch.ones(3)), None, 1.5e-7, "gelu", True, (torch.ones(4), 3))
    tensors, numbers = [], []
    text = serialize(("native", given, {"clip": None, "norm": torch.ones(5)}), tensors, numbers)
    backend, back, options = OPAQUE_OPERATIONS["attention"].arguments(tensors, numbers, text)
    assert backend == "native" and isinstance(back[0], Prefix) and back[0].v is tensors[2]
    assert back[1:5] == (None, 1.5e-7, "gelu", True) and back[5][0] is tensors[3] and back[5][1] == 3
    assert options["clip"] is None and options["norm"] is tensors[4]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.c_kernels
def test_a_compiled_memory_confines_nonfinite_values_to_later_tokens():
    (tokens, before, norm, _, options), _ = memory()
    tokens = tokens._replace(v=tokens.v.detach().index_fill(1, torch.tensor([5]), float("nan")))
    run = lambda: titans_memory(*tokens[:6], before, options.chunk, norm=norm, clip=options.clip)  # noqa: E731
    y, expected = compiled(run)()[0], run()[0]
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert y[:, :5].isfinite().all() and not y[:, 5:].isfinite().all()


@pytest.mark.c_kernels
def test_compiled_attention_confines_nonfinite_values():
    q, k, v = (new(1, 6, 2, 4) for _ in range(3))
    v = v.detach().index_fill(1, torch.tensor([3]), float("inf"))
    y = compiled(lambda: attention(q, k, v, window=2))()
    torch.testing.assert_close(y, attention(q, k, v, window=2), rtol=0, atol=0, equal_nan=True)
    assert y[:, [0, 1, 2, 5]].isfinite().all() and y[:, 3:5].isnan().all()


@pytest.mark.c_kernels
def test_the_choice_of_a_backend_holds_while_compiling(monkeypatch):
    """By argument and by environment, and what cannot run is an error there too."""
    x = new(2, 8)
    for backend in ("native", "triton", "torch", "reference"):
        torch.testing.assert_close(compiled(lambda b=backend: rms_norm(x, backend=b))(), rms_norm(x))
    with pytest.raises(Exception, match="triton cannot run"):
        compiled(lambda: rms_norm(x.to("meta"), backend="triton"))()
    monkeypatch.setenv("TITANS_BUILD_BACKEND", "rms_norm=quick")
    with pytest.raises(Exception, match="no such backend"):
        compiled(lambda: rms_norm(x))()


@pytest.mark.c_kernels
def test_no_gradient_is_recorded_where_none_is_wanted():
    q = new(1, 5, 2, 4, grad=False)
    y = compiled(lambda: attention(q, q, q))()
    assert not y.requires_grad and len(custom_op._RECORDINGS) == 0


@pytest.mark.c_kernels
@pytest.mark.parametrize("dynamic", [True, None])
def test_symbolic_lengths_and_numbers(dynamic):
    """With ``dynamic=True`` from the first call on, else from the second length on, and no length compiles again."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.eps, self.window, self.clip = 1e-5, 3, 0.7

        def forward(self, q, gates, before):
            y, after = titans_memory(q, q.flip(1), q, *gates, before, 4, clip=self.clip)
            return attention(rms_norm(y, eps=self.eps), y, y, window=self.window), after

    torch._dynamo.reset()
    module = Module()
    run = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for count, time in enumerate((9, 14, 11, 17)):
        given = [new(2, time, 2, 4), torch.rand(3, 2, time, 2, dtype=torch.float64).requires_grad_()]
        before = state()
        seed, leaves = new(2, time, 2, 4, grad=False), [*given, *before.weights, *before.anchor]
        with torch._dynamo.config.patch(error_on_recompile=count > 1):
            outputs = [each(given[0], given[1].unbind(), before) for each in (run, module)]
        found, expected = (
            [y, *after.weights, after.position, *torch.autograd.grad(y, leaves, seed)] for y, after in outputs
        )
        torch.testing.assert_close(found, expected)


def test_numbers_as_text_and_back():
    given = (0, -7, 2**40, 0.1, float("inf"), -0.0, True, None, "b''", (3, {"n": 5}))
    tensors, numbers = [], []
    text = serialize(("native", given, {}), tensors, numbers)
    assert numbers == [0, -7, 2**40, 3, 5] and not tensors
    back = OPAQUE_OPERATIONS["attention"].arguments(tensors, numbers, text)[1]
    assert repr(back) == repr(given)


def test_importing_the_package_after_torch_defines_all_operators() -> None:
    """Exported programs that contain them can then be loaded."""
    script = (
        "import torch, titans_build\n"
        "names = [name for name in {names!r} if not hasattr(torch.ops.titans_build, name)]\n"
        "print(names)"
    )
    names = [f"{name}{end}" for name in OPAQUE_OPERATIONS for end in ("", "_backward")]
    done = subprocess.run(
        [sys.executable, "-c", script.format(names=names)], capture_output=True, text=True, check=True
    )
    assert len(names) >= 28 and done.stdout == "[]\n"


class Logits(torch.nn.Module):
    """Programs can only be saved if they return tensors and tuples."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens).logits


class First(Logits):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lmm", "mag", "mac"])
def test_an_exported_model_is_loaded_in_another_process(name: str, tmp_path: Path) -> None:
    model = tb.build(name, overrides={"dim": 16, "stack.0.repeat": 1}).eval()
    tokens = torch.randint(256, (1, 20))
    with torch.no_grad():
        torch.export.save(torch.export.export(Logits(model), (tokens,)), tmp_path / "model.pt2")
        torch.save((tokens, model(tokens).logits), tmp_path / "expected.pt")
    script = (
        "import torch, titans_build\n"
        "tokens, expected = torch.load('expected.pt')\n"
        "logits = torch.export.load('model.pt2').module()(tokens)\n"
        "torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["lmm", "memory"])
def test_onnx_and_tracing_are_refused(name: str, wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(
        RuntimeError, match=r"^ONNX and torch\.jit\.trace cannot represent .*: export with torch\.export"
    )
    if name == "lmm":
        model: torch.nn.Module = tb.build("lmm", overrides={"dim": 16, "stack.0.repeat": 1}).eval()
        inputs = torch.zeros(1, 4, dtype=torch.long)
    else:
        model, inputs = tb.NeuralMemory(dim=16), torch.zeros(1, 4, 16)
    if wrapped:
        model = First(model)
    with refused:
        torch.jit.trace(model, (inputs,))
    with refused:
        torch.onnx.export(model, (inputs,), io.BytesIO(), dynamo=False)
    # the newer exporter runs torch.export like this, and needs onnxscript
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with refused:
        torch.export.export(model, (inputs,), strict=False)


@pytest.mark.c_kernels
def test_kernels_that_could_not_be_built_are_not_taken_while_compiling(monkeypatch):
    graphs = []

    def call():
        torch._dynamo.reset()
        torch.compile(rms_norm, backend=lambda graph, _: graphs.append(graph.code) or graph, fullgraph=True)(new(2, 8))

    call()
    monkeypatch.setitem(library._failures, torch.float64, "needs a C compiler")
    call()
    assert ["titans_build.rms_norm" in graph for graph in graphs] == [True, False]
