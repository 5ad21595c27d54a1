"""The swapped scheduler keeps the checkpoint's schedule, and its noise comes from the pipeline's generator."""

from __future__ import annotations

import copy

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import ernie_accel
from ernie_accel import SwapScheduler
from ernie_accel.core.context import Context
from ernie_accel.samplers.solvers import SCHEDULERS
from tests.pipelines import PIPELINES, picture, tiny_ernie

PROMPTS = ["a red circle", "a big blue square on red"]
STOCHASTIC = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lcm")
TWO_STAGE = ("heun", "dpmpp_sde")

every_name = pytest.mark.parametrize("name", SCHEDULERS)
every_stochastic = pytest.mark.parametrize("name", STOCHASTIC)

#: What each pipeline passes to set_timesteps, for 8 steps.
PASSED = {
    "ERNIE-Image: a tensor": {"sigmas": torch.linspace(1, 0, 9)[:-1]},
    "Z-Image: a list and mu": {"sigmas": torch.linspace(1, 1 / 8, 8).tolist(), "mu": 0.6},
    "Lumina 2: an array and mu": {"sigmas": np.linspace(1, 1 / 8, 8), "mu": 0.6},
    "only a number": {"num_inference_steps": 8},
}


def swapped(name, scheduler=None, **options):
    """Return a scheduler as the transform leaves it on a pipeline."""
    pipe = type("Pipe", (), {})()
    pipe.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.components = {"scheduler": pipe.scheduler}
    transform = SwapScheduler(name, **options)
    if transform.preview(pipe, Context.named("cpu")).changes:
        transform.apply(pipe, Context.named("cpu"))
    return pipe.scheduler


# The schedule ---------------------------------------------------------------------------------------------------------


@every_name
@pytest.mark.parametrize("passed", PASSED.values(), ids=PASSED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_schedule_is_the_checkpoints_whatever_the_pipeline_passes(name, passed, dynamic):
    """The silent trap: stock Euler classes take a tensor of sigmas and run another schedule."""
    if dynamic:
        passed = {"mu": 0.6} | passed
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    scheduler = swapped(name, copy.deepcopy(stock))
    stock.set_timesteps(**passed)
    scheduler.set_timesteps(**passed)
    if name == "dpmpp_sde":
        mine = torch.cat([scheduler.sigmas[:-1][::2], scheduler.sigmas[-1:]])  # the others lie in between
    else:
        mine = scheduler.sigmas.unique().flip(0)
    assert torch.equal(mine, stock.sigmas)
    assert scheduler.sigmas[-1] == 0
    assert scheduler.sigmas.dtype == scheduler.timesteps.dtype == torch.float32  # not int64: 666.67 is no 667
    assert torch.equal(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)
    assert len(scheduler.timesteps) == (15 if name in TWO_STAGE else 8)


@every_name
def test_the_timesteps_go_where_the_pipeline_wants_them(name):
    scheduler = swapped(name)
    scheduler.set_timesteps(sigmas=[1.0, 0.5], device="meta" if name == "euler" else "cpu")
    assert scheduler.timesteps.device.type == ("meta" if name == "euler" else "cpu")


def test_the_shift_of_the_checkpoint_stays(ernie):
    ernie.scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 9)[:-1])
    before = ernie.scheduler.sigmas.clone()
    ernie_accel.optimize(ernie, SwapScheduler("euler_ancestral"))
    ernie.scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 9)[:-1])
    assert ernie.scheduler.config.shift == 3.0
    assert torch.equal(ernie.scheduler.sigmas, before)


def test_a_shift_set_at_run_time_stays_too(ernie):
    ernie.scheduler.set_shift(5.0)  # the config goes on saying 3.0
    ernie_accel.optimize(ernie, SwapScheduler("unipc"))
    assert ernie.scheduler.shift == 5.0


