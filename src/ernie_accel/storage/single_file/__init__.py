"""Read a transformer from a single file, as ComfyUI keeps it: safetensors (also fp8 and int8) or GGUF.

tensor_files   what a file holds, found in its header alone; a tensor is mapped when it is asked for
layout         ComfyUI's names and scales, held against an empty model before any memory is taken
transformer    fill the empty model, one tensor after the other
"""
