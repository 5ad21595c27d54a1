"""The forward of a text encoder's ``Ministral3Model`` in fewer kernels, replayed as CUDA graphs for short texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.core.captured import Fingerprint, only_listens
from ernie_accel.core.library_hooks import library_hooks
from ernie_accel.models.ministral.architecture import LanguageModel, Layer
from ernie_accel.models.ministral.layers import (
    Rotary,
    linears_of,
    pass_on,
    rms_norm,
    run_layer,
    signed,
    unsupported_config_reasons,
)
from ernie_accel.models.replayed_forward import ReplayedForward
from ernie_accel.models.replays import Capture

_PADDED_TO = 64  # tokens: prompts of many lengths share a graph, and the plan that cuDNN makes for its attention
#: Arguments of the forward of a ``Ministral3Model``, by position.
_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
#: Those that may be other than None.
_KNOWN = ("input_ids", "inputs_embeds", "use_cache", "output_hidden_states", "output_attentions", "return_dict")


def unsupported_reasons(model: LanguageModel) -> list[str]:
    """Return why `RewrittenForward` cannot replace the forward of a language model; empty if it can."""
    if type(model).__name__ != "Ministral3Model":
        return [f"its text encoder's language model is a {type(model).__name__}, not a Ministral3Model"]
    if "forward" in vars(model):
        return ["the forward of its text encoder's language model was replaced already"]
    return unsupported_config_reasons(model.config)


class _Look(NamedTuple):
    """What a language model consists of at the moment.

    Attributes:
        layers: Those that are to run, and None for those that pass on what they are given.
        is_plain: Whether all linear layers are torch's own, untouched; others cannot be captured for good.
    """

    layers: tuple[Layer | None, ...]
    is_plain: bool


class RewrittenForward(ReplayedForward[Tensor, list[Tensor]]):
    """The forward of a ``Ministral3Model``; same arguments, same result up to rounding."""

    def __init__(self, model: nn.Module, max_tokens: int, keep: int, capture: Capture | None = None) -> None:
        """Replace the forward of `model`; with `capture`, graphs are made by that, and on every device."""
        self._max_tokens = max_tokens
        super().__init__(model, keep, capture)

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        look = _look(self.module) if len(args) <= len(_ARGUMENTS) and self._knows(given) else None
        if look is None:
            return self.forward_below(*args, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        x_bth = given.get("inputs_embeds")
        if x_bth is None:
            x_bth = self.module.embed_tokens(given["input_ids"])
        if self.module.norm.weight.dtype != x_bth.dtype:  # stock's norm gives the wider of the two
            return self.forward_below(*args, **kwargs)
        all_of_them = bool(self._setting(given, "output_hidden_states"))
        if look.is_plain and self._is_short(x_bth) and (x_bth.is_cuda or self._capture is not None):
            states = self._replayed(x_bth, look, all_of_them)
        else:
            states = self._states(x_bth, look.layers)
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1], hidden_states=tuple(states) if all_of_them else None
        )

    def _knows(self, given: Mapping[str, Any]) -> bool:
        """Return whether a call asks for nothing but hidden states of whole texts."""
        x, config = given.get("inputs_embeds"), self.module.config
        if x is None:
            x = given.get("input_ids")
        elif given.get("input_ids") is not None:
            return False
        return (
            isinstance(x, Tensor)
            and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.module.training)
            and not torch.is_autocast_enabled(x.device.type)
            and all(value is None for name, value in given.items() if name not in _KNOWN)
            and not given.get("use_cache")
            and not self._setting(given, "output_attentions")
            and isinstance(self._setting(given, "output_hidden_states"), (bool, type(None)))  # not: only some
            and self._setting(given, "return_dict") is not False
            and getattr(config, "is_causal", None) is not False
            and getattr(config, "tie_last_hidden_states", None) is not False
            and not unsupported_config_reasons(config)
        )

    def _setting(self, given: Mapping[str, Any], name: str) -> Any:
        return given[name] if name in given else getattr(self.module.config, name, None)

    def _states(self, x_bth: Tensor, layers: tuple[Layer | None, ...]) -> list[Tensor]:
        """Return the embeddings and the output of each layer, the last one after the norm, as stock does."""
        at, states = self._rotary(x_bth), [x_bth]
        for layer in layers:
            if layer is not None:
                x_bth = run_layer(layer, x_bth, at, _attend, normalize=rms_norm)
            states.append(x_bth)
        states[-1] = rms_norm(self.module.norm, x_bth)
        return states

    def _rotary(self, x_bth: Tensor) -> Rotary:
        tokens, settings = x_bth.shape[1], self.module.config.rope_parameters
        position_1t = torch.arange(tokens, device=x_bth.device)[None]
        cos_1td, sin_1td = self.module.rotary_emb(x_bth, position_ids=position_1t)
        q_scale_1t11, period = None, settings["original_max_position_embeddings"]
        if tokens > period:  # up to there it is 1
            q_scale_1t = 1 + settings["llama_4_scaling_beta"] * torch.log(1 + torch.floor(position_1t / period))
            q_scale_1t11 = q_scale_1t[:, :, None, None].to(x_bth.dtype)
        return Rotary(cos_1td[:, :, None], signed(sin_1td[:, :, None]), q_scale_1t11)

    # Graphs ----------------------------------------------------------------------------------------------------------

    def _is_short(self, x_bth: Tensor) -> bool:
        return 0 < len(x_bth) * _padded(x_bth.shape[1]) <= self._max_tokens

    def _replayed(self, x_bth: Tensor, look: _Look, all_of_them: bool) -> list[Tensor]:
        """Return copies of the states, or of the last one; those of padding, which no token sees, are cut off."""
        tokens = x_bth.shape[1]
        is_on = torch.cuda.device_of(x_bth)  # type: ignore[no-untyped-call]
        with self._lock, torch.inference_mode(False), torch.no_grad(), is_on:
            self._forget_if_stale(Fingerprint.of(self.module))
            name = (len(x_bth), _padded(tokens), x_bth.dtype, x_bth.device, len(look.layers))
            static_bth = self._graphs.inputs(name, lambda: x_bth.new_empty(len(x_bth), _padded(tokens), x_bth.shape[2]))
            static_bth[:, :tokens] = x_bth
            static_bth[:, tokens:] = 0  # what stood there before could be NaN, and 0 * NaN is no 0
            # The first time, too, it computes padded: so the first and the later forwards give the same bits.
            states = self._graphs.run(name, partial(self._states, static_bth, look.layers))
            wanted = states if all_of_them else states[-1:]
            return list(torch.stack([state[:, :tokens] for state in wanted]))


def _look(model: LanguageModel) -> _Look | None:
    """Return what `model` consists of, or None if something in its layers was changed.

    It runs at every call, so it looks no deeper than it must: 26 layers take a third of a millisecond on a slow core.
    """
    layers: list[Layer | None] = []
    is_plain = True
    for layer in list(model.layers)[: model.config.num_hidden_layers]:
        if vars(layer).get("forward") is pass_on and _is_as_made(layer, but_for_its_forward=True):
            layers.append(None)
            continue
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        for part in (layer, layer.self_attn, layer.mlp, *norms):
            if not type(part).__name__.startswith("Ministral3") or not _is_as_made(part):
                return None
        for linear in linears_of(layer):
            if type(linear) is not nn.Linear or not _is_as_made(linear):
                is_plain = False
        layers.append(layer)
    return _Look(tuple(layers), is_plain) if _is_as_made(model.norm) else None


def _is_as_made(module: nn.Module, *, but_for_its_forward: bool = False) -> bool:
    """Return whether calling `module` does what its class says; the hooks of transformers only listen."""
    state = vars(module)
    if "forward" in state and not but_for_its_forward:
        return False
    if state["_forward_pre_hooks"] or library_hooks(module):
        return False
    if state.get("_compiled_call_impl") is not None:
        return False
    hooks = state["_forward_hooks"]
    return not hooks or all(only_listens(hook) for hook in hooks.values())


def _attend(q_bntd: Tensor, k_bntd: Tensor, v_bntd: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q_bntd, k_bntd, v_bntd, is_causal=True, scale=scale, enable_gqa=True)


def _padded(tokens: int) -> int:
    return math.ceil(tokens / _PADDED_TO) * _PADDED_TO
