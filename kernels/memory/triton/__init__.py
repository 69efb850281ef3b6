"""The memory operation on Triton: kernels, and the operations that launch them."""
