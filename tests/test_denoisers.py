"""Pipes whose denoiser is no single transformer: a UNet, or two that take turns."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from transformers import CLIPTextConfig, CLIPTextModel

import ernie_accel
from ernie_accel import CheckFinite, Compile, Context, FreeAfterUse, Quantize, SetAttention
from ernie_accel.core.components import denoisers_of
from ernie_accel.core.outputs import images_of
from tests import pipelines

H100 = Context("cuda", "NVIDIA H100", (9, 0), 80 * 2**30, versions={}, no_compile=None)


def draw(pipe: Any, **kwargs: Any) -> torch.Tensor:
    given, steps = torch.Generator().manual_seed(7), 2
    embeds = torch.randn(1, 5, 32, generator=given)
    arguments: dict[str, Any] = {"prompt_embeds": embeds, "num_inference_steps": steps, "guidance_scale": 1.0}
    size = {"height": 16, "width": 16}
    if type(pipe).__name__ == "WanPipeline":
        arguments |= size | {"num_frames": 1, "output_type": "pt"}
    else:
        arguments |= {"height": 64, "width": 64, "output_type": "pt"}
    made = pipe(**(arguments | {"generator": torch.Generator().manual_seed(0)} | kwargs))
    return made.frames if hasattr(made, "frames") else images_of(made)


PIPES = {
    "sd": pipelines.tiny_sd,
    "wan": pipelines.tiny_wan,
    "wan without first": lambda: pipelines.tiny_wan(first=False),
}


@pytest.mark.parametrize("make", PIPES.values(), ids=PIPES)
def test_the_check_draws_what_stock_draws_and_notices_every_denoiser(make):
    want = draw(make())
    pipe = ernie_accel.optimize(make(), CheckFinite())
    assert torch.equal(draw(pipe), want)
    *_, last = denoisers_of(pipe).values()

    def spoil(module, args, output):
        output[0].fill_(float("nan"))
        return output

    last.register_forward_hook(spoil)
    with pytest.raises(ernie_accel.ErnieAccelError, match=r"the latents after step \d of 2 in float32 hold "):
        draw(pipe)


def test_two_transformers_are_both_served_or_the_plan_says_which_stays():
    pipe = pipelines.tiny_wan()
    assert list(denoisers_of(pipe)) == ["transformer", "transformer_2"]
    changes = ernie_accel.plan(pipe, SetAttention("math")).steps[0].preview.changes
    assert {change.split(".")[0] for change in changes} == {"transformer", "transformer_2"}
    hint = "transformer_2 stays as it is (components=('transformer', 'transformer_2') takes it, too)"
    assert hint in str(ernie_accel.plan(pipe, Quantize("int8-weight-only")))
    assert hint in str(ernie_accel.plan(pipe, Compile(), context=H100))
    both = ernie_accel.plan(pipe, Quantize("int8-weight-only", components=("transformer", "transformer_2")))
    assert both.ok
    assert "stays as it is" not in str(both)


def test_a_pipe_without_a_first_transformer_is_told_which_component_to_name():
    plan = ernie_accel.plan(pipelines.tiny_wan(first=False), Quantize("int8-weight-only"))
    assert "has no component 'transformer'" in str(plan)
    assert "write components=('transformer_2',)" in str(plan)
    assert "write components=('unet',)" in str(ernie_accel.plan(pipelines.tiny_sd(), Quantize("int8-weight-only")))


def test_the_weights_of_the_text_encoder_are_freed_by_a_unet_too():
    pipe = pipelines.tiny_sd()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipe.text_encoder = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=32))
    ernie_accel.optimize(pipe, FreeAfterUse())
    draw(pipe)
    assert all(weight.numel() == 0 for weight in pipe.text_encoder.parameters())
    ernie_accel.restore(pipe)
    assert all(weight.numel() for weight in pipe.text_encoder.parameters())


class Reads(PipelineCallback):
    """Says itself what it reads, as diffusers' own callbacks do."""

    tensor_inputs: ClassVar[list[str]] = ["prompt_embeds"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.seen = [*getattr(self, "seen", ()), *callback_kwargs]
        callback_kwargs["prompt_embeds"] = callback_kwargs["prompt_embeds"] * 0
        return callback_kwargs


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: MultiPipelineCallbacks([c])], ids=["one", "several"])
def test_callbacks_of_diffusers_read_what_they_name(wrap):
    stock, mine = Reads(cutoff_step_ratio=1.0), Reads(cutoff_step_ratio=1.0)
    want = draw(pipelines.tiny_sd(), callback_on_step_end=wrap(stock))
    pipe = ernie_accel.optimize(pipelines.tiny_sd(), CheckFinite())
    assert torch.equal(draw(pipe, callback_on_step_end=wrap(mine)), want)
    assert mine.seen == stock.seen == ["prompt_embeds"] * 2


def test_no_tensor_inputs_at_all_are_as_good_as_in_stock(ernie):
    want = pipelines.picture(ernie, callback_on_step_end_tensor_inputs=None)
    ernie_accel.optimize(ernie, CheckFinite())
    assert torch.equal(pipelines.picture(ernie, callback_on_step_end_tensor_inputs=None), want)
