"""The ERNIE-Image transformer rewritten: the same numbers from fewer operations. ``RewriteBlocks`` installs it.

What stock diffusers does, and what is done here instead:

    to_q, to_k, to_v and gate, up as five products       two: the weights are concatenated (`FusedLinear`)
    RoPE angles -> cos, sin in every layer, for q and k  once per image size and prompt length (`Positions`)
    six modulation vectors copied to [S, B, H]           broadcast from [B, 1, H], cast and shifted once a step
    an all-True attention mask                           none, if no prompt of the batch is padded
    [S, B, H] between blocks, permuted in each           [B, S, H] throughout
    final norm and linear over text tokens too           over the image tokens only

Every arithmetic operation that is left has the operands and the rounding of stock. Shapes in names: b batch, s tokens
(image first, then text), h hidden size, n heads, d head size, f hidden size of the feed-forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ernie_image import (
    ErnieImageSingleStreamAttnProcessor,
    ErnieImageTransformer2DModelOutput,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.core.components import Pipeline, alignment_of, with_alignment
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.stand_in import StandInForward, StandInMethod
from ernie_accel.core.undo import Undo
from ernie_accel.models.ernie_image.architecture import Attention, ErnieTransformer, attention_of, transformer_of
from ernie_accel.models.ernie_image.positions import (
    LAYOUT,
    Position,
    RememberingPad,
    Rows,
    TokenLayout,
    prompt_lengths,
)
from ernie_accel.models.processors import processor_for

#: Six float32 tensors [B, 1, H], the same for all blocks: shift, 1 + scale, gate of the attention, then of the MLP.
Modulation = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


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
            copy = rows.new_empty_strided(rows.shape, stride).copy_(rows)
            part.weight.data = with_alignment(copy, alignment)
        return self._parts

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        if not self.is_plain:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        owner = prefix[: prefix[:-1].rfind(".") + 1]
        weight = self.weight if keep_vars else self.weight.detach()
        for name, rows in zip(self._parts, torch.split(weight, self._sizes), strict=True):
            destination[f"{owner}{name}.weight"] = rows


class _Part(nn.Module):
    """A module that takes over the children of a stock module and can fuse some of them into one product."""

    taken: tuple[str, ...] = ()
    fusible: tuple[str, ...] = ()
    fused_name: str = ""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        for name in self.taken:
            setattr(self, name, getattr(stock, name))
        self.register_load_state_dict_pre_hook(_join_parts)  # type: ignore[no-untyped-call]

    @property
    def fused(self) -> nn.Module | None:
        """The fused layer (or what quantization put in its place), or None while the linear layers stand alone."""
        return self._modules.get(self.fused_name)

    def unfusible_reason(self) -> str | None:
        """Return why the linear layers cannot be fused, or None."""
        for name in self.fusible:
            layer = getattr(self, name)
            if type(layer) is not nn.Linear:
                return (
                    f"{name} is a {type(layer).__name__} (a LoRA, for instance), which has to stay a layer of its own"
                )
            if layer.bias is not None or type(layer.weight) is not nn.Parameter:
                return f"{name} has a bias or a quantized weight"
        return None

    def fuse(self) -> None:
        """Replace the fusible layers by one, in place."""
        fused = FusedLinear({name: getattr(self, name) for name in self.fusible})
        others = {name: layer for name, layer in self._modules.items() if name not in self.fusible}
        self._set_children({**others, self.fused_name: fused})
        fused.take_over()

    def split(self) -> None:
        """Replace the fused layer by the layers it is made of, in place; nothing happens if they stand alone.

        Raises:
            ErnieAccelError: The fused weight is quantized.
        """
        if self.fused is None:
            return
        if not isinstance(self.fused, FusedLinear) or not self.fused.is_plain:
            raise ErnieAccelError(
                f"Cannot split {self.fused_name} into {', '.join(self.fusible)}: its weight is quantized. Undo the "
                "quantization first (ernie_accel.restore(pipe)); to use a LoRA, load it before optimizing."
            )
        parts = self.fused.split()
        self._set_children({name: parts[name] if name in parts else self._modules[name] for name in self.taken})

    def _set_children(self, children: Mapping[str, nn.Module | None]) -> None:
        """Replace all children in one step, so that an interrupt finds the old ones or the new, in the stock order."""
        vars(self)["_modules"] = type(self._modules)(children)

    def give_back(self, stock: nn.Module) -> None:
        """Hand all children to the stock module, whatever has become of them meanwhile (a LoRA, a new device)."""
        self.split()
        for name in self.taken:
            setattr(stock, name, getattr(self, name))


def _join_parts(part: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let a fused layer load the weights of its parts; see `nn.Module.register_load_state_dict_pre_hook`."""
    if isinstance(part, _Part) and part.fused is not None:
        keys = [f"{prefix}{name}.weight" for name in part.fusible]
        if all(key in state_dict for key in keys):
            state_dict[f"{prefix}{part.fused_name}.weight"] = torch.cat([state_dict.pop(key) for key in keys])


