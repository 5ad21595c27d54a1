"""`evaluate` compares like with like, excludes the warm-up, fails what is not finite, and gives the pipe back."""

from __future__ import annotations

import json
import math
import mmap
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

import ernie_accel
from ernie_accel import CallDefaults, CastDtype, MakeContiguous, Quantize, SliceVae, SwapScheduler, Thresholds
from ernie_accel.fidelity.render import PeakMemory, render
from tests.examples import differences, snapshot
from tests.pipelines import PIPELINES, picture, tiny_ernie, tiny_flux

PROMPTS = ["a red circle", "a big blue square on red"]
CAST = f"CastDtype('bfloat16') (lossy, >= {CastDtype('bfloat16').floor_db:g} dB)"
SMALL = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 1.0}


def evaluate(baseline, candidate, prompts=PROMPTS, **options):
    return ernie_accel.evaluate(baseline, candidate, prompts, **(SMALL | options))


# Like with like -------------------------------------------------------------------------------------------------------


def test_a_pipe_against_itself_is_equal_bit_for_bit(ernie):
    found = evaluate(ernie, tiny_ernie())
    assert found.ok
    assert found.total.nmse == 0
    assert found.total.psnr_db == found.total.sqnr_db == math.inf
    assert found.total.ssim == pytest.approx(1)
    assert all(torch.equal(p.baseline.image, p.candidate.image) for p in found.pictures)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "flux"])
def test_every_family_can_be_evaluated(name):
    call = {} if name == "ernie" else {"max_sequence_length": 48}
    found = evaluate(PIPELINES[name](), CastDtype("bfloat16"), call=call)
    assert found.ok
    assert 20 < found.total.sqnr_db < 80
    assert found.baseline.steps == found.candidate.steps == 3


def test_the_baseline_is_drawn_from_the_seed_as_anyone_would(ernie):
    found = evaluate(ernie, SliceVae(), seed=5)
    assert [p.seed for p in found.pictures] == [5, 6]
    for prompt, compared in zip(PROMPTS, found.pictures, strict=True):
        assert torch.equal(compared.baseline.image, picture(ernie, prompt=prompt, seed=compared.seed)[0])


def test_another_dtype_starts_from_the_same_noise(ernie):
    """Drawn in bfloat16, the same seed gives other noise, and the comparison would be of two pictures."""
    found = evaluate(ernie, CastDtype("bfloat16"))
    for compared in found.pictures:
        assert compared.candidate.start.dtype == torch.bfloat16
        assert torch.equal(compared.candidate.start, compared.baseline.start.bfloat16())
    assert found.total.sqnr_db > 25


def test_a_stochastic_sampler_is_compared_on_the_same_noise_too(ernie):
    ernie_accel.optimize(ernie, SwapScheduler("lcm"))
    assert evaluate(ernie, CastDtype("bfloat16")).total.sqnr_db > 20


def test_the_figures_are_those_of_the_pictures(ernie):
    found = evaluate(ernie, CastDtype("bfloat16"))
    errors = [(p.candidate.image - p.baseline.image).double().square() for p in found.pictures]
    signal = sum(p.baseline.image.double().square().sum() for p in found.pictures)
    assert found.total.nmse == pytest.approx((sum(e.sum() for e in errors) / signal).item())
    assert found.total.psnr_db == pytest.approx(-10 * math.log10(torch.stack(errors).mean().item()))
    assert found.total.ssim == pytest.approx(sum(p.fidelity.ssim for p in found.pictures) / 2)


def test_different_steps_are_said_to_be_another_picture_by_design(ernie):
    other = ernie_accel.optimize(tiny_ernie(), CallDefaults(num_inference_steps=2))
    ernie_accel.optimize(ernie, CallDefaults(num_inference_steps=4))
    found = ernie_accel.evaluate(ernie, other, PROMPTS[0], height=64, width=64, guidance_scale=1.0)
    assert (found.baseline.steps, found.candidate.steps) == (4, 2)
    assert "4 and 2 steps: the candidate draws another picture by design" in found.notes
    assert "Note: 4 and 2 steps" in str(found)


