"""What all rewritten models share: linear layers fused and split again, blocks put in the place of stock ones and back.

A family subclasses `SelfAttention` and `RewrittenBlock`; `rewrite` and `to_be_fused` do the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ernie_accel.common.language import said
from ernie_accel.core.captured import comes_and_goes
from ernie_accel.core.components import alignment_of, with_alignment
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.library_hooks import library_hooks
from ernie_accel.core.stand_in import StandInForward
from ernie_accel.core.undo import Undo
from ernie_accel.kernels.low_rank import LowRankProduct, is_bare
from ernie_accel.models.adapters import Adaptable, take_adapters
from ernie_accel.models.processors import processor_for
from ernie_accel.models.token_layout import LAYOUT, TokenLayout


class ChosenBackend:
    """Says which attention backend was chosen, as a processor of diffusers does, for code that has no processors."""

    _attention_backend: object = None
    _parallel_config: object = None


class FusedLinear(nn.Linear):
    """Bias-free linear layers of one input as one matrix product; outputs are concatenated in the given order.

    The parts give up their weights in `take_over`, so that memory does not double, and take them back in `split`. In a
    state dict the fused layer appears under the names of its parts, as long as its weight is a plain one.
    """

    def __init__(self, parts: Mapping[str, nn.Linear]) -> None:
        first = next(iter(parts.values()))
        sizes = [part.out_features for part in parts.values()]
        super().__init__(first.in_features, sum(sizes), bias=False, device="meta")
        with torch.no_grad():
            fused = torch.cat([part.weight for part in parts.values()])
        self.weight = nn.Parameter(fused, requires_grad=first.weight.requires_grad)
        self._parts = dict(parts)  # a plain dict: torch must not see them
        self._sizes = sizes
        self._strides = [part.weight.stride() for part in parts.values()]
        self._alignments = [alignment_of(part.weight) for part in parts.values()]

    def take_over(self) -> None:
        """Free the weights of the parts; call it once this layer is where `split` will find it."""
        for part in self._parts.values():
            part.weight.data = part.weight.data.new_empty(0)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the layers that this one stands for, beside it in its parent."""
        return tuple(self._parts)

    @property
    def is_plain(self) -> bool:
        """Whether the weight is an ordinary parameter, not a quantized one."""
        return type(self.weight) is nn.Parameter

    def split(self) -> dict[str, nn.Linear]:
        """Give every part its rows of the weight again, as copies, and return the parts by name."""
        all_rows = torch.split(self.weight.data, self._sizes)
        places = zip(self._strides, self._alignments, strict=True)
        for part, rows, (stride, alignment) in zip(self._parts.values(), all_rows, places, strict=True):
            copy = with_alignment(rows.new_empty_strided(rows.shape, stride).copy_(rows), alignment)
            if part.weight.is_meta:  # the blocks were rewritten before there were weights
                part.weight = nn.Parameter(copy, requires_grad=self.weight.requires_grad)
            else:
                part.weight.data = copy
        return self._parts

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        if not self.is_plain:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        owner = prefix[: prefix[:-1].rfind(".") + 1]
        weight = self.weight if keep_vars else self.weight.detach()
        for name, rows in zip(self._parts, torch.split(weight, self._sizes), strict=True):
            destination[f"{owner}{name}.weight"] = rows


