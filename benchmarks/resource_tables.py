"""The table of what ``kernel_resources.py`` found, which can be written without Triton."""

from __future__ import annotations

import measure

TARGETS = {"sm_80": ("mma",), "sm_90": ("wgmma", "mma"), "sm_100": ("tcgen05", "mma"), "gfx942": ("mfma",)}
"""The instructions that multiply matrices on each."""


def tables(results: measure.Result) -> dict[str, str]:
    """A row for each kernel; memories for which it is the same on all targets share one."""
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for row in results["rows"]:
        used = [f"{row[kind]} {kind}" for kind in TARGETS[row["target"]] if row[kind]]
        said = ", ".join([*used, f"{row['spilled']} B", f"{row['shared'] / 1024:.0f} KiB"])
        name = row["kernel"].removeprefix("memory.triton.").replace(".triton", "")
        memory = f"TNT {row['heads']}" if row["plain"] else str(row["heads"])
        cells.setdefault(name, {}).setdefault(memory, {})[row["target"]] = said
    targets = [target for target in TARGETS if any(row["target"] == target for row in results["rows"])]
    lines = []
    for name, found in cells.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for memory, of in found.items():
            alike.setdefault(tuple(of.get(target, "") for target in targets), []).append(memory)
        for of, memories in alike.items():
            named = [m for m in memories if m.isdigit() or m.removeprefix("TNT ") not in memories]
            lines.append([f"`{name}`", ", ".join(named), *of])
    return {
        "kernels": measure.table(("kernel", "heads of", *targets), lines),
        "machine": measure.machine_table(results),
    }
