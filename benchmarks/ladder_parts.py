"""The parts of a picture beside the denoiser, each alone: decoding, encoding prompts, enhancing a prompt."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ladder_measures import (
    CUDA,
    STEPS,
    TEXT_TOKENS,
    Job,
    kernel_times,
    milliseconds,
    peak_gb,
    reset_peak,
    seconds,
    sqnr_db,
)
from ladder_rungs import Change, leave, optimized
from random_pipeline import SIZES, prompt_of

from ernie_accel.models.ministral.stand_in import enhancer_of

PROMPTS = 8
NEW_TOKENS = {"full": 256, "tiny": 8}
#: A chat template like the published one: "Output:" ends the user's turn, and no generation prompt follows.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@dataclass(frozen=True)
class Part:
    """One way to do one part.

    Attributes:
        what: What it is.
        change: Makes the stock pipe do it.
        measure: (pipe, job) -> columns of the row; "out", if there, is compared to that of the group's first.
        exact: (pipe, job) -> what "out" would be without rounding, if that can be had; asked of the group's first.
    """

    what: str
    change: Change
    measure: Callable[[Any, Job], dict[str, Any]]
    exact: Callable[[Any, Job], torch.Tensor] | None = None


def decode_ms(pipe: Any, job: Job) -> dict[str, Any]:
    """Time the VAE's decoder on the latents of one picture."""
    latents = _latents(pipe, job)
    return _timed(lambda: pipe.vae.decode(latents, return_dict=False)[0], 20, job)


def decode_float32(pipe: Any, job: Job) -> torch.Tensor:
    """Return the pictures of the same latents by the same weights in float32, with no faster products than that."""
    latents = _latents(pipe, job).float()
    with torch.backends.cudnn.flags(allow_tf32=False):
        out: torch.Tensor = pipe.vae.float().decode(latents, return_dict=False)[0]
    return out


def _latents(pipe: Any, job: Job) -> torch.Tensor:
    side, channels = job.pixels[0] // pipe.vae_scale_factor * 2, pipe.vae.config.latent_channels
    generator = torch.Generator().manual_seed(7)
    return torch.randn(1, channels, side, side, generator=generator).to(job.device, torch.bfloat16)


def encode_ms(pipe: Any, job: Job) -> dict[str, Any]:
    """Time the encoding of eight prompts of 128 tokens, as the pipeline asks for it."""
    prompts = [prompt_of(TEXT_TOKENS, seed) for seed in range(PROMPTS)]
    device = torch.device(job.device)
    return _timed(lambda: torch.stack(pipe.encode_prompt(prompts, device)), 10, job)


def encode_one_ms(pipe: Any, job: Job) -> dict[str, Any]:
    """Time the encoding of one prompt of 128 tokens, as the pipeline asks for it."""
    prompt, device = prompt_of(TEXT_TOKENS), torch.device(job.device)
    return _timed(lambda: torch.stack(pipe.encode_prompt(prompt, device)), 10, job)


def enhance_part_ms(pipe: Any, job: Job) -> dict[str, Any]:
    """Time the enhancing of one prompt."""
    return enhance_ms(pipe, NEW_TOKENS[job.size])


def enhance_ms(pipe: Any, new_tokens: int) -> dict[str, Any]:
    """Time the pipeline's prompt enhancer, through the method that its call uses, for exactly `new_tokens` tokens."""
    device = next(pipe.pe.parameters()).device
    with exactly(pipe, new_tokens):
        row = _timed_alone(lambda: pipe._enhance_prompt_with_pe(prompt_of(16), device))
    return row | {"ms_per_token": row["ms"] / new_tokens}


def enhance_eight_ms(pipe: Any, job: Job) -> dict[str, Any]:
    """Time the enhancing of the prompts of a call with eight; the time of a token is that of all eight."""
    device, requests = next(pipe.pe.parameters()).device, [prompt_of(16, seed) for seed in range(PROMPTS)]
    stand_in = enhancer_of(pipe)
    arguments: dict[str, Any] = {"prompt": requests, "prompt_embeds": None, "use_pe": True, "generator": None}
    arguments |= {"num_images_per_prompt": 1, "width": 1024, "height": 1024}

    def enhance() -> None:
        if stand_in is None:
            for request in requests:
                pipe._enhance_prompt_with_pe(request, device)
        else:
            stand_in.around(lambda given: pipe._enhance_prompt_with_pe(requests[0], device), arguments)

    with exactly(pipe, NEW_TOKENS[job.size]):
        row = _timed_alone(enhance)
    return row | {"ms_per_token": row["ms"] / NEW_TOKENS[job.size]}