class Part(Adaptable):
    """A module that takes over the children of a stock module and can fuse some of them into one product.

    With nothing to fuse (`fusible`), `fused_name` is that of a layer which is one product in stock already.
    """

    taken: tuple[str, ...] = ()
    #: Whether its layers were fused once, and stand alone because something asked for them.
    was_split = False

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        for name in self.taken:
            setattr(self, name, getattr(stock, name))
        self.register_load_state_dict_pre_hook(_join_parts)  # type: ignore[no-untyped-call]

    @property
    def fused(self) -> nn.Module | None:
        """The fused layer (or what quantization put in its place), or None while the linear layers stand alone."""
        return self._modules.get(self.fused_name)

    def unfusible_reason(self, *, beneath_loras: bool = False) -> str | None:
        """Return why the linear layers cannot be fused, or None; or those beneath PEFT's layers."""
        for name in self.fusible:
            layer = getattr(self, name)
            if beneath_loras:
                layer = layer._modules.get("base_layer", layer)
            if type(layer) is not nn.Linear:
                return said(
                    "{name} is a {layer} (a LoRA, for instance), which has to stay a layer of its own",
                    name=name,
                    layer=type(layer).__name__,
                )
            if layer.bias is not None or type(layer.weight) is not nn.Parameter:
                return said("{name} has a bias or a quantized weight", name=name)
        return None

    def fuse(self) -> None:
        """Replace the fusible layers by one, in place."""
        layers = {name: getattr(self, name) for name in self.fusible}
        self.fused_sizes = tuple(layer.out_features for layer in layers.values())
        fused = FusedLinear(layers)
        others = {name: layer for name, layer in self._modules.items() if name not in self.fusible}
        self._set_children({**others, self.fused_name: fused})
        fused.take_over()
        self.was_split = False

    def split(self) -> None:
        """Replace the fused layer by the layers it is made of, in place; nothing happens if they stand alone.

        Raises:
            ErnieAccelError: The fused weight is quantized.
        """
        fused = self.splittable()
        if fused is None:
            return
        parts = fused.split()
        for part in parts.values():
            _cast_layerwise_as(fused, part)
        self._set_children({name: parts[name] if name in parts else self._modules[name] for name in self.taken})
        self.was_split = True

    def fuse_again(self) -> None:
        """Fuse what `split` has split, in place; nothing happens where a layer has become more than a plain one.

        Where the fused layer was put back already, the weights that its parts got are freed.
        """
        if self.was_split and isinstance(self.fused, FusedLinear) and self.fused.is_plain:
            self.fused.take_over()
            self.was_split = False
        if not self.was_split or self.fused is not None or self.unfusible_reason() is not None:
            return
        layers = [self.get_submodule(name) for name in self.fusible]
        weights = [cast(Tensor, layer.weight) for layer in layers]
        kinds = {(weight.device, weight.dtype, comes_and_goes(weight)) for weight in weights}
        if len(kinds) == 1 and not weights[0].is_meta and not comes_and_goes(weights[0]) and all(map(is_bare, layers)):
            self.fuse()

    def splittable(self) -> FusedLinear | None:
        """Return the fused layer, which `split` can split; None if the layers stand alone.

        Raises:
            ErnieAccelError: The fused weight is quantized.
        """
        if not self.fusible or self.fused is None:
            return None
        if isinstance(self.fused, FusedLinear) and self.can_be_split:
            return self.fused
        raise ErnieAccelError(
            f"Cannot split {self.fused_name} into {', '.join(self.fusible)}: its weight is quantized. Undo the "
            "quantization first (ernie_accel.restore(pipe))."
        )

    @property
    def can_be_split(self) -> bool:
        """Whether `split` can do its work: nothing is fused, or its weight is not quantized."""
        return not self.fusible or self.fused is None or (isinstance(self.fused, FusedLinear) and self.fused.is_plain)

    def _set_children(self, children: Mapping[str, nn.Module | None]) -> None:
        """Replace all children in one step, so that an interrupt finds the old ones or the new, in the stock order."""
        vars(self)["_modules"] = type(self._modules)(children)

    def give_back(self, stock: nn.Module) -> None:
        """Hand all children to the stock module, whatever has become of them meanwhile (a LoRA, a new device)."""
        self.close_sites()
        self.split()
        for name in self.taken:
            setattr(stock, name, getattr(self, name))


def _cast_layerwise_as(fused: nn.Module, part: nn.Module) -> None:
    """Have `part` cast before it runs if diffusers' layerwise casting was enabled on `fused`: its weight is float8."""
    for hook in library_hooks(fused).named("layerwise_casting"):
        apply_layerwise_casting_hook(part, hook.storage_dtype, hook.compute_dtype, hook.non_blocking)


