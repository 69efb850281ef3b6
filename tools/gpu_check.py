"""``python -m titans_build.tools.gpu_check``: the kernels on the GPU of this machine, see ``gpu.check``.

``--prepare FOLDER`` copies this file into a folder with wheels. There it is started by its path, on a machine that may
lack the package and its dependencies: it unpacks the wheels, and runs the package of the folder.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import zipfile
from pathlib import Path


def unpack(folder: Path, site: Path) -> None:
    """Unpack the wheels of ``folder`` for this Python.

    Raises:
        SystemExit: there are none, or they are for another version of Python.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not any(wheel.name.startswith("titans_build-") for wheel in wheels):
        sys.exit(f"{folder} has no wheel of titans-build: make one with --prepare, or use python -m")
    ours = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    for wheel in wheels:
        python = wheel.name.split("-")[-3]
        if python.startswith("cp3") and python != ours and "abi3" not in wheel.name:
            sys.exit(f"{wheel.name} is for another Python than {sys.version.split()[0]}: prepare the folder with "
                     f"--python {sys.version_info[0]}.{sys.version_info[1]}")  # fmt: skip
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)


def start_from_folder() -> None:
    """Run the package of this file's folder with the same arguments, in place of this process."""
    folder, began = Path(__file__).resolve().parent, time.time()
    site = Path(tempfile.mkdtemp(prefix="titans-build-"))
    unpack(folder, site)
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    prepared = ["--prepared", str(folder), "--began", str(began)]
    words = ["-m", "titans_build.tools.gpu_check", *prepared, *sys.argv[1:]]
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    if __package__:
        from .gpu.check import main

        status = main()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a process that a hanging device holds would be waited for
    start_from_folder()
