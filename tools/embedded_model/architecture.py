"""The embedded model's parts, untrained: every true class of ERNIE-Image at a few hundred thousand weights
each.

The real checkpoint's knobs are kept (text width unlike the transformer's so that there is a `text_proj`, QK
norm, rotary axes for text, row and column, a VAE of factor 16 with its patchified statistics); only the
widths shrink. Every width is a multiple of 32, as 4-bit formats with groups of 32 ask.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ernie_accel.embedded.captions import caption, random_request
from ernie_accel.embedded.scenes import random_scene

if TYPE_CHECKING:
    from diffusers import AutoencoderKLFlux2, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import Ministral3ForCausalLM, Mistral3Model, PreTrainedTokenizerFast

PAD, BOS, EOS, USER, OUTPUT = "<pad>", "<s>", "</s>", "<|user|>", "<|output|>"
VOCABULARY = 768
LATENT_CHANNELS = 8
TEXT_WIDTH = 128
SHIFT = 3.0
"""The scheduler's static shift, in training and in sampling."""
MAX_PROMPT_TOKENS = 256
MAX_ENHANCED_TOKENS = 160
"""The pipeline takes `pe_tokenizer.model_max_length` as the enhancer's `max_new_tokens`."""

MAX_POSITIONS = 1024

CHAT_TEMPLATE = (
    "{#- The user's JSON (prompt, width, height) between two markers; the enhancer goes on after the second. "
    "A system prompt is left out: the enhancer was trained without one. -#}\n"
    "{%- for message in messages if message['role'] == 'user' -%}\n"
    f"{USER}{{{{ message['content'] }}}}{OUTPUT}\n"
    "{%- endfor -%}"
)


def corpus(seed: int, lines: int) -> Iterator[str]:
    """Yield the sentences that the tokenizer learns from: captions, short prompts, and the enhancer's
    JSON.
    """
    rng = random.Random(seed)
    for i in range(lines):
        if i % 4:
            yield caption(random_scene(rng), rng)
        else:
            request, _ = random_request(rng)
            yield f'{{"prompt": "{request.text}", "width": {rng.randrange(4, 64) * 16}, "height": 128}}'


def build_tokenizer(sentences: Iterable[str], more_special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text encodes and decodes without loss, an empty one is one
    `<s>`. What is in `more_special` is one token each.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS, USER, OUTPUT, *more_special]
    bpe = Tokenizer(models.BPE())
    each_hanzi = pre_tokenizers.Split(Regex("[\u4e00-\u9fff]"), "isolated")  # merges must not straddle words
    bpe.pre_tokenizer = pre_tokenizers.Sequence([each_hanzi, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, special.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_PROMPT_TOKENS,
    )


def build_vae() -> AutoencoderKLFlux2:
    """Build the 1.2 M parameter VAE: 16 x 16 pixels to 4 * LATENT_CHANNELS patchified values."""
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=128,
        mid_block_add_attention=False,
        batch_norm_eps=1e-5,  # what the pipeline uses, whatever the config says
    )


def build_transformer() -> ErnieImageTransformer2DModel:
    """Build the 4.6 M parameter diffusion transformer."""
    from diffusers import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel(
        hidden_size=256,
        num_attention_heads=4,
        num_layers=6,
        ffn_hidden_size=512,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=4 * LATENT_CHANNELS,
        text_in_dim=TEXT_WIDTH,
        rope_axes_dim=(16, 24, 24),
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler with the shift that training assumed."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def _language_config(intermediate_size: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "ministral3",
        "vocab_size": VOCABULARY,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {  # plain rotary embedding, in the terms that Ministral's attention reads
            "rope_type": "yarn",
            "factor": 1.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": MAX_POSITIONS,
            "llama_4_scaling_beta": 0.1,
        },
    }


def build_text_encoder() -> Mistral3Model:
    """Build the text encoder; the pipeline reads the output of the last layer but one. Its vision tower is
    idle.
    """
    from transformers import Mistral3Config, Mistral3Model

    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    return Mistral3Model(Mistral3Config(text_config=_language_config(192, 4), vision_config=vision))


def build_prompt_enhancer() -> Ministral3ForCausalLM:
    """Build the prompt enhancer, a half-million parameter language model."""
    from transformers import Ministral3Config, Ministral3ForCausalLM

    config = _language_config(256, 3)
    del config["model_type"]
    return Ministral3ForCausalLM(Ministral3Config(**config, tie_word_embeddings=True))
