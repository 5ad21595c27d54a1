"""Enhance prompts as ErnieImagePipeline's own method does: the same chat, the same sampling; many at once, by seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from ernie_accel.common.language import said
from ernie_accel.core.components import Tokenizer
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.library_hooks import library_hooks
from ernie_accel.models.language.architecture import CausalLanguageModel
from ernie_accel.models.language.layers import unsupported_config_reasons
from ernie_accel.models.ministral.decoder import Decoder
from ernie_accel.models.ministral.sampling import Sampling, draws_for

#: What the pipeline samples with, in its ``_enhance_prompt_with_pe``.
TEMPERATURE, TOP_P = 0.6, 0.95
#: What transformers uses if a checkpoint does not say (``GenerationConfig._get_default_generation_params``).
_DEFAULT_TOP_K = 50
#: Settings of a checkpoint's ``generation_config`` that change the tokens and are not built here, with the values that
#: change nothing.
_WITHOUT_EFFECT = {
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "typical_p": (None, 1.0),
    "min_p": (None, 0.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "stop_strings": (None,),
    "max_time": (None,),
    "remove_invalid_values": (None, False),
    "penalty_alpha": (None,),
    "prompt_lookup_num_tokens": (None,),
}


class EnhanceRequest(NamedTuple):
    """A prompt to enhance.

    Attributes:
        prompt: What the user wrote.
        width: Of the picture, in pixels; the enhancer reads it beside the prompt.
        height: Of the picture, in pixels.
        seed: Of the words that are sampled; the same request gives the same words, alone or among others.
    """

    prompt: str
    width: int
    height: int
    seed: int


class PromptEnhancer:
    """The prompt enhancer of an ERNIE-Image pipeline."""

    def __init__(self, model: CausalLanguageModel, tokenizer: Tokenizer) -> None:
        """Enhance with `model` (a ``Ministral3ForCausalLM``) and its tokenizer, which brings the chat template."""
        self._model, self._tokenizer = model, tokenizer
        self._decoder = Decoder(model)

    def enhances_with(self, model: object) -> bool:
        """Return whether this is the model it was made for."""
        return self._model is model

    def forget(self) -> None:
        """Free what is kept on the device between calls; the next call makes it again."""
        self._decoder.forget()

    def enhance(
        self,
        requests: Sequence[EnhanceRequest],
        *,
        system_prompt: str | None = None,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_new_tokens: int | None = None,
        between_tokens: Callable[[], object] = lambda: None,
    ) -> list[str]:
        """Return the enhanced prompts.

        Args:
            requests: Any number, none included; up to 16 are decoded together.
            system_prompt: What the chat begins with, or None for nothing.
            temperature: Divides the logits, > 0; with 1.0 and `top_p` 1.0, decoding is greedy, as in the pipeline.
            top_p: Probability that the candidates reach together, in (0, 1].
            max_new_tokens: Tokens of an answer at most, >= 1; default: what the tokenizer accepts, as in the pipeline,
                but no more than the model has positions (a tokenizer without a limit says 10**30).
            between_tokens: Called every few tokens; what it raises ends the work.

        Raises:
            ErnieAccelError: A prompt has more tokens than the model has positions. Stock reads it all the same; its
                words mean little then, and its memory grows with the square of the length.
        """
        if not requests:
            return []
        positions = self._model.config.max_position_embeddings
        ids = [_ids(self._tokenizer, request, system_prompt) for request in requests]
        if (longest := max(map(len, ids))) > positions:
            raise ErnieAccelError(_too_long(longest, positions))
        limit = min(max_new_tokens or self._tokenizer.model_max_length, positions)
        sampling = None
        if temperature != 1.0 or top_p != 1.0:
            top_k = self._model.generation_config.top_k
            sampling = Sampling(temperature, _DEFAULT_TOP_K if top_k is None else top_k, top_p)
        draws_bt = draws_for([request.seed for request in requests], limit)
        _wake(self._model)
        end = self._tokenizer.eos_token_id
        answers = self._decoder.generate(ids, limit, [] if end is None else [end], sampling, draws_bt, between_tokens)
        return [self._tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


def length_problem(positions: int, tokenizer: Tokenizer, request: EnhanceRequest) -> str | None:
    """Return why a prompt is too long for an enhancer of so many positions; None if it is not."""
    if len(request.prompt) < positions // 16:  # a character has 6 bytes at most in JSON, and a token at least one
        return None
    tokens = len(_ids(tokenizer, request, None))
    return _too_long(tokens, positions) if tokens > positions else None


def _ids(tokenizer: Tokenizer, request: EnhanceRequest, system_prompt: str | None) -> list[int]:
    user = {"prompt": request.prompt, "width": request.width, "height": request.height}
    messages = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    messages.append({"role": "user", "content": json.dumps(user, ensure_ascii=False)})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    return list(tokenizer(text)["input_ids"])


def _too_long(tokens: int, positions: int) -> str:
    fix = "shorten it, or switch the enhancer off (use_pe=False; in a batch --no-enhancer)"
    return f"the prompt has {tokens} tokens, and the prompt enhancer reads {positions} at most; {fix}"


def unsupported_reasons(model: CausalLanguageModel, tokenizer: Tokenizer) -> list[str]:
    """Return why `PromptEnhancer` cannot replace the pipeline's own method for these; empty if it can."""
    if type(model).__name__ != "Ministral3ForCausalLM":
        return [said("its prompt enhancer is a {model}, not a Ministral3ForCausalLM", model=type(model).__name__)]
    reasons = unsupported_config_reasons(model.config)
    for name, values in _WITHOUT_EFFECT.items():
        value = getattr(model.generation_config, name, None)
        if value not in values:
            reasons.append(said("its generation_config sets {name}={value!r}", name=name, value=value))
    return reasons


def _wake(model: nn.Module) -> None:
    """Run the hooks that a call of the model would run first; offloading and freeing bring the weights by them."""
    for key, hook in model._forward_pre_hooks.items():
        hook(model, (), *([{}] if key in model._forward_pre_hooks_with_kwargs else []))
    of_accelerate = library_hooks(model).accelerate
    if of_accelerate is not None:
        of_accelerate.pre_forward(model)
