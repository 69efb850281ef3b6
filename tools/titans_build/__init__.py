"""A modular block library for neural memory models.

    import titans_build as tb

    model = tb.build(tb.load_recipe("mac"), seed=0)
    out = model(tokens)                       # out.logits, out.loss, out.state
"""
from importlib.metadata import version as _version

__version__ = _version("titans-build")
import importlib as _il
for _m, _ns in {".recipes": ("load_recipe", "build", "save", "load", "save_state", "load_state"),
                ".registry": ("register", "Spec", "create", "list_blocks", "describe", "RecipeError"),
                ".blocks.block": ("Block",), ".blocks.laws": ("check_block",), ".blocks.build": ("build_block",)}.items():
    for _n in _ns:
        try:
            globals()[_n] = getattr(_il.import_module(_m, __name__), _n)
        except (ImportError, AttributeError):
            pass
try:
    from titans_build.blocks import state
except ImportError:
    pass
