"""Write the tables of benchmarks/README.md and of the README from the result files.

python benchmarks/render.py
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGES = (HERE / "README.md", HERE.parent / "README.md")
PROGRAMS = {
    **{
        name: name
        for name in ("memory", "model", "streaming", "generation", "needle", "hf_swap", "stages", "long", "parallel")
    },
    **dict.fromkeys(("overhead", "packing", "torch_path", "learners"), "steps"),
    **dict.fromkeys(("estimate", "estimate_before"), "kernel_estimate"),
    "resources": "resource_tables",
    **dict.fromkeys(("copy", "mqar", "language", "family"), "variants"),
}
"""Which program, or module, has the tables of each file of results."""
PLACE = re.compile(r"(<!-- (\w+): ([\w ]+) -->\n).*?(<!-- end -->)", re.S)


def render(page: str, results: Path) -> str:
    """``page`` with new text between every ``<!-- results: table -->`` and ``<!-- end -->``."""
    tables: dict[str, dict[str, str]] = {}
    for name, program in PROGRAMS.items():
        file = results / f"{name}.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            tables[name] = importlib.import_module(program).tables(found)

    def fill(place: re.Match[str]) -> str:
        opening, name, table, end = place.groups()
        text = tables[name][table] if name in tables else f"Not measured yet: `make bench-{name}`."
        return f"{opening}{text}\n{end}"

    return PLACE.sub(fill, page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8"), HERE / "results"), encoding="utf-8")
