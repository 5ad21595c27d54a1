"""Stand-ins for the tiny models that diffusers' tests download: of the same classes, made here with random weights.

They are written as a cache of the hub, so that ``from_pretrained`` finds them by name without a network. What a test
compares with values recorded from the real ones fails with these, on stock too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, T5Config, T5EncoderModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

_REVISION = "0" * 40

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] if 'text' in part else '' }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                  "<|image_pad|>", "<|video_pad|>")  # fmt: skip


def write_cache(cache: Path) -> None:
    """Write all stand-ins below `cache`, which goes into the environment variable HF_HUB_CACHE."""
    for name, make in _MAKERS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / _REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(_REVISION)
        make(snapshot)


def _clip(folder: Path) -> None:
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{each}</w>" for each in letters), "<|startoftext|>", "<|endoftext|>"]
    _byte_pairs(folder, words)
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )


def _qwen(folder: Path) -> None:
    Qwen2VLConfig().save_pretrained(folder)  # from which AutoTokenizer learns the class
    _byte_pairs(folder, [*bytes_to_unicode().values(), *_QWEN_SPECIALS])
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": 1024,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(_QWEN_SPECIALS[1:]),
            "chat_template": _CHAT_TEMPLATE,
        },
    )


def _t5(folder: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "vocab_size": 1103}
    T5EncoderModel(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(folder)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    made = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2)
    _sentence_pieces(folder, made, "T5Tokenizer", pad="<pad>", eos="</s>", unk="<unk>")


def _gemma(folder: Path) -> None:
    # Tests give the encoder beside it a vocabulary of eight.
    made = _byte_pair_model(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "a", "e"], "<unk>")
    _sentence_pieces(folder, made, "GemmaTokenizer", pad="<pad>", eos="<eos>", bos="<bos>", unk="<unk>", mask="<mask>")


def _llama(folder: Path) -> None:
    made = _byte_pair_model(["<unk>", "<s>", "</s>", "<pad>", "▁", *map(chr, range(33, 127))], "<unk>")
    folder = folder / "tokenizer"
    _sentence_pieces(folder, made, "LlamaTokenizer", pad="<pad>", eos="</s>", bos="<s>", unk="<unk>")


def _byte_pairs(folder: Path, words: list[str]) -> None:
    _write(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def _byte_pair_model(pieces: list[str], unk: str) -> models.BPE:
    return models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token=unk)


def _sentence_pieces(folder: Path, model: models.Model, name: str, **specials: str) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    named = {f"{role}_token": piece for role, piece in specials.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **named).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    _write(folder / "tokenizer_config.json", settings | {"tokenizer_class": name})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


_MAKERS: dict[str, Callable[[Path], None]] = {
    "hf-internal-testing/tiny-random-clip": _clip,
    "hf-internal-testing/tiny-random-t5": _t5,
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": _qwen,
    "hf-internal-testing/dummy-gemma": _gemma,
    "finetrainers/dummy-hunyaunvideo": _llama,
}
