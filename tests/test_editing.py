"""From picture to picture: the pipe as it is, the scheduler's own noise levels, every sampler, and clear refusals."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ErnieImagePipeline, ZImageImg2ImgPipeline
from PIL import Image

import ernie_accel
from ernie_accel import (
    BatchPromptEncoding,
    CallDefaults,
    CheckFinite,
    ErnieAccelError,
    FuseVae,
    PictureError,
    RewriteBlocks,
    SwapScheduler,
    TileVae,
    image_to_image,
    inpaint,
    refine,
)
from ernie_accel.core.turns import turn_of
from ernie_accel.demo.judge import judge, summarize, unseen_prompts
from ernie_accel.editing.edit import _multiple
from ernie_accel.editing.pictures import finished
from ernie_accel.samplers.solvers import SCHEDULERS
from tests.pipelines import PIPELINES, tiny_ernie, tiny_flux, tiny_z_image

PICTURE = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(64, 64)
MASK[20:40, 10:30] = 1
PROMPT = "a red circle on blue"
KNOWN = [name for name in PIPELINES if name != "flux"]


def settings(pipe: Any, **more: Any) -> dict[str, Any]:
    kind = type(pipe).__name__
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 0.0 if "ZImage" in kind else 1.0}
    call |= {"use_pe": False} if kind.startswith("Ernie") else {"max_sequence_length": 48}
    return call | {"output_type": "pt", "generator": torch.Generator().manual_seed(3)} | more


def traced(pipe: Any) -> list[float]:
    """Return a list that will hold the timestep of every evaluation."""
    seen: list[float] = []
    name = "t" if "ZImage" in type(pipe).__name__ else "timestep"

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(float((kwargs[name] if name in kwargs else args[1])[0]))

    pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", KNOWN)
def test_strength_1_is_text_to_image_bit_for_bit_and_0_the_picture_through_the_vae(name):
    pipe = PIPELINES[name]()
    drawn = pipe(PROMPT, height=64, width=64, **settings(pipe)).images
    assert torch.equal(image_to_image(pipe, PICTURE, PROMPT, strength=1, **settings(pipe)).images, drawn)
    steps = traced(pipe)
    through = image_to_image(pipe, PICTURE, PROMPT, strength=0, **settings(pipe)).images
    again = image_to_image(pipe, PICTURE, "", strength=0, **settings(pipe, generator=None)).images
    assert steps == []
    assert torch.equal(through, again)  # neither prompt nor noise matters
    assert not torch.equal(through, drawn)


def test_strength_1_is_text_to_image_also_where_the_schedule_begins_below_the_highest_noise():
    pipe = tiny_z_image()
    call = settings(pipe, sigmas=[0.9, 0.5, 0.2], num_inference_steps=3)
    drawn = pipe(PROMPT, height=64, width=64, **call).images
    call |= settings(pipe, num_inference_steps=3)  # the generator anew
    assert torch.equal(image_to_image(pipe, PICTURE, PROMPT, strength=1, **call).images, drawn)


def test_the_progress_bar_counts_the_steps_that_run():
    pipe, totals = tiny_ernie(), []
    bar = pipe.progress_bar
    pipe.progress_bar = lambda iterable=None, total=None: totals.append(total) or bar(iterable, total)
    steps = traced(pipe)
    image_to_image(pipe, PICTURE, PROMPT, strength=0.5, **settings(pipe, num_inference_steps=4))
    assert totals == [len(steps)] == [2]


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (8, 0.3), (3, 0.1)])
def test_it_is_what_diffusers_own_image_to_image_does(steps, strength):
    pipe = tiny_z_image()
    stock = ZImageImg2ImgPipeline(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    call = settings(pipe, num_inference_steps=steps)
    mine = image_to_image(pipe, PICTURE, PROMPT, strength=strength, **call).images
    encode = pipe.vae.encode

    def most_probable(pictures: torch.Tensor) -> Any:  # diffusers draws a sample from the encoded distribution
        mode = encode(pictures).latent_dist.mode()
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator: mode))

    pipe.vae.encode = most_probable
    call |= settings(pipe, num_inference_steps=steps)
    its = stock(PROMPT, image=PICTURE[None], strength=strength, **call).images
    assert torch.allclose(mine, its, atol=1e-5)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("name", ["ernie", "z_image", "lumina2"])
def test_every_sampler_starts_where_euler_does(name, sampler):
    pipe = PIPELINES[name]()
    seen = traced(pipe)
    image_to_image(pipe, PICTURE, PROMPT, strength=0.5, **settings(pipe))
    euler = list(seen)
    assert len(euler) == 2
    seen.clear()
    ernie_accel.optimize(pipe, SwapScheduler(sampler))
    first = image_to_image(pipe, PICTURE, PROMPT, strength=0.5, **settings(pipe)).images
    assert seen[0] == euler[0]
    solver = SCHEDULERS[sampler]
    assert len(seen) == (3 if solver is not None and solver.evaluations == 2 else 2)
    assert torch.isfinite(first).all()
    if sampler != "lcm":  # its own stock step draws from the global random numbers
        assert torch.equal(image_to_image(pipe, PICTURE, PROMPT, strength=0.5, **settings(pipe)).images, first)
    assert inpaint(pipe, PICTURE, MASK, PROMPT, strength=0.5, **settings(pipe)).images.isfinite().all()


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("strength", [0, 0.5, 1])
def test_inpainting_keeps_what_is_not_masked_bit_for_bit(name, strength):
    pipe = PIPELINES[name]()
    picture = torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(50, 70, dtype=torch.bool)
    mask[10:30, 40:70] = True
    drawn = inpaint(pipe, picture, mask, PROMPT, strength=strength, **settings(pipe)).images[0]
    assert torch.equal(drawn[:, ~mask], picture[:, ~mask])
    assert not torch.equal(drawn[:, mask], picture[:, mask])
    pil = Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy())
    call = settings(pipe, output_type="pil")
    kept = inpaint(pipe, pil, Image.fromarray(mask.numpy()), PROMPT, strength=strength, **call).images[0]
    assert np.array_equal(np.array(kept)[~mask.numpy()], np.array(pil)[~mask.numpy()])


def test_what_is_kept_is_kept_in_the_latents_too_so_that_the_new_part_fits():
    pipe, whole = tiny_ernie(), torch.zeros(64, 64)
    call = settings(pipe, output_type="latent")
    encoded = image_to_image(pipe, PICTURE, PROMPT, strength=0, **call).images
    mask = MASK.clone()
    latents = inpaint(pipe, PICTURE, mask, PROMPT, **settings(pipe, output_type="latent")).images
    changed = torch.zeros(4, 4, dtype=torch.bool)
    changed[1:3, 0:2] = True  # whatever the mask touches
    assert torch.equal(latents[..., ~changed], encoded[..., ~changed])
    assert not torch.isclose(latents[..., changed], encoded[..., changed]).all(0).any()
    assert torch.equal(inpaint(pipe, PICTURE, whole, PROMPT, **settings(pipe)).images[0], PICTURE)


@pytest.mark.parametrize("output", ["pil", "np", "pt"])
def test_a_picture_of_any_size_keeps_its_size(output):
    pipe = tiny_ernie()
    out = image_to_image(pipe, torch.rand(3, 37, 53), PROMPT, **settings(pipe, output_type=output)).images
    shape = out[0].size[::-1] if output == "pil" else out.shape[1:3] if output == "np" else out.shape[2:]
    assert tuple(shape) == (37, 53)
    pair = image_to_image(pipe, torch.rand(3, 37, 53), PROMPT, **settings(pipe), return_dict=False)
    assert isinstance(pair, tuple) and pair[0].shape == (1, 3, 37, 53)
    assert image_to_image(pipe, PICTURE, PROMPT, height=32, width=48, **settings(pipe)).images.shape[2:] == (32, 48)


def test_a_picture_in_a_batch_is_the_one_made_alone():
    pipe = tiny_ernie()
    pictures = [PICTURE, 1 - PICTURE]
    prompts = [PROMPT, "a big square"]

    def seeds(*numbers: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    def draw(images: Any, texts: Any, generator: Any, **more: Any) -> torch.Tensor:
        call = settings(pipe, generator=generator, guidance_scale=3.0) | more
        images = image_to_image(pipe, images, texts, strength=0.6, **call).images
        assert isinstance(images, torch.Tensor)
        return images

    together = draw(pictures, prompts, seeds(1, 2))
    alone = torch.cat([draw(pictures[i], prompts[i], seeds(i + 1)) for i in range(2)])
    assert torch.allclose(together, alone, atol=1e-5)
    four = draw(pictures, prompts, seeds(1, 5, 2, 6), num_images_per_prompt=2)
    assert torch.allclose(four[[0, 2]], together, atol=1e-5)
    one_prompt = draw(pictures, PROMPT, seeds(1, 2))
    assert torch.allclose(one_prompt[0], together[0], atol=1e-5)
    assert draw(PICTURE, prompts, seeds(1, 2)).shape[0] == 2


def test_noise_can_be_given():
    pipe = tiny_ernie()
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    given = image_to_image(pipe, PICTURE, PROMPT, latents=noise, **settings(pipe, generator=None)).images
    assert torch.equal(given, image_to_image(pipe, PICTURE, PROMPT, **settings(pipe)).images)
    with pytest.raises(PictureError, match=r"latents are \(1, 16, 4, 4\); for these pictures, the noise is"):
        image_to_image(pipe, torch.rand(3, 32, 32), PROMPT, latents=noise, **settings(pipe))


def test_callbacks_see_the_steps_that_run_and_may_change_them():
    pipe, seen = tiny_ernie(), []

    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    call = settings(pipe, num_inference_steps=10, output_type="latent")
    out = image_to_image(pipe, PICTURE, PROMPT, strength=0.3, callback_on_step_end=callback, **call)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert not out.images.any()


def test_other_threads_wait_until_the_picture_is_drawn():
    pipe, entered, seen = tiny_ernie(), threading.Event(), []

    def other() -> None:
        with turn_of(pipe):
            entered.set()

    def look(pipe: Any, step: int, timestep: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not seen:
            threads.submit(other)
        seen.append(entered.wait(0.05))
        return tensors

    with ThreadPoolExecutor(1) as threads:
        image_to_image(pipe, PICTURE, PROMPT, strength=0.5, callback_on_step_end=look, **settings(pipe))
        assert entered.wait(30)
    assert set(seen) == {False}


def test_both_the_family_and_the_vae_say_what_divides_the_sides():
    pipe = tiny_ernie()
    pipe.vae_scale_factor = 24
    assert _multiple(pipe) == 48


def test_outside_a_mask_the_originals_stay_whatever_was_drawn():
    images, originals = torch.full((1, 3, 2, 2), torch.nan), torch.rand(1, 3, 2, 2)
    mask = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    found = finished(images, originals, mask)
    assert torch.equal(found.isnan(), (mask == 1).expand(1, 3, 2, 2))
    assert torch.equal(found[mask.expand_as(found) == 0], originals[mask.expand_as(found) == 0])


def test_nothing_is_left_behind_also_after_an_error():
    pipe = tiny_ernie()
    drawn = pipe(PROMPT, height=64, width=64, **settings(pipe)).images
    before = [set(vars(pipe)), set(vars(pipe.scheduler))]

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    image_to_image(pipe, PICTURE, PROMPT, **settings(pipe))
    with pytest.raises(KeyboardInterrupt):
        image_to_image(pipe, PICTURE, PROMPT, callback_on_step_end=stop, **settings(pipe))
    for owner, attributes in zip((pipe, pipe.scheduler), before, strict=True):
        assert set(vars(owner)) == attributes
    assert torch.equal(pipe(PROMPT, height=64, width=64, **settings(pipe)).images, drawn)


def test_what_was_applied_to_the_pipe_applies():
    pipe = tiny_ernie()
    stock = image_to_image(pipe, PICTURE, PROMPT, strength=0.5, **settings(pipe, num_inference_steps=8)).images
    applied = CallDefaults("turbo"), RewriteBlocks(), BatchPromptEncoding(), FuseVae(), TileVae(), CheckFinite()
    ernie_accel.optimize(pipe, *applied)
    steps = traced(pipe)
    call = settings(pipe)
    del call["num_inference_steps"], call["guidance_scale"]  # the preset's are 8 and 1.0
    fast = image_to_image(pipe, PICTURE, PROMPT, strength=0.5, **call).images
    assert len(steps) == 4
    assert torch.allclose(fast, stock, atol=1e-4)
    ernie_accel.restore(pipe)
    again = image_to_image(pipe, PICTURE, PROMPT, strength=0.5, **settings(pipe, num_inference_steps=8)).images
    assert torch.equal(again, stock)


def test_files_pil_arrays_and_tensors_are_the_same_picture(tmp_path):
    pipe = tiny_ernie()
    pil = Image.fromarray((PICTURE * 255).byte().permute(1, 2, 0).numpy())
    pil.save(tmp_path / "a.png")
    array = np.array(pil)
    kinds = [pil, array, array.astype("float32") / 255, tmp_path / "a.png", str(tmp_path / "a.png"), [pil]]
    kinds += [torch.from_numpy(array).permute(2, 0, 1), array[None]]
    drawn = [image_to_image(pipe, kind, PROMPT, **settings(pipe)).images for kind in kinds]
    assert all(torch.equal(each, drawn[0]) for each in drawn)
    clear = pil.convert("RGBA")
    clear.putalpha(Image.new("L", pil.size, 0))
    white = image_to_image(pipe, Image.new("RGB", pil.size, "white"), PROMPT, **settings(pipe)).images
    assert torch.equal(image_to_image(pipe, clear, PROMPT, **settings(pipe)).images, white)


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (48, 32), "red").save(tmp_path / "a.jpg", exif=exif)
    pipe = tiny_ernie()
    assert image_to_image(pipe, tmp_path / "a.jpg", PROMPT, **settings(pipe)).images.shape[2:] == (48, 32)


NAN = torch.full((3, 64, 64), float("nan"))
BAD_PICTURES: list[tuple[Any, str]] = [
    ("nowhere.png", "nowhere.png cannot be read as a picture .No such file"),
    ("text.png", "text.png cannot be read as a picture .*expected PNG, JPEG"),
    ("cut.png", "cut.png cannot be read as a picture"),
    ("vector.eps", "vector.eps cannot be read as a picture"),
    (NAN, "image has NaN or infinite values"),
    (PICTURE * 255, "image goes from 0.* to 25.*; expected floats from 0 to 1"),
    (torch.rand(64, 64), r"image is a tensor \(64, 64\); expected \[3, H, W\]"),
    (torch.ones(3, 8, 8, dtype=torch.int64), "image holds torch.int64"),
    (torch.rand(3, 0, 8), "image is empty"),
    (Image.new("I;16", (8, 8)), "more than 8 bits a channel"),
    (None, "image is None; expected a file"),
    ((), "image is an empty tuple"),
    ((PICTURE, PICTURE[:, :32]), "one size; found 64 x 64 and 64 x 32"),
    ((PICTURE, PICTURE, PICTURE), "3 pictures for 2 prompts"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_PICTURES, ids=[message for _, message in BAD_PICTURES])
def test_pictures_that_cannot_be_used_are_refused_before_anything_runs(bad, message, tmp_path):
    pipe = tiny_ernie()
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "vector.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    pipe.vae.encode = pipe.encode_prompt = None  # would fail otherwise
    prompt = [PROMPT, PROMPT] if isinstance(bad, tuple) and len(bad) == 3 else PROMPT
    with pytest.raises(PictureError, match=message):
        image_to_image(pipe, tmp_path / bad if isinstance(bad, str) else bad, prompt, **settings(pipe))


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), float("inf"), "0.5", None, True, torch.tensor(0.5)])
def test_a_strength_outside_0_to_1_is_refused(strength):
    pipe = tiny_ernie()
    pipe.vae.encode = None
    with pytest.raises(PictureError, match=r"strength must be a number from 0 .* to 1 .*, got "):
        image_to_image(pipe, PICTURE, PROMPT, strength=strength, **settings(pipe))
    with pytest.raises(PictureError, match="strength must be a number"):
        refine(pipe, pipe, PROMPT, strength=strength)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK[:32], "mask is 64 x 32, and the picture 64 x 64: a mask has the size of its picture"),
        (MASK * float("nan"), "mask has NaN"),
        (MASK * 255, "mask goes from 0 to 255"),
        (MASK.byte(), "mask holds bytes from 0 to 1, and bytes go to 255: pass it as bool"),
        (torch.rand(5, 64, 64), r"mask has the shape \(5, 64, 64\)"),
        ("nowhere.png", "nowhere.png cannot be read"),
        (3, "mask is 3; expected a file"),
        ([MASK, MASK, MASK], "3 masks for 1 prompts"),
    ],
)
def test_masks_that_cannot_be_used_are_refused(mask, message):
    pipe = tiny_ernie()
    pipe.vae.encode = None
    with pytest.raises(PictureError, match=message):
        inpaint(pipe, PICTURE, mask, PROMPT, **settings(pipe))


def test_calls_that_cannot_work_are_refused():
    pipe = tiny_ernie()
    encode, pipe.vae.encode = pipe.vae.encode, None
    with pytest.raises(PictureError, match="there is no prompt"):
        image_to_image(pipe, PICTURE, **settings(pipe))
    with pytest.raises(TypeError, match="steps"):
        image_to_image(pipe, PICTURE, PROMPT, steps=4)
    with pytest.raises(PictureError, match="2 generators for 1 pictures"):
        image_to_image(pipe, PICTURE, PROMPT, **settings(pipe, generator=[torch.Generator()] * 2))
    with pytest.raises(PictureError, match="height must be a number of pixels"):
        image_to_image(pipe, PICTURE, PROMPT, height=0)
    with pytest.raises(ErnieAccelError, match=r"FluxPipeline: .*not known .Family.encode_pictures.; it is for"):
        image_to_image(tiny_flux(), PICTURE, PROMPT)
    with pytest.raises(ErnieAccelError, match="takes pictures itself"):
        image_to_image(ZImageImg2ImgPipeline(**tiny_z_image().components), PICTURE, PROMPT)
    with pytest.raises(ErnieAccelError, match="expected a diffusers pipeline"):
        image_to_image(42, PICTURE, PROMPT)  # type: ignore[arg-type]
    del pipe.vae.encode
    assert encode is not None
    pipe.vae.encoder = None
    with pytest.raises(ErnieAccelError, match="no VAE with an encoder"):
        image_to_image(pipe, PICTURE, PROMPT)
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = tiny_ernie()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ErnieAccelError, match=r"has FlowMatchHeunDiscreteScheduler\. Other samplers: "):
        image_to_image(pipe, PICTURE, PROMPT)


def test_the_classes_have_the_components_of_the_pipe_and_what_was_applied_to_it():
    pipe = tiny_ernie(dtype=torch.bfloat16)
    ernie_accel.optimize(pipe, CallDefaults(num_inference_steps=4, guidance_scale=1.0, use_pe=False))
    made = ernie_accel.ErnieImageImg2ImgPipeline.from_pipe(pipe)
    assert isinstance(made, ErnieImagePipeline)
    assert all(made.components[name] is part for name, part in pipe.components.items())
    assert pipe.transformer.dtype == torch.bfloat16  # diffusers' own from_pipe casts to float32
    call = {"output_type": "pt"}
    steps = traced(pipe)
    by_class = made(PROMPT, PICTURE, 0.5, generator=torch.Generator().manual_seed(3), **call).images
    assert len(steps) == 2
    function = image_to_image(pipe, PICTURE, PROMPT, strength=0.5, generator=torch.Generator().manual_seed(3), **call)
    assert torch.equal(by_class, function.images)
    painting = ernie_accel.ErnieImageInpaintPipeline.from_pipe(made)
    painted = painting(PROMPT, PICTURE, MASK, generator=torch.Generator().manual_seed(3), **call).images
    assert torch.equal(painted, inpaint(pipe, PICTURE, MASK, PROMPT, **settings(pipe)).images)


def test_a_class_takes_the_dtype_that_scripts_for_diffusers_pass_if_it_is_the_pipes():
    pipe = tiny_ernie()
    ernie_accel.ErnieImageInpaintPipeline.from_pipe(pipe, torch_dtype=torch.float32)
    with pytest.raises(ErnieAccelError, match=r"casts none: .*float32, not torch.bfloat16.*CastDtype\('bfloat16'\)"):
        ernie_accel.ErnieImageInpaintPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.float32


def test_a_class_is_saved_as_the_stock_pipeline_that_it_is_made_of(tmp_path):
    kind = ernie_accel.ErnieImageImg2ImgPipeline
    made = kind.from_pipe(tiny_ernie())
    ernie_accel.save(made, tmp_path / "ours")
    made.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert type(ernie_accel.load(tmp_path / folder, device="cpu")) is ErnieImagePipeline
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "theirs")) is ErnieImagePipeline
    assert type(kind.from_pretrained(tmp_path / "theirs")) is kind


def test_a_class_can_be_optimized_by_itself_and_copied():
    made = ernie_accel.ErnieImageImg2ImgPipeline(**tiny_ernie().components)
    made.set_progress_bar_config(disable=True)
    call = settings(made, image=PICTURE, strength=0.5)
    stock = made(PROMPT, **call).images
    copied = copy.deepcopy(made)
    assert torch.equal(copied(PROMPT, **settings(made, image=PICTURE, strength=0.5)).images, stock)
    ernie_accel.optimize(made, CallDefaults("turbo"), SwapScheduler("heun"))
    steps = traced(made)
    made(PROMPT, image=PICTURE, strength=0.5, use_pe=False)
    assert len(steps) == 7  # four steps of eight
    ernie_accel.restore(made)
    assert torch.equal(made(PROMPT, **settings(made, image=PICTURE, strength=0.5)).images, stock)


def test_a_second_pass_refines_what_the_first_one_drew():
    turbo, base = tiny_ernie(enhancer=True), tiny_ernie()
    first, second = traced(turbo), traced(base)
    torch.manual_seed(0)
    out = refine(turbo, base, PROMPT, first={"height": 32, "width": 48, "num_inference_steps": 8}, output_type="pt")
    assert out.images.shape == (1, 3, 32, 48)
    assert (len(first), len(second)) == (8, 6)
    four = refine(
        base, base, [PROMPT, "a"], num_images_per_prompt=2, first=settings(base) | {"height": 32, "width": 32}
    )
    assert len(four.images) == 4


def test_a_prompt_that_the_first_pass_enhanced_is_not_enhanced_again():
    turbo, base = tiny_ernie(enhancer=True), tiny_ernie(enhancer=True)
    base.pe.generate = lambda *_, **__: pytest.fail("enhanced again")
    size = {"height": 32, "width": 32, "num_inference_steps": 1}
    assert len(refine(turbo, base, PROMPT, first=size, num_inference_steps=2).images) == 1


def test_a_first_pass_that_overshoots_is_cut_to_colours():
    class Bright:
        components: ClassVar[dict[str, Any]] = {}

        def __call__(self, prompt: str, **call: Any) -> Any:
            return SimpleNamespace(images=torch.tensor([1.5, -0.5, 0.5]).view(1, 3, 1, 1).expand(1, 3, 32, 32))

    base = tiny_z_image()
    white = torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1).expand(3, 32, 32)
    call = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
    twice = [torch.Generator().manual_seed(3) for _ in range(2)]
    found = refine(Bright(), base, PROMPT, generator=twice[0], **call).images
    assert torch.equal(found, image_to_image(base, white, PROMPT, generator=twice[1], **call).images)


@pytest.fixture(scope="module")
def scenes() -> Any:
    pipe = ernie_accel.demo.load(prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    found = [pair for pair in unseen_prompts(24) if (pair[1].height, pair[1].width) == (128, 128)][:3]
    texts, wanted = [text for text, _ in found], [scene for _, scene in found]
    return pipe, texts, wanted, pipe(texts, height=128, width=128, **of_scenes(0)).images


def of_scenes(seed: int) -> dict[str, Any]:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(3)]
    call: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 1.0, "use_pe": False, "output_type": "pt"}
    return call | {"generator": generators}


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def test_adherence_holds_and_the_distance_grows_with_the_strength(scenes):
    pipe, texts, wanted, drawn = scenes
    assert summarize(judge(drawn, wanted), wanted).object_fraction == 1
    distances = []
    for strength in (0, 0.3, 0.6, 1):
        again = image_to_image(pipe, drawn, texts, strength=strength, **of_scenes(100)).images
        assert summarize(judge(again, wanted), wanted).object_fraction == 1
        distances.append(rmse(again, drawn))
    assert distances == sorted(distances)
    assert distances[0] < 0.01 < 0.05 < distances[-1]


def test_another_prompt_changes_the_picture_the_more_the_stronger(scenes):
    pipe, texts, wanted, drawn = scenes
    others, scenes_of_others = texts[1:] + texts[:1], wanted[1:] + wanted[:1]
    distances, followed = [], []
    for strength in (0.1, 0.9):
        again = image_to_image(pipe, drawn, others, strength=strength, **of_scenes(100)).images
        distances.append(rmse(again, drawn))
        followed.append(summarize(judge(again, scenes_of_others), scenes_of_others).object_fraction)
    assert distances == sorted(distances)
    assert followed[0] < 0.2 < 0.8 < followed[1]


def test_inpainting_draws_what_is_asked_for_in_its_place(scenes):
    pipe, texts, wanted, drawn = scenes
    right = torch.zeros(128, 128)
    right[:, 64:] = 1
    again = inpaint(pipe, drawn, right, texts, **of_scenes(100)).images
    assert torch.equal(again[..., :64], drawn[..., :64])
    assert summarize(judge(again, wanted), wanted).object_fraction > 0.9