def test_pipes_of_different_latents_are_refused(ernie):
    with pytest.raises(ernie_accel.ErnieAccelError, match="latents of different shapes"):
        evaluate(ernie, PIPELINES["z_image"]())


def test_a_pipeline_of_an_unknown_family_is_compared_too():
    flux, other = tiny_flux(), ernie_accel.optimize(tiny_flux(), SwapScheduler("unipc"))
    given = {
        "prompt_embeds": torch.zeros(1, 5, 32),
        "pooled_prompt_embeds": torch.zeros(1, 32),
        "num_inference_steps": 3,
        "output_type": "pt",
        "height": 32,
        "width": 32,
    }
    one = render(flux, None, 0, given)
    two = render(other, None, 0, given, one.start)
    assert torch.equal(one.start, two.start)
    assert not torch.equal(one.latents, two.latents)


# Time and memory ------------------------------------------------------------------------------------------------------


def test_the_warm_up_is_in_no_figure_but_its_own(ernie, monkeypatch):
    import time

    calls, late = [], [0.0]
    forward, clock = ernie.transformer.forward, time.perf_counter

    def slow_at_first(*args, **kwargs):
        calls.append(1)
        late[0] = 1000.0  # seconds, of the very first call
        return forward(*args, **kwargs)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    monkeypatch.setattr(ernie.transformer, "forward", slow_at_first)
    found = evaluate(ernie, SliceVae(), repeats=2)
    assert found.baseline.first_picture_s > 1000
    assert found.baseline.picture_ms < 1000 * 1000
    assert found.candidate.first_picture_s < 1000
    assert "the warm-up picture of each side is in no time but its own row" in str(found)
    assert json.loads(found.to_json())["warm_up"].startswith("one picture each, excluded")
    assert len(calls) == (1 + 2 * 2) * 3 * 2


def test_times_and_rates_agree(ernie):
    found = evaluate(ernie, SliceVae())
    for side in (found.baseline, found.candidate):
        assert side.steps_per_s == pytest.approx(1000 / side.ms_per_step)
        assert 0 < side.ms_per_step * 2 < side.picture_ms * 3
    assert found.speedup == pytest.approx(found.baseline.picture_ms / found.candidate.picture_ms)


def test_functions_that_load_are_timed_and_a_pipe_that_came_loaded_says_so(ernie):
    found = evaluate(tiny_ernie, lambda: ernie_accel.optimize(tiny_ernie(), CastDtype("bfloat16")), PROMPTS[0])
    assert found.baseline.load_s > 0
    assert found.candidate.load_s > 0
    assert found.candidate.optimize_s > 0
    assert found.candidate.applied == (CAST,)
    assert any("pays for imports" in note for note in found.notes)
    assert evaluate(ernie, SliceVae(), PROMPTS[0]).baseline.load_s is None


def test_peak_memory_of_the_process_rises_with_what_is_allocated_and_can_be_reset():
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.read()
    assert before is not None
    kept = mmap.mmap(-1, 64 * 2**20)  # fresh pages: an allocator would reuse what is resident already
    for page in range(0, len(kept), mmap.PAGESIZE):
        kept[page] = 1
    assert memory.read() - before > 50 * 2**20
    kept.close()
    memory.reset()
    assert memory.read() - before < 50 * 2**20


# The pipe comes back --------------------------------------------------------------------------------------------------


def test_the_pipe_is_given_back_as_it_came(ernie):
    picture(ernie)  # the first one sets attributes of the text encoder
    before = snapshot(ernie)
    evaluate(ernie, [CastDtype("bfloat16"), SwapScheduler("unipc")])
    assert differences(before, snapshot(ernie)) == []
    assert "step" not in vars(ernie.scheduler)


def test_what_was_in_place_before_is_in_place_again(ernie):
    ernie_accel.optimize(ernie, SliceVae(), CastDtype("float16", components=("vae",)))
    ernie_accel.restore(ernie)
    ernie_accel.optimize(ernie, SliceVae(), MakeContiguous(), SwapScheduler("unipc"))
    found = evaluate(ernie, CastDtype("bfloat16"), PROMPTS[0])
    assert found.baseline.applied == ("SwapScheduler('unipc') (resamples)", "SliceVae() (rounding)")
    assert found.candidate.applied[0] == CAST
    assert len(found.candidate.applied) == 3
    in_place = [repr(e.step.transform) for e in ernie_accel.report(ernie).entries if e.applied is not None]
    assert in_place == ["SwapScheduler('unipc')", "SliceVae()"]