def test_another_shift_is_applied_as_the_paper_has_it(ernie):
    ernie_accel.optimize(ernie, SwapScheduler("euler", shift=5.0))
    t = torch.linspace(1, 0, 9)[:-1]
    ernie.scheduler.set_timesteps(sigmas=t)
    torch.testing.assert_close(ernie.scheduler.sigmas[:-1], 5 * t / (1 + 4 * t))  # SD3, arXiv 2403.03206, section 5.3.2


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@every_name
def test_another_spacing_keeps_the_ends_of_the_schedule(name, spacing):
    scheduler, plain = swapped(name, **{spacing: True}), FlowMatchEulerDiscreteScheduler(shift=3.0)
    for each in (scheduler, plain):
        each.set_timesteps(sigmas=torch.linspace(1, 0, 9)[:-1])
    steps = scheduler.sigmas.unique().flip(0)
    assert steps[0] == plain.sigmas[0] == 1
    torch.testing.assert_close(steps[-2], plain.sigmas[-2])
    assert steps[-1] == 0
    assert (steps[:-1] > steps[1:]).all()
    assert len(steps) != 9 or not torch.allclose(steps, plain.sigmas)
    sample = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        sample = scheduler.step(sample, t, sample).prev_sample
    assert sample.isfinite().all()


def test_trailing_spacing_where_the_pipeline_leaves_it_to_the_scheduler():
    """Stock, given only a number, starts and ends at sigmas that are shifted already, and shifts them again."""
    expected = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected.set_timesteps(sigmas=torch.linspace(1, 1 / 8, 8))
    stock, trailing = swapped("euler"), swapped("euler", timestep_spacing="trailing")
    for scheduler in (stock, trailing):
        scheduler.set_timesteps(8)
    assert torch.equal(trailing.sigmas, expected.sigmas)
    assert stock.sigmas[-2] < 0.01 < trailing.sigmas[-2]
    trailing.set_timesteps(sigmas=[1.0, 0.5])
    assert trailing.sigmas.tolist() == pytest.approx([1, 0.75, 0])  # what a pipeline passes stays


# Why the stock classes are no way to swap; where one of these fails, diffusers has mended it itself -------------------


@pytest.mark.parametrize(
    ("stock", "error", "message"),
    [
        ("UniPCMultistepScheduler", AttributeError, "'Tensor' object has no attribute 'copy'"),
        ("DPMSolverMultistepScheduler", TypeError, "sigmas"),
        ("DEISMultistepScheduler", TypeError, "sigmas"),
        ("SASolverScheduler", TypeError, "sigmas"),
        ("FlowMatchHeunDiscreteScheduler", TypeError, "sigmas"),
    ],
)
def test_stock_classes_die_on_ernies_sigmas(ernie, stock, error, message):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    ernie.scheduler = getattr(diffusers, stock).from_config(ernie.scheduler.config, **flow)
    with pytest.raises(error, match=message):
        picture(ernie)


@pytest.mark.parametrize("stock", ["EulerDiscreteScheduler", "EDMEulerScheduler", "LTXEulerAncestralRFScheduler"])
def test_stock_euler_classes_run_a_silently_wrong_schedule(ernie, stock):
    right = ernie.scheduler
    ernie.scheduler = getattr(diffusers, stock).from_config(right.config)
    picture(ernie)
    right.set_timesteps(sigmas=torch.linspace(1, 0, 4)[:-1])
    wrong = ernie.scheduler.sigmas.float()
    assert len(wrong) != 4 or not torch.allclose(wrong, right.sigmas, atol=1e-2)


@pytest.mark.parametrize("settings", [{"solver_order": 3}, {"solver_type": "bh1"}], ids=str)
def test_stock_unipc_of_order_3_or_with_bh1_gives_nan_from_sigma_1(settings):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = diffusers.UniPCMultistepScheduler(**flow, **settings)
    scheduler.set_timesteps(6)
    scheduler.sigmas = torch.linspace(1, 0, 7)
    sample = torch.ones(1, 4)
    for t in scheduler.timesteps:
        sample = scheduler.step(0.5 * sample, t, sample).prev_sample
    assert sample.isnan().any()


def test_the_shift_does_not_become_flow_shift():
    scheduler = diffusers.UniPCMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert scheduler.config.flow_shift == 1.0


# The pipelines --------------------------------------------------------------------------------------------------------


