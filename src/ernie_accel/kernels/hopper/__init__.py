"""Kernels in CUDA C++ for Hopper cards, compiled when they are first needed."""