class RewrittenAttention(_Part, AttentionModuleMixin):  # type: ignore[misc]
    """Self-attention over [B, S, H]; `processor` only says which attention backend was chosen for the model."""

    taken = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out")
    fusible = ("to_q", "to_k", "to_v")
    fused_name = "to_qkv"
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    norm_q: nn.RMSNorm
    norm_k: nn.RMSNorm
    to_out: nn.ModuleList

    def __init__(self, stock: Attention) -> None:
        super().__init__(stock)
        self.heads = stock.heads
        self.processor = stock.processor  # set_attention_backend writes to it

    def forward(self, x_bsh: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor, mask_b11s: Tensor | None) -> Tensor:
        if self.fused is not None:
            q_bsh, k_bsh, v_bsh = self.fused(x_bsh).chunk(3, -1)
        else:
            q_bsh, k_bsh, v_bsh = self.to_q(x_bsh), self.to_k(x_bsh), self.to_v(x_bsh)
        q_bsnd, k_bsnd, v_bsnd = (t.unflatten(-1, (self.heads, -1)) for t in (q_bsh, k_bsh, v_bsh))
        q_bsnd = rotate(self.norm_q(q_bsnd), cos_bs1d, sin_bs1d)
        k_bsnd = rotate(self.norm_k(k_bsnd), cos_bs1d, sin_bs1d)
        return self.to_out[0](self.attend(q_bsnd, k_bsnd, v_bsnd, mask_b11s))  # type: ignore[no-any-return]

    def attend(self, q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, mask_b11s: Tensor | None) -> Tensor:
        """Return the attention output [B, S, H] by the backend that was chosen for the model."""
        processor = processor_for(self.processor, mask_b11s)
        out_bsnd: Tensor = dispatch_attention_fn(
            q_bsnd, k_bsnd, v_bsnd, attn_mask=mask_b11s, backend=processor._attention_backend
        )
        return out_bsnd.flatten(2, 3)


class RewrittenFeedForward(_Part):
    """down(up(x) * gelu(gate(x))) over [B, S, H]."""

    taken = ("gate_proj", "up_proj", "linear_fc2")
    fusible = ("gate_proj", "up_proj")
    fused_name = "gate_up_proj"
    gate_proj: nn.Linear
    up_proj: nn.Linear
    linear_fc2: nn.Linear

    def forward(self, x_bsh: Tensor) -> Tensor:
        if self.fused is not None:
            gate_bsf, up_bsf = self.fused(x_bsh).chunk(2, -1)
        else:
            gate_bsf, up_bsf = self.gate_proj(x_bsh), self.up_proj(x_bsh)
        # On the CPU torch's float32 GELU rounds differently over a view; compiled, the copy is no operation of its own.
        return self.linear_fc2(up_bsf * F.gelu(gate_bsf.contiguous()))  # type: ignore[no-any-return]


