"""For every test: one thread, since the models are tiny and the suite runs in as many processes as there are cores.

Without a GPU, the Triton kernels run in Triton's interpreter, where a test asks for them by name.
"""

from __future__ import annotations

import os
import signal

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's background jobs ignore Ctrl-C and pass that on, also to the commands that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
