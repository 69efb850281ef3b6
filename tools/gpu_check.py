"""``python -m titans_build.tools.gpu_check``: the kernels on the GPU of this machine, see ``gpu.check``."""

import sys

from .gpu.check import main

if __name__ == "__main__":
    sys.exit(main())
