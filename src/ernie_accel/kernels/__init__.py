"""Fused GPU kernels, each with a plain-torch twin that defines what it computes.

    reference.py   the twins: the specification, which also runs on the CPU
    gpu.py         the Triton kernels of the blocks and their launches; imported at first use
    group_norm.py  the Triton kernels of the VAE's decoder
    decode.py      the Triton kernels of the prompt enhancer
    hopper/        attention and float8 products on Hopper cards, in CUDA C++
    cudnn_attention.py  attention by cuDNN, in bf16 and fp8; wide_attention.py  attention of heads too wide for flash
    kept_plans.py  the last plans of a library that plans for each shape
    linear.py      the layer with an fp8 weight
    sizes.py       arithmetic of grids and tiles
    ops.py         twin and kernel behind one torch operator each, which torch.compile keeps as one node

Rows are quantized to float8_e4m3fn with one float32 scale per row: ``value = float8 * scale``, ``scale = amax / 448``.
A row with a NaN or an infinity gets a NaN, so that it cannot go unnoticed. Shapes in names: b batch, s tokens,
h hidden size, n heads, d head size, f hidden size of the feed-forward; of pictures bchw.
"""
