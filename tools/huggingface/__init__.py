"""Recipe models in transformers, and the files of transformers models with memories in them.

Importing this package imports transformers, and registers recipe models with its Auto classes.
"""

from ..extras import from_extra
from ..terminal import UsageError

try:
    from_extra("transformers", "hf", "titans_build.huggingface")
except UsageError as error:
    raise ImportError(str(error)) from None

from ..training.optimizer import parameter_groups
from .cache import StateCache
from .config import TitansBuildConfig
from .loading import from_pretrained
from .model import TitansBuildForCausalLM, TitansBuildForSequenceClassification, TitansBuildModel, as_pretrained
from .tokenizer import byte_tokenizer, tokenizer_of
from .weight_decay import DecayMixin

__all__ = [
    "DecayMixin",
    "StateCache",
    "TitansBuildConfig",
    "TitansBuildForCausalLM",
    "TitansBuildForSequenceClassification",
    "TitansBuildModel",
    "as_pretrained",
    "byte_tokenizer",
    "from_pretrained",
    "parameter_groups",
    "tokenizer_of",
]
