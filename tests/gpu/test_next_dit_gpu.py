"""Z-Image's and Lumina 2's fast path on a GPU: rewriting, kernels and graphs predict what stock predicts.

Blocks have the width, the heads and the feed-forward of the published models, and few layers. Errors are printed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel import BatchGuidance, CaptureGraphs, FuseKernels, RewriteBlocks
from ernie_accel.core.transform import ROUNDING_REL
from ernie_accel.models.guided_forward import GuidedForward
from tests.own_newbie import NextDiT_CLIP, tiny_own_newbie
from tests.pipelines import picture, tiny_lumina2, tiny_z_image


@cache
def z_image() -> Any:
    """Z-Image-Turbo's sizes."""
    from diffusers import ZImageTransformer2DModel

    return placed(lambda: ZImageTransformer2DModel(n_layers=3, n_refiner_layers=1, cap_feat_dim=32))


@cache
def lumina2() -> Any:
    """NewBie-image's sizes."""
    from diffusers import Lumina2Transformer2DModel

    return placed(
        lambda: Lumina2Transformer2DModel(
            hidden_size=2304,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=24,
            num_kv_heads=8,
            in_channels=16,
            cap_feat_dim=32,
        )
    )


@cache
def own_newbie() -> Any:
    """NewBie-image's sizes in the manner of its authors' code."""
    return placed(
        lambda: NextDiT_CLIP(
            in_channels=16,
            dim=2304,
            n_layers=3,
            n_heads=24,
            n_kv_heads=8,
            hidden_dim=9216,
            axes_dims=(32, 32, 32),
            axes_lens=(1024, 512, 512),
            clip_text_dim=1024,
        )
    )


def placed(make: Callable[[], Any]) -> Any:
    """Return a transformer in bfloat16, made on the GPU with weights of the size that training leaves."""
    with torch.device("cuda"):
        transformer = make()
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)
    return transformer.to(torch.bfloat16).eval().requires_grad_(False)


def pipe_of(name: str) -> Any:
    """Return a new pipe on the GPU with a copy of the family's transformer."""
    pipe = {"z_image": tiny_z_image, "lumina2": tiny_lumina2, "own_newbie": tiny_own_newbie}[name]()
    pipe.register_modules(transformer=copy.deepcopy(FAMILIES[name]()))
    return pipe.to("cuda")


FAMILIES = {"z_image": z_image, "lumina2": lumina2, "own_newbie": own_newbie}
every_family = pytest.mark.parametrize("name", FAMILIES)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def predict(pipe: Any, name: str, tokens: tuple[int, ...] = (77,), side: int = 64, step: int = 0) -> torch.Tensor:
    """Return the prediction [B, C, H, W] for pictures of 8 * `side` pixels and prompts of so many tokens."""
    rows, channels = len(tokens), 16
    time = torch.full((rows,), 0.3 + 0.1 * step, device="cuda", dtype=torch.bfloat16)
    noise = rand(rows, channels, side, side, seed=step)
    captions = [rand(count, 32, seed=count) for count in tokens]
    with torch.no_grad():
        if name != "z_image":
            text = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)
            text = torch.nn.functional.pad(text, (0, 0, 0, 256 - text.shape[1]))  # as the pipeline does
            mask = (torch.arange(256) < torch.tensor(tokens)[:, None]).long().cuda()
            if name == "own_newbie":
                pooled = rand(rows, 1024, seed=step)
                return pipe.transformer(noise, time, text, mask, clip_text_pooled=pooled).float()  # type: ignore[no-any-return]
            return pipe.transformer(noise, time, text, mask, return_dict=False)[0].float()  # type: ignore[no-any-return]
        out = pipe.transformer(list(noise.unsqueeze(2)), time, captions, return_dict=False)[0]
        return torch.stack(list(out)).squeeze(2).float()


def error(got: torch.Tensor, expected: torch.Tensor, what: str) -> float:
    assert torch.isfinite(got).all(), what
    found = float((got - expected).norm() / expected.norm())
    print(f"\n{what}: rel. error {found:.2e}, largest {float((got - expected).abs().max()):.2e} of "
          f"{float(expected.abs().max()):.2e}", end=" ")  # fmt: skip
    return found


BATCHES = {"one": (77,), "32": (32,), "unequal": (77, 20), "equal": (64, 64)}
batches = pytest.mark.parametrize("tokens", BATCHES.values(), ids=BATCHES)


@every_family
@batches
def test_rewritten_blocks_only_round(name: str, tokens: tuple[int, ...]) -> None:
    pipe = pipe_of(name)
    expected = predict(pipe, name, tokens)
    ernie_accel.optimize(pipe, RewriteBlocks())
    assert error(predict(pipe, name, tokens), expected, f"{name} rewritten {tokens}") < ROUNDING_REL["bfloat16"]
    ernie_accel.restore(pipe)
    assert torch.equal(predict(pipe, name, tokens), expected)


@every_family
@batches
@pytest.mark.parametrize(("precision", "attention"), [("bf16", "auto"), ("fp8", "bf16"), ("fp8", "auto")])
def test_kernels_keep_their_floor(name: str, tokens: tuple[int, ...], precision: str, attention: str) -> None:
    pipe = pipe_of(name)
    expected = predict(pipe, name, tokens)
    fuse = FuseKernels(precision, attention=attention)
    ernie_accel.optimize(pipe, RewriteBlocks(), fuse)
    found = error(predict(pipe, name, tokens), expected, f"{name} {fuse} {tokens}")
    assert found < 10 ** (-fuse.floor_db / 20)