def _join_parts(part: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let a fused layer load the weights of its parts; see `nn.Module.register_load_state_dict_pre_hook`."""
    if isinstance(part, Part) and part.fusible and part.fused is not None:
        within = ".product" if isinstance(part.fused, LowRankProduct) else ""
        names = ((f"{prefix}{name}.weight", f"{prefix}{name}.base_layer.weight") for name in part.fusible)
        keys = [next((key for key in each if key in state_dict), None) for each in names]
        if None not in keys:
            weight = torch.cat([state_dict.pop(key) for key in keys if key is not None])
            state_dict[f"{prefix}{part.fused_name}{within}.weight"] = weight


class SelfAttention(Part, AttentionModuleMixin):  # type: ignore[misc]
    """The layers of a self-attention over [B, S, H]; `processor` only says which attention backend was chosen.

    Class-level facts, by the names of diffusers; code of others has others:
        taken: The layers; what makes queries, keys and values comes first.
        norm_names: Norms of queries and of keys.
        last_name: Path of the layer after the attention.
        heads_name: Attribute with the number of heads of queries.
    """

    taken: tuple[str, ...] = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out")
    fusible: tuple[str, ...] = ("to_q", "to_k", "to_v")
    fused_name = "to_qkv"
    norm_names: ClassVar[tuple[str, str]] = ("norm_q", "norm_k")
    last_name: ClassVar[str] = "to_out.0"
    heads_name: ClassVar[str] = "heads"

    def __init__(self, stock: nn.Module) -> None:
        super().__init__(stock)
        self.heads = int(getattr(stock, self.heads_name))
        self.processor = getattr(stock, "processor", None) or ChosenBackend()  # set_attention_backend writes to it
        self.head_dim = int(self.norms[0].weight.shape[0])

    @property
    def norms(self) -> tuple[nn.RMSNorm, nn.RMSNorm]:
        """The norms of queries and of keys."""
        norm_q, norm_k = (self.get_submodule(name) for name in self.norm_names)
        return cast(nn.RMSNorm, norm_q), cast(nn.RMSNorm, norm_k)

    @property
    def last(self) -> nn.Module:
        """The layer after the attention, or what PEFT has put around it."""
        return self.get_submodule(self.last_name)

    def project(self, x_bsh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, S, N, D]; there may be fewer heads of keys and values."""
        if self.fused is not None:
            qkv_bsh = self.fused(x_bsh)
            queries = self.heads * self.head_dim
            others = (qkv_bsh.shape[-1] - queries) // 2
            q_bsh, k_bsh, v_bsh = qkv_bsh.split((queries, others, others), -1)
        else:
            q_bsh, k_bsh, v_bsh = (self.get_submodule(name)(x_bsh) for name in self.fusible)
        q_bsnd, k_bsnd, v_bsnd = (t.unflatten(-1, (-1, self.head_dim)) for t in (q_bsh, k_bsh, v_bsh))
        return q_bsnd, k_bsnd, v_bsnd

    def attend(self, q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention output [B, S, H] by the backend that was chosen for the model.

        Args:
            q_bsnd: Queries.
            k_bsnd: Keys; each head of them serves as many heads of queries as there are more of these.
            v_bsnd: Values, likewise.
            mask: True where a token is real [B, 1, 1, S]; None if all are.
        """
        share = q_bsnd.shape[2] // k_bsnd.shape[2]
        if share > 1:
            k_bsnd, v_bsnd = (t.repeat_interleave(share, dim=2) for t in (k_bsnd, v_bsnd))
        backend = getattr(processor_for(self.processor, mask), "_attention_backend", None)
        out_bsnd: Tensor = dispatch_attention_fn(q_bsnd, k_bsnd, v_bsnd, attn_mask=mask, backend=backend)
        return out_bsnd.flatten(2, 3)


class RewrittenBlock(nn.Module):
    """A block over the layers of a stock block, under their stock names.

    Class-level facts:
        part_names: Children that take over the layers of a stock child; the first one is the attention.
    """

    part_names: ClassVar[tuple[str, ...]] = ()

    @property
    def parts(self) -> dict[str, Part]:
        """What takes over the layers of a stock child, by its name."""
        return {name: cast(Part, self.get_submodule(name)) for name in self.part_names}

    @property
    def attention_part(self) -> SelfAttention:
        """The one that attends."""
        return cast(SelfAttention, self.get_submodule(self.part_names[0]))

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()

    def give_back(self, stock: nn.Module) -> None:
        """Hand all layers to the stock block in place."""
        for name, part in self.parts.items():
            part.give_back(stock.get_submodule(name))


def blocks_of(transformer: nn.Module, lists: tuple[str, ...]) -> Iterator[tuple[str, nn.ModuleList, int, nn.Module]]:
    """Yield (path, list, index, block) of every block in these lists."""
    for name in lists:
        blocks = cast(nn.ModuleList, transformer.get_submodule(name))
        for i, block in enumerate(blocks):
            yield f"{name}.{i}", blocks, i, block


def takes_all_of(rewritten: Callable[..., object], stock: Callable[..., object]) -> bool:
    """Return whether a rewritten forward takes all arguments of the stock one; other versions of it may take more."""
    known, asked = (inspect.signature(each).parameters.keys() for each in (rewritten, stock))
    return asked <= known


def unsupported_reasons(
    transformer: nn.Module, lists: tuple[str, ...], attention: str, processors: tuple[type, ...]
) -> list[str]:
    """Return every reason why a stock transformer cannot be rewritten.

    Args:
        transformer: The transformer.
        lists: Attributes with its blocks.
        attention: Path of the attention within a block.
        processors: Classes of attention processors that are known to do what the rewritten attention does.
    """
    reasons = []
    if getattr(transformer, "gradient_checkpointing", False):
        reasons.append(said("gradient checkpointing is on, and the rewritten blocks are for inference: switch it off"))
    stock = [cast(Any, block.get_submodule(attention)) for *_, block in blocks_of(transformer, lists)]
    others = {type(each.processor).__name__ for each in stock if type(each.processor) not in processors}
    for other in sorted(others):
        reasons.append(
            said(
                "the attention has a processor of its own, {other}, which rewritten blocks would not call", other=other
            )
        )
    if any(each.norm_q is None or each.norm_k is None for each in stock):
        reasons.append(said("the attention does not norm queries and keys, as rewritten blocks do"))
    return reasons


def to_be_fused(
    transformer: nn.Module, lists: tuple[str, ...], cls: type[RewrittenBlock], *, beneath_loras: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return which layers of stock blocks `rewrite` would make one: path of the one -> paths of its parts.

    With `beneath_loras`, also those that `FuseKernels` would: beneath PEFT's layers, and of rewritten blocks.
    """
    found = {}
    for path, _, _, block in blocks_of(transformer, lists):
        parts = block.parts if isinstance(block, RewrittenBlock) else cls(block).parts
        for name, part in parts.items():
            if part.fusible and part.fused is None and part.unfusible_reason(beneath_loras=beneath_loras) is None:
                at = f"{path}.{name}"
                found[f"{at}.{part.fused_name}"] = tuple(f"{at}.{child}" for child in part.fusible)
    return found


def rewrite(
    transformer: nn.Module,
    lists: tuple[str, ...],
    cls: type[RewrittenBlock],
    forward: type[RewrittenForward],
    undo: Undo,
    fuse: bool,
) -> dict[str, str]:
    """Rewrite the blocks of `lists` and the forward in place; return what could not be fused: path -> reason."""
    model, skipped = cast(Any, transformer), {}
    for path, blocks, i, stock in blocks_of(transformer, lists):
        block = cls(stock)
        undo.push(partial(_put_back, blocks, i, block, stock))
        blocks[i] = block
        for name, part in block.parts.items():
            if not part.fusible:
                continue
            reason = part.unfusible_reason() if fuse else "fuse=False"
            if reason is None:
                part.fuse()
            else:
                skipped[f"transformer.{path}.{name}.{part.fused_name}"] = reason
    declared = getattr(model, "_repeated_blocks", None) or []
    undo.setattr(model, "_repeated_blocks", [*declared, cls.__name__])
    undo.attach(LAYOUT, transformer, TokenLayout())
    forward(transformer).install(undo)
    take_adapters(transformer, undo)
    return skipped


def _put_back(blocks: nn.ModuleList, i: int, block: RewrittenBlock, stock: nn.Module) -> None:
    block.give_back(stock)
    blocks[i] = stock


class RewrittenForward(StandInForward):
    """A forward of a transformer with rewritten blocks; subclasses say which."""

    function: ClassVar[Callable[..., object]]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self).function, self.module))

    def __call__(self, *args: object, **kwargs: object) -> object:
        return type(self).function(self.module, *args, **kwargs)
