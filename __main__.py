"""``python -m titans_build``: the same as ``titans-build``."""

from .tools.cli import run

if __name__ == "__main__":
    run()