def picture_ms(pipe: Any, job: Job) -> dict[str, Any]:
    """Time a whole picture with prompt enhancer, whose text is then taken to be one of 128 tokens."""
    side = job.pixels[0]
    with exactly(pipe, NEW_TOKENS[job.size], then=prompt_of(TEXT_TOKENS)):
        return _timed_alone(
            lambda: pipe(
                prompt_of(16), height=side, width=side, num_inference_steps=STEPS, guidance_scale=1.0, output_type="pt"
            )
        )


@contextlib.contextmanager
def exactly(pipe: Any, new_tokens: int, then: str | None = None) -> Iterator[None]:
    """Let a pipe's enhancer write exactly `new_tokens` tokens for every prompt in a with-block, or raise.

    No token ends the text, and the pipeline asks for as many as the tokenizer's ``model_max_length``. What the
    enhancer hands to the tokenizer's ``decode`` is counted.

    Args:
        pipe: A pipeline with prompt enhancer.
        new_tokens: How many.
        then: What the tokens are decoded to; default: what they stand for.
    """
    tokenizer = pipe.pe_tokenizer
    tokenizer.model_max_length = new_tokens
    tokenizer.eos_token = None
    pipe.pe.generation_config.eos_token_id = None
    counted: list[int] = []
    decode = tokenizer.decode

    def counting(ids: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(ids))
        return decode(ids, *args, **kwargs) if then is None else then

    tokenizer.decode = counting
    try:
        yield
    finally:
        del tokenizer.decode
    if set(counted) != {new_tokens}:
        raise RuntimeError(f"asked for {new_tokens} new tokens, got {sorted(set(counted))}")


