"""docs/custom-blocks.md: following it works as written, and what it says of mistakes is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.blocks.laws import LawError
from titans_build.registry import lookup, scratch
from titans_build.tools.cli import main

PAGE = "custom-blocks.md"
POINT = "[titans_build.blocks]\nmoving_average = moving_average_block:MovingAverage\n"


@pytest.fixture
def followed(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which the page's first command has been typed, with the package importable but not installed."""
    monkeypatch.chdir(tmp_path)
    first, *_ = page.command_lines("titans-build")
    assert main(first) == 0
    source = tmp_path / "moving_average" / "src"
    info = source / "moving_average_block-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moving-average-block\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(POINT)
    monkeypatch.syspath_prepend(str(source))
    with scratch():
        yield tmp_path
    sys.modules.pop("moving_average_block", None)


def test_the_commands_work_in_order(page: Any, followed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, *rest = page.command_lines("titans-build")
    assert len(rest) == 2
    for words in rest:
        # what --try does is tested elsewhere, and on this page where a wheel is tried
        assert main(words[: words.index("--try")] if "--try" in words else words) == 0, capsys.readouterr().err
    assert lookup("moving_average").source == "moving_average_block"
    out = capsys.readouterr().out
    assert "span   number > 1" in out and "moving_average" in out.partition("dim 64")[2]


def test_the_page_shows_the_files_that_are_written(page: Any, followed: Path) -> None:
    made = followed / "moving_average"
    assert page.fences("python")[0] == (made / "src/moving_average_block/__init__.py").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w./]+)` \|", page.text.partition("## 2.")[0], flags=re.M)
    files = {file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file()}
    assert set(table) == {file for file in files if ".dist-info" not in file}
    settings = (made / "pyproject.toml").read_text(encoding="utf-8")
    assert (
        '[project.entry-points."titans_build.blocks"]\nmoving_average = "moving_average_block:MovingAverage"'
        in settings
    )


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        (
            "import titans_build as tb\ntb.register('memory')(type('M', (tb.Block,), {}))",
            "the block name 'memory' is taken",
        ),
    ],
)
def test_a_package_that_does_not_work_is_one_error(
    page: Any, code: str, reason: str, followed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("moving_average/src/moving_average_block/__init__.py").write_text(code, encoding="utf-8")
    said = "the installed block 'moving_average' (moving-average-block) cannot be used: "
    assert said.replace("moving_average", "x").replace("moving-average-block", "package") + "..." in page.text
    for words in (
        ["moving_average/recipe.yaml"],
        ["describe", "moving_average"],
        ["check", "moving_average/recipe.yaml"],
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert said in err and reason in err and "Traceback" not in err
        assert "  layers.mixed.0.type: " in err or words[0] == "describe"
    # and the rest goes on working
    assert main(["list", "--json"]) == 0 and said in capsys.readouterr().out
    assert main(["check", "mac"]) == 0


class Average(tb.Block):
    """The page's block in its plainest form, for mistakes to be made in."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.rate = torch.nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.rate, 1.0)

    def init_state(self, batch_size: int) -> Any:
        return self.rate.new_zeros(batch_size, self.dim)

    def step(self, x: Any, average: Any) -> Any:
        keep = torch.sigmoid(self.rate)
        return keep * average + (1 - keep) * x

    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any:
        average, outputs = self.init_state(x.shape[0]) if state is None else state, []
        for t in range(x.shape[1]):
            real = torch.ones_like(x[:, t], dtype=torch.bool) if mask is None else mask[:, t, None]
            average = torch.where(real, self.step(x[:, t], average), average)
            outputs.append(torch.where(real, average, 0))
        return torch.stack(outputs, dim=1) if outputs else x, average


class LastPiece(Average):
    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any:
        return super().forward(x, None, mask=mask)


class PaddingCounts(Average):
    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any:
        return super().forward(x, state)


class Buffer(Average):
    kept: Any = None

    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any:
        y, self.kept = super().forward(x, self.kept, mask=mask)
        return y, self.init_state(x.shape[0])


class MeanOverBatch(Average):
    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any:
        return super().forward(x - x.mean(0, keepdim=True), state, mask=mask)


class MeanOverTime(Average):
    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any:
        return super().forward(x - x.mean(1, keepdim=True), state, mask=mask)


class InPlace(Average):
    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any:
        y, after = super().forward(x, state, mask=mask)
        with torch.no_grad():
            return y, after if state is None else state.copy_(after)


class Detached(Average):
    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any:
        return super().forward(x, None if state is None else state.detach(), mask=mask)


class Counting(Average):
    def init_state(self, batch_size: int) -> Any:
        return super().init_state(batch_size), torch.zeros(batch_size, 1, dtype=torch.int64, device=self.rate.device)

    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any:
        average, read = self.init_state(x.shape[0]) if state is None else state
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        y, average = super().forward(x, average, mask=mask)
        return y, (average, read + real.sum(1, keepdim=True))


class Growing(Average):
    def step(self, x: Any, average: Any) -> Any:
        return 1.5 * average + torch.sigmoid(self.rate) * x


class SetInConstructor(Average):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.rate = torch.nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None: ...


class ReadsWeight(Average):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.layer = torch.nn.Linear(dim, dim, bias=False)

    def forward(self, x: Any, state: Any = None, *, mask: Any = None) -> Any:
        return super().forward(torch.nn.functional.linear(x, self.layer.weight), state, mask=mask)


MISTAKES = {
    "the state keeps only the last piece": [LastPiece],
    "padding counts as tokens": [PaddingCounts],
    "a buffer kept on `self` between calls": [Buffer],
    "a mean or a norm over the batch, or over time": [MeanOverBatch, MeanOverTime],
    "`state.add_(...)`": [InPlace],
    "`.detach()` or `.item()` on the way": [Detached],
    "a counter of tokens that is not named `position`": [Counting],
    "values that grow from token to token": [Growing],
    "parameters that are set in the constructor alone": [SetInConstructor],
    "`F.linear(x, self.layer.weight)` in place of `self.layer(x)`": [ReadsWeight],
}


def test_the_plain_block_obeys_the_laws() -> None:
    with scratch():
        tb.register("mistaken")(Average)
        tb.check_block("mistaken", dim=4, endurance=300)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_violates_the_listed_law(page: Any, mistake: str) -> None:
    rows = dict(
        re.findall(r"^\| (.+?) \| (`\w+`.*) \|$", page.text.partition("## 3.")[2].partition("## 4.")[0], flags=re.M)
    )
    assert list(rows) == list(MISTAKES)
    found = set()
    for cls in MISTAKES[mistake]:
        with scratch():
            tb.register("mistaken")(cls)
            with pytest.raises(LawError) as caught:
                tb.check_block("mistaken", dim=4, endurance=3000)
        found.add(caught.value.law)
    assert found == set(re.findall(r"`(\w+)`", rows[mistake]))


@pytest.mark.slow
def test_the_page_works_with_an_installed_wheel(page: Any, root: Path, tmp_path: Path) -> None:
    """A new environment that has the wheel, and of everything else what is installed here: nothing of this folder."""
    source, wheels, home = tmp_path / "source", tmp_path / "wheels", tmp_path / "home"
    for name in (
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "__init__.py",
        "__main__.py",
        "huggingface.py",
        "py.typed",
        "blocks",
        "kernels",
        "recipes",
        "registry",
        "tools",
    ):
        if (root / name).is_dir():
            shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(root / name, source / name)
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": "1", "TITANS_BUILD_CACHE": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)

    def run(*words: str) -> str:
        done = subprocess.run(
            words, cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=1200
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    home.mkdir()
    run(sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--wheel-dir", str(wheels))
    (wheel,) = wheels.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    environment["PATH"] = f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "install", "--no-deps", str(wheel))
    # what came with it is older than what builds packages here, and would stand before that
    run(python, "-m", "pip", "uninstall", "--yes", "setuptools")
    # a line in a .pth file adds a folder and heeds none of the .pth files in it, by which an editable install works
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    here = Path(torch.__file__).parents[1]
    (site / "what_is_installed_here.pth").write_text(f"{here}\n", encoding="utf-8")
    place = run(python, "-c", "import titans_build.blocks as b; print(b.__file__)").strip()
    assert Path(place).is_relative_to(site)

    lines = [line for block in page.fences("sh") for line in block.splitlines()]
    assert [line.split()[0] for line in lines] == ["titans-build", "pip", "python", "titans-build", "titans-build"]
    said = {line: run("bash", "-c", line) for line in lines}
    assert "3 passed" in said[lines[2]]
    assert "(moving_average_block, " in said[lines[3]]
    assert "generating (one row)" in said[lines[4]]
    # and what is made of the plugin is a wheel like any other
    run(python, "-m", "pip", "uninstall", "--yes", "moving-average-block")
    run(python, "-m", "pip", "install", "--no-deps", "./moving_average")
    assert "moving_average" in run("titans-build", "list", "moving*")
