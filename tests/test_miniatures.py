"""Miniatures of other architectures: trained on what their pipelines feed, small, and put together from a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tools.embedded_model import architecture, miniatures, sensitivity
from tools.embedded_model.corpus import captioned_scenes
from tools.embedded_model.miniatures import MINIATURES, PROMPT_START, Miniature, patchify
from tools.embedded_model.parts import OPERANDS, attend, part_errors_db, parts_in_fp8
from tools.embedded_model.sensitivity import (
    Kept,
    by_kind,
    compared,
    computed,
    in_fp8,
    kept,
    kept_precise,
    layer_errors_db,
    linears_of,
    quick_on_cpu,
    rounded,
    wilson,
)
from tools.embedded_model.train import TOY, LatentPool, TrainingBatch, _Denoiser, _Gradients, train_denoiser

import ernie_accel
from ernie_accel import RewriteBlocks
from ernie_accel.core.undo import Undo
from ernie_accel.demo import load
from ernie_accel.demo.judge import ObjectVerdict, Verdict, adherence, summarize, unseen_prompts, verdicts
from ernie_accel.embedded.scenes import all_backgrounds
from ernie_accel.kernels.linear import Fp8Linear
from tests.pipelines import randomize

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
OTHERS = [miniature for miniature in MINIATURES.values() if not miniature.has_enhancer]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return architecture.build_tokenizer(architecture.corpus(0, 300), (PROMPT_START,))


@pytest.fixture(scope="module", params=OTHERS, ids=lambda miniature: miniature.name)
def saved(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A miniature with random weights, and the folder that it was saved to."""
    miniature, folder = request.param, tmp_path_factory.mktemp(request.param.name)
    parts = miniature.build_transformer(), miniature.build_text_encoder()
    for part in parts:
        randomize(part)
    miniatures.save(folder, *parts, tokenizer)
    return miniature, folder


def test_it_is_small_and_its_widths_suit_formats_of_four_bits(saved: tuple[Miniature, Path]) -> None:
    _, folder = saved
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 6_000_000
    assert not (folder / "vae").exists()
    for linear in miniatures.load(*reversed_arguments(saved)).transformer.modules():
        if isinstance(linear, torch.nn.Linear):
            assert linear.in_features % 32 == 0, linear


def reversed_arguments(saved: tuple[Miniature, Path]) -> tuple[Path, str]:
    return saved[1], saved[0].name


def test_the_trainer_computes_what_the_pipeline_does(saved: tuple[Miniature, Path]) -> None:
    """One step from noise to a picture is noise - velocity: of the same tokens, times and latents."""
    miniature, prompt = saved[0], "a red circle"
    pipe = miniatures.load(*reversed_arguments(saved))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 1, "guidance_scale": miniature.guidance_scale, "output_type": "latent"}
    got = pipe(prompt, height=128, width=128, latents=noise.clone(), **arguments).images
    tokens = torch.tensor([pipe.tokenizer(miniature.frame.around(prompt))["input_ids"]])
    with torch.no_grad():
        states = pipe.text_encoder(input_ids=tokens, output_hidden_states=True).hidden_states[-2]
        lengths = torch.tensor([tokens.shape[1]])
        velocity = miniature.velocity(pipe.transformer, noise, torch.ones(1), states, lengths)
    assert velocity.shape == noise.shape
    assert (got - (noise - velocity)).norm() < 1e-5 * noise.norm()
    encoded = pipe.encode_prompt("", do_classifier_free_guidance=True, negative_prompt=[""])
    negative = encoded[1][0] if isinstance(encoded[1], list) else encoded[2][0][encoded[3][0].bool()]
    assert len(negative) == len(pipe.tokenizer(miniature.frame.empty)["input_ids"])


