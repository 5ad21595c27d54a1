"""Record which Triton kernels each family launches: ``python -m tools.kernel_lists``."""
