"""Named tuples of transforms. A preset is plain data: print it, edit it, replace a transform by passing another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ernie_accel.core.context import Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.transform import Transform
from ernie_accel.transforms.attention import ElideMask, ExpandAttentionMask
from ernie_accel.transforms.call_defaults import CallDefaults
from ernie_accel.transforms.compile import Compile
from ernie_accel.transforms.dtype import CastDtype
from ernie_accel.transforms.encode_prompts import BatchPromptEncoding
from ernie_accel.transforms.fuse_kernels import FuseKernels
from ernie_accel.transforms.graphs import CaptureGraphs
from ernie_accel.transforms.layout import MakeContiguous
from ernie_accel.transforms.rewrite import RewriteBlocks
from ernie_accel.transforms.vae import CompileVae


@dataclass(frozen=True)
class Preset:
    """A name for a combination that works.

    Attributes:
        name: ``<mode>-<precision>`` in kebab-case.
        summary: One sentence: what it is for.
        transforms: What it applies, in any order.
    """

    name: str
    summary: str
    transforms: tuple[Transform, ...]


class PresetTable(Mapping[str, Preset]):
    """The presets by name; printing it lists them."""

    def __init__(self, *presets: Preset) -> None:
        self._presets = {preset.name: preset for preset in presets}

    def __getitem__(self, name: str) -> Preset:
        if name not in self._presets:
            raise KeyError(name)
        return self._presets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._presets)

    def __len__(self) -> int:
        return len(self._presets)

    def __repr__(self) -> str:
        return "\n".join(
            f"{p.name:14} {p.summary}\n{'':14} {', '.join(map(repr, p.transforms))}" for p in self.values()
        )


_FAST_BF16 = (CastDtype("bfloat16"), RewriteBlocks(), FuseKernels("bf16"))
_FAST_FP8 = (CastDtype("bfloat16"), RewriteBlocks(), FuseKernels("fp8"))

_FAST_PARTS = (BatchPromptEncoding(), Compile(), CompileVae(), CaptureGraphs())

presets = PresetTable(
    Preset(
        "exact",
        "Bitwise the same pictures: only what cannot change a bit.",
        (MakeContiguous(),),
    ),
    Preset(
        "turbo-fp32",
        "Few steps, compiled, in the precision the pipe came in: for CPUs, where bfloat16 seldom pays.",
        (MakeContiguous(), CallDefaults("turbo"), Compile()),
    ),
    Preset(
        "turbo-bf16",
        "Few steps in bfloat16, on fused kernels or compiled: for a distilled (Turbo) checkpoint on any recent card.",
        (*_FAST_BF16, MakeContiguous(), CallDefaults("turbo"), *_FAST_PARTS),
    ),
    Preset(
        "turbo-fp8",
        "Few steps with fp8 linears on fused kernels: for a distilled (Turbo) checkpoint on capability 8.9 and above.",
        (*_FAST_FP8, MakeContiguous(), CallDefaults("turbo"), *_FAST_PARTS),
    ),
    Preset(
        "npu-bf16",
        "Few steps in bfloat16 with masks as Ascend's kernels take them: for a distilled (Turbo) checkpoint on an NPU.",
        (CastDtype("bfloat16"), ElideMask(), ExpandAttentionMask(), MakeContiguous(), CallDefaults("turbo")),
    ),
    Preset(
        "quality-bf16",
        "The family's full steps and guidance in bfloat16, compiled: for a base (undistilled) checkpoint.",
        (*_FAST_BF16, MakeContiguous(), CallDefaults("quality"), *_FAST_PARTS),
    ),
)


def find_preset(preset: Preset | str) -> Preset:
    """Return a preset by name, or the preset itself.

    Raises:
        UnknownNameError: There is no preset of that name.
    """
    if isinstance(preset, Preset):
        return preset
    if preset not in presets:
        raise UnknownNameError("preset", preset, presets)
    return presets[preset]


def fitting_preset(context: Context) -> Preset:
    """Return the Turbo preset that pays most on a machine and can run there."""
    if context.device == "cpu":
        return presets["turbo-fp32"]  # few CPUs multiply in bfloat16
    if context.device == "npu":
        return presets["npu-bf16"]
    if (context.capability or (0, 0)) >= (8, 9) and "triton" in context.versions:
        return presets["turbo-fp8"]
    return presets["turbo-bf16"]
