"""What a pipe will be once the earlier transforms have run: one frozen value, passed from transform to transform.

A plan begins with what the pipe is (`PlannedPipe.of`). Each transform reads the value in its `Context` and returns the
next one (``Transform.planned``), so none needs to know about the others. The bytes that a plan shows come from this
value.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from ernie_accel.common.language import said
from ernie_accel.common.notes import Note
from ernie_accel.core.components import Pipeline, device_of, modules_of, tensor_bytes, weights_of


class CarriesPlan:
    """What an optimized pipe carries (see ``carried.py``), as far as plans read it."""

    @property
    def planned(self) -> PlannedPipe | None:
        """What the pipe was planned to be after the last transform that was applied; None if none was."""
        return None


CARRIED = Note("report", CarriesPlan, "pipeline", "what was applied to it, and the way back")


class Blocks(enum.IntEnum):
    """How the repeated blocks of the denoiser run; each builds on the one before."""

    STOCK = 0
    REWRITTEN = 1
    """By the family's rewritten blocks."""
    KERNELS = 2
    """By rewritten blocks on fused kernels."""


@dataclass(frozen=True)
class PlannedWeight:
    """One parameter or buffer, or all that a quantized layer stores for one.

    Attributes:
        shape: Of the tensor; of a quantized weight, before it was quantized.
        dtype: Of the tensor; of a quantized weight, what it is multiplied in.
        nbytes: Bytes it occupies.
        stored_as: How a quantized weight is stored ("int8 by torchao"); None for a plain tensor.
        is_fresh: Whether it will be in new memory, which torch aligns; what is loaded from a file may start anywhere.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    stored_as: str | None = None
    is_fresh: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor) -> PlannedWeight:
        """Describe a tensor as it is."""
        stored_as = said("another scheme") if hasattr(tensor, "__tensor_flatten__") else None
        return cls(tuple(tensor.shape), tensor.dtype, tensor_bytes(tensor), stored_as)

    def cast(self, dtype: torch.dtype) -> PlannedWeight:
        """Return it in another dtype, in new memory."""
        numel = self.nbytes // self.dtype.itemsize
        return replace(self, dtype=dtype, nbytes=numel * dtype.itemsize, is_fresh=True)


@dataclass(frozen=True)
class PlannedPipe:
    """What a pipe will be by the time the transform that reads this runs.

    Attributes:
        weights: Parameters and buffers by component and path ("transformer.layers.0.mlp.up_proj.weight").
        device: torch device type it runs on.
        num_inference_steps: Steps of a call that does not say; None where the pipe has no such default.
        blocks: How the blocks of the denoiser run.
        concatenates_linears: Whether rewritten blocks run linear layers of one input as one product.
        scheduler: Name of the scheduler that was chosen ("unipc"); None for the pipe's own.
        elides_mask: What keeps attention masks away from batches that need none; None where all get one.
        attention: Name of the attention backend that was chosen; None where none was.
        takes_lengths: Whether all blocks take the lengths of prompts in place of a mask.
        always_lengths: Whether they take them where nothing is padded, too.
        tokens_multiple_of: What the tokens of a row are padded to a multiple of.
        batches_guidance: Whether both halves of guidance are one batch where the pipeline calls its denoiser for each.
        autocast: Dtype that calls are cast to; None: none.
        offload: How weights wait in host memory ("model", "group", ...); None: not.
        freed_to: Where the weights of the prompt encoders go after use ("disk", "nowhere"); None: they stay.
        prompt_limit: Tokens that prompts are cut at; None: by the tokenizer only.
        enhances_prompts: Whether a call may have its prompts enhanced.
        keeps_graphs: Graphs of the denoiser that are kept; 0 where none are captured.
        graph_tokens: Image tokens, times the batch, up to which the denoiser may be captured.
        breaks_graph: Why the layers of a component cannot be compiled without graph breaks, by component.
        on_first_call: What compiles or captures on the first call, by slot of the transform that does so.
        kept_on_host: Bytes of originals that wait in host memory, so that ``restore`` is exact.
    """

    weights: Mapping[str, PlannedWeight]
    device: str
    num_inference_steps: int | None = None
    blocks: Blocks = Blocks.STOCK
    concatenates_linears: bool = False
    scheduler: str | None = None
    elides_mask: str | None = None
    attention: str | None = None
    takes_lengths: bool = False
    always_lengths: bool = False
    tokens_multiple_of: int = 1
    batches_guidance: bool = False
    autocast: str | None = None
    offload: str | None = None
    freed_to: str | None = None
    prompt_limit: int | None = None
    enhances_prompts: bool = True
    keeps_graphs: int = 0
    graph_tokens: int = 0
    breaks_graph: Mapping[str, str] = field(default_factory=dict)
    on_first_call: frozenset[str] = frozenset()
    kept_on_host: int = 0

    @classmethod
    def of(cls, pipe: Pipeline) -> PlannedPipe:
        """Look at a pipe as it is: at its weights and defaults, and at what its report says was applied."""
        return cls.seen(pipe, None if (carried := CARRIED.of(pipe)) is None else carried.planned)

    @classmethod
    def seen(cls, pipe: Pipeline, planned: PlannedPipe | None) -> PlannedPipe:
        """Return `planned`, updated with what can be seen on the pipe; None stands for an untouched pipe."""
        weights = {
            f"{name}.{weight.path}": PlannedWeight.of(weight.tensor)
            for name, module in modules_of(pipe).items()
            for weight in weights_of(module, all_buffers=True)
        }
        device, steps = device_of(pipe).type, _default_steps(pipe)
        if planned is None:
            return cls(weights, device, steps)
        return replace(planned, weights=weights, device=device, num_inference_steps=steps)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.nbytes for weight in self.weights.values())

    def bytes_of(self, component: str) -> int:
        """Return the bytes of a component's weights."""
        return sum(weight.nbytes for name, weight in self.weights.items() if name.startswith(f"{component}."))

    def dtype_of(self, component: str) -> torch.dtype | None:
        """Return the dtype that most bytes of a component's plain weights have; None if it has no such weight."""
        sizes: dict[torch.dtype, int] = {}
        for name, weight in self.weights.items():
            if name.startswith(f"{component}.") and weight.stored_as is None and weight.dtype.is_floating_point:
                sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype], default=None)

    def cast(self, dtype: torch.dtype, chosen: Callable[[str], bool] = lambda name: True) -> PlannedPipe:
        """Return this with plain floating-point weights in another dtype.

        Args:
            dtype: The dtype.
            chosen: Which weights, by their name in `weights`; default all.
        """
        return self.with_weights(
            {
                name: weight.cast(dtype)
                for name, weight in self.weights.items()
                if weight.stored_as is None
                and weight.dtype.is_floating_point
                and weight.dtype != dtype
                and chosen(name)
            }
        )

    def with_weights(self, new: Mapping[str, PlannedWeight], without: frozenset[str] = frozenset()) -> PlannedPipe:
        """Return this with some weights replaced or added, and others gone."""
        stays = {name: weight for name, weight in self.weights.items() if name not in without}
        return replace(self, weights={**stays, **new})

    def keeping(self, names: Iterable[str]) -> PlannedPipe:
        """Return this with some of its weights, which are about to be replaced, waiting in host memory as well."""
        return replace(self, kept_on_host=self.kept_on_host + sum(self.weights[name].nbytes for name in names))

    def concatenated(self, layers: tuple[str, ...]) -> PlannedWeight:
        """Return the weight that linear layers ("transformer.layers.0.mlp.up_proj", ...) make when concatenated."""
        parts = [self.weights[f"{layer}.weight"] for layer in layers]
        rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
        return PlannedWeight((rows, columns), parts[0].dtype, sum(part.nbytes for part in parts), is_fresh=True)

    def compiling(self, slot: str) -> PlannedPipe:
        """Return this with one more transform that compiles or captures on the first call."""
        return replace(self, on_first_call=self.on_first_call | {slot})


def _default_steps(pipe: Pipeline) -> int | None:
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None
