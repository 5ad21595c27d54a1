"""Transforms of the VAE: its decoder's speed and memory."""
