"""Without the extra hf: transformers is not imported, and the error says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_missing_extra_is_one_error() -> None:
    code = """
import sys
import titans_build
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
try:
    import titans_build.huggingface
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "titans_build.huggingface needs transformers, which is not installed: pip install 'titans-build[hf]'\n"
    )


def test_transformers_finds_a_folder_named_kernels_in_the_root() -> None:
    """With the root on Python's path it imports it, as the package ``kernels``, before the library is imported."""
    root = Path(__file__).parents[3]
    code = "import transformers.activations, titans_build as tb; tb.build('mac', device='meta')"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