def add_enhancer(pipe: Any, size: str) -> None:
    """Give a random pipeline a prompt enhancer of the published architecture, with random weights, in place."""
    from transformers import Ministral3Config, Ministral3ForCausalLM

    device, before = next(pipe.transformer.parameters()).device, torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            enhancer = Ministral3ForCausalLM(Ministral3Config(**SIZES[size]["text"], tie_word_embeddings=True))
    finally:
        torch.set_default_dtype(before)
    tokenizer = type(pipe.tokenizer)(
        tokenizer_object=pipe.tokenizer.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    enhancer.to(device, torch.bfloat16).eval().requires_grad_(False)
    pipe.register_modules(pe=enhancer, pe_tokenizer=tokenizer)


def _channels_last(pipe: Any, cache: str) -> None:
    pipe.vae.to(memory_format=torch.channels_last)


def _fp8_enhancer(package: Any) -> list[Any]:
    quantize = package.Quantize("fp8-weight-only", components=("pe",), keep_originals=False)
    return [quantize, package.RewriteEnhancer()]


#: "<part>: <way>" -> how it is done; the first of each part is stock, which the others are compared to. A rung of
#: another transform is one line: "enhancer: name": Part("what", optimized(lambda a, _: [a.Name()]), enhance_part_ms).
PARTS: dict[str, Part] = {
    "vae: stock": Part("VAE decode, diffusers as it is", leave, decode_ms, decode_float32),
    "vae: channels_last": Part("VAE decode, stock with channels-last weights", _channels_last, decode_ms),
    "vae: CompileVae": Part("VAE decode, CompileVae", optimized(lambda a, _: [a.CompileVae()]), decode_ms),
    "vae: FuseVae": Part("VAE decode, FuseVae", optimized(lambda a, _: [a.FuseVae()]), decode_ms),
    "prompts: stock": Part("8 prompts encoded, the pipeline's loop", leave, encode_ms),
    "prompts: BatchPromptEncoding": Part(
        "8 prompts encoded, BatchPromptEncoding", optimized(lambda a, _: [a.BatchPromptEncoding()]), encode_ms
    ),
    "prompts: RewriteTextEncoder": Part(
        "8 prompts encoded, BatchPromptEncoding and RewriteTextEncoder",
        optimized(lambda a, _: [a.BatchPromptEncoding(), a.RewriteTextEncoder()]),
        encode_ms,
    ),
    "one prompt: stock": Part("one prompt encoded, diffusers as it is", leave, encode_one_ms),
    "one prompt: BatchPromptEncoding": Part(
        "one prompt encoded, BatchPromptEncoding", optimized(lambda a, _: [a.BatchPromptEncoding()]), encode_one_ms
    ),
    "one prompt: RewriteTextEncoder": Part(
        "one prompt encoded, RewriteTextEncoder", optimized(lambda a, _: [a.RewriteTextEncoder()]), encode_one_ms
    ),
    "enhancer: stock": Part("one prompt enhanced, diffusers as it is", leave, enhance_part_ms),
    "enhancer: RewriteEnhancer": Part(
        "one prompt enhanced, RewriteEnhancer", optimized(lambda a, _: [a.RewriteEnhancer()]), enhance_part_ms
    ),
    "enhancer: RewriteEnhancer fp8": Part(
        "one prompt enhanced, with fp8-weight-only", optimized(lambda a, _: _fp8_enhancer(a)), enhance_part_ms
    ),
    "8 prompts enhanced: stock": Part("8 prompts enhanced, the pipeline's loop", leave, enhance_eight_ms),
    "8 prompts enhanced: RewriteEnhancer": Part(
        "8 prompts enhanced, RewriteEnhancer", optimized(lambda a, _: [a.RewriteEnhancer()]), enhance_eight_ms
    ),
    "picture with enhancer: stock": Part("a picture with enhancer, diffusers as it is", leave, picture_ms),
    "picture with enhancer: turbo-bf16": Part(
        "a picture with enhancer, turbo-bf16", optimized(lambda a, _: [], "turbo-bf16"), picture_ms
    ),
    "picture with enhancer: turbo-fp8": Part(
        "a picture with enhancer, turbo-fp8",
        optimized(lambda a, _: [a.FuseKernels("fp8", keep_originals=False)], "turbo-fp8"),
        picture_ms,
    ),
    "picture with enhancer: turbo-fp8 and fp8 enhancer": Part(
        "a picture with enhancer, turbo-fp8 and the enhancer in fp8-weight-only",
        optimized(lambda a, _: [a.FuseKernels("fp8", keep_originals=False), *_fp8_enhancer(a)], "turbo-fp8"),
        picture_ms,
    ),
}


@torch.no_grad()
def measure_part(name: str, job: Job) -> dict[str, Any]:
    """Measure one part in this process."""
    part, group, pipe = PARTS[name], name.split(":")[0], job.pipeline()
    if "enhance" in group:
        add_enhancer(pipe, job.size)
    optimize_s = seconds(lambda: part.change(pipe, str(job.cache)))
    row = {"what": part.what, "group": group, "optimize_s": optimize_s, **part.measure(pipe, job)}
    out = row.pop("out", None)
    stock = job.folder / f"{group}.pt"
    if out is not None and name == f"{group}: stock":
        torch.save(out.cpu(), stock)
    elif out is not None and stock.exists():
        expected = torch.load(stock)
        row["is_stock"] = torch.equal(out.cpu(), expected)
        row["sqnr_to_stock_db"] = None if row["is_stock"] else sqnr_db(out, expected)  # JSON has no infinity
    exact = job.folder / f"{group}.float32.pt"
    if part.exact is not None:
        torch.save(part.exact(pipe, job).cpu(), exact)
    if out is not None and exact.exists():
        row["sqnr_db"] = sqnr_db(out, torch.load(exact))
    return row


def _timed_alone(step: Callable[[], object]) -> dict[str, Any]:
    """Time something that takes long, and gives nothing to compare, by itself."""
    row: dict[str, Any] = {"first_call_s": seconds(step)}
    reset_peak()
    row["ms"] = statistics.median(seconds(step) for _ in range(3)) * 1e3
    return row | {"peak_gb": peak_gb()}


def _timed(step: Callable[[], torch.Tensor], repeats: int, job: Job) -> dict[str, Any]:
    row: dict[str, Any] = {"first_call_s": seconds(step)}
    for _ in range(3):
        step()
    reset_peak()
    row |= {"ms": milliseconds(step, repeats), "peak_gb": peak_gb(), "out": step()}
    return row | ({"kernels": kernel_times(step)} if job.profile and CUDA else {})