def test_a_change_that_cannot_be_undone_keeps_its_figures_and_says_so(ernie):
    found = evaluate(ernie, CastDtype("bfloat16", keep_originals=False), PROMPTS[0])
    assert found.ok
    assert any("the pipe stays optimized: Cannot undo CastDtype" in note for note in found.notes)


def test_what_cannot_run_is_refused_before_anything_is_drawn(ernie, monkeypatch):
    monkeypatch.setattr(ernie.transformer, "forward", lambda *_, **__: pytest.fail("it drew"))
    with pytest.raises(ernie_accel.UnsupportedError, match="needs CUDA compute capability"):
        evaluate(ernie, [CastDtype("bfloat16"), Quantize("fp8")])


def test_a_picture_that_fails_leaves_the_scheduler_as_it_was(ernie):
    with pytest.raises(ValueError, match="divisible"):
        evaluate(ernie, SliceVae(), height=70)
    assert "step" not in vars(ernie.scheduler)


# Verdicts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thresholds", "failure"),
    [
        ({"max_nmse": 1e-9}, "picture 1: nmse"),
        ({"min_psnr_db": 200}, "picture 2: psnr_db"),
        ({"min_ssim": 1.1}, "picture 1: ssim"),
        ({"min_sqnr_db": 200}, "picture 1: sqnr_db"),
        ({"min_speedup": 1000}, "speedup"),
        ({"max_ms_per_step": 1e-3}, "ms_per_step"),
        ({"max_peak_bytes": 1}, "peak_bytes"),
    ],
)
def test_each_threshold_can_fail_the_candidate(ernie, thresholds, failure):
    found = evaluate(ernie, CastDtype("bfloat16"), thresholds=Thresholds(**thresholds))
    assert not found.ok
    assert found.exit_code == 1
    assert any(line.startswith(failure) for line in found.failures)
    assert str(found).startswith("# Evaluation: FAILED\n\n- ")


def test_thresholds_that_hold_pass(ernie):
    found = evaluate(ernie, CastDtype("bfloat16"), thresholds=Thresholds(max_nmse=0.01, min_sqnr_db=15, min_ssim=0.5))
    assert found.ok
    assert found.exit_code == 0
    assert found.failures == ()
    assert str(found).startswith("# Evaluation: passed\n\nHeld to: max_nmse 0.01, min_ssim 0.5, min_sqnr_db 15\n\n")


