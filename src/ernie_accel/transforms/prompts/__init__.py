"""Transforms of what happens to a prompt before the denoiser sees it."""
