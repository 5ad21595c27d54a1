"""Choose the kernel that computes attention, by name or by what suits the device, and say why."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ernie_accel.common.language import joined, listed, one_of, said
from ernie_accel.core.components import DENOISERS, Pipeline, denoisers_of
from ernie_accel.core.context import UNSUPPORTED_DEVICES, Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo
from ernie_accel.models.fused_npu import with_prepared_masks
from ernie_accel.models.masks import no_mask_reason
from ernie_accel.models.processors import BY_MASK, ByMask, attentions, processor_for, send_through_dispatcher
from ernie_accel.models.rewritten import attends_by_lengths

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionBackend:
    """The facts about one attention kernel.

    Attributes:
        diffusers: Its name in diffusers' dispatcher (``AttentionBackendName``).
        summary: Whose kernel it is.
        devices: Device types it runs on.
        capability: Least CUDA compute capability.
        preferred_from: CUDA compute capability from which "auto" prefers it; None: wherever it runs.
        capability_below: First CUDA compute capability that it no longer supports, or None.
        dtypes: Dtypes it takes; empty: all.
        max_head_dim: Largest head size it takes; None: any.
        takes_mask: Whether it takes an attention mask. For those that do not, a padded batch runs on "native".
        package: The import name of the package it needs, with how to install it.
    """

    diffusers: str
    summary: str
    devices: tuple[str, ...] = ("cuda",)
    capability: tuple[int, int] = (0, 0)
    preferred_from: tuple[int, int] | None = None
    capability_below: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    max_head_dim: int | None = None
    takes_mask: bool = True
    package: tuple[str, str] | None = None


#: Requirements from the kernels' own documentation (torch: aten/native/transformers/cuda/sdp_utils.cpp).
BACKENDS: Mapping[str, AttentionBackend] = MappingProxyType(
    {
        "native": AttentionBackend(
            "native", said("torch's own choice for every call"), ("cpu", "cuda", "npu", *UNSUPPORTED_DEVICES)
        ),
        # [1, 32, 4224, 128] in bfloat16 takes cuDNN 0.44 ms on an H200, FlashAttention 2 0.88, the memory-efficient
        # kernel 1.66; before Hopper, cuDNN has no such lead.
        "cudnn": AttentionBackend(
            "_native_cudnn", said("cuDNN's, in torch"), ("cuda",), (8, 0), (9, 0), dtypes=HALF, max_head_dim=128
        ),
        "flash": AttentionBackend(
            "_native_flash",
            said("FlashAttention 2, in torch"),
            ("cpu", "cuda"),
            capability=(8, 0),
            dtypes=HALF,
            max_head_dim=256,
            takes_mask=False,
        ),
        "efficient": AttentionBackend(
            "_native_efficient", said("memory-efficient attention, in torch"), capability=(5, 0)
        ),
        "math": AttentionBackend(
            "_native_math",
            said("plain products, in torch: slow, for reference"),
            ("cpu", "cuda", "npu", *UNSUPPORTED_DEVICES),
        ),
        "flash2": AttentionBackend(
            "flash",
            "FlashAttention 2",
            capability=(8, 0),
            dtypes=HALF,
            max_head_dim=256,
            takes_mask=False,
            package=("flash_attn", "pip install flash-attn"),
        ),
        "flash3": AttentionBackend(
            "_flash_3",
            said("FlashAttention 3, Hopper only"),
            capability=(9, 0),
            capability_below=(10, 0),
            dtypes=HALF,
            max_head_dim=256,
            takes_mask=False,
            package=("flash_attn_interface", said("build it from github.com/Dao-AILab/flash-attention, folder hopper")),
        ),
        "sage": AttentionBackend(
            "sage",
            said("SageAttention: queries and keys in int8, so it loses bits"),
            capability=(8, 0),
            dtypes=HALF,
            max_head_dim=128,
            takes_mask=False,
            package=("sageattention", "pip install sageattention"),
        ),
        "xformers": AttentionBackend(
            "xformers",
            said("xformers' memory-efficient attention"),
            capability=(7, 0),
            package=("xformers", "pip install xformers"),
        ),
        "npu": AttentionBackend(
            "_native_npu",
            said("Ascend's fused attention"),
            ("npu",),
            dtypes=HALF,
            package=("torch_npu", said("pip install 'ernie-accel[npu]' on a machine with Ascend drivers")),
        ),
    }
)

#: What "auto" tries, best first. Sage loses bits, so "auto" never chooses it.
PREFERRED = ("npu", "flash3", "cudnn", "flash2", "flash", "native")

#: Why "auto" chooses none.
_LEFT_OPEN = said("the fused kernels attend themselves, with the lengths of prompts instead of a mask")


@dataclass(frozen=True, repr=False)
class SetAttention(Transform):
    """Choose the attention kernel of the transformer through diffusers' dispatcher, on this instance only.

    diffusers' own ``set_attention_backend`` also changes the default of every other model in the process; this does
    not. A kernel that takes no mask gets the batches that are not padded; padded ones run on "native".

    Pays:
        "auto" where the default is not the fastest. On Hopper and Blackwell, cuDNN without a mask takes 0.44 ms, where
        FlashAttention 2 takes 0.88 and the memory-efficient kernel 1.66. "math" and "efficient" are for comparing.

    Attributes:
        backend: A key of `BACKENDS`: "native", "cudnn", "flash", "efficient", "math" (all in torch), "flash2",
            "flash3", "sage", "xformers", "npu" (packages). "auto" takes the first of `PREFERRED` that runs (see
            `explain`), and none where `FuseKernels` attends itself. A name overrides those calls in blocks whose
            attention is in bfloat16, and in all blocks the padding that lets prompt lengths share plans and graphs.
    """

    phase: ClassVar[Phase] = Phase.ATTENTION
    slot: ClassVar[str] = "attention-processor"

    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise UnknownNameError("attention backend", self.backend, ("auto", *BACKENDS))

    @property
    def effect(self) -> Effect:
        """ROUNDING; LOSSY for "sage", which multiplies in int8."""
        return Effect.LOSSY if self.backend == "sage" else Effect.ROUNDING

    @property
    def floor_db(self) -> float | None:
        """For "sage", SQNR of the latents, checked on an emulation of its int8 scheme; the package needs CUDA."""
        return 15.0 if self.backend == "sage" else None

    @property
    def changes_inside(self) -> tuple[str, ...]:
        return DENOISERS

    def keeps_compiled(self, pipe: Pipeline, context: Context) -> bool:
        return True

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        if not any(_attentions(pipe)):
            return [
                said(
                    "no attention of {pipe}'s denoiser goes through diffusers' dispatcher, so none can be given "
                    "another backend",
                    pipe=type(pipe).__name__,
                )
            ]
        return [] if self.backend == "auto" else unsupported_reasons(self.backend, pipe, context)

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        name = self.choose(pipe, context)
        if name is None:
            return Preview((), note=_LEFT_OPEN)
        changes = _changes(pipe, name, context)
        return Preview(
            changes, note=self._note(name) if changes else said("attention runs on {name!r} already", name=name)
        )

    def planned(self, pipe: Pipeline, context: Context) -> PlannedPipe:
        name = self.choose(pipe, context)
        return replace(context.planned(pipe), attention=name, takes_lengths=False, tokens_multiple_of=1)

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        from diffusers.models.attention_dispatch import (
            AttentionBackendName,
            _check_attention_backend_requirements,
        )

        name = self.choose(pipe, context)
        if name is None:
            return Applied((), undo=Undo(), note=_LEFT_OPEN)
        backend = AttentionBackendName(BACKENDS[name].diffusers)
        _check_attention_backend_requirements(backend)
        changes = _changes(pipe, name, context)
        with Undo() as undo:
            for denoiser in denoisers_of(pipe).values():
                send_through_dispatcher(denoiser, undo)
            for _, attention in _attentions(pipe):
                if name == "npu":
                    processor = with_prepared_masks(attention.processor)
                    processor._attention_backend = backend
                    undo.setattr(attention, "processor", processor)
                elif BACKENDS[name].takes_mask:
                    undo.setattr(attention.processor, "_attention_backend", backend)
                else:
                    undo.setattr(attention, "processor", _by_mask(attention.processor, backend))
        return Applied(changes, undo=undo, note=self._note(name))

    def choose(self, pipe: Pipeline, context: Context) -> str | None:
        """Return the name of the backend that is used on a machine; None if "auto" chooses none."""
        if self.backend != "auto":
            return self.backend
        if attends_by_lengths(pipe, context):
            return None
        return next((name for name in PREFERRED if _auto_accepts(name, pipe, context)), "native")

    def explain(self, pipe: Pipeline, context: Context | None = None) -> str:
        """Return what speaks for and against every backend here, one line each, and the choice.

        Args:
            pipe: The pipeline.
            context: The machine; default this one.
        """
        context = context or Context.detect(pipe)
        chosen = self.choose(pipe, context)
        if chosen is None:
            return f"{self!r} chooses none on {context}: {_LEFT_OPEN}"
        dtype = str(_dtype(pipe, context)).removeprefix("torch.")
        mask = no_mask_reason(pipe, context)
        lines = [
            f"{self!r} takes {chosen!r} on {context}: {dtype}, head size {_head_dim(pipe)}, "
            + (f"no mask ({mask})" if mask else "a mask in every call (ElideMask() would drop it)")
        ]
        for name in (*PREFERRED, *(name for name in BACKENDS if name not in PREFERRED)):
            reasons = unsupported_reasons(name, pipe, context)
            verdict = "; ".join(reasons) or ("chosen" if name == chosen else "could run")
            lines.append(f"  {name:9} {BACKENDS[name].summary}: {verdict}")
        return "\n".join(lines)

    def _note(self, name: str) -> str:
        chosen = (
            said("auto takes {name!r} ({summary})", name=name, summary=BACKENDS[name].summary)
            if self.backend == "auto"
            else ""
        )
        falls = (
            "" if BACKENDS[name].takes_mask else said("padded batches run on 'native', as this kernel takes no mask")
        )
        return joined((chosen, falls))


def _changes(pipe: Pipeline, name: str, context: Context) -> tuple[str, ...]:
    wanted, by_lengths = BACKENDS[name].diffusers, attends_by_lengths(pipe, context)
    return tuple(path for path, part in _attentions(pipe) if by_lengths or _name_of(part.processor) != wanted)


def _auto_accepts(name: str, pipe: Pipeline, context: Context) -> bool:
    # On a CPU torch chooses its flash kernel by itself wherever that can run.
    late = (context.capability or (0, 0)) < (BACKENDS[name].preferred_from or (0, 0))
    return context.device != "cpu" and not late and not unsupported_reasons(name, pipe, context)


def unsupported_reasons(name: str, pipe: Pipeline, context: Context) -> list[str]:
    """Return every reason why a backend cannot serve this pipe on a machine; empty if it can."""
    backend, reasons = BACKENDS[name], []
    if context.device not in backend.devices:
        reasons.append(
            said(
                "{name!r} runs on {devices}; this device is {device}",
                name=name,
                devices=listed(backend.devices),
                device=context.device,
            )
        )
    elif context.capability is not None:
        reasons += context.missing_capability(repr(name), backend.capability)
        if backend.capability_below is not None and context.capability >= backend.capability_below:
            have, limit = ("{}.{}".format(*capability) for capability in (context.capability, backend.capability_below))
            reasons.append(
                said(
                    "{name!r} is built for CUDA compute capability < {limit}; this device has {have}",
                    name=name,
                    limit=limit,
                    have=have,
                )
            )
    if backend.package is not None and backend.package[0] not in context.versions:
        reasons.append(
            said(
                "{name!r} needs {package}, which is not installed: {fix}",
                name=name,
                package=backend.package[0],
                fix=backend.package[1],
            )
        )
    dtype, head_dim = _dtype(pipe, context), _head_dim(pipe)
    if backend.dtypes and context.device != "cpu" and dtype not in backend.dtypes:
        wanted = one_of(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        found = str(dtype).removeprefix("torch.")
        reasons.append(
            said(
                "{name!r} computes in {wanted}; the transformer is {found}: add CastDtype('bfloat16')",
                name=name,
                wanted=wanted,
                found=found,
            )
        )
    if backend.max_head_dim is not None and head_dim is not None and head_dim > backend.max_head_dim:
        reasons.append(
            said(
                "{name!r} takes heads of at most {most}; this transformer has {head_dim}",
                name=name,
                most=backend.max_head_dim,
                head_dim=head_dim,
            )
        )
    if not backend.takes_mask and no_mask_reason(pipe, context) is None:
        reasons.append(
            said("{name!r} takes no mask, and this transformer passes one in every call: add ElideMask()", name=name)
        )
    return reasons


def _attentions(pipe: Pipeline) -> Iterator[tuple[str, Any]]:
    for name, denoiser in denoisers_of(pipe).items():
        yield from ((f"{name}.{path}", part) for path, part in attentions(denoiser))


def _name_of(processor: object) -> str:
    """Return the diffusers name of the backend a processor uses; None on it means the process's default."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if not hasattr(processor, "_attention_backend"):
        return str(AttentionBackendName.NATIVE.value)  # bypasses the dispatcher and calls what it names native
    backend = processor._attention_backend
    if backend is None:
        backend = _AttentionBackendRegistry.get_active_backend()[0]
    return str(AttentionBackendName(backend).value)