class RewrittenErnieBlock(nn.Module):
    """One transformer block over [B, S, H]: the stock block's layers under the stock names, other arithmetic order."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.adaLN_sa_ln = stock.get_submodule("adaLN_sa_ln")
        self.self_attention = RewrittenAttention(attention_of(stock))
        self.adaLN_mlp_ln = stock.get_submodule("adaLN_mlp_ln")
        self.mlp = RewrittenFeedForward(stock.get_submodule("mlp"))

    @property
    def parts(self) -> dict[str, _Part]:
        """The two halves by name."""
        return {"self_attention": self.self_attention, "mlp": self.mlp}

    def give_back(self, stock: nn.Module) -> None:
        """Hand all layers to the stock block in place."""
        for name, part in self.parts.items():
            part.give_back(stock.get_submodule(name))

    def forward(
        self,
        x_bsh: Tensor,
        cos_bs1d: Tensor,
        sin_bs1d: Tensor,
        modulation: Modulation,
        mask_b11s: Tensor | None = None,
        lengths_b: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states after this block.

        Args:
            x_bsh: Hidden states [B, S, H].
            cos_bs1d: Cosines of the RoPE angles [B, S, 1, D], in the dtype of `x_bsh`.
            sin_bs1d: Sines, likewise.
            modulation: See `Modulation`.
            mask_b11s: True where a token is real [B, 1, 1, S]; None if `lengths_b` says it, or if all are.
            lengths_b: Real tokens of each row, for blocks that need no mask (not for these). With both None all are.
        """
        shift_sa, scale_sa, gate_sa, shift_mlp, scale_mlp, gate_mlp = modulation
        h_bsh: Tensor
        h_bsh = (self.adaLN_sa_ln(x_bsh).float() * scale_sa + shift_sa).to(x_bsh.dtype)
        h_bsh = self.self_attention(h_bsh, cos_bs1d, sin_bs1d, mask_b11s)
        x_bsh = x_bsh + (gate_sa * h_bsh.float()).to(x_bsh.dtype)
        h_bsh = (self.adaLN_mlp_ln(x_bsh).float() * scale_mlp + shift_mlp).to(x_bsh.dtype)
        h_bsh = self.mlp(h_bsh)
        return x_bsh + (gate_mlp * h_bsh.float()).to(x_bsh.dtype)


#: The layers of a block that are one product where their parts are fused, by path within the block.
FUSED_LAYERS = (f"self_attention.{RewrittenAttention.fused_name}", f"mlp.{RewrittenFeedForward.fused_name}")


def rotate(x_bsnd: Tensor, cos_bs1d: Tensor, sin_bs1d: Tensor) -> Tensor:
    """Return `x_bsnd` rotated by RoPE in half-split layout: angles of dimension i and i + D/2 belong together."""
    first, second = x_bsnd.chunk(2, -1)
    return x_bsnd * cos_bs1d + torch.cat((-second, first), -1) * sin_bs1d


