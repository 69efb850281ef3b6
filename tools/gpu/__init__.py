"""Whether the kernels are right on a GPU, and how fast they are there: ``python -m titans_build.tools.gpu_check``."""
