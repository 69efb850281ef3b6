"""The CPU kernels in C: built once by the machine's own compiler, for the machine's own registers."""
