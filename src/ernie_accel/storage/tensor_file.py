"""Write tensors to a safetensors file one after the other, each where a mapped file can be computed with.

safetensors' own ``save_file`` takes all tensors on the host at once, and a mapped tensor may begin at any multiple of 8
bytes, where some kernels cannot read. Files are read with safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

#: What tensors begin at a multiple of, as far as their sizes allow; torch's allocator on the CPU has the same.
ALIGNMENT = 64
#: Names of dtypes in a header (safetensors/src/tensor.rs, Dtype).
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float64: "F64",
}
if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on
    _NAMES[torch.float8_e8m0fnu] = "F8_E8M0"
#: What they stand for.
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file; no more than one tensor is copied at a time, from whichever device it is on.

    Raises:
        ValueError: The format has no name for a tensor's dtype.
        OSError: The file cannot be written.
    """
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT > 0, -tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"safetensors files have no {tensor.dtype}, which {name} is of")
        end = start + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name in order:
            if tensors[name].numel():
                values = tensors[name].detach().cpu().contiguous().reshape(-1)
                out.write(values.view(torch.uint8).numpy().data)
