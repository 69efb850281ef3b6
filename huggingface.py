"""Models of transformers: those of recipes as such, and its own with memories in them. Needs ``titans-build[hf]``.

Example::

    from titans_build.huggingface import as_pretrained, from_pretrained

    model = as_pretrained(tb.load("models/mine"))            # a PreTrainedModel
    model.generate(tokens, num_beams=4, max_new_tokens=64)
    model.save_pretrained("models/hf")
    model = from_pretrained("models/hf")                     # AutoModelForCausalLM reads it as well
"""

from .tools.huggingface import *  # noqa: F403
from .tools.huggingface import __all__ as __all__