def _dtype(pipe: Pipeline, context: Context) -> torch.dtype:
    """Return the dtype the transformer will compute in."""
    name, denoiser = next(iter(denoisers_of(pipe).items()))
    found: object = context.planned(pipe).dtype_of(name) or denoiser.dtype
    return cast("torch.dtype", found)


def _head_dim(pipe: Pipeline) -> int | None:
    """Return the head size of the transformer's attention; None where it does not say."""
    for _, attention in _attentions(pipe):
        if hasattr(attention, "head_dim"):
            return int(attention.head_dim)
        if hasattr(attention, "inner_dim") and hasattr(attention, "heads"):
            return int(attention.inner_dim // attention.heads)
    return None


def _by_mask(processor: Any, backend: object) -> object:
    """Return a copy of `processor` that uses `backend` without a mask and the dispatcher's "native" with one."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    made = copy.copy(processor)
    cls: object = type(processor)
    made.__class__ = _by_mask_class(cls)
    made._attention_backend = backend
    by_mask = ByMask(copy.copy(processor), copy.copy(processor))
    by_mask.unmasked._attention_backend = backend
    by_mask.masked._attention_backend = AttentionBackendName.NATIVE
    BY_MASK.put(made, by_mask)
    return made


@functools.cache  # one class for all blocks: torch.compile would compile each class anew
def _by_mask_class(cls: Any) -> type:
    """Return a subclass of a processor class that hands each call to the processor for its mask (`ByMask`).

    It has the same name and signature, because attention modules pass a processor only what its signature names.
    """
    stock = cls.__call__
    names = list(inspect.signature(stock).parameters)
    position = names.index("attention_mask") - 2 if "attention_mask" in names else None  # after self and attn

    @functools.wraps(stock)
    def __call__(self: object, attn: nn.Module, *args: object, **kwargs: object) -> object:
        mask = args[position] if position is not None and len(args) > position else kwargs.get("attention_mask")
        return stock(processor_for(self, mask), attn, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})
