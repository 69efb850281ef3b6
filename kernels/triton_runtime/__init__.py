"""The GPU kernels in Triton. Their modules import Triton, so they are imported where one is about to run."""
