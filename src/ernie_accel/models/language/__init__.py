"""Language models that encode prompts: their layers in fewer kernels; what differs between architectures is data.

architecture.py  how each architecture differs from the others
layers.py        one layer of any of them; the prompt enhancer (../ministral) decodes with it, too
text_encoder.py  the forward of a whole model, replayed as CUDA graphs
"""
