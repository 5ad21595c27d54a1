"""Transforms of the weights: their dtype, bits, layout and place."""
