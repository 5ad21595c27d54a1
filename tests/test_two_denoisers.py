"""Pipes with two transformers, both with blocks that take a mask: each is served, or the plan says that it stays."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch

import ernie_accel
from ernie_accel import (
    CacheSteps,
    CaptureGraphs,
    Context,
    ElideMask,
    ErnieAccelError,
    ExpandAttentionMask,
    FuseKernels,
    RewriteBlocks,
)
from ernie_accel.families.ernie_image import ERNIE_IMAGE
from tests import pipelines

H100 = Context("cuda", "NVIDIA H100", (9, 0), 80 * 2**30, versions={"triton": "3"}, no_compile=None)
STAYS = "transformer_2 stays as it is: a family's own blocks are those of its transformer"


class TwoErnie(diffusers.ErnieImagePipeline):
    """Leaves the second half of the steps to another transformer, as Wan 2.2 does."""

    def __init__(self, transformer, transformer_2, vae, text_encoder, tokenizer, scheduler, pe=None, pe_tokenizer=None):
        super().__init__(transformer, vae, text_encoder, tokenizer, scheduler, pe, pe_tokenizer)
        self.register_modules(transformer_2=transformer_2)


def tiny_pair(dtype: torch.dtype = torch.float32) -> Any:
    parts = pipelines.tiny_ernie(dtype=dtype).components
    second = copy.deepcopy(parts["transformer"])
    pipelines.randomize(second, seed=1)
    return TwoErnie(transformer_2=second.to(dtype), **parts)


def forward(transformer: Any) -> torch.Tensor:
    given = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, 16, 4, 4, generator=given),
            timestep=torch.tensor([500.0, 500.0]),
            text_bth=torch.randn(2, 5, 64, generator=given),
            text_lens=torch.tensor([5, 3]),
            return_dict=False,
        )[0]


def test_masks_of_both_are_expanded_and_given_back():
    pipe = tiny_pair()
    want = [forward(pipe.transformer), forward(pipe.transformer_2)]
    changes = ernie_accel.plan(pipe, ExpandAttentionMask()).steps[0].preview.changes
    assert {change.split(".")[0] for change in changes} == {"transformer", "transformer_2"}
    ernie_accel.optimize(pipe, ExpandAttentionMask())
    seen: dict[str, torch.Size] = {}
    for name in ("transformer", "transformer_2"):
        block = getattr(pipe, name).layers[0]

        def look(module, args, kwargs, name=name):
            seen[name] = next(
                each.shape for each in (*args, *kwargs.values()) if getattr(each, "dtype", None) == torch.bool
            )

        block.register_forward_pre_hook(look, with_kwargs=True)
    # The second one's masks follow the call, not what the first one last saw.
    for got, stock in zip([forward(pipe.transformer), forward(pipe.transformer_2)], want, strict=True):
        assert torch.allclose(got, stock, atol=1e-5)
    assert seen == {"transformer": (2, 1, 21, 21), "transformer_2": (2, 1, 21, 21)}
    ernie_accel.restore(pipe)
    assert torch.equal(forward(pipe.transformer_2), want[1])


def test_what_only_the_familys_transformer_can_have_says_that_the_other_stays():
    pipe = tiny_pair(torch.bfloat16)
    request = (RewriteBlocks(), FuseKernels("fp8"), CaptureGraphs())
    for transform in (*request, ElideMask()):
        transforms = (transform,) if isinstance(transform, ElideMask) else request
        steps = ernie_accel.plan(pipe, *transforms, context=H100).steps
        preview = next(step.preview for step in steps if step.transform == transform)
        assert preview.changes, transform
        assert STAYS in preview.note, transform
        assert not any(change.startswith("transformer_2") for change in preview.changes)
    one = ernie_accel.plan(pipelines.tiny_ernie(dtype=torch.bfloat16), *request, context=H100)
    assert "stays as it is" not in str(one)


def test_the_plan_says_which_denoiser_caches_no_steps():
    said = "transformer_2 computes all of its steps"
    assert said in str(ernie_accel.plan(tiny_pair(), CacheSteps()))
    assert said not in str(ernie_accel.plan(pipelines.tiny_ernie(), CacheSteps()))


def test_the_second_one_is_not_touched():
    pipe = tiny_pair()
    before = forward(pipe.transformer_2)
    ernie_accel.optimize(pipe, RewriteBlocks())
    assert type(pipe.transformer_2.layers[0]) is not type(pipe.transformer.layers[0])
    assert torch.equal(forward(pipe.transformer_2), before)


@pytest.mark.parametrize("make", [pipelines.tiny_sd, lambda: pipelines.tiny_wan(first=False)], ids=["unet", "second"])
def test_a_family_for_a_pipe_without_a_transformer_is_refused(make):
    with pytest.raises(ErnieAccelError, match="has no transformer that could be of it"):
        ernie_accel.plan(make(), ExpandAttentionMask(), family=ERNIE_IMAGE)