@every_family
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_replays_are_bitwise_the_same_for_many_prompt_lengths(name: str, precision: str) -> None:
    pipe = pipe_of(name)
    ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels(precision), CaptureGraphs())
    graphed = pipe.transformer.forward
    for tokens in ((20,), (31,), (77,), (20, 31)):
        for step in range(3):
            got = predict(pipe, name, tokens, side=32, step=step)
            pipe.transformer.forward = graphed.inner
            expected = predict(pipe, name, tokens, side=32, step=step)
            pipe.transformer.forward = graphed
            # Without a graph bf16 attention gets no lengths where nothing pads, and may round otherwise.
            assert error(got, expected, f"{name} {precision} replayed {tokens}") < 0.02
    print(f"\n{len(graphed._graphs)} graphs for four batches")
    assert len(graphed._graphs) <= 3


@every_family
def test_compiled_rewritten_blocks_only_round(name: str) -> None:
    pipe = pipe_of(name)
    expected = predict(pipe, name)
    ernie_accel.optimize(pipe, RewriteBlocks(), ernie_accel.Compile())
    assert error(predict(pipe, name), expected, f"{name} compiled") < ROUNDING_REL["bfloat16"]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("side", [256, 1024])
def test_guidance_as_one_batch_draws_what_two_calls_draw(
    precision: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse, batches, join = FuseKernels(precision), [], GuidedForward._joined
    monkeypatch.setattr(GuidedForward, "_joined", lambda *given: batches.append(1) or join(*given))
    drawn = []
    for more in ((), (BatchGuidance(),)):
        pipe = pipe_of("lumina2").to(torch.bfloat16)
        ernie_accel.optimize(pipe, RewriteBlocks(), fuse, CaptureGraphs(), *more)
        call = {"height": side, "width": side, "guidance_scale": 2.0, "negative_prompt": "a small square"}
        drawn.append(picture(pipe, steps=4, output_type="latent", **call))
    assert len(batches) == 4
    found = error(drawn[1], drawn[0], f"{fuse} guided at {side}")
    assert found < (ROUNDING_REL["bfloat16"] if precision == "bf16" else 10 ** (-fuse.floor_db / 20))


def controlnet_beside(transformer: Any) -> Any:
    """Return a ControlNet that shares the refiners of a Z-Image transformer, as diffusers' pipeline makes it."""
    from diffusers import ZImageControlNetModel

    def make() -> Any:
        return ZImageControlNetModel(
            control_layers_places=[0, 2], control_refiner_layers_places=[0], control_in_dim=16, n_refiner_layers=1
        )

    torch.manual_seed(0)  # of biases
    return ZImageControlNetModel.from_transformer(placed(make), transformer)


def predict_controlled(pipe: Any, net: Any) -> torch.Tensor:
    """Return the prediction of one step, in which the ControlNet comes first."""
    x, caption, control = rand(16, 1, 64, 64), rand(77, 32, seed=77), rand(16, 1, 64, 64, seed=9)
    time = torch.full((1,), 0.3, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        samples = net([x], time, [caption], [control], conditioning_scale=0.8)
        out = pipe.transformer([x], time, [caption], controlnet_block_samples=samples, return_dict=False)[0]
    return torch.stack(list(out)).squeeze(2).float()


@pytest.mark.parametrize("how", ["bf16", "fp8", "fp8 in graphs", "compiled"])
def test_a_controlnet_and_its_transformer_see_each_change_of_a_lora(how: str) -> None:
    """A ControlNet runs the refiners earlier in the step than the transformer does."""
    stock, pipe = pipe_of("z_image"), pipe_of("z_image")
    nets = {id(each): controlnet_beside(each.transformer) for each in (stock, pipe)}
    precision, graphs = how.split()[0], how.endswith("graphs")
    last = ernie_accel.Compile() if how == "compiled" else FuseKernels(precision)
    ernie_accel.optimize(pipe, RewriteBlocks(), last, *((CaptureGraphs(),) if graphs else ()))
    bound = ROUNDING_REL["bfloat16"] if how == "compiled" else 10 ** (-last.floor_db / 20)
    seen: list[torch.Tensor] = []

    def same(what: str) -> None:
        seen.append(predict_controlled(stock, nets[id(stock)]))
        for _ in range(3 if graphs else 1):  # the second step is captured, the third a replay
            got = predict_controlled(pipe, nets[id(pipe)])
        assert not graphs or len(pipe.transformer.forward._graphs) == 1
        found = error(got, seen[-1], f"ControlNet, {how}, {what}")
        assert found < bound
        if len(seen) > 1:
            assert found < 0.6 * error(got, seen[-2], "from what it was before")

    same("without")
    weights = lora_of(stock.transformer)
    for name, change in (
        ("loaded", lambda each: each.load_lora_weights(dict(weights), adapter_name="a")),
        ("scaled", lambda each: each.set_adapters(["a"], [-0.5])),
        ("off", lambda each: each.disable_lora()),
    ):
        for each in (stock, pipe):
            change(each)
        same(name)


def lora_of(transformer: Any) -> dict[str, torch.Tensor]:
    """Return a LoRA for all linear layers of the blocks and refiners, half as large as each weight."""
    generator, tensors = torch.Generator("cuda").manual_seed(1), {}
    for path, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and path.split(".")[0] in ("layers", "noise_refiner", "context_refiner"):
            down, up = (torch.randn(shape, device="cuda", generator=generator) for shape in lora_shapes(layer))
            scale = 0.5 * layer.weight.float().norm() / (up @ down).norm()
            tensors |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up * scale}
    return tensors


def lora_shapes(layer: torch.nn.Linear, rank: int = 16) -> tuple[tuple[int, int], tuple[int, int]]:
    return (rank, layer.in_features), (layer.out_features, rank)
