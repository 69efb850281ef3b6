"""Weight decay in ``Trainer`` of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..training.optimizer import parameter_groups


class DecayMixin:
    """For subclasses of ``Trainer``: weight decay of what ``parameter_groups`` lets decay.

    ``Trainer`` itself lets all parameters decay whose names do not contain ``norm`` or ``bias``: the gates and gains
    of memories, their initial weights and persistent tokens as well::

        class MemoryTrainer(DecayMixin, SFTTrainer): ...
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay."""
        base: Any = super()
        decay = {name for group in parameter_groups(model, 1.0) if group["weight_decay"] for name, _ in group["params"]}
        return [name for name in base.get_decay_parameter_names(model) if name in decay]
