"""Decode a Ministral-like language model token by token, many rows at once, without a host wait for each token.

The forward below is the specification, and what runs on the CPU. On CUDA a step of plain linear layers is captured into
a graph; where their weights are bfloat16 or fp8-weight-only, its layers are the kernels of ``kernels/decode.py``.
Shapes in names: b rows, t tokens, h hidden size, n heads, d head size, p positions the cache has room for, l layers, v
vocabulary.
"""

from __future__ import annotations

import importlib.util
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie_accel.core.captured import Fingerprint
from ernie_accel.models.language.architecture import CausalLanguageModel
from ernie_accel.models.language.layers import Rotary, call, linears_of, run_layer, signed
from ernie_accel.models.ministral.sampling import Sampling, choose
from ernie_accel.models.ministral.state import DecodeState
from ernie_accel.models.replays import Replays

if TYPE_CHECKING:
    from ernie_accel.models.ministral.weights import KernelWeights

#: A prompt as token ids.
Ids: TypeAlias = Sequence[int]

_MAX_ROWS = 16  # rows decoded together; the kernels read each weight once for all of them
_ROOM = 256  # tokens beyond the longest prompt that the cache has room for; it doubles when they are used up
_LOOK_EVERY = 4  # tokens between looks at whether all rows have ended, on devices where looking means waiting
_READ_TOGETHER = 64  # tokens: prompts are read in multiples of this, where a read is a graph
_KEPT_GRAPHS = 48  # of one cache: one for each way to sample, and one for each number of tokens that are read together
_KEPT = 2  # caches kept with their graphs
_KEPT_SHARE = 32  # between two calls they take at most this part of the device's memory: one of 32


class _Workplace:
    """A state, and graphs of the work on it, if that is to be captured."""

    def __init__(self, state: DecodeState, *, captures: bool) -> None:
        self.state, self.captures = state, captures
        self._replays: Replays[None, object] = Replays(keep=_KEPT_GRAPHS)

    def run(self, name: object, work: Callable[[], object]) -> None:
        """Do `work`, from the second time on in one launch; it may read the state and the weights (see `Replays`)."""
        if self.captures:
            self._replays.run(name, work)
        else:
            work()


