"""What Z-Image and Lumina 2 share: blocks with sandwich norms, tanh gates, SwiGLU and RoPE over pairs of dimensions.

blocks.py in plain torch, kernels.py on fused kernels, positions.py for both, and rewriting.py, which puts the blocks in
place. A family adds the names of its layers, its modulation and its forward.
"""
