"""Every preset on a CUDA device: it runs, draws the same scene, and restores bit for bit."""

from __future__ import annotations

import pytest
import torch

import ernie_accel
from ernie_accel import Context, UnsupportedError
from ernie_accel.core.components import pipe_bytes
from ernie_accel.core.transform import ROUNDING_REL

PROMPT = "a large red circle in the center on a grey background"
SETTINGS = {"height": 128, "width": 128, "num_inference_steps": 8, "guidance_scale": 1.0, "use_pe": False}


@pytest.fixture(scope="module")
def pipe():
    pipe = ernie_accel.demo.load().to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe):
    # The noise is given: drawn by the pipe, it would be other noise in another dtype.
    side = SETTINGS["height"] // pipe.vae_scale_factor
    shape = (1, pipe.transformer.config.in_channels, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", pipe.transformer.dtype)
    return pipe(PROMPT, latents=noise, output_type="latent", **SETTINGS).images.float()


def sqnr_db(a, b):
    return (20 * torch.log10(b.norm() / (a - b).norm())).item()


def test_the_device_is_seen(pipe):
    context = Context.detect(pipe)
    assert context.device == "cuda"
    assert context.capability == torch.cuda.get_device_capability()
    assert context.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert context.no_compile is None


#: Presets for other devices, and why they are refused on this one.
BEYOND = {"npu-bf16": r"there is no 'npu' here: the device is cuda"}
if torch.cuda.get_device_capability() < (10, 0):
    BEYOND["turbo-nvfp4"] = r"needs CUDA compute capability >= 10\.0; this device has"


@pytest.mark.parametrize("name", BEYOND)
def test_a_preset_for_another_device_is_refused_with_the_reason(pipe, name):
    with pytest.raises(UnsupportedError, match=BEYOND[name]):
        ernie_accel.optimize(pipe, preset=name)


@pytest.mark.parametrize("name", [name for name in ernie_accel.presets if name not in BEYOND])
def test_a_preset_draws_the_scene_and_restores(pipe, name):
    before = latents(pipe)
    assert torch.equal(latents(pipe), before), "stock itself is not deterministic here"
    ernie_accel.optimize(pipe, preset=name)
    after = latents(pipe)
    lossy = [t.floor_db for t in ernie_accel.presets[name].transforms if t.floor_db is not None]
    if lossy:
        assert sqnr_db(after, before) > min(lossy)
    else:
        assert ((after - before).norm() / before.norm()).item() < ROUNDING_REL["float32"]
    ernie_accel.restore(pipe)
    assert torch.equal(latents(pipe), before)


def test_originals_wait_in_host_memory(pipe):
    torch.cuda.synchronize()
    before, weights = torch.cuda.memory_allocated(), pipe_bytes(pipe)
    ernie_accel.optimize(pipe, preset="turbo-bf16")
    torch.cuda.empty_cache()
    assert before - torch.cuda.memory_allocated() > 0.4 * weights  # half of them, but for a few kernels' workspaces
    ernie_accel.restore(pipe)


def test_a_pipe_that_moved_since_is_restored_where_it_is():
    pipe = ernie_accel.demo.load()
    before = pipe.transformer.final_linear.weight.detach().clone()
    ernie_accel.optimize(pipe, ernie_accel.CastDtype("float16"))
    pipe.to("cuda")
    ernie_accel.restore(pipe)
    assert pipe.transformer.final_linear.weight.device.type == "cuda"
    assert torch.equal(pipe.transformer.final_linear.weight.cpu(), before)
