"""The prompt enhancer without what transformers' ``generate`` costs: the same tokens, many prompts at once.

sampling.py   which token comes next: greedy, or top-k and top-p by a row's own random numbers
decoder.py    the language model, whole prompts first, then token by token, in CUDA graphs where there is CUDA
enhancer.py   prompts to enhanced prompts, as the pipeline's own method does it
"""
