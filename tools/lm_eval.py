"""``titans-lm-eval``: the command of the evaluation harness, with the models of this library.

All its options are those of ``lm_eval``. ``--model titans`` reads any folder that ``huggingface.from_pretrained`` does,
and ``--model hf`` those of ``save_pretrained`` with a tokenizer beside them.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from .extras import from_extra
from .terminal import UsageError


def run() -> None:
    """Run the command of the harness on ``sys.argv``."""
    try:
        from_extra("lm_eval", "eval", "titans-lm-eval")
        from_extra("transformers", "hf", "titans-lm-eval")
    except UsageError as error:
        sys.exit(str(error))
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


@functools.cache
def register() -> None:
    """Register the model ``titans`` with the harness, and recipe models and swapped ones with transformers."""
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    from .huggingface import from_pretrained, tokenizer_of

    @register_model("titans")
    class TitansLM(HFLM):
        """``pretrained``: a folder. ``tokenizer``: another one, by default that of the model."""

        def __init__(
            self,
            pretrained: str,
            tokenizer: Any = None,
            device: str | None = None,
            dtype: str = "auto",
            **settings: Any,
        ) -> None:
            model = from_pretrained(pretrained, dtype=dtype)
            if device is not None:
                model.to(device)
            super().__init__(model, tokenizer=tokenizer_of(model) if tokenizer is None else tokenizer, **settings)
            self.pretrained = pretrained


if __name__ == "__main__":
    run()
