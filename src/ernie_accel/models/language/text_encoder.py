"""The forward of a text encoder's language model in fewer kernels, replayed as CUDA graphs for short texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ernie_accel.common.language import one_of, said
from ernie_accel.core.captured import Fingerprint, only_listens
from ernie_accel.core.library_hooks import NO_HOOKS, library_hooks
from ernie_accel.core.stand_in import StandInForward, but_for_own
from ernie_accel.core.undo import Undo
from ernie_accel.models.language.architecture import (
    ARCHITECTURES,
    Architecture,
    LanguageModel,
    Layer,
    Norm,
    architecture_of,
)
from ernie_accel.models.language.layers import (
    Rotary,
    attend_causally,
    linears_of,
    norms_of,
    pass_on,
    rms_norm,
    run_layer,
    signed,
    unsupported_config_reasons,
)
from ernie_accel.models.replayed_forward import ReplayedForward
from ernie_accel.models.replays import Capture

_PADDED_TO = 64  # tokens: prompts of many lengths share a graph, and the plan that cuDNN makes for its attention
#: Arguments of the forward of each of these models, by position.
_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
#: Those that may be other than None.
_KNOWN = (
    "input_ids",
    "attention_mask",
    "inputs_embeds",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
)


def unsupported_reasons(model: LanguageModel) -> list[str]:
    """Return why `RewrittenForward` cannot replace the forward of a language model; empty if it can."""
    architecture = architecture_of(model)
    if architecture is None:
        known = one_of(known.model for known in ARCHITECTURES)
        return [
            said(
                "its text encoder's language model is a {model}, not a {known}", model=type(model).__name__, known=known
            )
        ]
    forward = vars(model).get("forward")
    if forward is not None and library_hooks(model).accelerate is None and not isinstance(forward, StandInForward):
        return [said("the forward of its text encoder's language model was replaced already")]
    return _unsupported_reasons(model, architecture)


def _unsupported_reasons(model: LanguageModel, architecture: Architecture) -> list[str]:
    reasons = unsupported_config_reasons(model.config, architecture)
    embedding = type(model.embed_tokens).__name__
    if architecture.scaled_embedding not in (None, embedding):
        reasons.append(
            said(
                "its embedding is a {embedding}, not a {scaled_embedding}",
                embedding=embedding,
                scaled_embedding=architecture.scaled_embedding,
            )
        )
    if architecture.has_soft_caps and getattr(model.config, "_attn_implementation", None) == "sdpa":
        reasons.append(said("its attention runs on sdpa, which ignores the cap of its scores"))
    return reasons


class _Look(NamedTuple):
    """What a language model consists of at the moment.

    Attributes:
        layers: Those that are to run, and None for those that pass on what they are given.
        is_plain: Whether all linear layers are torch's own, untouched; others cannot be captured for good.
    """

    layers: tuple[Layer | None, ...]
    is_plain: bool


class RewrittenForward(ReplayedForward[Tensor, list[Tensor]]):
    """The forward of a language model of a known architecture; same arguments, same result up to rounding.

    Padding on the right is cut off, as far as all texts of a batch have it: no token sees it. Hidden states of what a
    mask hides are zero.
    """

    def __init__(self, model: nn.Module, max_tokens: int, keep: int, capture: Capture | None = None) -> None:
        """Replace the forward of `model`; with `capture`, graphs are made by that, and on every device."""
        self._max_tokens = max_tokens
        architecture = architecture_of(model)
        if architecture is None:
            raise LookupError(f"{type(model).__name__} is no language model that is known here")
        self._architecture = architecture
        super().__init__(model, keep, capture)

    def install(self, undo: Undo) -> None:
        """Replace the module's forward by this, beneath a hook of accelerate, which moves weights and inputs first."""
        if library_hooks(self.module).accelerate is None:
            super().install(undo)
            return
        self.inner = but_for_own(self.module, vars(self.module)["_old_forward"])
        undo.push(self.remove)
        undo.watch(self.is_installed)
        self.module._old_forward = self

    def __call__(self, *args: Any, **kwargs: object) -> object:
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        look = _look(self.module, self._architecture) if len(args) <= len(_ARGUMENTS) and self._knows(given) else None
        if look is None:
            return self.inner_forward(*args, **kwargs)
        given_mask = given.get("attention_mask")
        padding = None if given_mask is None else _Padding.of(given_mask)
        if padding is not None and not padding.is_on_the_right:
            return self.inner_forward(*args, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        x_bth = given.get("inputs_embeds")
        if x_bth is None:
            ids_bt = given["input_ids"]
            x_bth = self.module.embed_tokens(ids_bt if padding is None else ids_bt[:, : padding.longest])
        elif padding is not None:
            x_bth = x_bth[:, : padding.longest]
        if self.module.norm.weight.dtype != x_bth.dtype:  # stock's norm gives the wider of the two
            return self.inner_forward(*args, **kwargs)
        all_of_them = bool(self._setting(given, "output_hidden_states"))
        if look.is_plain and self._is_short(x_bth) and (x_bth.is_cuda or self._capture is not None):
            states = self._replayed(x_bth, look, all_of_them)
        else:
            states = self._states(x_bth, look.layers)
            states = states if all_of_them else states[-1:]
        if padding is not None:
            states = padding.put_back(states)
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1], hidden_states=tuple(states) if all_of_them else None
        )

    def _knows(self, given: Mapping[str, object]) -> bool:
        """Return whether a call asks for nothing but hidden states of whole texts."""
        x, config = given.get("inputs_embeds"), self.module.config
        if x is None:
            x = given.get("input_ids")
        elif given.get("input_ids") is not None:
            return False
        return (
            isinstance(x, Tensor)
            and _is_mask_of(x, given.get("attention_mask"))
            and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.module.training)
            and not torch.is_autocast_enabled(x.device.type)
            and all(value is None for name, value in given.items() if name not in _KNOWN)
            and not given.get("use_cache")
            and not self._setting(given, "output_attentions")
            and isinstance(self._setting(given, "output_hidden_states"), (bool, type(None)))  # not: only some
            and self._setting(given, "return_dict") is not False
            and getattr(config, "is_causal", None) is not False
            and getattr(config, "tie_last_hidden_states", None) is not False
            and not _unsupported_reasons(self.module, self._architecture)
        )

    def _setting(self, given: Mapping[str, object], name: str) -> object:
        return given[name] if name in given else getattr(self.module.config, name, None)

    def _states(self, x_bth: Tensor, layers: tuple[Layer | None, ...]) -> list[Tensor]:
        """Return the embeddings and the output of each layer, the last one after the norm, as stock does."""
        architecture, states = self._architecture, [x_bth]
        at = self._rotary(x_bth)
        for number, layer in enumerate(layers):
            if layer is not None:
                here = at[self.module.config.layer_types[number] if architecture.has_layer_types else ""]
                attend = partial(
                    attend_causally,
                    window=layer.self_attn.sliding_window if architecture.has_windows else None,
                    soft_cap=layer.self_attn.attn_logit_softcapping if architecture.has_soft_caps else None,
                )
                x_bth = run_layer(layer, x_bth, here, attend, normalize=self._normalize, architecture=architecture)
            states.append(x_bth)
        states[-1] = self._normalize(self.module.norm, x_bth)
        return states

    def _normalize(self, norm: Norm, x: Tensor) -> Tensor:
        return rms_norm(norm, x, self._architecture)

    def _rotary(self, x_bth: Tensor) -> dict[str, Rotary]:
        """Return the positions by type of layer, or under "" where all layers have the same."""
        tokens, config = x_bth.shape[1], self.module.config
        position_1t = torch.arange(tokens, device=x_bth.device)[None]
        q_scale_1t11 = None
        if self._architecture.scales_queries:
            settings = config.rope_parameters
            period = settings["original_max_position_embeddings"]
            if tokens > period:  # up to there it is 1
                q_scale_1t = 1 + settings["llama_4_scaling_beta"] * torch.log(1 + torch.floor(position_1t / period))
                q_scale_1t11 = q_scale_1t[:, :, None, None].to(x_bth.dtype)
        kinds = sorted(set(config.layer_types)) if self._architecture.has_layer_types else [""]
        found = {}
        for kind in kinds:
            asked = {"layer_type": kind} if kind else {}
            cos_1td, sin_1td = self.module.rotary_emb(x_bth, position_ids=position_1t, **asked)
            found[kind] = Rotary(cos_1td[:, :, None], signed(sin_1td[:, :, None]), q_scale_1t11)
        return found

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


