"""ERNIE-Image's transformer rewritten: blocks.py in plain torch, kernels.py on fused kernels, positions.py for both."""
