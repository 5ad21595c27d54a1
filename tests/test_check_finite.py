"""NaN and infinity are noticed where they arise; float32 helps where it can; autocast leaves the weights alone."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

import ernie_accel
from ernie_accel import Autocast, CastDtype, CheckFinite, Context, Quantize, SwapScheduler
from ernie_accel.core.step_ends import watching_steps
from ernie_accel.core.wrap_call import around_of
from tests.own_newbie import tiny_own_newbie
from tests.pipelines import after, picture, tiny_ernie
from tests.z_image_pipes import Z_IMAGE_PIPES


def break_transformer(pipe, *, step, only=torch.bfloat16, value=float("nan"), within=""):
    """Let the transformer, or the layer `within` it, return one bad number at a step (from 1), computing in `only`."""
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        first = output[0][0] if isinstance(output[0], list) else output[0]
        if first.dtype == only and len(calls) == step:
            first.view(-1)[0] = value
        return output

    pipe.transformer.get_submodule(within).register_forward_hook(spoil)


def break_authors(pipe, **how):
    """The same for the pipeline of NewBie-image's authors, which runs no hooks of its transformer."""
    break_transformer(pipe, within="x_embedder", **how)


@pytest.fixture
def half(ernie):
    ernie.vae.to(torch.bfloat16)
    ernie.text_encoder.to(torch.bfloat16)
    ernie.transformer.to(torch.bfloat16)
    return ernie


@pytest.mark.parametrize("generator", ["given", "global"])
def test_a_broken_call_is_made_again_in_float32_with_the_same_noise(half, generator):
    def make():
        torch.manual_seed(4)
        return picture(half, **({} if generator == "given" else {"generator": None}))

    half.to(torch.float32)
    want = make()
    half.to(torch.bfloat16)
    weights = {name: p.clone() for name, p in half.transformer.named_parameters()}
    break_transformer(half, step=2)
    ernie_accel.optimize(half, CheckFinite())
    with pytest.warns(UserWarning, match="the latents after step 2 of 3 in bfloat16 hold 1 NaN and 0 infinite numbers"):
        image = make()
    assert ((image - want).norm() / want.norm()).item() < 5e-2  # the initial noise is drawn in the pipe's dtype
    assert torch.isfinite(image).all()
    assert all(torch.equal(p, weights[name]) for name, p in half.transformer.named_parameters())


def test_a_call_that_breaks_in_float32_too_is_an_error(ernie):
    break_transformer(ernie, step=1, only=torch.float32, value=float("inf"))
    ernie_accel.optimize(ernie, CheckFinite())
    message = r"after step 1 of 3 in float32 hold 0 NaN and 1 infinite numbers of 256. The weights are float32 already"
    with pytest.raises(ernie_accel.ErnieAccelError, match=message):
        picture(ernie)


def test_without_a_rerun_it_is_an_error_that_names_the_step(half):
    break_transformer(half, step=3)
    ernie_accel.optimize(half, CheckFinite(rerun=False))
    with pytest.raises(ernie_accel.ErnieAccelError, match="after step 3 of 3 in bfloat16"):
        picture(half)


def test_quantized_weights_are_not_run_again(half):
    ernie_accel.optimize(half, Quantize("int8-weight-only"), CheckFinite())
    break_transformer(half, step=1)
    with pytest.raises(ernie_accel.ErnieAccelError, match="Quantized weights cannot be computed in float32"):
        picture(half)


def test_a_picture_that_the_vae_breaks_is_noticed(ernie):
    ernie.vae.decoder.conv_out.bias.data[0] = float("nan")
    ernie_accel.optimize(ernie, CheckFinite())
    with pytest.raises(ernie_accel.ErnieAccelError, match="the pixels that the VAE decoded in float32 hold 4096 NaN"):
        picture(ernie)


def test_the_callers_callback_gets_what_it_asked_for(ernie):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        return {}

    ernie_accel.optimize(ernie, CheckFinite())
    picture(ernie, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["pred"], steps=2)
    picture(ernie, callback_on_step_end=callback, steps=1)
    assert seen == [(0, ["pred"]), (1, ["pred"]), (0, ["latents"])]