@every_name
@pytest.mark.parametrize("family", PIPELINES)
def test_every_name_draws_on_every_family(name, family):
    pipe = PIPELINES[family]()
    evaluations = []
    pipe.transformer.register_forward_hook(lambda *_: evaluations.append(1))
    ernie_accel.optimize(pipe, SwapScheduler(name, **({"shift": 2.0} if name == "euler" else {})))
    assert picture(pipe, steps=4).isfinite().all()
    assert len(evaluations) == (7 if name in TWO_STAGE else 4)


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n not in STOCHASTIC])
def test_many_steps_of_any_deterministic_solver_give_the_same_picture(name):
    """All of them solve one equation. On random weights it is smooth, so 100 steps agree to a few thousandths."""
    exact, pipe = picture(tiny_ernie(), steps=100), tiny_ernie()
    if name != "euler":
        ernie_accel.optimize(pipe, SwapScheduler(name))
    assert (picture(pipe, steps=50) - exact).norm() / exact.norm() < 1e-2


def test_one_step_is_euler_whatever_the_solver(ernie):
    expected = picture(tiny_ernie(), steps=1)
    for name in SCHEDULERS:
        ernie_accel.optimize(ernie, SwapScheduler(name), on_unsupported="error")
        torch.testing.assert_close(picture(ernie, steps=1), expected, atol=1e-5, rtol=0)


def test_guidance_and_callbacks_go_on_working(ernie):
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append((i, float(t)))
        return tensors

    ernie_accel.optimize(ernie, SwapScheduler("heun"))
    picture(ernie, steps=3, guidance_scale=3.0, callback_on_step_end=callback)
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert seen[1][1] == seen[2][1]


@every_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_kept(name, dtype):
    scheduler = swapped(name)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 5)[:-1])
    sample = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    for t in scheduler.timesteps:
        sample = scheduler.step(sample, t, sample).prev_sample
        assert sample.dtype == dtype
        assert sample.isfinite().all()


def test_half_precision_latents_are_stepped_in_float32():
    scheduler = swapped("unipc")
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    sample = torch.full((1, 4), 1.0, dtype=torch.bfloat16)
    velocity = torch.full((1, 4), 0.01, dtype=torch.bfloat16)
    out = scheduler.step(velocity, scheduler.timesteps[0], sample, return_dict=False)[0]
    assert out[0, 0] == (1 - 0.25 * velocity[0, 0].float()).bfloat16()


# Noise ----------------------------------------------------------------------------------------------------------------


@every_stochastic
def test_the_same_seed_gives_the_same_picture_whatever_the_global_generator(name, ernie):
    ernie_accel.optimize(ernie, SwapScheduler(name))
    torch.manual_seed(1)
    first = picture(ernie, seed=5)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert torch.equal(picture(ernie, seed=5), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(picture(ernie, seed=6), first)


def test_stock_stochastic_sampling_is_not_reproducible(ernie):
    """The trap that this transform mends; if this fails, diffusers has mended it itself."""
    ernie.scheduler = type(ernie.scheduler).from_config(ernie.scheduler.config, stochastic_sampling=True)
    torch.manual_seed(1)
    first = picture(ernie, seed=5)
    torch.manual_seed(2)
    assert not torch.equal(picture(ernie, seed=5), first)


@every_stochastic
def test_a_picture_in_a_batch_equals_the_one_made_alone(name, ernie):
    ernie_accel.optimize(ernie, SwapScheduler(name))
    together = picture(ernie, prompt=PROMPTS, generator=[torch.Generator().manual_seed(s) for s in (3, 4)])
    for row, (prompt, seed) in enumerate(zip(PROMPTS, (3, 4), strict=True)):
        torch.testing.assert_close(together[row : row + 1], picture(ernie, prompt=prompt, seed=seed), atol=1e-5, rtol=0)


def noise_of(scheduler, sample):
    """Return the noise [steps, *sample.shape] that lcm adds to data of zero, but for its last step."""
    noise = []
    for i, t in enumerate(scheduler.timesteps[:-1]):
        velocity = sample.float() / scheduler.sigmas[i]
        sample = scheduler.step(velocity, t, sample).prev_sample
        noise.append(sample / scheduler.sigmas[i + 1])
    return torch.stack(noise)


def test_noise_is_standard_normal_and_differs_from_step_to_step_and_from_row_to_row():
    scheduler = swapped("lcm")
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 4)[:-1])
    noise = noise_of(scheduler, torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)))
    correlation = torch.corrcoef(noise.flatten(2).flatten(0, 1))
    torch.testing.assert_close(correlation, torch.eye(4), atol=0.06, rtol=0)
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_of_the_same_latents_gets_the_same_noise(dtype):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    both = []
    for start in (latents, latents.to(dtype)):
        scheduler = swapped("lcm")
        scheduler.set_timesteps(sigmas=[1.0, 0.5])
        both.append(noise_of(scheduler, start))
    torch.testing.assert_close(both[0], both[1], atol=1e-4, rtol=0)