class Decoder:
    """A causal language model of Ministral's architecture, for generating. It holds no weights of its own."""

    def __init__(self, model: CausalLanguageModel) -> None:
        """Decode `model`, a ``Ministral3ForCausalLM``."""
        self._model = model
        self._workplaces: OrderedDict[tuple[int, int], _Workplace] = OrderedDict()
        self._seen: Fingerprint | None = None  # what the model was when the graphs were made

    def __reduce__(self) -> tuple[type[Decoder], tuple[object]]:
        return Decoder, (self._model,)  # of a copy or pickle, too: graphs read the weights of this one

    def forget(self) -> None:
        """Free the caches and graphs, and with them memory of the device; the next call makes new ones."""
        self._workplaces.clear()
        self._seen = None

    def generate(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        eos: Sequence[int],
        sampling: Sampling | None,
        draws_bt: Tensor,
        between_tokens: Callable[[], object] = lambda: None,
    ) -> list[list[int]]:
        """Return the tokens that follow each prompt, without the end-of-sequence token that ended them.

        Args:
            prompts: Token ids, at least one a prompt.
            max_new_tokens: No more than these, >= 1.
            eos: Token ids that end a row.
            sampling: None for greedy decoding.
            draws_bt: Random numbers in [0, 1), of each row and token [B, max_new_tokens]; see `choose`.
            between_tokens: Called every few tokens; what it raises ends the work.
        """
        weight = self._model.model.embed_tokens.weight
        kind, is_on = weight.device.type, torch.cuda.device_of(weight)  # type: ignore[no-untyped-call]
        # The caches outlive the call, so its inference mode must not mark them; and they are of the weights' dtype.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False), is_on:
            now = Fingerprint.of(self._model)
            if now != self._seen:
                self._workplaces.clear()
                self._seen = now
            answers: list[list[int]] = []
            try:
                for start in range(0, len(prompts), _MAX_ROWS):
                    rows = slice(start, start + _MAX_ROWS)
                    some = prompts[rows]
                    chosen = self._decode(some, max_new_tokens, tuple(eos), sampling, draws_bt[rows], between_tokens)
                    answers += [_until(row, eos) for row in chosen]
            finally:
                if kind == "cuda":
                    self._keep(torch.cuda.get_device_properties(weight.device).total_memory // _KEPT_SHARE)
        return answers

    def _decode(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        eos: tuple[int, ...],
        sampling: Sampling | None,
        draws_bt: Tensor,
        between_tokens: Callable[[], object],
    ) -> list[list[int]]:
        longest = max(map(len, prompts))
        workplace = self._workplace(len(prompts), _capacity(longest))
        state = workplace.state
        self._begin(state, prompts, draws_bt)
        self._read(workplace, prompts)
        look_every = _LOOK_EVERY if workplace.captures else 1
        for count in range(max_new_tokens):
            if count % look_every == 0:
                between_tokens()
                if count and bool(state.done_b.all()):
                    break
            if longest + count > state.capacity:
                workplace = self._workplace(len(prompts), 2 * state.capacity)
                workplace.state.take_over(state)
                state = workplace.state
                _set_draws(state, draws_bt)
            limit = state.capacity if workplace.captures else longest + count
            workplace.run(("step", eos, sampling), partial(self._step, state, eos, sampling, limit))
        return list(state.chosen_bt[: len(prompts), : int(state.step_1)].tolist())

    def _workplace(self, prompts: int, capacity: int) -> _Workplace:
        """Return a workplace for at least so many rows, which may be one that was used before."""
        weight = self._model.model.embed_tokens.weight
        if weight.device.type != "cuda" or not self._is_plain():
            return _Workplace(self._new_state(prompts, capacity), captures=False)
        rows = 1 << (prompts - 1).bit_length()  # few shapes, few graphs; the rows added have ended before they begin
        key = (rows, capacity)
        if key not in self._workplaces:
            self._workplaces[key] = _Workplace(self._new_state(rows, capacity), captures=True)
        self._workplaces.move_to_end(key)
        while len(self._workplaces) > _KEPT:
            self._workplaces.popitem(last=False)
        return self._workplaces[key]

    def _keep(self, most_bytes: int) -> None:
        """Free the largest caches, and their graphs, until the others take no more than `most_bytes`."""
        sizes = {key: workplace.state.cache_bytes for key, workplace in self._workplaces.items()}
        for key in sorted(sizes, key=lambda key: sizes[key], reverse=True):
            if sum(sizes.values()) > most_bytes:
                del sizes[key], self._workplaces[key]

    def _is_plain(self) -> bool:
        """Return whether all linear layers are torch's own, whatever their weights.

        Others cannot be captured: adapters are switched and scaled between calls, and the layers of some quantizers
        wait for the device.
        """
        linears = [*chain.from_iterable(map(linears_of, self._model.model.layers)), self._model.lm_head]
        return all(type(linear) is nn.Linear for linear in linears)

    def _new_state(self, rows: int, capacity: int) -> DecodeState:
        model, settings = self._model.model, self._model.config.rope_parameters
        weight, attention = model.embed_tokens.weight, model.layers[0].self_attn
        device = weight.device
        position_p = torch.arange(capacity, device=device)
        cos_1pd, sin_1pd = model.rotary_emb(weight, position_ids=position_p[None])
        beta, period = settings["llama_4_scaling_beta"], settings["original_max_position_embeddings"]
        q_scale_p = 1 + beta * torch.log(1 + torch.floor(position_p / period))
        heads = attention.k_proj.out_features // attention.head_dim
        cache = (len(model.layers), rows, heads, capacity, attention.head_dim)
        return DecodeState(
            ids_bt=torch.zeros(rows, capacity, dtype=torch.int64, device=device),
            token_b=torch.zeros(rows, dtype=torch.int64, device=device),
            position_b=torch.zeros(rows, dtype=torch.int64, device=device),
            step_1=torch.zeros(1, dtype=torch.int64, device=device),
            done_b=torch.ones(rows, dtype=torch.bool, device=device),
            chosen_bt=torch.zeros(rows, capacity, dtype=torch.int64, device=device),
            draws_bt=torch.zeros(rows, capacity, device=device),
            keys_lbnpd=torch.zeros(cache, dtype=weight.dtype, device=device),
            values_lbnpd=torch.zeros(cache, dtype=weight.dtype, device=device),
            cos_pd=cos_1pd[0],
            sin_pd=sin_1pd[0],
            q_scale_p=q_scale_p.to(weight.dtype),
        )

    def _begin(self, state: DecodeState, prompts: Sequence[Ids], draws_bt: Tensor) -> None:
        """Set the state to before the last token of each prompt, padded on the right; the cache is still to fill."""
        rows, spare = len(state.token_b), len(state.token_b) - len(prompts)
        ids = [list(prompt) for prompt in prompts] + [[0]] * spare
        longest = max(map(len, ids))
        state.ids_bt[:, :longest] = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        state.token_b.copy_(torch.tensor([row[-1] for row in ids]))
        state.position_b.copy_(torch.tensor([len(row) - 1 for row in ids]))
        state.step_1.zero_()
        state.done_b.copy_(torch.arange(rows) >= len(prompts))
        _set_draws(state, draws_bt)

    def _read(self, workplace: _Workplace, prompts: Sequence[Ids]) -> None:
        """Put the keys and values of all tokens but the last of each prompt into the cache.

        What padding leaves there is overwritten before it can be seen.
        """
        tokens = max(map(len, prompts)) - 1
        if workplace.captures:
            tokens = math.ceil(tokens / _READ_TOGETHER) * _READ_TOGETHER  # few graphs
        if tokens:
            workplace.run(("read", tokens), partial(self._read_tokens, workplace.state, tokens))

    def _read_tokens(self, state: DecodeState, tokens: int) -> None:
        position_bt = torch.arange(tokens, device=state.token_b.device).expand(len(state.token_b), -1)
        self._forward(state, state.ids_bt[:, :tokens], position_bt, limit=tokens)

    def _step(self, state: DecodeState, eos: tuple[int, ...], sampling: Sampling | None, limit: int) -> None:
        """Choose the next token of every row, in place and without a host wait; a row that has ended stays as it is."""
        weights = self._kernel_weights() if state.token_b.device.type == "cuda" else None
        if weights is None:
            hidden_bth = self._forward(state, state.token_b[:, None], state.position_b[:, None], limit)
            logits_bv = self._model.lm_head(self._model.model.norm(hidden_bth[:, 0]))
        else:
            logits_bv = weights.logits(self._model.model.embed_tokens(state.token_b), state)
        draw_b = state.draws_bt.gather(1, state.step_1.expand(len(state.token_b), 1)).squeeze(1)
        token_b = torch.where(state.done_b, state.token_b, choose(logits_bv, sampling, draw_b))
        state.chosen_bt.scatter_(1, state.step_1.expand(len(token_b), 1), token_b[:, None])
        for end in eos:
            state.done_b |= token_b == end
        state.token_b.copy_(token_b)
        state.position_b += 1
        state.step_1 += 1

    def _forward(self, state: DecodeState, ids_bt: Tensor, position_bt: Tensor, limit: int) -> Tensor:
        """Return the hidden states [B, T, H] before the last norm, and put keys and values into the cache.

        Args:
            state: Its cache is read up to `limit` and written at `position_bt`.
            ids_bt: Tokens.
            position_bt: Their positions.
            limit: One more than the largest position.
        """
        model, project = self._model.model, self._projection(ids_bt)
        x_bth: Tensor = model.embed_tokens(ids_bt)
        at = Rotary(
            cos_bt1d=state.cos_pd[position_bt][:, :, None],
            signed_sin_bt1d=signed(state.sin_pd[position_bt][:, :, None]),
            q_scale_bt11=state.q_scale_p[position_bt][:, :, None, None],
        )
        visible = torch.arange(limit, device=x_bth.device) <= position_bt[:, None, :, None]
        row_b1 = torch.arange(len(ids_bt), device=x_bth.device)[:, None]

        def attend(
            keys_bnpd: Tensor, values_bnpd: Tensor, q_bntd: Tensor, k_bntd: Tensor, v_bntd: Tensor, scale: float
        ) -> Tensor:
            keys_bnpd[row_b1, :, position_bt] = k_bntd.transpose(1, 2)
            values_bnpd[row_b1, :, position_bt] = v_bntd.transpose(1, 2)
            seen = keys_bnpd[:, :, :limit], values_bnpd[:, :, :limit]
            return F.scaled_dot_product_attention(q_bntd, *seen, attn_mask=visible, scale=scale, enable_gqa=True)

        for layer, *cache in zip(model.layers, state.keys_lbnpd, state.values_lbnpd, strict=True):
            x_bth = run_layer(layer, x_bth, at, partial(attend, *cache), project)
        return x_bth

    def _projection(self, ids_bt: Tensor) -> Callable[[nn.Linear, Tensor], Tensor]:
        """Return what a linear layer gives for its input; float8 weights are widened by a kernel if there is one.

        torchao does it in three passes over the weights, which took 24 of 32 ms of reading a prompt on an H200.
        """
        weights = self._kernel_weights() if ids_bt.is_cuda else None
        return call if weights is None else weights.project

    def _kernel_weights(self) -> KernelWeights | None:
        if importlib.util.find_spec("triton") is None or not self._is_plain():
            return None
        from ernie_accel.models.ministral.weights import kernel_weights

        weights = kernel_weights(self._model)
        return None if isinstance(weights, str) else weights


def _set_draws(state: DecodeState, draws_bt: Tensor) -> None:
    count = min(draws_bt.shape[1], state.capacity)
    state.draws_bt[: len(draws_bt), :count] = draws_bt[:, :count]


def _capacity(longest: int) -> int:
    """Return the positions a cache starts with: a power of two, so that prompts of many lengths share a graph."""
    return 1 << (longest + _ROOM - 1).bit_length()


def _until(tokens: Sequence[int], eos: Sequence[int]) -> list[int]:
    """Return the tokens before the first that is in `eos`."""
    end = next((i for i, token in enumerate(tokens) if token in eos), len(tokens))
    return list(tokens[:end])
