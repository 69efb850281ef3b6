"""accelerate's offloading of models with memories."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import cpu_offload
from torch import Tensor
from torch.testing import assert_close


def test_a_swapped_model_that_is_offloaded(llama: Any, tokens: Tensor) -> None:
    model = llama.swapped("beside")
    with torch.no_grad():
        expected = model(tokens).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert next(model.parameters()).is_meta
        assert_close(model(tokens).logits, expected)