def test_a_generator_given_to_step_wins(ernie):
    results = []
    for start in (0.0, 1.0):
        scheduler = swapped("lcm")
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 4)[:-1])
        sample = torch.full((1, 4, 2, 2), start)
        out = scheduler.step(
            torch.zeros_like(sample), scheduler.timesteps[0], sample, generator=torch.Generator().manual_seed(9)
        )
        results.append(out.prev_sample - sample * (1 - scheduler.sigmas[1]))
    torch.testing.assert_close(results[0], results[1])


# Life -----------------------------------------------------------------------------------------------------------------


@every_name
def test_a_swapped_pipe_saves_as_a_stock_one_with_the_checkpoints_schedule(name, ernie, tmp_path):
    from diffusers import ErnieImagePipeline

    ernie_accel.optimize(ernie, SwapScheduler(name, karras=True))
    (entry,) = ernie_accel.report(ernie).entries
    assert ("save_pretrained writes a stock" in entry.applied.note) == (name != "euler")
    ernie.save_pretrained(tmp_path)
    again = ErnieImagePipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(again.scheduler) is FlowMatchEulerDiscreteScheduler
    assert again.scheduler.config.shift == 3.0
    assert again.scheduler.config.use_karras_sigmas
    assert again.scheduler.config.stochastic_sampling == (name == "lcm")
    again.set_progress_bar_config(disable=True)
    assert picture(again).isfinite().all()


@every_name
def test_a_copy_made_between_two_pictures_draws_the_same(name, ernie):
    ernie_accel.optimize(ernie, SwapScheduler(name, shift=4.0))
    first = picture(ernie, seed=1)
    assert torch.equal(picture(copy.deepcopy(ernie), seed=1), first)
    assert torch.equal(picture(ernie, seed=1), first)


def test_a_run_that_was_cut_off_leaves_nothing_behind(ernie):
    ernie_accel.optimize(ernie, SwapScheduler("dpmpp_2m"))
    expected = picture(ernie)

    def stop(pipe, i, t, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        picture(ernie, steps=5, callback_on_step_end=stop)
    assert torch.equal(picture(ernie), expected)


def test_the_history_is_dropped_after_the_last_step_and_stepping_on_is_an_error():
    scheduler = swapped("dpmpp_3m")
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    sample = torch.ones(1, 4)
    for t in scheduler.timesteps:
        sample = scheduler.step(sample, t, sample).prev_sample
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(sample, scheduler.timesteps[0], sample)


def test_a_run_may_begin_in_the_middle_as_image_to_image_does():
    scheduler = swapped("heun")
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 5)[:-1])
    scheduler.set_begin_index(1 * scheduler.order)  # what diffusers' get_timesteps computes: one step later
    sample = torch.ones(1, 4)
    for t in scheduler.timesteps[2:]:
        sample = scheduler.step(torch.ones(1, 4), t, sample).prev_sample
    torch.testing.assert_close(sample, torch.ones(1, 4) - scheduler.sigmas[2])


def test_an_index_is_no_timestep():
    scheduler = swapped("unipc")
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    for index in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match="got the integer 0"):
            scheduler.step(torch.ones(1, 4), index, torch.ones(1, 4))


