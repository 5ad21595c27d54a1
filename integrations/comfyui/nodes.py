"""The nodes: load and optimize, LoRA, text to image, image to image, batch, evaluate."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

import ernie_accel

from . import host
from .held import EMBEDDED, HeldPipe, Lora, Recipe, as_written, place_of

PIPE, LORAS = "ERNIE_ACCEL_PIPE", "ERNIE_ACCEL_LORAS"
OWN = "the model's own"
MODEL = "baidu/ERNIE-Image-Turbo"
_SHOWN = 16

Inputs = dict[str, dict[str, Any]]


class _Node:
    """What all have in common."""

    CATEGORY = "ernie_accel"
    FUNCTION = "run"


class Load(_Node):
    """Load a pipeline and optimize it on its way to the device."""

    DESCRIPTION = "Load a pipeline and optimize it by a preset, within a budget of memory."
    RETURN_TYPES: ClassVar = (PIPE, "STRING")
    RETURN_NAMES: ClassVar = ("pipe", "report")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        presets = ["auto", "none", *ernie_accel.presets]
        files = [OWN, *host.files("diffusion_models", ".safetensors", ".gguf")]
        return {
            "required": {
                "model": (
                    "STRING",
                    {"default": MODEL, "tooltip": f"A hub id, a folder in models/diffusers, or {EMBEDDED!r}."},
                ),
                "preset": (presets, {"default": "auto", "tooltip": "auto: the one that fits this machine."}),
                "memory": ("STRING", {"default": "auto", "tooltip": "auto, 12GiB, -2GiB (leave that free) or none."}),
            },
            "optional": {
                "transformer": (files, {"default": OWN, "tooltip": "A single file in models/diffusion_models."}),
                "dtype": (["auto", "bfloat16", "float16", "float32"], {"default": "auto"}),
                "prompt_enhancer": ("BOOLEAN", {"default": True, "tooltip": "Off: more memory for the rest."}),
                "loras": (LORAS,),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model: str) -> bool | str:
        try:
            place_of(model)
        except host.HostError as error:
            return f"{error}; a hub id, such as {MODEL}, or {EMBEDDED!r} will do as well"
        return True

    @classmethod
    def IS_CHANGED(cls, transformer: str = OWN, **_: Any) -> str:
        """Load again when the file has changed."""
        return "" if transformer == OWN else _stamp(host.find("diffusion_models", transformer))

    def run(
        self,
        model: str,
        preset: str,
        memory: str,
        transformer: str = OWN,
        dtype: str = "auto",
        prompt_enhancer: bool = True,
        loras: tuple[Lora, ...] = (),
    ) -> tuple[HeldPipe, str]:
        file = None if transformer == OWN else host.find("diffusion_models", transformer)
        held = HeldPipe(Recipe(model, preset, memory, dtype, file, tuple(loras), prompt_enhancer))
        return held, held.report()


class AddLora(_Node):
    """Name a LoRA that is fused into the weights; several in a row are fused one after the other."""

    DESCRIPTION = "A LoRA for the loader, which fuses it into the weights: it then costs no time, with any preset."
    RETURN_TYPES: ClassVar = (LORAS,)
    RETURN_NAMES: ClassVar = ("loras",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "lora": (host.files("loras", ".safetensors"),),
                "scale": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
            },
            "optional": {"loras": (LORAS,)},
        }

    @classmethod
    def IS_CHANGED(cls, lora: str, **_: Any) -> str:
        return _stamp(host.find("loras", lora))

    def run(self, lora: str, scale: float, loras: tuple[Lora, ...] = ()) -> tuple[tuple[Lora, ...]]:
        return ((*loras, Lora(host.find("loras", lora), scale)),)


def _sampling() -> dict[str, Any]:
    return {
        "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: as the preset or the pipeline has it."}),
        "guidance": (
            "FLOAT",
            {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1, "tooltip": "-1: as the preset has it."},
        ),
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
        "pictures": ("INT", {"default": 1, "min": 1, "max": 64, "tooltip": "Their seeds count on from the first."}),
    }


_PROMPTS = {
    "prompt": ("STRING", {"multiline": True, "default": ""}),
    "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
}
_MORE = {"enhance_prompt": ("BOOLEAN", {"default": True, "tooltip": "Where the pipeline has a prompt enhancer."})}


class TextToImage(_Node):
    """Draw pictures from a text."""

    DESCRIPTION = "Draw pictures from a text."
    RETURN_TYPES: ClassVar = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        size = {"default": 1024, "min": 16, "max": 8192, "step": 16}
        return {
            "required": {
                "pipe": (PIPE,),
                **_PROMPTS,
                "width": ("INT", dict(size)),
                "height": ("INT", dict(size)),
                **_sampling(),
            },
            "optional": dict(_MORE),
        }

    def run(self, pipe: HeldPipe, width: int, height: int, **given: Any) -> tuple[torch.Tensor]:
        drawing = pipe.pipe()
        call = _call(drawing, **given)
        with as_written():
            return (_as_images(drawing(**call, width=width, height=height)),)


class ImageToImage(_Node):
    """Draw from pictures, or, with a mask, where it is white."""

    DESCRIPTION = "Draw from a picture; with a mask, only where it is white. The pipe is the one for texts."
    RETURN_TYPES: ClassVar = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = {"default": 0.3, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "How far to go from the picture."}
        return {
            "required": {
                "pipe": (PIPE,),
                "image": ("IMAGE",),
                **_PROMPTS,
                "strength": ("FLOAT", strength),
                **_sampling(),
            },
            "optional": {"mask": ("MASK",), **_MORE},
        }

    def run(
        self, pipe: HeldPipe, image: torch.Tensor, strength: float, mask: torch.Tensor | None = None, **given: Any
    ) -> tuple[torch.Tensor]:
        drawing = pipe.pipe()
        call = _call(drawing, copies=len(image), **given)
        with as_written():
            pictures = [each.permute(2, 0, 1) for each in image[..., :3].clone().float().cpu()]
            if mask is None:
                drawn = ernie_accel.image_to_image(drawing, pictures, strength=strength, **call)
            else:
                masks = list(mask.clone().float().cpu().reshape(-1, *mask.shape[-2:]))
                drawn = ernie_accel.inpaint(drawing, pictures, masks, strength=strength, **call)
            return (_as_images(drawn),)


class Batch(_Node):
    """Make a picture for each row of a table."""

    DESCRIPTION = "A picture for each row of a table in ComfyUI's input folder, by the JSON of the authors' guide."
    RETURN_TYPES: ClassVar = ("STRING", "STRING")
    RETURN_NAMES: ClassVar = ("summary", "folder")
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        job = """{
  "batch_mode": "csv",
  "input_file": "products.csv",
  "output_dir": "products",
  "naming_pattern": "{sku}_{index}.png",
  "batch_size": 4,
  "max_concurrent": 2
}"""
        return {"required": {"pipe": (PIPE,), "job": ("STRING", {"multiline": True, "default": job})}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Always run: the job's ledger knows what is left to do, and it takes no time if nothing is."""
        return float("nan")

    def run(self, pipe: HeldPipe, job: str) -> dict[str, Any]:
        from .batch import run_batch

        made = run_batch(pipe, job)
        shown = [
            {"filename": path.name, "subfolder": path.parent.as_posix(), "type": "output"}
            for path in (each.relative_to(host.output_folder()) for each in made.pictures[:_SHOWN])
        ]
        return {"ui": {"images": shown, "text": [made.summary]}, "result": (made.summary, str(made.folder))}