def test_captions_stand_within_what_the_pipeline_writes(tokenizer: Any) -> None:
    for miniature in OTHERS:
        data = captioned_scenes(tokenizer, (128, 128), 3, 2, 0, miniature.frame)
        for row, length in zip(data.tokens.flatten(0, 1), data.lengths.flatten(), strict=True):
            text = tokenizer.decode(row[1:length])
            assert text.startswith(miniature.frame.before), text
            assert text.endswith(miniature.frame.after), text


@torch.no_grad()
def test_its_vae_is_the_embedded_one_with_the_statistics_inside() -> None:
    vae, embedded = MINIATURES["z-image"].build_vae().eval(), load(prompt_enhancer=False)
    pictures = embedded("red circle", height=128, width=128, num_inference_steps=2, output_type="pt", use_pe=False)
    pixels = pictures.images.to("cpu") * 2 - 1
    raw, mine = (each.encode(pixels).latent_dist for each in (embedded.vae, vae))
    assert (vae.decode(mine.mean).sample - embedded.vae.decode(raw.mean).sample).norm() < 1e-5 * pixels.norm()
    for_ernie = MINIATURES["ernie-image"].normalized(embedded.vae, raw.mean)
    assert torch.equal(MINIATURES["z-image"].normalized(vae, mine.mean), mine.mean)
    assert (patchify(mine.mean) - for_ernie).norm() < 0.2 * for_ernie.norm()
    ratio = (mine.logvar - raw.logvar)[0].flatten(1)
    assert (ratio - ratio[:, :1]).abs().max() < 1e-4  # the spread is scaled, too


@pytest.mark.parametrize("miniature", OTHERS, ids=lambda miniature: miniature.name)
def test_training_steps_are_faster_for_the_same_gradients(miniature: Miniature) -> None:
    torch.manual_seed(0)
    denoiser, found = _Denoiser(miniature), []
    randomize(denoiser)
    with Undo() as undo:
        for faster in (False, True):
            if faster:
                miniature.made_faster(denoiser.transformer, undo)
            denoiser.zero_grad()
            denoiser(Pool().batch.latents, torch.tensor([0.3, 0.8]), Pool().batch).square().mean().backward()
            found.append({name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None})
    undo()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


class Replayed:
    """Stands in for a CUDA graph: does the work again, and leaves the result where the first one is."""

    def __init__(self, work: Callable[[], torch.Tensor], result: torch.Tensor) -> None:
        self.work, self.result = work, result

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        self.result.copy_(self.work())


@pytest.mark.parametrize("miniature", OTHERS, ids=lambda miniature: miniature.name)
def test_replayed_gradients_are_those_of_each_batch(miniature: Miniature) -> None:
    torch.manual_seed(0)
    denoiser, captured = _Denoiser(miniature), []
    randomize(denoiser)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]

    def capture(work: Callable[[], torch.Tensor], pool: object) -> tuple[Replayed, torch.Tensor]:
        captured.append(work)
        result = work()
        return Replayed(work, result), result

    with Undo() as undo:
        miniature.made_faster(denoiser.transformer, undo)
        replayed = _Gradients(denoiser, parameters, "cpu", capture)
        for lengths in ((6, 4), (6, 5), (6, 2), (6, 3)):
            noisy, target = torch.randn(2, 2, 8, 8, 8).unbind(0)
            sigma, batch = torch.rand(2), TrainingBatch(noisy, torch.randint(5, 300, (2, 6)), torch.tensor(lengths))
            found = []
            for gradients in (replayed, _Gradients(denoiser, parameters, "cpu")):
                loss = gradients(noisy, sigma, target, batch).clone()
                found.append([loss, *(p.grad.clone() for p in parameters if p.grad is not None)])
            for mine, plain in zip(*found, strict=True):
                assert torch.equal(mine, plain)
    undo()
    assert len(captured) == 1  # all four are of one shape