def test_the_class_of_the_scheduler_is_left_alone(ernie):
    step = FlowMatchEulerDiscreteScheduler.step
    ernie_accel.optimize(ernie, SwapScheduler("unipc"))
    assert type(ernie.scheduler) is FlowMatchEulerDiscreteScheduler
    assert FlowMatchEulerDiscreteScheduler.step is step
    assert tiny_ernie().scheduler.step.__func__ is step


# What it says ---------------------------------------------------------------------------------------------------------


def test_the_receipt_says_what_is_only_sound_for_distilled_models(ernie):
    for name in SCHEDULERS:
        (step,) = ernie_accel.plan(ernie, SwapScheduler(name)).steps
        assert ("only sound for distilled" in step.preview.note) == (name == "lcm")
        assert ("two evaluations per step" in step.preview.note) == (name in TWO_STAGE)


def test_the_plan_says_what_would_change(ernie):
    (step,) = ernie_accel.plan(ernie, SwapScheduler("unipc", shift=5.0, karras=True)).steps
    assert step.preview.changes == (
        "scheduler.step euler -> unipc",
        "scheduler.shift 3.0 -> 5.0",
        "scheduler.use_karras_sigmas False -> True",
    )
    (step,) = ernie_accel.plan(ernie, SwapScheduler("euler")).steps
    assert step.verdict == "nothing to do"


def test_a_pipeline_that_does_not_match_flows_is_refused(ernie):
    ernie.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ernie_accel.UnsupportedError, match=r"needs a flow-matching pipeline .*; it has DDIMScheduler"):
        ernie_accel.optimize(ernie, SwapScheduler("euler"))


@pytest.mark.parametrize(
    ("config", "arguments", "reason"),
    [
        ({"invert_sigmas": True}, {}, "has invert_sigmas=True; solvers need falling sigmas"),
        ({"use_dynamic_shifting": True}, {"shift": 5.0}, "shift=5 would have no effect: leave it out"),
    ],
)
def test_settings_that_would_do_nothing_or_harm_are_refused(ernie, config, arguments, reason):
    ernie.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    with pytest.raises(ernie_accel.UnsupportedError, match=reason):
        ernie_accel.optimize(ernie, SwapScheduler("unipc", **arguments))


def test_beta_names_the_package_it_needs(ernie):
    context = Context("cpu", "cpu")
    assert SwapScheduler("unipc", beta=True).unsupported(ernie, context) == [
        "scipy is not installed: pip install 'ernie-accel[scipy]'"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "unipcc"}, "Unknown scheduler 'unipcc'. Did you mean 'unipc'?"),
        ({"name": "unipc", "shift": 0.0}, "shift must be > 0"),
        ({"name": "unipc", "karras": True, "beta": True}, "karras and beta exclude each other"),
        ({"name": "unipc", "timestep_spacing": "leading"}, "Unknown timestep_spacing 'leading'"),
    ],
)
def test_mistakes_are_told_when_the_transform_is_made(arguments, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        SwapScheduler(**arguments)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("UniPCMultistepScheduler", "unipc"),
        ("uni_pc", "unipc"),
        ("uni_pc_bh2", "unipc"),
        ("DPM++ 2M SDE", "dpmpp_2m_sde"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("DPM++ 2M Karras", "dpmpp_2m"),
        ("DPM++ 3M SDE", "dpmpp_3m"),
        ("DPM++ SDE", "dpmpp_sde"),
        ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("DPMSolverSDEScheduler", "dpmpp_sde"),
        ("Euler", "euler"),
        ("Euler a", "euler_ancestral"),
        ("k_euler_a", "euler_ancestral"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("FlowMatchEulerDiscreteScheduler", "euler"),
        ("FlowMatchHeunDiscreteScheduler", "heun"),
        ("FlowMatchLCMScheduler", "lcm"),
        ("LCM", "lcm"),
    ],
)
def test_the_names_of_other_programs_are_answered_with_ours(name, meant):
    with pytest.raises(ernie_accel.UnknownNameError, match=f"Did you mean {meant!r}") as caught:
        SwapScheduler(name)
    assert ("karras=True" in str(caught.value)) == ("Karras" in name)