def test_autocast_computes_in_half_and_leaves_weights_and_angles_alone(ernie):
    dtypes, angles = set(), set()
    ernie.transformer.layers[0].mlp.up_proj.register_forward_hook(lambda *hook: dtypes.add(hook[2].dtype))
    ernie.transformer.pos_embed.register_forward_hook(lambda *hook: angles.add(hook[2].dtype))
    ernie_accel.optimize(ernie, Autocast("bfloat16"))
    picture(ernie)
    assert (dtypes, angles) == ({torch.bfloat16}, {torch.float32})
    assert ernie.transformer.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_is_for_float32_weights(ernie):
    context = after(Context.named("h200"), ernie, CastDtype("bf16"))
    reasons = Autocast("float16").unsupported(ernie, context)
    assert reasons == ["the weights are bfloat16: autocast is for float32 weights"]
    assert (
        "bfloat16 needs CUDA compute capability >= 8.0"
        in Autocast("bfloat16").unsupported(ernie, Context.named("v100"))[0]
    )
    with pytest.raises(ernie_accel.UnknownNameError, match="dtype of autocast"):
        Autocast("float32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipe_that_a_script_casts_runs_without_autocast(ernie, dtype):
    """Torch's norms in bfloat16 refuse weights in float16."""
    ernie_accel.optimize(ernie, Autocast("bfloat16"))
    want = picture(tiny_ernie(dtype=dtype))
    assert torch.equal(picture(ernie.to(dtype)), want)
    assert not torch.equal(picture(ernie.to(torch.float32)), picture(tiny_ernie(dtype=dtype).to(torch.float32)))


def test_autocast_is_that_of_the_device_where_the_pipe_is_by_now(ernie, monkeypatch):
    ernie_accel.optimize(ernie, Autocast("bfloat16"))
    monkeypatch.setattr("ernie_accel.transforms.calls.autocast.device_of", lambda pipe: torch.device("cuda"))
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *args: asked.append(args) or contextlib.nullcontext())
    around_of(ernie, "autocast")(lambda arguments: None, {})
    assert asked == [("cuda", torch.bfloat16)]


@pytest.fixture
def authors():
    """A pipeline whose call takes no callback."""
    return tiny_own_newbie()


def in_bfloat16(pipe):
    for name in ("transformer", "text_encoder", "clip_model", "vae"):
        getattr(pipe, name).to(torch.bfloat16)
    return pipe


def is_as_it_came(scheduler):
    return "step" not in vars(scheduler)


def test_without_a_callback_the_schedulers_steps_are_looked_at(authors):
    want = picture(authors)
    ernie_accel.optimize(authors, CheckFinite())
    assert torch.equal(picture(authors), want)
    assert is_as_it_came(authors.scheduler)
    break_authors(authors, step=2, only=torch.float32, value=float("inf"))
    message = r"after step 2 of 3 in float32 hold \d+ NaN and \d+ infinite numbers of 512. The weights are float32"
    with pytest.raises(ernie_accel.ErnieAccelError, match=message):
        picture(authors)
    assert is_as_it_came(authors.scheduler)


def test_without_a_callback_a_broken_call_is_made_again_in_float32(authors):
    want = picture(authors)
    in_bfloat16(authors)
    ernie_accel.optimize(authors, CheckFinite())
    break_authors(authors, step=2)
    with pytest.warns(UserWarning, match="the latents after step 2 of 3 in bfloat16 hold"):
        image = picture(authors)
    assert ((image - want).norm() / want.norm()).item() < 5e-2
    assert authors.transformer.dtype == torch.bfloat16
    assert is_as_it_came(authors.scheduler)


@pytest.mark.parametrize("replaced", ["component", "step"])
def test_a_scheduler_that_a_script_replaces_is_watched_from_then_on(authors, replaced):
    ernie_accel.optimize(authors, CheckFinite())
    picture(authors)
    old = authors.scheduler
    if replaced == "component":
        authors.scheduler = type(old).from_config(old.config, shift=2.0)
    else:
        stock = old.step
        own = old.step = lambda *args, **kwargs: stock(*args, **kwargs)
    picture(authors)
    break_authors(authors, step=3, only=torch.float32)
    with pytest.raises(ernie_accel.ErnieAccelError, match="after step 3 of 3"):
        picture(authors)
    ernie_accel.restore(authors)
    assert is_as_it_came(old) if replaced == "component" else old.step is own
    assert torch.isnan(picture(authors, steps=1)).sum() == 0


