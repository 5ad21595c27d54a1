"""Transforms of the denoiser: its blocks, kernels, graphs, attention and cached steps."""
