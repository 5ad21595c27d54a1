"""Other libraries' ways to the same end, as their documentation gives them, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.utils
from ladder_measures import STEPS, Job, denoised, inputs_for, milliseconds, peak_gb, reset_peak, seconds, sqnr_db
from ladder_measures import weight_gb as weights
from ladder_rungs import RUNGS


@dataclass(frozen=True)
class Peer:
    """One recipe.

    Attributes:
        what: What it is.
        change: Changes a stock pipe in place.
        compiles: Compile the blocks afterwards, and stay eager where that fails.
        approximate: It leaves work out depending on the steps before, so only a whole picture can be timed.
    """

    what: str
    change: Callable[[Any], None]
    compiles: bool = True
    approximate: bool = False


def _rung(name: str) -> Peer:
    what, change = RUNGS[name]
    return Peer(what, lambda pipe: change(pipe, ""), compiles=False)


def _sdnq(weights_dtype: str, **options: Any) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        from sdnq import sdnq_post_load_quant

        pipe.transformer = sdnq_post_load_quant(
            pipe.transformer, weights_dtype=weights_dtype, torch_dtype=torch.bfloat16, **options
        )

    return change


def _quantized(scheme: str, backend: str) -> Callable[[Any], None]:
    """Quantize through this package: the peer's layers and kernels, with the same layers left out as everywhere."""

    def change(pipe: Any) -> None:
        import ernie_accel

        ernie_accel.optimize(pipe, ernie_accel.Quantize(scheme, backend=backend, keep_originals=False))

    return change


def _cache_dit(**options: Any) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        import cache_dit

        if len(pipe.transformer.layers) <= cache_dit.DBCacheConfig().Fn_compute_blocks:  # the tiny model
            options["Fn_compute_blocks"] = 1
        cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**options))

    return change


PEERS: dict[str, Peer] = {
    **{name: _rung(name) for name in ("stock", "stock+compile", "turbo-bf16", "turbo-fp8")},
    "torchao-fp8": Peer("torchao fp8 per row, weights and activations", _quantized("fp8", "torchao")),
    "torchao-int8": Peer("torchao int8 per row, weights and activations", _quantized("int8", "torchao")),
    "sdnq-fp8": Peer("SDNQ float8_e4m3fn, quantized products", _sdnq("float8_e4m3fn", use_quantized_matmul=True)),
    "sdnq-int8": Peer("SDNQ int8, quantized products", _sdnq("int8", use_quantized_matmul=True)),
    "sdnq-uint4": Peer("SDNQ uint4, quantized products", _sdnq("uint4", use_quantized_matmul=True)),
    "quanto-qint8": Peer("quanto qint8, weights only", _quantized("int8-weight-only", "quanto")),
    "quanto-qfloat8": Peer("quanto qfloat8, weights only", _quantized("fp8-weight-only", "quanto")),
    "bnb-int8": Peer("bitsandbytes LLM.int8", _quantized("int8", "bitsandbytes")),
    "bnb-nf4": Peer("bitsandbytes nf4, weights only", _quantized("nf4", "bitsandbytes")),
    "cache-dit": Peer("cache-dit's defaults (8 steps of warm-up), bf16", _cache_dit(), approximate=True),
    "cache-dit warm-up 2": Peer(
        "cache-dit with 2 steps of warm-up, bf16", _cache_dit(max_warmup_steps=2), approximate=True
    ),
}


@torch.no_grad()
def measure_peer(name: str, job: Job) -> dict[str, Any]:
    """Measure one recipe in this process: a step alone, a step on average in a picture, memory and fidelity."""
    peer, pipe, main = PEERS[name], job.pipeline(), job.pixels[0]
    row: dict[str, Any] = {"what": peer.what, "approximate": peer.approximate}
    row["optimize_s"] = seconds(lambda: peer.change(pipe))
    row["weight_gb"] = weights(pipe.transformer)
    arguments, expected = inputs_for(pipe, main), torch.load(job.reference)

    def predict() -> torch.Tensor:
        out: torch.Tensor = pipe.transformer(**arguments)[0]
        return out

    def first() -> torch.Tensor:
        return denoised(pipe, main) if peer.approximate else predict()

    if peer.compiles:
        row |= _compile(pipe, first)
    if "first_call_s" not in row:
        row["first_call_s"] = seconds(first)
    if not peer.approximate:
        for _ in range(2):
            predict()
        reset_peak()
        row["ms"] = milliseconds(predict, 20)
        row["peak_gb"] = peak_gb()
        row["sqnr_db"] = sqnr_db(predict(), expected["prediction"])
    denoised(pipe, main)
    reset_peak()
    latents: list[torch.Tensor] = []
    row["picture_step_ms"] = milliseconds(lambda: latents.append(denoised(pipe, main)), 3) / STEPS
    row.setdefault("peak_gb", peak_gb())
    row["latents_db"] = sqnr_db(latents[-1], expected["latents"])
    row["compiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    return row


def _compile(pipe: Any, first: Callable[[], object]) -> dict[str, Any]:
    """Compile the blocks and time the first call; where that fails, leave them eager and say why."""
    try:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
        first_call_s = seconds(first)
    except Exception as error:  # whatever a peer's layers raise inside a compiler is the result here
        for block in pipe.transformer.modules():
            block._compiled_call_impl = None
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return {"not_compiled": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]}
    return {"first_call_s": first_call_s}