class _Padding(NamedTuple):
    """What a mask hides of a batch of texts.

    Attributes:
        mask_bt: Whether a token counts.
        longest: Tokens of the longest text, at least 1.
        is_on_the_right: Whether each text is followed by its padding.
    """

    mask_bt: Tensor
    longest: int
    is_on_the_right: bool

    @classmethod
    def of(cls, mask_bt: Tensor) -> _Padding:
        """Look at a mask, which waits for the device once."""
        mask_bt = mask_bt.bool()
        length_b1 = mask_bt.sum(1, keepdim=True)
        expected_bt = torch.arange(mask_bt.shape[1], device=mask_bt.device) < length_b1
        longest, is_right = torch.stack((length_b1.max(), (expected_bt == mask_bt).all().long())).tolist()
        return cls(mask_bt, max(longest, 1), bool(is_right))

    def put_back(self, states: list[Tensor]) -> list[Tensor]:
        """Return states of all tokens of the batch, zero for padding, of those of the first `longest` tokens."""
        rows, tokens = self.mask_bt.shape
        all_lbth = states[0].new_zeros(len(states), rows, tokens, states[0].shape[2])
        hidden_bt1 = ~self.mask_bt[:, : self.longest, None]
        for all_bth, state_bth in zip(all_lbth, states, strict=True):
            all_bth[:, : self.longest] = state_bth.masked_fill(hidden_bt1, 0)
        return list(all_lbth)


def _is_mask_of(x: Tensor, mask: object) -> bool:
    """Return whether `mask` is None, or says of each token of `x` whether it counts."""
    return mask is None or (
        isinstance(mask, Tensor) and not mask.is_floating_point() and mask.shape == x.shape[:2] and mask.numel() > 0
    )


def _look(model: LanguageModel, architecture: Architecture) -> _Look | None:
    """Return what `model` consists of, or None if something in its layers was changed.

    It runs at every call, so it looks no deeper than it must: 26 layers take a third of a millisecond on a slow core.
    """
    layers: list[Layer | None] = []
    is_plain = True
    for layer in list(model.layers)[: model.config.num_hidden_layers]:
        if vars(layer).get("forward") is pass_on and _is_as_made(layer, but_for_its_forward=True):
            layers.append(None)
            continue
        for part in (layer, layer.self_attn, layer.mlp, *norms_of(layer, architecture)):
            if not type(part).__name__.startswith(architecture.prefix) or not _is_as_made(part):
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
    if state["_forward_pre_hooks"] or library_hooks(module) is not NO_HOOKS:
        return False
    if state.get("_compiled_call_impl") is not None:
        return False
    hooks = state["_forward_hooks"]
    return not hooks or all(only_listens(hook) for hook in hooks.values())


def _padded(tokens: int) -> int:
    return math.ceil(tokens / _PADDED_TO) * _PADDED_TO
