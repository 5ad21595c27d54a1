"""What Z-Image, Lumina 2 and NewBie-image share: blocks with sandwich norms, tanh gates, SwiGLU, RoPE over pairs.

blocks.py in plain torch, kernels.py on fused kernels, positions.py for both, text_first.py for the forward of the last
two, time_rates.py for the time of the last one, and rewriting.py, which puts the blocks in place. A family adds the
names of its layers, its modulation and its forward.
"""
