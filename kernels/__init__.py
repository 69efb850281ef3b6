"""The operations that models spend their time in, each with a plain reference and faster backends.

===============  =====================================================================================================
``attention``    causal attention with a window, persistent tokens and cache slots; one or a few tokens over a cache
``linear``       linear maps of many and of a few tokens; when a layer's weights may be read
``memory``       the neural memory: write and read a sequence, read at fixed weights, one token
``norm_gate``    RMS and L2 norm, gates, SwiGLU; a gated hidden layer of a few tokens
``rotary``       rotary positions, exact at any position
``scan``         linear recurrences over time
``short_conv``   the short causal convolution, and queries, keys and values made with it
===============  =====================================================================================================

Each is a folder. ``__init__.py`` has the operation: its signature, checks and backends, and the calls of C where they
are short. Beside it, as far as an operation has them:

- ``reference.py``: the definition, in obvious PyTorch; short ones are in ``__init__.py``;
- ``torch_backend.py``, ``sdpa.py``, ``flex.py``, ``xformers.py``: PyTorch's operators and other libraries (a module
  ``torch.py`` would take the name of the library in its package);
- ``cpu.c``, ``cpu.py``: the C kernel and its calls;
- ``triton.py``, ``triton/``: GPU kernels;
- ``decode.py``, ``decode_cpu.c``: a few tokens without gradients, where an operator costs more to start than to run.

For all of them: ``dispatch.py`` chooses the backend, ``autograd.py`` differentiates gradients, ``custom_op.py`` makes
backends visible to ``torch.compile``, ``cpu_runtime/`` builds and calls the C kernels, ``triton_runtime.py`` launches
Triton's, and ``padding.py`` moves the real tokens of padded rows together.
"""

if "." in __name__:  # in the repository's root, transformers takes this folder for its package kernels and imports it
    from . import attention, linear, memory, norm_gate, rotary, scan, short_conv
    from .attention import decode as _attention  # noqa: F401 - defines operators that exported programs may contain
    from .norm_gate import decode as _norm_gate  # noqa: F401
    from .short_conv import decode as _short_conv  # noqa: F401

__all__ = ["attention", "linear", "memory", "norm_gate", "rotary", "scan", "short_conv"]