def forward(
    self: ErnieTransformer,
    hidden_states: Tensor,
    timestep: Tensor,
    text_bth: Tensor,
    text_lens: Tensor,
    return_dict: bool = True,
    at: Position | None = None,
) -> ErnieImageTransformer2DModelOutput | tuple[Tensor]:
    """Return the prediction [B, C, height, width] of a transformer with `RewrittenErnieBlock` layers.

    Arguments and result are those of ``ErnieImageTransformer2DModel.forward``, whose place it takes on an instance;
    with `at`, text and positions are those that `prepare` returned.
    """
    batch, _, height, width = hidden_states.shape
    patch, grid = self.patch_size, _grid(self, hidden_states)
    image_tokens = grid[0] * grid[1]
    if at is None:
        text_bth, rows = _pad(self, text_bth, text_lens, grid)
    if self.text_proj is not None and text_bth.numel() > 0:
        text_bth = self.text_proj(text_bth)
    x_bsh = torch.cat([self.x_embedder(hidden_states), text_bth], 1)
    if at is None:
        at = LAYOUT.required(self).positions.get(self.pos_embed, rows, x_bsh)

    time_bh = self.time_embedding(self.time_proj(timestep).to(hidden_states.dtype))
    parts = [part.float().unsqueeze(1) for part in self.adaLN_modulation(time_bh).chunk(6, -1)]
    modulation = (parts[0], 1 + parts[1], parts[2], parts[3], 1 + parts[4], parts[5])
    for block in self.layers:
        x_bsh = block(x_bsh, at.cos_bs1d, at.sin_bs1d, modulation, at.mask_b11s, at.lengths_b)

    scale_bh, shift_bh = self.final_norm.linear(time_bh).chunk(2, -1)
    x_bsh = self.final_norm.norm(x_bsh[:, :image_tokens]) * (1 + scale_bh[:, None]) + shift_bh[:, None]
    patches = self.final_linear(x_bsh.to(hidden_states.dtype))
    sample: Tensor = (
        patches.view(batch, *grid, patch, patch, self.out_channels)
        .permute(0, 5, 1, 3, 2, 4)
        .reshape(batch, self.out_channels, height, width)
    )
    return ErnieImageTransformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _grid(transformer: ErnieTransformer, hidden_states: Tensor) -> tuple[int, int]:
    height, width = hidden_states.shape[-2:]
    return height // transformer.patch_size, width // transformer.patch_size


def _pad(
    transformer: ErnieTransformer,
    text_bth: Tensor,
    text_lens: Tensor,
    grid: tuple[int, int],
    *,
    for_graph: bool = False,
) -> tuple[Tensor, Rows]:
    """Return the text padded as the transformer's rule requires, and the layout of the padded rows.

    No other token sees the added ones, so their values do not matter.

    Args:
        transformer: Has the rule.
        text_bth: Text of each prompt.
        text_lens: Tokens of each prompt [B].
        grid: Height and width of the image in tokens.
        for_graph: If the blocks use lengths, pass them even if nothing is padded, so that padded batches can replay
            the same graph.
    """
    rule = LAYOUT.required(transformer).padding_rule()
    lengths, more = prompt_lengths(text_lens), -(grid[0] * grid[1] + text_bth.shape[1]) % rule.multiple_of
    if more:
        text_bth = F.pad(text_bth, (0, 0, 0, more))
    is_padded = any(length != text_bth.shape[1] for length in lengths)
    passes_padding = is_padded or rule.always_lengths or (for_graph and rule.padding_input == "lengths")
    return text_bth, Rows(grid, lengths, text_bth.shape[1], rule.padding_input if passes_padding else None)


#: Attribute of the transformer with the blocks.
BLOCKS = "layers"
# What `CaptureGraphs` asks of a rewritten family.
FORWARD_ARGUMENTS = ("hidden_states", "timestep", "text_bth", "text_lens", "return_dict")
#: Other tensors in every step.
STEP_INPUTS = ("hidden_states", "timestep")
#: The same in all steps of a picture.
PICTURE_INPUT = "text_bth"


def token_count(transformer: nn.Module, arguments: Mapping[str, Any]) -> int:
    """Return the image tokens of all pictures of a batch."""
    height, width = _grid(transformer_of(transformer), arguments["hidden_states"])
    return int(len(arguments["hidden_states"]) * height * width)