def test_batches_of_a_bucket_are_of_one_shape(tokenizer: Any) -> None:
    miniature = MINIATURES["lumina2"]
    data = [captioned_scenes(tokenizer, (128, 128), 6, 3, 0, miniature.frame)]
    pool = LatentPool(
        miniature.build_vae(), data, replace(TOY, captions=3, dit_batch=3, empty_share=0.5), "cpu", miniature, [1]
    )
    longest: dict[int, set[int]] = {}
    for _ in range(12):
        batch = pool.draw()
        longest.setdefault(batch.tokens.shape[1], set()).add(int(batch.lengths.max()))
        assert batch.lengths.min() >= 1
    assert all(len(found) == 1 for found in longest.values()), longest


class Pool:
    """Draws the same batch, and can be interrupted."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.drawn, self.skipped, self.stop_at = 0, 0, stop_at
        torch.manual_seed(0)
        self.batch = TrainingBatch(torch.randn(2, 8, 8, 8), torch.randint(5, 300, (2, 6)), torch.tensor([6, 4]))

    def draw(self) -> TrainingBatch:
        if self.drawn == self.stop_at:
            raise KeyboardInterrupt
        self.drawn += 1
        return self.batch

    def skip(self, batches: int) -> None:
        self.skipped = batches


@pytest.mark.parametrize("miniature", OTHERS, ids=lambda miniature: miniature.name)
def test_training_goes_on_where_it_was_interrupted(miniature: Miniature, tmp_path: Path) -> None:
    recipe, file = replace(TOY, dit_steps=4, dit_batch=2, keep_every=2, ema=0.0), tmp_path / "unfinished.pt"
    torch.manual_seed(0)
    denoiser = _Denoiser(miniature)
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(denoiser, Pool(stop_at=3), recipe, file)
    kept = torch.load(file, weights_only=True)
    assert kept["step"] == 2
    again, pool = _Denoiser(miniature), Pool()
    train_denoiser(again, pool, recipe, file, resume=True)
    assert (pool.skipped, pool.drawn, file.exists()) == (2, 2, False)
    moved = [(a - b).abs().max() for a, b in zip(again.transformer.parameters(), kept["parameters"], strict=False)]
    assert 0 < max(moved) < 0.1  # two steps from what was kept, not from other random weights


def test_wilsons_interval_is_that_of_the_textbook() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 100)[0] == pytest.approx(0.9630, abs=1e-4)


def read_as(pictures: list[list[bool]]) -> list[Verdict]:
    """Verdicts on pictures of which these objects are right."""
    ground = all_backgrounds()[0]
    objects = [[ObjectVerdict("red", "ring", "small", 1.0, right, True, True) for right in each] for each in pictures]
    return [Verdict(tuple(each), ground, True, 0) for each in objects]


def test_what_is_kept_is_counted_object_by_object_and_drawn_again_picture_by_picture() -> None:
    before = read_as([[True, True]] * 99 + [[False, True]])
    after = read_as([[True, True]] * 90 + [[False, False]] * 9 + [[True, True]])
    of = kept(before, after)
    assert (of.right_in_both, of.lost, of.gained) == (181, 18, 1)
    assert of.share == pytest.approx(181 / 199)
    assert of.right_ratio == pytest.approx(182 / 199)
    # Nine pictures in a hundred are lost: 3 by the binomial; were objects drawn, 18 in 200, 4.1 of them.
    for low, high in (of.interval, of.right_ratio_interval):
        assert 0.5 * (high - low) == pytest.approx(1.96 * 0.09**0.5 * 0.91**0.5 / 10, rel=0.1)
    same = kept(before, before)
    assert same[1:] == (0, 0, (1.0, 1.0), (1.0, 1.0)) and same.share == same.right_ratio == 1.0
    assert kept(before, after) == of  # the same numbers each time


def test_what_is_gained_makes_up_for_losses_in_the_ratio_and_is_not_kept() -> None:
    left, right = [[True, False]] * 50, [[False, True]] * 50
    of = kept(read_as(left + left), read_as(left + right))
    assert (of.share, of.right_ratio) == (0.5, 1.0)
    assert of.interval.high < 0.65 and of.right_ratio_interval == (1.0, 1.0)
    more = kept(read_as(left + right), read_as([[True, True]] * 60 + [[False, False]] * 40))
    assert (more.share, more.right_ratio) == (0.6, 1.2)
    assert more.interval.high < 0.75 and more.right_ratio_interval.high > 1.2


@pytest.mark.parametrize("file", sorted(RESULTS.glob("kept_*.json")), ids=lambda file: file.stem)
def test_results_say_what_follows_from_their_counts(file: Path) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))["compared"]
    reference = found["ways"][found["compared_with"]]
    for way in found["ways"].values():
        of = way["kept"]
        assert Kept(**{name: of[name] for name in Kept._fields if name in of}).as_json() == of
        assert of["right_ratio"] == pytest.approx(way["right"] / reference["right"], abs=1e-12)
        low, high = of["right_ratio_interval"]
        assert low <= of["right_ratio"] <= high


def test_ways_to_compute_are_compared_on_the_same_pictures(
    saved: tuple[Miniature, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> Any:
        pipe = miniatures.load(*reversed_arguments(saved))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    call = {"steps": 1, "guidance_scale": saved[0].guidance_scale}
    found = compared(load, ("float32", "kernels-fp8"), 2, **call)
    first, second = found["ways"].values()
    assert found["prompts"] == 2 and found["compared_with"] == "float32"
    assert first["kept"]["lost"] == first["kept"]["gained"] == 0
    assert set(second["kept"]) == {*Kept._fields, "share", "right_ratio"}
    scenes = [scene for _, scene in unseen_prompts(2)]
    assert first["objects"] == second["objects"] == sum(len(scene.objects) for scene in scenes)
    assert summarize(verdicts(load(), 2, **call), scenes) == adherence(load(), 2, **call)
    assert "| kernels-fp8 |" in capsys.readouterr().out


def test_a_way_to_compute_has_options(saved: tuple[Miniature, Path]) -> None:
    def blocks(way: str) -> Any:
        return computed(miniatures.load(*reversed_arguments(saved)), way).transformer.layers

    def in_fp8_of(block: Any) -> list[bool]:
        return [
            isinstance(part, Fp8Linear) for part in block.modules() if isinstance(part, Fp8Linear | torch.nn.Linear)
        ]

    plain, kept_one, attends = (blocks(f"kernels-fp8{one}") for one in ("", "@keep=layers[.]0[.]", "@attention=bf16"))
    assert any(in_fp8_of(plain[0])) and not any(in_fp8_of(kept_one[0]))
    assert in_fp8_of(kept_one[1]) == in_fp8_of(plain[1]) == in_fp8_of(attends[1])
    assert plain[1].has_fp8_attention and not attends[1].has_fp8_attention


def test_convolutions_in_float16_are_rounded_from_float32_on_a_cpu() -> None:
    torch.manual_seed(0)
    vae = torch.nn.Sequential(torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.Conv2d(32, 4, 1)).requires_grad_(False)
    x = torch.randn(1, 4, 9, 9)
    pipe, plain = SimpleNamespace(vae=vae), vae(x)
    assert torch.equal(quick_on_cpu(pipe).vae(x), plain) and "forward" not in vars(vae[0])
    want = vae.half()(x.half())
    got = quick_on_cpu(pipe).vae(x.half())
    assert "forward" in vars(vae[0]) and got.dtype == torch.float16
    assert (got.float() - want.float()).norm() < 1e-3 * want.float().norm()
    assert (got.float() - plain).norm() > 1e-4 * plain.norm()  # rounded


def test_layers_are_rounded_as_fp8_does_and_given_back() -> None:
    linear, x = torch.nn.Linear(32, 8).requires_grad_(False), torch.randn(2, 3, 32)
    before, want = linear.weight.clone(), linear(x)
    with in_fp8([linear]):
        assert torch.equal(linear.weight, rounded(before))
        assert torch.equal(linear(x), torch.nn.functional.linear(rounded(x), rounded(before), linear.bias))
        assert 0.005 < (linear(x) - want).norm() / want.norm() < 0.1
    assert torch.equal(linear.weight, before)
    assert torch.equal(linear(x), want)
    assert rounded(torch.zeros(1, 4)).eq(0).all()
    assert (rounded(x) - x).abs().max() <= x.abs().max() / 16  # three bits of mantissa


def test_every_layer_has_an_error_and_the_kinds_are_sorted(
    saved: tuple[Miniature, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ("layers.0.*.to_q", "layers.1.*.to_q", "layers.1.*.to_v", "cap_embedder.1", "*caption_embedder.1")

    def few(pipe: Any) -> dict[str, Any]:
        return {path: each for path, each in linears_of(pipe).items() if any(fnmatch(path, one) for one in wanted)}

    monkeypatch.setattr(sensitivity, "linears_of", few)
    pipe = miniatures.load(*reversed_arguments(saved))
    pipe.set_progress_bar_config(disable=True)
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    errors = layer_errors_db(pipe, 1, saved[0].guidance_scale, prompts=1)
    assert len(errors) == len(by_kind(errors)) + 1 == 4
    assert all(-200 < error < 0 for error in errors.values())
    worst = [error for error, _ in by_kind(errors).values()]
    assert worst == sorted(worst, reverse=True)
    assert worst[0] == max(errors.values())
    assert len(kept_precise(pipe)) == 1
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())


@torch.no_grad()
def test_attention_is_rounded_operand_by_operand(saved: tuple[Miniature, Path]) -> None:
    pipe = ernie_accel.optimize(miniatures.load(*reversed_arguments(saved)), RewriteBlocks())
    attention = pipe.transformer.layers[0].attention_part
    heads, size = attention.heads, len(attention.norm_q.weight)
    q, k, v = (torch.randn(2, 9, n, size) for n in (heads, heads, heads))
    mask = (torch.arange(9) < torch.tensor([[9], [5]]))[:, None, None]
    want = attention.attend(q, k, v, mask)
    for mixes in (False, True):
        torch.testing.assert_close(attend(q, k, v, mask, of=set(), mixes=mixes), want, rtol=1e-4, atol=1e-5)
    for operand in OPERANDS:
        assert 0.001 < (attend(q, k, v, mask, of={operand}, mixes=True) - want).norm() / want.norm() < 0.2
    with parts_in_fp8(pipe, operands={"keys"}, within="layers"):
        assert torch.equal(attention.attend(q, k, v, mask), attend(q, k, v, mask, of={"keys"}, mixes=True))
        assert "attend" not in vars(pipe.transformer.noise_refiner[0].attention_part)
    assert torch.equal(attention.attend(q, k, v, mask), want)


def test_every_part_of_fp8_has_an_error_and_leaves_nothing_behind(saved: tuple[Miniature, Path]) -> None:
    pipe = miniatures.load(*reversed_arguments(saved))
    pipe.set_progress_bar_config(disable=True)
    errors = part_errors_db(pipe, 2, saved[0].guidance_scale, prompts=1)
    assert len(errors.pop("by step")) == 2
    assert {name.split(":")[0] for name in errors} == {
        "all",
        "all, queries and keys not mixed",
        "products",
        "attention",
        "attention, not mixed",
        "block",
    }
    assert all(-120 < error < 0 for error in errors.values())
    parts = [error for name, error in errors.items() if not name.startswith("all")]
    assert errors["all"] > max(parts) - 1.5  # errors of two halves add up, and seldom cancel
    again = part_errors_db(pipe, 2, saved[0].guidance_scale, prompts=1)
    assert again["products"] == errors["products"]


def test_the_judge_reads_pictures_of_every_miniature(saved: tuple[Miniature, Path]) -> None:
    pipe = miniatures.load(*reversed_arguments(saved))
    pipe.set_progress_bar_config(disable=True)
    found = adherence(pipe, 1, steps=1, guidance_scale=saved[0].guidance_scale)
    assert found.pictures == 1
