"""Write the tables of benchmarks/README.md and of the README from the result files.

python benchmarks/render.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hf_swap
import memory
import model
import needle
import overhead
import streaming
import torch_path
import variants

HERE = Path(__file__).parent
TABLES: dict[str, Callable[[dict], dict[str, str]]] = {
    "memory": memory.tables,
    "model": model.tables,
    "streaming": streaming.tables,
    "torch_path": torch_path.tables,
    **dict.fromkeys(variants.TASKS, variants.tables),
    "needle": needle.tables,
    "overhead": overhead.tables,
    "hf_swap": hf_swap.tables,
}
PLACE = re.compile(r"(<!-- (\w+): ([\w ]+) -->\n).*?(<!-- end -->)", re.S)


def render(page: str, results: Path) -> str:
    """``page`` with new text between every ``<!-- program: table -->`` and ``<!-- end -->``."""
    tables: dict[str, dict[str, str]] = {}
    for program, make in TABLES.items():
        file = results / f"{program}.json"
        if file.is_file():
            tables[program] = make(json.loads(file.read_text(encoding="utf-8")))

    def fill(place: re.Match[str]) -> str:
        opening, program, name, end = place.groups()
        text = tables[program][name] if program in tables else f"Not measured yet: `make bench-{program}`."
        return f"{opening}{text}\n{end}"

    return PLACE.sub(fill, page)


PAGES = (HERE / "README.md", HERE.parent / "README.md")


def main() -> None:
    for file in PAGES:
        before = file.read_text(encoding="utf-8")
        after = render(before, HERE / "results")
        if after == before:
            continue
        if "--check" in sys.argv[1:]:
            sys.exit(f"{file.relative_to(HERE.parent)} does not match the result files: python benchmarks/render.py")
        file.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
