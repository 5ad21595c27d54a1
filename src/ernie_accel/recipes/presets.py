"""Named tuples of transforms, by mode and precision and by card. Plain data: print it, edit it, replace a part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ernie_accel.common.language import said
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.hardware import HARDWARE, Hardware, add_row
from ernie_accel.core.preset import Preset
from ernie_accel.plugins import load_plugins
from ernie_accel.transforms.calls.call_defaults import CallDefaults
from ernie_accel.transforms.denoiser.batch_guidance import BatchGuidance
from ernie_accel.transforms.denoiser.capture_graphs import CaptureGraphs
from ernie_accel.transforms.denoiser.compile import Compile
from ernie_accel.transforms.denoiser.elide_mask import ElideMask
from ernie_accel.transforms.denoiser.expand_mask import ExpandAttentionMask
from ernie_accel.transforms.denoiser.fuse_kernels import FuseKernels
from ernie_accel.transforms.denoiser.rewrite_blocks import RewriteBlocks
from ernie_accel.transforms.prompts.encode_prompts import BatchPromptEncoding
from ernie_accel.transforms.prompts.rewrite_enhancer import RewriteEnhancer
from ernie_accel.transforms.prompts.rewrite_text_encoder import RewriteTextEncoder
from ernie_accel.transforms.scheduler.keep_timesteps_on_host import KeepTimestepsOnHost
from ernie_accel.transforms.vae.decoder import FuseVae
from ernie_accel.transforms.weights.cast_dtype import CastDtype
from ernie_accel.transforms.weights.make_contiguous import MakeContiguous
from ernie_accel.transforms.weights.move_to import MoveTo
from ernie_accel.transforms.weights.quantize import Quantize


class PresetTable(Mapping[str, Preset]):
    """The presets by name; printing it lists them."""

    def __init__(self, *presets: Preset) -> None:
        self._presets = {preset.name: preset for preset in presets}

    def __getitem__(self, name: str) -> Preset:
        if name not in self._presets:
            raise KeyError(
                str(UnknownNameError("preset", name, self, note="A card's name goes to optimize(preset=...)."))
            )
        return self._presets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._presets)

    def __len__(self) -> int:
        return len(self._presets)

    def __repr__(self) -> str:
        return "\n".join(line for preset in self.values() for line in _lines(preset))


def _lines(preset: Preset) -> Iterator[str]:
    yield f"{preset.name:14} {preset.summary}"
    yield f"{'':14} {', '.join(map(repr, preset.transforms))}"
    if preset.without_kernels:
        instead = ", ".join(map(repr, preset.without_kernels))
        yield f"{'':14} for a family without fused kernels: {instead}"


_FAST_BF16 = (CastDtype("bfloat16"), RewriteBlocks(), FuseKernels("bf16"))
_FAST_FP8 = (CastDtype("bfloat16"), RewriteBlocks(), FuseKernels("fp8"))
_FP8_ELSEWHERE = (Quantize("fp8"),)
_INT8 = (CastDtype("bfloat16"), Quantize("int8"))

_FAST_PARTS = (
    BatchPromptEncoding(),
    RewriteTextEncoder(),
    KeepTimestepsOnHost(),
    Compile(),
    FuseVae(),
    CaptureGraphs(),
    RewriteEnhancer(),
)

presets = PresetTable(
    Preset.of(
        "exact",
        None,
        said("Bitwise the same pictures: only what cannot change a bit."),
        (KeepTimestepsOnHost(),),
    ),
    Preset.of(
        "turbo",
        "fp32",
        said(
            "Few steps, compiled, in the precision the pipe came in: for CPUs; beside CastDtype('bfloat16') where it "
            "pays."
        ),
        (RewriteBlocks(), MakeContiguous(), CallDefaults("turbo"), Compile(), RewriteEnhancer()),
    ),
    Preset.of(
        "turbo",
        "bf16",
        said(
            "Few steps in bfloat16, on fused kernels or compiled: for a distilled (Turbo) checkpoint on any recent "
            "card."
        ),
        (*_FAST_BF16, MakeContiguous(), CallDefaults("turbo"), *_FAST_PARTS),
    ),
    Preset.of(
        "turbo",
        "fp16",
        said("Few steps in float16, compiled: for a distilled (Turbo) checkpoint on cards without bfloat16."),
        (CastDtype("float16"), MakeContiguous(), CallDefaults("turbo"), Compile()),
    ),
    Preset.of(
        "turbo",
        "fp8",
        said(
            "Few steps with fp8 linears on fused kernels: for a distilled (Turbo) checkpoint on capability 8.9 and "
            "above."
        ),
        (*_FAST_FP8, MakeContiguous(), CallDefaults("turbo"), *_FAST_PARTS),
        _FP8_ELSEWHERE,
    ),
    Preset.of(
        "turbo",
        "int8",
        said("Few steps with int8 linears, compiled: for a distilled (Turbo) checkpoint on capability 8.0 to 8.6."),
        (*_INT8, MakeContiguous(), CallDefaults("turbo"), Compile(), FuseVae()),
    ),
    Preset.of(
        "turbo",
        "bf16",
        said(
            "Few steps in bfloat16 on an Ascend NPU, with masks as it takes them: for a distilled (Turbo) checkpoint."
        ),
        (
            CastDtype("bfloat16"),
            ElideMask(),
            ExpandAttentionMask(),
            MakeContiguous(),
            MoveTo("npu"),
            CallDefaults("turbo"),
        ),
        device="npu",
    ),
    Preset.of(
        "turbo",
        "nvfp4",
        said("Few steps with nvfp4 linears, compiled: the fastest on capability 10.0 and above, at a visible cost."),
        (CastDtype("bfloat16"), Quantize("nvfp4"), MakeContiguous(), CallDefaults("turbo"), Compile(), FuseVae()),
    ),
    Preset.of(
        "turbo",
        "q4",
        said("Few steps with 4-bit weights (nf4), compiled: for memory and not for speed."),
        (CastDtype("bfloat16"), Quantize("nf4"), MakeContiguous(), CallDefaults("turbo"), Compile(), FuseVae()),
    ),
    Preset.of(
        "quality",
        "bf16",
        said("The family's full steps and guidance in bfloat16, compiled: for a base (undistilled) checkpoint."),
        (*_FAST_BF16, MakeContiguous(), CallDefaults("quality"), *_FAST_PARTS, BatchGuidance()),
    ),
    Preset.of(
        "quality",
        "fp8",
        said("The family's full steps and guidance with fp8 linears on fused kernels: for a base checkpoint."),
        (*_FAST_FP8, MakeContiguous(), CallDefaults("quality"), *_FAST_PARTS, BatchGuidance()),
        _FP8_ELSEWHERE,
    ),
    Preset.of(
        "quality",
        "int8",
        said("The family's full steps and guidance with int8 linears, compiled: for a base checkpoint."),
        (*_INT8, MakeContiguous(), CallDefaults("quality"), Compile(), FuseVae()),
    ),
)


def register_hardware(row: Hardware) -> Hardware:
    """Add a row to the table of hardware, for this process; return the row.

    ``Context.named``, ``--device`` and, if it names a preset, ``optimize(preset=row.key)`` find it then, and
    ``recommend`` knows the device by its name.

    Raises:
        TypeError: It is no `Hardware`.
        ValueError: Another device, or a preset, has its key or its name.
        UnknownNameError: There is no such preset.
    """
    if not isinstance(row, Hardware):
        raise TypeError(f"expected a Hardware, got {row!r}")
    if row.preset is not None and row.preset not in presets:
        raise UnknownNameError("preset", row.preset, presets)
    if row.key in presets:
        raise ValueError(f"key={row.key!r} is the name of a preset: choose another")
    add_row(row)
    return row


def hardware_presets() -> dict[str, str]:
    """Return key of a device -> name of its preset, for those that have one; the keys are preset names, too."""
    return {row.key: row.preset for row in HARDWARE.values() if row.preset is not None}


def find_preset(preset: Preset | str) -> Preset:
    """Return a preset by its name or that of a device, or the preset itself.

    Raises:
        UnknownNameError: There is no preset and no device with a preset of that name.
    """
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str):
        raise TypeError(f"expected a preset or its name, got {preset!r}")
    load_plugins()
    if preset in presets:
        return presets[preset]
    by_device = hardware_presets()
    if preset in by_device:
        base, row = presets[by_device[preset]], HARDWARE[preset]
        return replace(base, name=row.key, summary=said("{name} for this card: {why}.", name=base.name, why=row.why))
    raise UnknownNameError("preset", preset, (*presets, *by_device))
