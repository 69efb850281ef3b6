"""Without the extra hf: transformers is not imported, and the error says what to install."""

from __future__ import annotations

import subprocess
import sys


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