class Evaluate(_Node):
    """Hold an optimized pipe against another preset, or the pipe as it comes."""

    DESCRIPTION = "Draw the same prompts from the same noise with the pipe and with a baseline, and compare."
    RETURN_TYPES: ClassVar = ("IMAGE", "STRING", "BOOLEAN")
    RETURN_NAMES: ClassVar = ("pairs", "report", "passed")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        size = {"default": 1024, "min": 16, "max": 8192, "step": 16}
        prompts = {"multiline": True, "default": "", "tooltip": "One a line."}
        settings = _sampling()
        del settings["pictures"]
        return {
            "required": {
                "pipe": (PIPE,),
                "baseline": (["none", *ernie_accel.presets], {"default": "none", "tooltip": "none: as it comes."}),
                "prompts": ("STRING", prompts),
                "width": ("INT", dict(size)),
                "height": ("INT", dict(size)),
                **settings,
                "min_psnr_db": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 200.0, "tooltip": "0: anything passes."}),
            }
        }

    def run(
        self,
        pipe: HeldPipe,
        baseline: str,
        prompts: str,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        seed: int,
        min_psnr_db: float,
    ) -> dict[str, Any]:
        texts = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not texts:
            raise ValueError("there is no prompt: write one a line")
        pipe.release()  # two of them need not fit at once
        other = HeldPipe(replace(pipe.recipe, preset=baseline))

        def loaded(of: HeldPipe) -> Any:
            host.check_interrupt()
            found = of.pipe()
            if of is other:
                of.release()  # the caller has it now, and lets it go before it loads the other
            return found

        with as_written():
            found = ernie_accel.evaluate(
                lambda: loaded(other),
                lambda: loaded(pipe),
                texts,
                seed=seed,
                width=width,
                height=height,
                num_inference_steps=steps or None,
                guidance_scale=None if guidance < 0 else guidance,
                thresholds=ernie_accel.Thresholds(min_psnr_db=min_psnr_db or None),
            )
        pairs = [side.image for each in found.pictures for side in (each.baseline, each.candidate)]
        report = found.to_markdown()
        images = torch.stack(pairs).permute(0, 2, 3, 1).clamp(0, 1).contiguous()
        return {"ui": {"text": [report]}, "result": (images, report, found.ok)}


