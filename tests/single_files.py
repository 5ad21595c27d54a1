"""Write single files of a transformer as ComfyUI keeps them, from tiny models; independent of the library's tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "model.diffusion_model."
Tensors = dict[str, torch.Tensor]


def comfy_names(transformer: Any) -> Tensors:
    """Return the weights of a transformer by the names of its authors' own code."""
    found = dict(transformer.state_dict())
    naming = {"ZImageTransformer2DModel": _as_z_image, "Lumina2Transformer2DModel": _as_lumina2}
    rename = naming.get(type(transformer).__name__)
    return found if rename is None else rename(found)


def _as_z_image(found: Tensors) -> Tensors:
    """Join to_q, to_k and to_v, and name what lies outside the blocks and inside attention as Z-Image's code does."""
    named: Tensors = {}
    for name, tensor in found.items():
        if ".to_q." in name:
            parts = [found[name.replace("to_q", f"to_{each}")] for each in "qkv"]
            named[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            name = name.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1.", "x_embedder.")
            name = name.replace("norm_q", "q_norm").replace("norm_k", "k_norm").replace("to_out.0", "out")
            named[name] = tensor
    named["norm_final.weight"] = torch.ones(4)
    return named


def _as_lumina2(found: Tensors) -> Tensors:
    named: Tensors = {}
    outside = {
        "time_caption_embed.caption_embedder": "cap_embedder",
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
    }
    inside = {
        ".norm1.norm.": ".attention_norm1.",
        ".norm1.linear.": ".adaLN_modulation.1.",
        ".norm1.": ".attention_norm1.",
        ".norm2.": ".attention_norm2.",
        ".attn.norm_q.": ".attention.q_norm.",
        ".attn.norm_k.": ".attention.k_norm.",
        ".attn.to_out.0.": ".attention.out.",
        ".feed_forward.linear_": ".feed_forward.w",
    }
    for name, tensor in found.items():
        if ".to_q." in name:
            parts = [found[name.replace("to_q", f"to_{each}")] for each in "qkv"]
            named[name.replace("attn.to_q", "attention.qkv")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            new = next((name.replace(old, new) for old, new in outside.items() if name.startswith(old)), name)
            for old, other in inside.items():
                if old in new:
                    new = new.replace(old, other)
                    break
            named[new] = tensor
    return named


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    """Return whether files in eight bits keep a tensor so: the matrices of the blocks."""
    return "layers." in name and tensor.ndim == 2 and name.endswith(".weight") and "adaLN" not in name


def _scaled(tensor: torch.Tensor, dtype: torch.dtype, by_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    most = tensor.abs().amax(1, keepdim=True) if by_row else tensor.abs().amax()
    scale = (most / largest).float()
    values = tensor.float() / scale
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def as_bf16(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    return {PREFIX + name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, {}


def as_plain(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    return dict(tensors), {}


def as_fp8_scaled(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """The older layout: ``scale_weight`` beside each, and a marker for the file."""
    made: Tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if is_quantized(name, tensor):
            layer = name.removesuffix("weight")
            made[name], made[f"{layer}scale_weight"] = _scaled(tensor, torch.float8_e4m3fn, by_row=False)
            made[f"{layer}scale_input"] = torch.ones(())
        else:
            made[name] = tensor.to(torch.bfloat16)
    return {PREFIX + name: tensor for name, tensor in made.items()}, {}


def _marked(dtype: torch.dtype, kind: str, by_row: bool, in_header: bool) -> Callable[..., Any]:
    def write(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
        made: Tensors = {}
        layers: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if is_quantized(name, tensor):
                layer = name.removesuffix(".weight")
                made[name], made[f"{layer}.weight_scale"] = _scaled(tensor, dtype, by_row)
                layers[layer] = {"format": kind}
                if not in_header:
                    made[f"{layer}.comfy_quant"] = format_of(layers[layer])
            else:
                made[name] = tensor.to(torch.float32)
        return made, {"_quantization_metadata": json.dumps({"layers": layers})} if in_header else {}

    return write


def format_of(settings: Mapping[str, Any]) -> torch.Tensor:
    """Return the settings of a layer as files hold them."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


#: Layout -> function that returns tensors and metadata.
LAYOUTS: dict[str, Callable[[Tensors], tuple[Tensors, dict[str, str]]]] = {
    "plain": as_plain,
    "bf16": as_bf16,
    "fp8_scaled": as_fp8_scaled,
    "fp8 in the header": _marked(torch.float8_e4m3fn, "float8_e4m3fn", by_row=False, in_header=True),
    "fp8 beside": _marked(torch.float8_e4m3fn, "float8_e4m3fn", by_row=False, in_header=False),
    "int8 by rows": _marked(torch.int8, "int8_tensorwise", by_row=True, in_header=False),
}


def write(transformer: Any, file: Path, layout: str, change: Callable[[Tensors], None] = lambda _: None) -> Path:
    """Write a safetensors file in one of `LAYOUTS`; `change` may spoil it first."""
    tensors, metadata = LAYOUTS[layout](comfy_names(transformer))
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata or None)
    return file


def write_gguf(transformer: Any, file: Path, kind: str, prefix: str = "") -> Path:
    """Write a GGUF file with the package's own writer: the blocks' matrices in `kind`, the rest in float16 or 32."""
    import gguf

    writer = gguf.GGUFWriter(file, "lumina2")
    writer.add_array("some.words", ["one", "two"])
    quantized = gguf.GGMLQuantizationType[kind]
    for name, tensor in comfy_names(transformer).items():
        values = tensor.float().numpy()
        if is_quantized(name, tensor) and values.shape[1] % 32 == 0:
            writer.add_tensor(prefix + name, gguf.quants.quantize(values, quantized), raw_dtype=quantized)
        elif values.ndim > 1:
            writer.add_tensor(prefix + name, values.astype("float16"))
        else:
            writer.add_tensor(prefix + name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
