"""The command: a dry run, what is prepared for another machine, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from titans_build.tools import gpu_check
from titans_build.tools.gpu import cases as gpu_cases
from titans_build.tools.gpu import check, plan, prepare

ROOT = Path(__file__).parents[3]


def test_without_a_gpu_it_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main(["--out", str(tmp_path)]) == 2
    assert "has no CUDA GPU" in capsys.readouterr().err


def test_an_unknown_stage_is_refused(capsys, tmp_path):
    assert check.main(["--dry-run", "--stages", "speed", "--out", str(tmp_path)]) == 2
    assert "--stages speed: no such stage; expected some of ceilings, parity" in capsys.readouterr().err


def test_the_rows_of_another_run_are_not_overwritten(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert check.main(["--dry-run", "--out", str(tmp_path)]) == 2
    assert "has the rows of another run; name a new folder" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_text() == "{}\n"


def test_stages_fit_into_the_time_in_their_order():
    stages, beside = plan.first("cuda", False, None)
    assert [stage.name for stage in stages][:4] == ["ceilings", "parity", "repeats", "operation"]
    assert sum(stage.seconds for stage in stages) <= 460 and beside.cases
    second = plan.second("cuda", False, check.WORST)
    assert sum(stage.seconds for stage in second) <= 480
    names = [case.name for stage in stages for case in stage.cases]
    assert len(set(names)) > 0.9 * len(names) and {f"{name}-170m, 32768 tokens" for name in plan.MODELS} <= {*names}


@pytest.mark.slow
def test_a_run_ends_at_its_time_whatever_hangs(tmp_path):
    code = "import time, torch; torch.cuda.is_available = lambda: time.sleep(60)\n"
    code += f"from titans_build.tools.gpu import check; check.main(['--out', {str(tmp_path)!r}, '--seconds', '7'])"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Timeout" in done.stderr and time.monotonic() - began < 50


@pytest.mark.slow
def test_a_dry_run_with_a_crash_a_hang_and_a_wrong_number(tmp_path):
    (tmp_path / "about.json").write_text('{"commit": "abc", "modified": true}')  # of the packed version
    words = ["--dry-run", "--prepared", str(tmp_path), "--out", str(tmp_path / "out"), "--seconds", "400"]
    assert check.main(words) == 1
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["environment"]["commit"], found["environment"]["modified"]) == ("abc", True)
    assert found["environment"]["versions"]["torch"] == torch.__version__ and not found["left_out"]
    red = {row["case"]: row for row in found["red"]}
    assert red.pop("injected crash")["failed"] == "its process ended with -6"
    assert red.pop("injected hang")["failed"] == "took longer than 2 s"
    assert red.pop("injected wrong number")["error"] > 0.009
    assert not red
    stages, _ = plan.first("cpu", True, None)
    ran = {(row["stage"], row["case"]) for row in found["rows"]}
    assert ran >= {(stage.name, case.name) for stage in stages for case in stage.cases}
    assert {"parity", "further"} <= {stage for stage, _ in ran}
    steps = [row for row in found["rows"] if row.get("what") == "training step"]
    assert {row["model"] for row in steps} == {*plan.MODELS} and all(row["seconds"] > 0 for row in steps)


@pytest.mark.slow
def test_what_processes_are_forked_from_does_not_touch_cuda():
    code = (
        "import torch\n"
        "def no(*a, **k): raise AssertionError('asks for the GPU')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'get_device_name', 'get_device_capability',"
        " 'get_device_properties', 'init', 'synchronize'): setattr(torch.cuda, name, no)\n"
        "import titans_build.tools.gpu.preload\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def wheel(folder, name, content=""):
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr(f"{name.partition('-')[0]}/__init__.py", content)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that writes empty wheels."""
    asked = []

    def run(command, **options):
        asked.append(command[5:])
        to = Path(command[command.index("--dest" if "download" in command else "--wheel-dir") + 1])
        names = [word for word in command if word[0].islower() and ">" not in word] if "download" in command else []
        for name in (*prepare.WITH_NEEDS, "xformers", "fla_core") if names else ("titans_build",):
            wheel(to, f"{name}-1.0-py3-none-any.whl")
        return SimpleNamespace(returncode=0, stderr="", stdout="")

    few = [case for case in gpu_cases.cases(small=True) if case.name in ("gate", "SwiGLU")]
    monkeypatch.setattr(gpu_cases, "cases", lambda small=False: few)
    return SimpleNamespace(run=run, asked=asked)


def test_a_prepared_folder_has_wheels_references_and_the_program(tmp_path, pip):
    names = prepare.prepare(tmp_path / "folder", "3.12", pip.run, small=True)
    assert {"about.json", "gpu_check.py", "references.pt", "titans_build-1.0-py3-none-any.whl"} <= {*names}
    needs, alone, own = pip.asked
    assert "--no-deps" not in needs and needs[needs.index("--python-version") + 1] == "3.12" and "pydantic" in needs
    assert "--no-deps" in alone and "xformers>=0.0.35" in alone and own[0] == "wheel"
    assert torch.load(tmp_path / "folder" / "references.pt").keys() == {"gate", "SwiGLU"}
    pip.asked.clear()
    prepare.prepare(tmp_path / "folder", "3.12", pip.run, small=True)  # offline: its wheels are there
    assert [words[0] for words in pip.asked] == ["wheel"]


def test_a_prepared_folder_is_not_made_by_half(tmp_path, pip):
    failing = lambda *args, **options: SimpleNamespace(returncode=1, stderr="\nERROR: no network\n", stdout="")  # noqa: E731
    with pytest.raises(check.CommandFailed, match="pip download: ERROR: no network"):
        prepare.prepare(tmp_path / "folder", "3.12", failing, small=True)


def test_the_program_in_a_prepared_folder_runs_its_package_without_what_is_installed(tmp_path):
    """In a Python without any installed package: what it runs is that of the wheels."""
    folder = tmp_path / "folder"
    folder.mkdir()
    code = "import sys, titans_build, pydantic\nprint(sys.argv[1:], titans_build.__name__, pydantic.__file__)"
    with zipfile.ZipFile(folder / "titans_build-1.0-py3-none-any.whl", "w") as file:
        for name, text in (("__init__", ""), ("tools/__init__", ""), ("tools/gpu_check", code)):
            file.writestr(f"titans_build/{name}.py", text)
    wheel(folder, "pydantic-1.0-py3-none-any.whl")
    (folder / "gpu_check.py").write_text((ROOT / "tools" / "gpu_check.py").read_text())
    command = [sys.executable, "-S", str(folder / "gpu_check.py"), "--seconds", "9"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert f"['--prepared', '{folder}', '--began', '" in done.stdout and "titans-build-" in done.stdout
    assert "', '--seconds', '9'] titans_build" in done.stdout


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pydantic-1.0-py3-none-any.whl"], "has no wheel of titans-build"),
        (["titans_build-1.0-py3-none-any.whl", "pydantic_core-1.0-cp37-cp37-linux_x86_64.whl"], "for another Python"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, names, message):
    for name in names:
        wheel(tmp_path, name)
    with pytest.raises(SystemExit, match=message):
        gpu_check.unpack(tmp_path, tmp_path / "site")
