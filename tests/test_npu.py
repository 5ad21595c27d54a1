"""Ascend, on a stand-in for torch_npu that is as strict as the kernel; each in a process of its own.

diffusers looks for torch_npu when it is imported, so the stand-in has to be there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forked import Forked

START = """
from dataclasses import replace
import torch, torch_npu, ernie_accel
from ernie_accel import CastDtype, Context, ElideMask, ExpandAttentionMask, SetAttention
from tests.pipelines import picture, tiny_ernie

stock = torch.nn.functional.scaled_dot_product_attention
def strict(query, key, value, attn_mask=None, **kwargs):
    if attn_mask is not None:
        torch_npu.check_mask_shape(attn_mask, query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return stock(query, key, value, attn_mask=attn_mask, **kwargs)

PROMPTS = ["a red circle", "a big blue square on a small red circle"]
npu, pipe = Context.named("ascend910b"), tiny_ernie()
from ernie_accel.transforms.denoiser import set_attention
any_dtype = replace(set_attention.BACKENDS["npu"], dtypes=())  # the stand-in computes in float32, too
set_attention.BACKENDS = {**set_attention.BACKENDS, "npu": any_dtype}
pipe.text_encoder.set_attn_implementation("eager")  # only the transformer is looked at
right = picture(pipe, prompt=PROMPTS)
def rel(image):
    return ((image - right).norm() / right.norm()).item()
"""


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[str], list[str]]]:
    """Return code -> the lines it prints in a process of its own, where the stand-in is."""
    forked = Forked("torch_npu", "tests.loaded_ernie", path=[Path(__file__).parent / "standins"])
    yield forked.lines
    forked.close()


def test_the_kernel_refuses_a_broadcast_mask_in_its_own_words(run):
    code = START + (
        "torch.nn.functional.scaled_dot_product_attention = strict\n"
        "try: picture(pipe, prompt=PROMPTS)\nexcept RuntimeError as error: print(error)"
    )
    assert run(code)[-1].startswith(
        "get unsupported atten_mask shape, the shape is [2, 1, 1, 25]. B=[2], N=[2], Sq=[25], Skv=[25], supported"
    )


def test_expanded_it_runs_through_torch_and_means_the_same(run):
    code = START + (
        "ernie_accel.optimize(pipe, ElideMask(), ExpandAttentionMask(), context=npu)\n"
        "torch.nn.functional.scaled_dot_product_attention = strict\n"
        "print(rel(picture(pipe, prompt=PROMPTS)), len(torch_npu.calls))"
    )
    distance, calls = run(code)[-1].split()
    assert float(distance) < 1e-5
    assert calls == "0"


@pytest.mark.parametrize("elide", ["", "ElideMask(), "])
def test_expanded_it_runs_through_the_fused_kernel_and_means_the_same(run, elide):
    """True is masked out there, and attended in torch."""
    code = START + (
        "from ernie_accel.transforms.denoiser import set_attention\n"
        f"machine = npu\n"
        f"ernie_accel.optimize(pipe, {elide}ExpandAttentionMask(), SetAttention('npu'), context=machine)\n"
        "print(rel(picture(pipe, prompt=PROMPTS)))\n"
        "masks = list(torch_npu.calls); torch_npu.calls.clear()\n"
        "print(len(masks), masks[0].dtype, list(masks[0].shape), masks[0][0, 0, 0].tolist().count(True))\n"
        "picture(pipe, prompt=PROMPTS[:1])\n"
        "print({mask is None for mask in torch_npu.calls})"
    )
    distance, facts, alone = run(code)[-3:]
    assert float(distance) < 1e-5
    assert facts == "6 torch.bool [2, 1, 25, 25] 6"  # six of the short prompt's nine text tokens are padding
    assert alone == "{True}"


COUNT = """
from collections import Counter
from torch.utils._python_dispatch import TorchDispatchMode

class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__(); self.of = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is not None and tensor.dtype == torch.bool and tensor.ndim >= 2:
            self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

def count(pipe, prompts=PROMPTS):
    calls = Calls()
    with calls:
        picture(pipe, prompt=prompts, steps=3)
    return [calls.of[name] for name in ("all", "bitwise_not", "clone")]
"""


@pytest.mark.parametrize("elide", ["", "ElideMask(), "])
@pytest.mark.parametrize("fused", ["", "SetAttention('npu'), "])
def test_a_padded_mask_is_prepared_once_for_all_layers_and_steps_on_both_paths(run, elide, fused):
    """Two layers, three steps: diffusers' fused path looks at, expands and inverts the mask six times."""
    code = (
        START
        + COUNT
        + (
            "machine = npu\n"
            "ernie_accel.optimize(pipe, SetAttention('npu'), context=machine)\n"
            "print(count(pipe))\n"
            f"ernie_accel.optimize(pipe, {elide}{fused}ExpandAttentionMask(), context=machine)\n"
            "print(count(pipe))"
        )
    )
    stock, ours = run(code)[-2:]
    assert stock == "[6, 6, 6]"
    assert ours == "[0, 1, 1]"


def test_processors_of_diffusers_and_their_modules_stay_as_they_were(run):
    code = START + (
        "from diffusers.models.transformers import transformer_ernie_image as module\n"
        "processor = module.ErnieImageSingleStreamAttnProcessor\n"
        "before = processor.__call__, module.dispatch_attention_fn, dict(vars(processor))\n"
        "machine = npu\n"
        "ernie_accel.optimize(pipe, ExpandAttentionMask(), SetAttention('npu'), context=machine)\n"
        "picture(pipe, prompt=PROMPTS)\n"
        "after = processor.__call__, module.dispatch_attention_fn, dict(vars(processor))\n"
        "print(before == after)\n"
        "print({type(layer.self_attention.processor) is processor for layer in pipe.transformer.layers})\n"
        "ernie_accel.restore(pipe)\n"
        "print({type(layer.self_attention.processor) is processor for layer in pipe.transformer.layers})\n"
        "print(torch.equal(picture(pipe, prompt=PROMPTS), right))"
    )
    assert run(code)[-4:] == ["True", "{False}", "{True}", "True"]


def test_lumina_2_runs_on_both_paths_and_means_the_same(run):
    """Its own processor folds every mask to [B, 1, 1, S], which the kernel refuses."""
    code = START + (
        "from tests.pipelines import tiny_lumina2\n"
        "pipe = tiny_lumina2(); right = picture(pipe, prompt=PROMPTS)\n"
        "machine = npu\n"
        "for fused in ((), (SetAttention('npu'),)):\n"
        "    ernie_accel.optimize(pipe, ExpandAttentionMask(), *fused, context=machine)\n"
        "    torch.nn.functional.scaled_dot_product_attention = stock if fused else strict\n"
        "    torch_npu.calls.clear()\n"
        "    print(rel(picture(pipe, prompt=PROMPTS)) < 1e-5, bool(torch_npu.calls))\n"
        "    torch.nn.functional.scaled_dot_product_attention = stock\n"
        "ernie_accel.restore(pipe)\n"
        "print(torch.equal(picture(pipe, prompt=PROMPTS), right))"
    )
    assert run(code)[-3:] == ["True False", "True True", "True"]


def test_an_additive_mask_would_be_taken_for_its_opposite_and_is_not(run):
    """The trap: diffusers inverts what it is given as if it were bool, and 0 of an additive mask attends."""
    code = START + (
        "from ernie_accel.transforms.denoiser.expand_mask import expand\n"
        "from diffusers.models.attention_dispatch import dispatch_attention_fn as attend\n"
        "q = torch.randn(1, 4, 2, 8)\n"
        "keep = torch.tensor([[[[True, True, False, False]]]])\n"
        "additive = torch.zeros(1, 1, 1, 4).masked_fill(~keep, float('-inf'))\n"
        "want = attend(q, q, q, attn_mask=keep)\n"
        "for mask in (additive, expand(additive)):\n"
        "    print(torch.allclose(attend(q, q, q, attn_mask=mask, backend='_native_npu'), want, atol=1e-6))"
    )
    assert run(code)[-2:] == ["False", "True"]


def test_the_preset_of_an_ascend_plans_and_runs(run):
    code = START + (
        "here = [t for t in ernie_accel.presets['npu-bf16'].transforms if t.slot != 'device']\n"
        "ernie_accel.optimize(pipe, *here, context=npu)\n"
        "torch.nn.functional.scaled_dot_product_attention = strict\n"
        "import inspect; print(inspect.signature(pipe.__call__).parameters['num_inference_steps'].default)\n"
        "print(pipe.transformer.dtype, rel(picture(pipe, prompt=PROMPTS)) < 0.1)"
    )
    assert run(code)[-2:] == ["8", "torch.bfloat16 True"]


#: What torch_npu adds to torch, on a machine with two chips.
DEVICES = """
from types import SimpleNamespace
torch.utils.rename_privateuse1_backend("npu")
chips = [
    SimpleNamespace(name="Ascend910B3", total_memory=62432 * 2**20),
    SimpleNamespace(name="Ascend310P3", total_memory=44280 * 2**20),
]
torch.npu = SimpleNamespace(
    is_available=lambda: True,
    device_count=lambda: len(chips),
    get_device_properties=lambda device: chips[torch.device(device).index or 0],
)
"""


def test_a_chip_is_known_by_the_name_that_torch_npu_reports(run):
    code = (
        "import torch, ernie_accel\n"
        + DEVICES
        + "for context in ernie_accel.Context.detect(), ernie_accel.Context.detect(device='npu:1'):\n"
        "    print(context)\n"
        "    found = ernie_accel.recommend(context, mode='turbo')\n"
        "    print(found.preset.name, 'Ascend 910B: masks' in str(found))\n"
    )
    assert run(code) == [
        "npu (Ascend910B3, 61 GiB)",
        "npu-bf16 True",
        "npu (Ascend310P3, 43 GiB)",
        "npu-bf16 False",
    ]
