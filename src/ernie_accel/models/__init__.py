"""Rewritten networks, and replacements for a network's forward. Nothing here imports a transform.

ernie_image/    the transformer's blocks rewritten, and on fused kernels
lumina/         an attention processor that goes through diffusers' dispatcher
ministral/      the prompt enhancer's language model, whose layers the text encoder runs on, too
vae_decoder.py  the VAE's decoder on fused kernels
replays.py      work captured into CUDA graphs
masks.py        which mask reaches the blocks; processors.py: which kernel computes their attention
"""