def host_facts(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Return what `prepare` depends on beside shapes: the prompt lengths."""
    return prompt_lengths(arguments["text_lens"])


def prepare(transformer: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, Position]:
    """Return text and positions for `forward`: all that depends on how long each prompt is, and is no shape."""
    hidden_states, model = arguments["hidden_states"], transformer_of(transformer)
    grid = _grid(model, hidden_states)
    text_bth, rows = _pad(model, arguments["text_bth"], arguments["text_lens"], grid, for_graph=True)
    like = hidden_states.new_empty(0, dtype=torch.promote_types(hidden_states.dtype, text_bth.dtype))
    return text_bth, LAYOUT.required(model).positions.get(model.pos_embed, rows, like)


def as_output(sample: Tensor, arguments: Mapping[str, object]) -> ErnieImageTransformer2DModelOutput | tuple[Tensor]:
    """Return `sample` in the form that the caller of `forward` asked for."""
    return ErnieImageTransformer2DModelOutput(sample=sample) if arguments.get("return_dict", True) else (sample,)


def is_rewritten(transformer: nn.Module) -> bool:
    """Return whether `rewrite` has been here."""
    return any(isinstance(block, RewrittenErnieBlock) for block in transformer_of(transformer).layers)


def unsupported_reasons(transformer: nn.Module) -> list[str]:
    """Return every reason why this stock transformer cannot be rewritten."""
    model, reasons = transformer_of(transformer), []
    axes, head_dim = tuple(model.config.rope_axes_dim), model.head_dim
    if sum(axes) != head_dim:
        reasons.append(f"RoPE covers {sum(axes)} of {head_dim} dimensions of a head; only full rotation is rewritten")
    if model.gradient_checkpointing:
        reasons.append("gradient checkpointing is on, and the rewritten blocks are for inference: switch it off")
    processors: set[type] = {type(attention_of(block).processor) for block in model.layers}
    for other in sorted(cls.__name__ for cls in processors - {ErnieImageSingleStreamAttnProcessor}):
        reasons.append(f"the attention has a processor of its own, {other}, which rewritten blocks would not call")
    return reasons


def to_be_fused(transformer: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return which layers of a stock transformer `rewrite` would make one: path of the one -> paths of its parts."""
    found = {}
    for i, stock in enumerate(transformer_of(transformer).layers):
        for name, part in RewrittenErnieBlock(stock).parts.items():
            if part.unfusible_reason() is None:
                at = f"layers.{i}.{name}"
                found[f"{at}.{part.fused_name}"] = tuple(f"{at}.{child}" for child in part.fusible)
    return found


def rewrite(pipe: Pipeline, undo: Undo, fuse: bool) -> dict[str, str]:
    """Rewrite the transformer of `pipe` in place and return what could not be fused: path -> reason."""
    transformer, skipped = transformer_of(pipe.transformer), {}
    for i, stock in enumerate(transformer.layers):
        block = RewrittenErnieBlock(stock)
        undo.push(partial(_put_back, transformer.layers, i, block, stock))
        transformer.layers[i] = block
        for name, part in block.parts.items():
            reason = part.unfusible_reason() if fuse else "fuse=False"
            if reason is None:
                part.fuse()
            else:
                skipped[f"transformer.layers.{i}.{name}.{part.fused_name}"] = reason
    undo.setattr(transformer, "_repeated_blocks", [*transformer._repeated_blocks, RewrittenErnieBlock.__name__])
    undo.attach(LAYOUT, transformer, TokenLayout())
    RewrittenErnieForward(transformer).install(undo)
    for method in ("load_lora_adapter", "add_adapter"):
        undo.setattr(transformer, method, _AfterSplitting(transformer, method))
    undo.setattr(pipe, "_pad_text", RememberingPad(pipe, "_pad_text"))
    return skipped


def _put_back(layers: nn.ModuleList, i: int, block: RewrittenErnieBlock, stock: nn.Module) -> None:
    block.give_back(stock)
    layers[i] = stock


class RewrittenErnieForward(StandInForward):
    """`forward` as that of one transformer."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(forward, self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        return forward(self.module, *args, **kwargs)


class _AfterSplitting(StandInMethod):
    """A method of a transformer that splits the fused layers first: a LoRA looks for them by name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for block in transformer_of(cast(nn.Module, self.owner)).layers:
            for part in block.parts.values() if isinstance(block, RewrittenErnieBlock) else ():
                part.split()
        return self.call_below(*args, **kwargs)
