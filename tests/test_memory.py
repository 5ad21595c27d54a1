"""Memory: what is freed is really gone, what comes back is the same, and what cannot come back says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ernie_accel
from ernie_accel import Context, FreeAfterUse, MakeContiguous, Offload, RewriteBlocks, SliceVae, TileVae
from ernie_accel.core.components import module_bytes
from ernie_accel.core.outputs import images_of
from tests.pipelines import picture


def held_while_denoising(pipe):
    """Return the bytes of the text encoder at every step of a picture, and the picture."""
    held = []

    def look(pipe, step, t, tensors):
        held.append(module_bytes(pipe.text_encoder))
        return tensors

    return held, picture(pipe, steps=2, callback_on_step_end=look)


def test_the_text_encoder_is_gone_while_denoising_and_back_for_the_next_call(ernie):
    before = picture(ernie, steps=2)
    ernie_accel.optimize(ernie, FreeAfterUse())
    buffers = sum(b.numel() * b.element_size() for b in ernie.text_encoder.buffers())
    for _ in range(2):
        held, image = held_while_denoising(ernie)
        assert held == [buffers] * 2
        assert torch.equal(image, before)


def test_a_saved_text_encoder_is_whole(ernie, tmp_path):
    """The trap: empty tensors would be saved without a word."""
    whole = {name: tensor.clone() for name, tensor in ernie.text_encoder.state_dict().items()}
    ernie_accel.optimize(ernie, FreeAfterUse(folder=str(tmp_path)))
    picture(ernie, steps=1)
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["text_encoder"]
    saved = ernie.text_encoder.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in whole.items())
    ernie_accel.restore(ernie)
    assert list(tmp_path.iterdir()) == []


def test_freed_to_nowhere_the_next_call_says_what_to_do(ernie):
    embeds = ernie.encode_prompt("a red circle", torch.device("cpu"))
    ernie_accel.optimize(ernie, FreeAfterUse("nowhere"))
    before = picture(ernie, prompt="a red circle", steps=1)
    with pytest.raises(ernie_accel.ErnieAccelError, match="weights of text_encoder were freed after their first use"):
        picture(ernie, prompt="a red circle", steps=1)
    assert torch.equal(picture(ernie, prompt=None, prompt_embeds=embeds, steps=1), before)
    with pytest.raises(ernie_accel.RestoreError, match="freed weights are gone"):
        ernie_accel.restore(ernie)


def test_a_prompt_enhancer_fetches_its_weights_before_it_generates(ernie):
    """The trap: ``generate`` looks at the model before its first forward."""

    class Enhancer(torch.nn.Linear):
        device = torch.device("cpu")

        def generate(self):
            return self.weight.sum()

    ernie.register_modules(pe=Enhancer(4, 4))
    before = ernie.pe.generate()
    ernie_accel.optimize(ernie, FreeAfterUse())
    picture(ernie, steps=1, use_pe=False)
    assert module_bytes(ernie.pe) == 0
    assert ernie.pe.generate() == before


def test_what_works_later_cannot_be_freed_before(ernie):
    (step,) = ernie_accel.plan(ernie, FreeAfterUse(components=("vae",))).steps
    assert step.reasons == ("vae works while or after the picture is denoised: it cannot be freed before",)


def test_offloading_says_what_is_in_the_way(ernie, flux):
    h200 = Context.named("h200")
    ernie.vae._hf_hook = object()
    assert "vae: offloaded already" in Offload("group").unsupported(ernie, h200)[0]
    assert "FluxPipeline has none of text_encoder" in Offload("stages").unsupported(flux, h200)[0]
    assert "there is no accelerator" in Offload("model").unsupported(flux, Context.named("cpu"))[0]
    assert Offload("model").unsupported(flux, h200) == []
    with pytest.raises(ernie_accel.UnknownNameError, match="Did you mean 'sequential'"):
        Offload("sequentially")
    with pytest.raises(ValueError, match="blocks_per_group must be >= 1, got 0"):
        Offload("group", blocks_per_group=0)


def test_channels_last_lays_out_convolutions_only_and_says_when_it_pays(ernie):
    before = picture(ernie)
    ernie_accel.optimize(ernie, MakeContiguous(channels_last=("vae",)))
    (entry,) = ernie_accel.report(ernie).entries
    weights = {f"vae.{name}": p for name, p in ernie.vae.named_parameters() if p.ndim == 4}
    assert set(entry.applied.changed) >= {n for n, p in weights.items() if min(p.shape[1:]) > 1}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights.values())
    assert "pay only in a compiled model" in entry.applied.note
    image = picture(ernie)
    assert ((image - before).norm() / before.norm()).item() < 1e-5
    assert MakeContiguous(channels_last=("vae",)).effect is ernie_accel.Effect.ROUNDING
    assert MakeContiguous().effect is ernie_accel.Effect.ROUNDING  # a row alone rounds by where its weight begins


def test_channels_last_names_components_that_are_there_and_asked_for(ernie):
    reasons = MakeContiguous(channels_last=("unet",)).unsupported(ernie, Context.named("cpu"))
    assert reasons[0].startswith("ErnieImagePipeline has no component 'unet'")
    odd = replace(MakeContiguous(channels_last=("vae",)), components=("transformer",))
    assert "which is not among components=('transformer',)" in odd.unsupported(ernie, Context.named("cpu"))[0]


def align_hooks(pipe):
    """Return the hooks by which accelerate moves the weights of every layer."""
    hooks = [
        getattr(part, "_hf_hook", None) for m in (pipe.transformer, pipe.text_encoder, pipe.vae) for part in m.modules()
    ]
    return [each for hook in hooks for each in getattr(hook, "hooks", (hook,)) if hasattr(each, "execution_device")]


@pytest.mark.parametrize("mode", ["model", "sequential", "group", "stages"])
def test_offloading_gives_the_same_bits_and_restores(ernie, mode):
    """Onto the CPU itself, where the same hooks run; tests/gpu looks at the devices.

    accelerate takes weights on "cpu" and "cpu:0" for weights in two places and stumbles, so "sequential" is told the
    former; its weights then really go from the host's copy to the layer and away again.
    """
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    before = picture(ernie, latents=latents.clone(), steps=1)
    attributes, places = set(vars(ernie)), {part: set(vars(part)) for part in ernie.transformer.modules()}
    applied = Offload(mode).apply(ernie, Context.named("cpu"))
    if mode == "sequential":
        for hook in align_hooks(ernie):
            hook.execution_device = torch.device("cpu")
    for _ in range(2):
        assert torch.equal(picture(ernie, latents=latents.clone(), steps=1), before)
        resting = {parameter.device.type for parameter in ernie.transformer.parameters()}
        assert resting == ({"meta"} if mode == "sequential" else {"cpu"})
    applied.undo()
    assert {parameter.device.type for parameter in ernie.transformer.parameters()} == {"cpu"}
    assert set(vars(ernie)) - {"_guidance_scale"} == attributes - {"_guidance_scale"}
    for part, names in places.items():
        assert set(vars(part)) - names <= {"_diffusers_hook"}  # an empty registry stays
        assert not part._forward_pre_hooks
    assert torch.equal(picture(ernie, latents=latents.clone(), steps=1), before)


@pytest.fixture
def with_card(monkeypatch):
    """A machine with an H200, which a pipe on the host does not live on."""
    detect = Context.detect
    h200 = replace(Context.named("h200"), versions={**Context.detect().versions, "triton": "3.6"})
    monkeypatch.setattr(Context, "detect", lambda pipe=None, device=None: h200 if pipe is None else detect(pipe))
    return h200


@pytest.mark.parametrize("mode", ["model", "stages"])
def test_a_pipe_on_the_host_is_offloaded_from_the_accelerator_that_is_here(mode, with_card, ernie):
    for more in ({}, {"preset": "turbo-fp8"}):
        plan = ernie_accel.plan(ernie, Offload(mode), **more)
        assert (plan.context, plan.problems) == (with_card, {})
        (step,) = (step for step in plan.steps if isinstance(step.transform, Offload))
        assert (step.verdict, step.planned.device) == ("apply", "cuda")
    assert ernie_accel.plan(ernie, SliceVae()).context.device == "cpu"


FP8 = (ernie_accel.CastDtype("bf16"), RewriteBlocks(), ernie_accel.FuseKernels("fp8"))


def test_a_pipe_on_the_host_is_brought_to_the_accelerator_for_what_only_runs_there(with_card, ernie):
    plan = ernie_accel.plan(ernie, *FP8)
    assert (plan.context, plan.problems) == (with_card, {})
    assert [str(step.transform) for step in plan.steps if step.transform.moves_to == "cuda"], "nothing brings it there"
    with pytest.raises(ernie_accel.UnsupportedError, match="there is no 'cuda' here"):  # only the plan has the card
        ernie_accel.optimize(ernie, *FP8)
    with pytest.raises(ernie_accel.UnsupportedError) as refused:
        ernie_accel.optimize(ernie, *FP8, memory=None)  # it is to stay
    assert "no CUDA (cpu)" in str(refused.value)
    assert "MoveTo" not in str(refused.value)


def test_a_pipe_on_the_host_stays_there_for_what_runs_anywhere_or_nowhere(with_card, ernie):
    assert ernie_accel.plan(ernie, RewriteBlocks()).context.device == "cpu"
    nowhere = ernie_accel.plan(ernie, FP8[-1])  # its blocks are not rewritten
    assert (nowhere.context.device, nowhere.ok) == ("cpu", False)


@pytest.mark.parametrize("mode", ["model", "sequential", "group", "stages"])
def test_the_device_is_the_accelerator_and_all_goes_back_to_where_it_was(mode, with_card, ernie, monkeypatch):
    moved, enabled = [], []
    for name in ("transformer", "vae", "text_encoder"):
        module = getattr(ernie, name)
        module.to = lambda device, name=name, module=module: moved.append((name, str(device))) or module
    for method in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(ernie, method, lambda device: enabled.append(str(device)))
    monkeypatch.setattr(ernie, "enable_group_offload", lambda onload_device, **_: enabled.append(str(onload_device)))
    applied = Offload(mode).apply(ernie, with_card)
    staying = {
        "group": [("vae", "cuda")],
        "stages": [("transformer", "cuda"), ("vae", "cuda"), ("text_encoder", "cpu")],
    }
    assert list(dict.fromkeys(moved)) == staying.get(mode, [])
    assert enabled == ([] if mode == "stages" else ["cuda"])
    moved.clear()
    applied.undo()
    assert dict(moved) == {"transformer": "cpu", "vae": "cpu", "text_encoder": "cpu"}


def test_stages_leave_when_denoising_begins(ernie, monkeypatch):
    from accelerate.hooks import UserCpuOffloadHook

    events = []
    monkeypatch.setattr(UserCpuOffloadHook, "offload", lambda self: events.append("leave"))
    Offload("stages").apply(ernie, Context.named("cpu"))
    ernie.text_encoder.register_forward_pre_hook(lambda *_: events.append("encode"))
    ernie.transformer.register_forward_hook(lambda *_: events.append("step"))
    picture(ernie, steps=2)
    assert events == ["encode", "leave", "step", "leave", "step"]


def test_tiles_overlap_by_whole_latents(ernie):
    """The trap: with half a latent of overlap, diffusers returns a picture of another size."""
    ernie.vae.use_tiling, ernie.vae.tile_overlap_factor = True, 0.125
    ernie.vae.tile_sample_min_size, ernie.vae.tile_latent_min_size = 32, 4
    assert picture(ernie, steps=1).shape[-1] != 64
    reasons = TileVae(tile_px=32, overlap=0.125).unsupported(ernie, Context.named("cpu"))
    assert reasons[0].endswith(
        "0.5 latents, which is not whole, so that pictures would change their size: use overlap=0.25"
    )
    assert TileVae(tile_px=32, overlap=0.25).unsupported(ernie, Context.named("cpu")) == []
    ernie.vae.tile_latent_min_size = 6
    assert "use overlap=0.333333" in TileVae().unsupported(ernie, Context.named("cpu"))[0]


def test_tiling_stays_above_its_floor_on_the_embedded_model():
    """2x2 tiles of four latents, the hardest case: PSNR of two pictures against the untiled ones."""
    pipe = ernie_accel.demo.load(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = [
        "a large red circle in the center on a grey background",
        "a small blue square on the left on a white background",
    ]
    output = pipe(
        prompts,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    latents = images_of(output)

    def decode():
        output = pipe(
            prompts,
            height=64,
            width=64,
            num_inference_steps=1,
            guidance_scale=1.0,
            output_type="pt",
            latents=latents.clone(),
            callback_on_step_end=lambda *_: {"latents": latents},
        )
        return images_of(output)

    before = decode()
    ernie_accel.optimize(pipe, TileVae(tile_px=32))
    psnr_db = -10 * torch.log10((decode() - before).square().mean((1, 2, 3)))
    assert psnr_db.min() > TileVae().floor_db
    assert psnr_db.min() < 40  # it is not nothing either
