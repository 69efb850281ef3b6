"""The neural memory: a network whose weights are written while it reads (Titans, arXiv 2501.00663, eq. 8-15).

:func:`titans_memory` writes and reads, :func:`read_memory` only reads, and :func:`learn` writes and reads by any rule
of the family.

=====================  ===============================================================================================
``state.py``           what goes in and comes out: ``MemoryState``, ``Tokens``, ``Options``, ``Objective``
``operation.py``       the operations: arguments, and the choice of a backend
``learner/``           ``learn``: the general rule, and its parts
``self_modifying.py``  matrices that make their own keys, values and gates
``reference.py``       the reference implementation: the recurrence token by token, its inner gradient from autograd
``closed_form.py``     a second, independent reference: the equations of a chunk, term by term
``cpu.py``             backend ``native``: many tokens on a CPU, in C, with gradients
                       (``cpu.c``, ``read_cpu.c``; the mathematics of a chunk is in ``network.h`` and what it includes)
``linear_cpu.py``      backend ``native_linear``: one matrix and chunks of one token, in C (``linear_cpu.c``)
``step_cpu.py``        backend ``native_step``: one token on a CPU, in C (``step_cpu.c``), and decode plans
``chunkwise_torch.py`` backend ``torch``: any device and length, as groups of chunks, with its own backward; of it
                       ``chunk_torch.py`` is the mathematics of a chunk, ``decay_torch.py`` what its gates are as
                       matrices, ``network_torch.py`` the network at fixed weights and its derivatives;
                       ``channels_torch.py`` is a chunk with decays by channel
``step_torch.py``      backend ``step``: one token in few PyTorch operators
``triton/``            backends ``triton`` and ``triton_step``: the chunks of ``torch``, and one token, on a GPU
``decode.py``          one token of each row, many times: plans of backend ``native_step``
``measure.py``         ``measure_memory``: the surprise of each token
``surprise.py``        the norm of a token's gradient, and the threshold below which tokens are not written
``overflow.py``        confines NaN and infinity to the tokens from which on they belong to a memory
=====================  ===============================================================================================
"""

from .learner import LearnerState, learn
from .operation import MEMORY, READ, memory_flops, read_memory, run_memory, titans_memory
from .self_modifying import self_modify
from .state import MemoryState, Objective, Options, Tokens

__all__ = [
    "MEMORY", "READ", "LearnerState", "MemoryState", "Objective", "Options", "Tokens", "learn", "memory_flops",
    "read_memory", "run_memory", "self_modify", "titans_memory",
]  # fmt: skip
