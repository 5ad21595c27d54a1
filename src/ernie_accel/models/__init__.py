"""Rewritten networks, and replacements for a network's forward. Nothing here imports a transform.

ernie_image/    the transformer's blocks rewritten, and on fused kernels
z_image/        Z-Image's; lumina/: that of Lumina 2, which runs NewBie-image; newbie/: NewBie-image's own code
next_dit/       the blocks that these have in common
rewriting.py    what all rewritten models share; on_kernels.py: on fused kernels; token_layout.py: padding, positions
language/       language models that encode prompts: Ministral, Qwen and Gemma from the same layers
ministral/      the prompt enhancer, which decodes with those layers
prompt_cache.py embeddings of prompts that are kept between calls
autoencoder.py  the VAE on fused kernels
replays.py      work captured into CUDA graphs
adapters.py     LoRAs on products of several layers; stacked_adapters.py: on compiled blocks
masks.py        which mask reaches the blocks; processors.py: which kernel computes their attention
"""