def test_a_page_says_that_it_was_held_to_nothing(ernie):
    found = evaluate(ernie, CastDtype("bfloat16"))
    assert str(found).startswith("# Evaluation: passed\n\nHeld to: no threshold; only NaN and Inf fail\n\n")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_fail_whatever_the_thresholds(ernie, value):
    broken = tiny_ernie()
    broken.transformer.final_linear.bias.data[0] = value
    found = evaluate(ernie, broken)
    assert not found.ok
    assert "picture 1: candidate: NaN or Inf in the latents" in found.failures
    document = json.loads(found.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["ok"] is False
    assert document["total"]["sqnr_db"] in ("nan", "-inf")


def test_a_baseline_that_is_broken_fails_too(ernie):
    ernie.vae.decoder.conv_out.bias.data[0] = math.nan
    assert "picture 1: baseline: NaN or Inf in the picture" in evaluate(ernie, tiny_ernie()).failures


# Prompts --------------------------------------------------------------------------------------------------------------


class Enhances:
    """Stands in for the prompt enhancer: it writes what the global generator draws."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __call__(self, prompt, device, width, height):
        return f"{prompt} on {('red', 'blue')[int(torch.randint(2, (1,)))]} {width}x{height}"


def test_the_prompt_enhancer_is_off_or_its_text_fixed_for_both(ernie, monkeypatch):
    other = tiny_ernie()
    for pipe in (ernie, other):
        monkeypatch.setattr(pipe, "pe", object(), raising=False)
        monkeypatch.setattr(pipe, "pe_tokenizer", object(), raising=False)
        monkeypatch.setattr(pipe, "_enhance_prompt_with_pe", Enhances(pipe), raising=False)
    assert [p.prompt for p in evaluate(ernie, other).pictures] == PROMPTS
    state = torch.random.get_rng_state()
    fixed = evaluate(ernie, other, pe="fixed")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.prompt.endswith(" 64x64") for p in fixed.pictures)
    assert [p.prompt for p in fixed.pictures] == [p.prompt for p in evaluate(ernie, other, pe="fixed").pictures]
    assert fixed.total.nmse == 0


def test_a_fixed_text_needs_an_enhancer(ernie):
    with pytest.raises(ernie_accel.ErnieAccelError, match="this ErnieImagePipeline has none"):
        evaluate(ernie, SliceVae(), pe="fixed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pe": "on"}, "Unknown pe 'on'"),
        ({"prompts": []}, "at least one prompt"),
        ({"repeats": 0}, "repeats=0"),
        ({"candidate": "turbo-bf61"}, "Did you mean 'turbo-bf16'"),
    ],
)
def test_mistakes_are_told(ernie, arguments, message):
    arguments = {"candidate": SliceVae(), "prompts": PROMPTS} | arguments
    with pytest.raises(ValueError, match=message):
        evaluate(ernie, **arguments)


# What is kept ---------------------------------------------------------------------------------------------------------


def test_the_artifacts_are_the_page_the_data_and_every_picture(ernie, tmp_path):
    found = evaluate(ernie, [CastDtype("bfloat16")])
    folder = found.save(tmp_path / "new")
    names = sorted(path.name for path in folder.iterdir())
    pictures = [f"{side}-{number}.png" for side in ("baseline", "candidate") for number in (1, 2)]
    assert names == sorted(["evaluation.json", "evaluation.md", "sheet.png", *pictures])
    assert json.loads((folder / "evaluation.json").read_text())["candidate"]["applied"]
    assert "| 1 | a red circle | 42 |" in (folder / "evaluation.md").read_text()
    with Image.open(folder / "baseline-1.png") as image:
        assert image.size == (64, 64)


def test_a_broken_picture_can_be_kept(ernie, tmp_path):
    broken = tiny_ernie()
    broken.vae.decoder.conv_out.bias.data[0] = math.nan
    evaluate(ernie, broken, PROMPTS[0]).save(tmp_path)
    with Image.open(tmp_path / "candidate-1.png") as image:
        assert image.getpixel((0, 0))[0] == 0


# The trained model: floors are earned on pictures that mean something -----------------------------------------------


@pytest.mark.parametrize("transform", [CastDtype("bfloat16"), Quantize("int8-weight-only")], ids=repr)
def test_floors_are_earned_on_the_embedded_model(transform):
    found = ernie_accel.evaluate(
        ernie_accel.demo.load(prompt_enhancer=False),
        transform if isinstance(transform, CastDtype) else [transform],
        "a large red circle in the center on a striped cream background",
        height=128,
        width=128,
        num_inference_steps=8,
        guidance_scale=1.0,
        thresholds=Thresholds(max_nmse=0.01, min_sqnr_db=transform.floor_db, min_ssim=0.9),
    )
    assert found.ok, str(found)


def test_which_is_faster_is_said_only_where_the_times_allow_it(ernie):
    found = evaluate(ernie, tiny_ernie(), prompts=("red", "blue", "green"))

    def page(baseline_ms, candidate_ms):
        pairs = zip(found.pictures, baseline_ms, candidate_ms, strict=True)
        pictures = tuple(replace(picture, baseline_ms=old, candidate_ms=new) for picture, old, new in pairs)
        return replace(found, pictures=pictures).to_markdown()

    assert re.search(r"the candidate is (not )?faster\.", page((100.0, 101.0, 102.0), (90.0, 91.0, 92.0)))
    assert "too busy to tell, the median picture took 78.0 times" in page((100.0, 7800.0, 7900.0), (90.0, 91.0, 92.0))
    alone = replace(found, pictures=found.pictures[:1], repeats=1).to_markdown()
    assert "from one time each, which says little; repeat it" in alone