def _call(
    drawing: Any,
    *,
    prompt: str,
    negative_prompt: str,
    steps: int,
    guidance: float,
    seed: int,
    pictures: int,
    enhance_prompt: bool = True,
    copies: int = 1,
) -> dict[str, Any]:
    """Return the arguments of a pipe's call; what the node leaves open, the pipe decides."""
    seeds = [(seed + number) % 2**63 for number in range(pictures * copies)]
    takes = inspect.signature(drawing.__call__).parameters
    call: dict[str, Any] = {
        "prompt": prompt,
        "num_images_per_prompt": pictures,
        "generator": [torch.Generator().manual_seed(each) for each in seeds],
        "output_type": "pt",
        "callback_on_step_end": host.Progress().after_step,
    }
    if negative_prompt:
        call["negative_prompt"] = negative_prompt
    if steps:
        call["num_inference_steps"] = steps
    if guidance >= 0:
        call["guidance_scale"] = guidance
    if "use_pe" in takes:
        call["use_pe"] = enhance_prompt and getattr(drawing, "pe", None) is not None
    return call


def _as_images(drawn: Any) -> torch.Tensor:
    """Return a call's pictures as ComfyUI has them: [B, H, W, 3], float32, 0 to 1, on the host."""
    from ernie_accel.core.outputs import images_of

    images: torch.Tensor = images_of(drawn).detach().float().cpu().clamp(0, 1)
    return images.permute(0, 2, 3, 1).contiguous()


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}"


NODE_CLASS_MAPPINGS = {
    "ErnieAccelLoad": Load,
    "ErnieAccelLora": AddLora,
    "ErnieAccelTextToImage": TextToImage,
    "ErnieAccelImageToImage": ImageToImage,
    "ErnieAccelBatch": Batch,
    "ErnieAccelEvaluate": Evaluate,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ErnieAccelLoad": "Load and optimize (ernie_accel)",
    "ErnieAccelLora": "LoRA (ernie_accel)",
    "ErnieAccelTextToImage": "Text to image (ernie_accel)",
    "ErnieAccelImageToImage": "Image to image (ernie_accel)",
    "ErnieAccelBatch": "Batch from a table (ernie_accel)",
    "ErnieAccelEvaluate": "Evaluate (ernie_accel)",
}