@pytest.mark.parametrize("name", ["unipc", "heun", "lcm"])
def test_steps_of_other_samplers_are_looked_at(authors, name):
    want = picture(ernie_accel.optimize(tiny_own_newbie(), SwapScheduler(name)))
    ernie_accel.optimize(authors, SwapScheduler(name), CheckFinite())
    step = authors.scheduler.step
    assert torch.equal(picture(authors), want)
    assert authors.scheduler.step is step
    break_authors(authors, step=2, only=torch.float32)
    with pytest.raises(ernie_accel.ErnieAccelError, match="after step 2 of 3"):
        picture(authors)
    assert authors.scheduler.step is step


def test_threads_look_at_their_own_steps_while_another_pipe_shares_the_scheduler(authors):
    """A plain pipe does not take turns; what it draws is no business of the other's check."""
    scheduler = authors.scheduler
    mine, others = [], []
    inside, done = threading.Event(), threading.Event()
    scheduler.set_timesteps(4)
    ones = torch.ones(1)

    def step():
        return scheduler.step(ones, scheduler.timesteps[0], ones, return_dict=False)

    def other_call():
        with watching_steps(authors, lambda number, latents: others.append(number)):
            inside.set()
            assert done.wait(30)
            step()

    thread = threading.Thread(target=other_call)
    with watching_steps(authors, lambda number, latents: mine.append(number)):
        thread.start()
        assert inside.wait(30)
        step()
        assert (mine, others) == ([0], [])
    assert not is_as_it_came(scheduler)  # the other call is under way
    step()
    done.set()
    thread.join(30)
    assert (mine, others) == ([0], [0])
    assert is_as_it_came(scheduler)


def test_a_step_is_shown_once_and_in_every_form(authors):
    seen = []
    results = [ones := torch.ones(2), (ones * 2, None), [ones * 3], SimpleNamespace(prev_sample=ones * 4)]

    class Ticks:
        def step(self, number):
            return results[number] if number < 4 else {"latents": ones}

    authors.register_modules(scheduler=Ticks())
    with watching_steps(authors, lambda number, latents: seen.append((number, int(latents[0])))):
        inner = authors.scheduler.step
        own = authors.scheduler.step = lambda number: inner(number)  # replaced in the middle of a call
        for number in range(4):
            assert authors.scheduler.step(number) is results[number]
        with watching_steps(authors, lambda number, latents: seen.append((number, "again"))):
            authors.scheduler.step(0)
        with pytest.raises(ernie_accel.ErnieAccelError, match=r"Ticks\.step returned a dict without latents"):
            authors.scheduler.step(4)
    assert seen == [(0, 1), (1, 2), (2, 3), (3, 4), (0, "again"), (4, 1)]
    assert authors.scheduler.step is own


def test_a_call_that_never_steps_says_what_was_not_checked(authors):
    ernie_accel.optimize(authors, CheckFinite())
    with pytest.warns(UserWarning, match="made no step in this call, so that only the decoded picture was checked"):
        picture(authors, steps=0)


def test_a_pipe_without_callback_and_scheduler_is_refused(authors):
    authors.scheduler = None
    context = Context.detect(authors)
    (reason,) = CheckFinite().unsupported(authors, context)
    assert "NewbiePipeline cannot tell when a step ends" in reason


def test_a_vae_that_gets_its_pictures_in_bfloat16_stays_so_in_the_call_in_float32():
    make, call = Z_IMAGE_PIPES["ZImageOmniPipeline"]
    pipe, dtypes = make(), []
    break_transformer(pipe, step=2)
    pipe.transformer.register_forward_hook(lambda *_: dtypes.append((pipe.transformer.dtype, pipe.vae.dtype)))
    ernie_accel.optimize(pipe, CheckFinite())
    warning = r"the latents after step 2 of 2 in float32 hold .* again in float32 \(the weights are bfloat16\)$"
    with pytest.warns(UserWarning, match=warning):
        assert torch.isfinite(picture(pipe, steps=2, **call)).all()
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 2 + [(torch.float32, torch.bfloat16)] * 2
