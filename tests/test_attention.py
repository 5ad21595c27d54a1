"""Masks and attention kernels: a padded batch stays right, an unpadded one carries no mask, no device is asked."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode

import ernie_accel
from ernie_accel import CastDtype, Compile, Context, ElideMask, ExpandAttentionMask, RewriteBlocks, SetAttention
from ernie_accel.core.context import UNSUPPORTED_DEVICES
from ernie_accel.transforms.denoiser.expand_mask import expand
from ernie_accel.transforms.denoiser.set_attention import BACKENDS
from tests.pipelines import PIPELINES, after, picture, tiny_ernie, tiny_flux

SHORT, LONG = "a red circle", "a big blue square on a small red circle"
HERE = ("native", "math", "flash")  # the kernels that run on a CPU


class Spy(TorchFunctionMode):
    """Note every attention's mask, and every read of a tensor by the host."""

    reads = ("item", "tolist", "cpu", "__bool__", "__int__", "numpy")

    def __init__(self):
        super().__init__()
        self.masks, self.host_reads = [], 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "scaled_dot_product_attention" and args == () and kwargs["query"].shape[-1] == 64:
            self.masks.append(kwargs.get("attn_mask"))
        self.host_reads += name in self.reads
        return function(*args, **kwargs)


def spied(pipe, **kwargs):
    with Spy() as spy:
        picture(pipe, **kwargs)
    return spy


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


# ElideMask


def test_stock_passes_a_mask_that_masks_nothing(ernie):
    masks = spied(ernie).masks
    assert masks
    assert all(mask is not None and mask.all() for mask in masks)


def test_no_mask_where_nothing_is_padded_bit_for_bit(ernie):
    before = picture(ernie, prompt=[SHORT, SHORT])
    ernie_accel.optimize(ernie, ElideMask())
    assert set(spied(ernie, prompt=[SHORT, SHORT]).masks) == {None}
    assert torch.equal(picture(ernie, prompt=[SHORT, SHORT]), before)


@pytest.mark.parametrize("arguments", [{"prompt": [SHORT, LONG]}, {"prompt": LONG, "guidance_scale": 3.0}], ids=str)
def test_the_mask_stays_where_a_batch_is_padded(ernie, arguments):
    before = picture(ernie, **arguments)
    ernie_accel.optimize(ernie, ElideMask())
    assert all(mask is not None and not mask.all() for mask in spied(ernie, **arguments).masks)
    assert torch.equal(picture(ernie, **arguments), before)


def test_dropping_a_mask_that_pads_would_be_seen(ernie):
    """The trap: without its mask a padded batch is wrong by far more than rounding."""
    ernie_accel.optimize(ernie, ElideMask())
    right = picture(ernie, prompt=[SHORT, LONG])
    for block in ernie.transformer.layers:
        block.register_forward_pre_hook(lambda _, args: (*args[:3], None))
    assert rel(picture(ernie, prompt=[SHORT, LONG]), right) > 1e-5


def test_it_reads_no_tensor_on_the_host(ernie):
    stock = spied(ernie, prompt=[SHORT, LONG]).host_reads
    ernie_accel.optimize(ernie, ElideMask())
    assert spied(ernie, prompt=[SHORT, LONG]).host_reads == stock
    assert spied(ernie, prompt=[SHORT, SHORT]).host_reads == stock


def inputs(lengths, width, batch=2):
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(batch, 16, 4, 4, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "text_bth": torch.randn(batch, width, 64, generator=generator),
        "text_lens": torch.tensor(lengths),
        "return_dict": False,
    }


@pytest.mark.parametrize(("lengths", "width", "elided"), [((3, 3), 3, True), ((3, 3), 4, False), ((2, 3), 3, False)])
@pytest.mark.parametrize("positional", [False, True])
def test_tensors_of_ones_own_are_looked_at_once(ernie, lengths, width, elided, positional):
    given = inputs(lengths, width)
    call = (lambda: ernie.transformer(*given.values())) if positional else (lambda: ernie.transformer(**given))
    before = call()[0]
    ernie_accel.optimize(ernie, ElideMask())
    with Spy() as spy:
        for _ in range(3):
            assert torch.equal(call()[0], before)
    assert all((mask is None) == elided for mask in spy.masks)
    assert spy.host_reads == 1


def test_a_text_that_somebody_pads_further_is_masked(ernie):
    """The lengths alone do not say what is padded: the pair of tensors does."""
    ernie_accel.optimize(ernie, ElideMask())
    given = inputs((3, 3), 3)
    ernie.transformer(**given)
    given["text_bth"] = torch.nn.functional.pad(given["text_bth"], (0, 0, 0, 2))
    with Spy() as spy:
        ernie.transformer(**given)
    assert all(mask is not None for mask in spy.masks)


def test_hooks_with_keywords_leave_nothing_behind(ernie):
    ernie_accel.optimize(ernie, ElideMask())
    assert any(part._forward_pre_hooks_with_kwargs for part in ernie.transformer.modules())
    ernie_accel.restore(ernie)
    assert not any(part._forward_pre_hooks_with_kwargs for part in ernie.transformer.modules())


def test_what_is_known_of_a_text_holds_with_its_own_lengths_only(ernie):
    """Exactly this pair: two batches of one width, one of which pads, called across."""
    ernie_accel.optimize(ernie, ElideMask())
    full, padded = inputs((3, 3), 3), inputs((2, 3), 3)
    full["text_bth"] = full["text_bth"].clone()
    for given in (full, padded):
        ernie.transformer(**given)  # each is looked at, and known from now on
    for text, lengths, elided in ((full, padded, False), (padded, full, True), (padded, padded, False)):
        given = text | {"text_lens": lengths["text_lens"]}
        with Spy() as spy:
            ernie.transformer(**given)
        assert spy.masks
        assert all((mask is None) == elided for mask in spy.masks)


def test_a_text_of_the_pipelines_own_with_other_lengths_is_looked_at(ernie):
    ernie_accel.optimize(ernie, ElideMask())
    text, lengths = ernie._pad_text([torch.randn(3, 64), torch.randn(3, 64)], torch.device("cpu"), torch.float32, 64)
    given = inputs((3, 3), 3) | {"text_bth": text, "text_lens": lengths}
    for lens, elided in ((lengths, True), (torch.tensor([2, 3]), False)):
        with Spy() as spy:
            ernie.transformer(**given | {"text_lens": lens})
        assert all((mask is None) == elided for mask in spy.masks)


@pytest.mark.parametrize(
    ("transforms", "whole"),
    [
        ((ElideMask(),), True),
        ((ElideMask(),), False),
        ((ElideMask(), ExpandAttentionMask(), SetAttention("flash")), False),
    ],
    ids=repr,
)
def test_compiled_it_is_one_graph_without_and_one_with_a_mask_for_all_blocks(transforms, whole):
    """The trap: a hook or a processor class of each block's own compiles each block anew, and the ninth fails."""
    torch._dynamo.reset()
    layers, attentions = 2 if whole else 10, []

    def backend(graph, _):
        attentions.extend(1 for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph.forward

    pipe = tiny_ernie(layers=layers)
    ernie_accel.optimize(pipe, *transforms)
    for module in [pipe.transformer] if whole else pipe.transformer.layers:
        module.compile(backend=backend, fullgraph=True, dynamic=True)
    for prompt in ([SHORT, SHORT], [SHORT, LONG], [LONG, LONG], ["a red circle on blue", LONG]):
        picture(pipe, prompt=prompt, steps=1)
    assert len(attentions) == (2 * layers if whole else 2)


def test_a_copied_pipe_watches_its_own_padding(ernie):
    ernie_accel.optimize(ernie, ElideMask())
    other = copy.deepcopy(ernie)
    picture(ernie, prompt=[SHORT])
    assert all(mask is not None for mask in spied(other, prompt=[SHORT, LONG]).masks)


def test_rewritten_blocks_have_no_idle_mask(ernie):
    plan = ernie_accel.plan(ernie, RewriteBlocks(), ElideMask())
    assert plan.steps[1].preview.note == "the rewritten blocks build a mask only for a batch that really pads"
    assert ernie_accel.plan(ernie, RewriteBlocks(), SetAttention("flash")).ok


def test_what_has_no_idle_masks_is_left_alone_or_refused(flux):
    (step,) = ernie_accel.plan(flux, ElideMask()).steps
    assert "FluxPipeline is of no known family" in step.reasons[0]


# every kernel


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(
    "extra",
    [(ElideMask(),), (ElideMask(), ExpandAttentionMask()), (RewriteBlocks(), ExpandAttentionMask())],
    ids=repr,
)
def test_a_padded_batch_equals_each_prompt_alone(ernie, backend, extra):
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    alone = [picture(ernie, prompt=p, latents=latents[i : i + 1].clone()) for i, p in enumerate((SHORT, LONG))]
    ernie_accel.optimize(ernie, SetAttention(backend), *extra)
    together = picture(ernie, prompt=[SHORT, LONG], latents=latents.clone())
    assert rel(together, torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("make", ["ernie", "flux"])
def test_another_kernel_only_rounds(request, backend, make):
    pipe = request.getfixturevalue(make)
    before = picture(pipe)
    ernie_accel.optimize(pipe, *([ElideMask()] if make == "ernie" else []), SetAttention(backend))
    assert rel(picture(pipe), before) < 1e-5


def test_the_default_of_the_process_stays(ernie):
    """The trap: diffusers' set_attention_backend changes the default of every model in the process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()
    ernie_accel.optimize(ernie, SetAttention("math"))
    assert _AttentionBackendRegistry.get_active_backend() == before
    assert tiny_flux().transformer.transformer_blocks[0].attn.processor._attention_backend is None


@pytest.mark.parametrize("name", ["native", "math"])
@pytest.mark.parametrize("device", ["cpu", "npu", *UNSUPPORTED_DEVICES])
def test_plain_torch_is_refused_on_no_device(ernie, name, device):
    assert SetAttention(name).unsupported(ernie, Context(device, device)) == []


def test_the_processors_class_is_not_touched(ernie):
    cls = type(ernie.transformer.layers[0].self_attention.processor)
    before = dict(vars(cls))
    ernie_accel.optimize(ernie, ElideMask(), SetAttention("flash"))
    assert dict(vars(cls)) == before
    assert type(ernie.transformer.layers[0].self_attention.processor).__name__ == cls.__name__


def reasons(pipe, backend, device, *before):
    plan = ernie_accel.plan(pipe, *before, SetAttention(backend), context=Context.named(device))
    return " ".join(plan.problems.get(SetAttention(backend), ()))


@pytest.mark.parametrize(
    ("backend", "device", "before", "expected"),
    [
        ("cudnn", "cpu", (), "'cudnn' runs on cuda; this device is cpu"),
        ("cudnn", "v100", (), "needs CUDA compute capability >= 8.0; this device has 7.0"),
        ("cudnn", "h200", (), "computes in bfloat16 or float16; the transformer is float32: add CastDtype('bfloat16')"),
        ("flash", "h200", (CastDtype("bf16"),), "takes no mask, and this transformer passes one in every call: add E"),
        ("flash3", "b200", (CastDtype("bf16"), ElideMask()), "is built for CUDA compute capability < 10.0; this dev"),
        ("sage", "h200", (CastDtype("bf16"), ElideMask()), "needs sageattention, which is not installed: pip install"),
        ("xformers", "h200", (), "needs xformers, which is not installed: pip install xformers"),
        ("npu", "h200", (), "'npu' runs on npu; this device is cuda"),
        ("npu", "ascend910b", (CastDtype("bf16"),), "needs torch_npu, which is not installed: pip install 'ernie-acc"),
    ],
)
def test_what_cannot_run_says_why(ernie, backend, device, before, expected):
    assert expected in reasons(ernie, backend, device, *before)


def test_an_unknown_kernel_names_the_known_ones():
    with pytest.raises(ernie_accel.UnknownNameError, match="Did you mean 'flash3'"):
        SetAttention("flash33")


@pytest.mark.parametrize(
    ("device", "packages", "elide", "dtype", "expected"),
    [
        ("h200", (), True, "bf16", "cudnn"),
        ("h200", (), False, "bf16", "cudnn"),
        ("h200", ("flash_attn_interface",), True, "bf16", "flash3"),
        ("h200", ("flash_attn_interface",), False, "bf16", "cudnn"),
        ("h200", ("sageattention",), True, "bf16", "cudnn"),
        ("h200", (), True, "fp32", "native"),
        ("rtx3090", (), True, "bf16", "flash"),
        ("rtx3090", (), False, "bf16", "native"),
        ("rtx3090", ("flash_attn",), True, "fp16", "flash2"),
        ("v100", (), True, "fp16", "native"),
        ("ascend910b", ("torch_npu",), True, "bf16", "npu"),
        ("ascend910b", (), True, "bf16", "native"),
        ("cpu", (), True, "fp32", "native"),
    ],
)
def test_auto_chooses_and_says_why(ernie, device, packages, elide, dtype, expected):
    from dataclasses import replace

    machine = Context.named(device)
    machine = replace(machine, versions={**machine.versions, **dict.fromkeys(packages, "9.9")})
    machine = after(machine, ernie, CastDtype(dtype), *([ElideMask()] if elide else []))
    auto = SetAttention()
    assert auto.choose(ernie, machine) == expected
    why = auto.explain(ernie, machine)
    assert why.startswith(f"SetAttention() takes {expected!r} on ")
    assert all(name in why for name in BACKENDS)
    assert (", no mask (" in why) == elide


# ExpandAttentionMask


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 1, 5), (2, 3, 1, 5), (2, 1, 5, 5), (2, 5, 5)], ids=str)
def test_expanded_masks_are_whole_and_contiguous(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
    wide = expand(mask)
    assert wide.shape == (2, shape[1] if len(shape) == 4 else 1, 5, 5)
    assert wide.is_contiguous()
    assert wide.dtype == torch.bool
    narrow = {2: mask[:, None, None, :] if mask.ndim == 2 else None, 3: mask[:, None] if mask.ndim == 3 else None}
    assert torch.equal(wide, torch.broadcast_to(mask if mask.ndim == 4 else narrow[mask.ndim], wide.shape))


@pytest.mark.parametrize("masked", [float("-inf"), -1e9, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_additive_mask_keeps_its_meaning(masked, dtype):
    additive = torch.tensor([[[[0.0, 0.0, masked]]]], dtype=dtype)
    assert expand(additive)[0, 0].tolist() == [[True, True, False]] * 3


def test_a_mask_of_ones_and_zeros_keeps_its_meaning():
    assert expand(torch.tensor([[1, 1, 0]]))[0, 0].tolist() == [[True, True, False]] * 3


def test_biases_are_no_mask():
    with pytest.raises(ernie_accel.ErnieAccelError, match=r"additive mask with biases \(values from -3 to 0\)"):
        expand(torch.tensor([[[[0.0, -3.0]]]]))


def test_it_expands_once_for_all_blocks_and_steps_of_a_picture(ernie):
    ernie_accel.optimize(ernie, ExpandAttentionMask())
    masks = spied(ernie, prompt=[SHORT, LONG], steps=3).masks
    assert len(masks) == 2 * 3
    assert masks[0].shape == (2, 1, 16 + 9, 16 + 9)
    assert len(set(map(id, masks))) == 1
    other = spied(ernie, prompt=[LONG, SHORT]).masks
    assert torch.equal(other[0], masks[0].flip(0))


def test_it_refuses_processors_that_fold_the_mask_again(ernie):
    class Folding:
        def __call__(self, attn, hidden_states, attention_mask=None, freqs_cis=None): ...

    ernie.transformer.layers[0].self_attention.processor = Folding()
    (step,) = ernie_accel.plan(ernie, ExpandAttentionMask()).steps
    assert "Folding folds every mask to [B, 1, 1, S] itself" in step.reasons[0]


@pytest.mark.slow
def test_masks_and_compiling_go_together(ernie):
    before = picture(ernie, prompt=[SHORT, LONG])
    ernie_accel.optimize(ernie, ElideMask(), ExpandAttentionMask(), Compile())
    assert rel(picture(ernie, prompt=[SHORT, LONG]), before) < 1e-5


def test_the_floor_of_sage_holds_for_its_scheme(ernie, monkeypatch):
    """Queries and keys in int8, keys centred first (SageAttention, arXiv 2410.02367, sections 4.2 and 4.3).

    The package needs CUDA, so its scheme is emulated: one scale for each head.
    """
    before = picture(ernie, output_type="latent", steps=8)
    stock = torch.nn.functional.scaled_dot_product_attention

    def int8(x_bnsd):
        scale = x_bnsd.abs().amax((-2, -1), keepdim=True) / 127
        return (x_bnsd / scale).round() * scale

    def sage(query, key, value, **kwargs):
        return stock(int8(query), int8(key - key.mean(-2, keepdim=True)), value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sage)
    after = picture(ernie, output_type="latent", steps=8)
    distance = (after - before).norm()
    assert distance > 0
    assert 20 * torch.log10(before.norm() / distance) > SetAttention("sage").floor_db


@pytest.mark.parametrize("name", ["lumina2", "newbie"])
def test_attention_of_lumina_2_goes_through_the_dispatcher_and_back(name):
    """Its own processor calls torch's kernel itself; the stand-in computes the same bits on it."""
    from ernie_accel.models.processors import send_through_dispatcher

    pipe = PIPELINES[name]()
    call = {"prompt": [SHORT, LONG], "guidance_scale": 4.0, "negative_prompt": ["", "red"]}
    before, stock = picture(pipe, **call), {type(p) for p in processors_of(pipe)}
    assert {cls.__name__ for cls in stock} == {"Lumina2AttnProcessor2_0"}
    with ernie_accel.Undo() as undo:
        send_through_dispatcher(pipe.transformer, undo)
    assert torch.equal(picture(pipe, **call), before)
    undo()
    assert {type(p) for p in processors_of(pipe)} == stock
    ernie_accel.optimize(pipe, SetAttention("math"), ExpandAttentionMask())
    assert {p._attention_backend.value for p in processors_of(pipe)} == {"_native_math"}
    assert 0 < rel(picture(pipe, **call), before) < 1e-5
    ernie_accel.restore(pipe)
    assert {type(p) for p in processors_of(pipe)} == stock


def processors_of(pipe):
    return [part.processor for part in pipe.transformer.modules() if hasattr(part, "processor")]


def test_what_runs_natively_already_is_left_to_its_own_processor():
    pipe = PIPELINES["lumina2"]()
    (step,) = ernie_accel.plan(pipe, SetAttention("native")).steps
    assert step.verdict == "nothing to do"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lumina2", "newbie"])
def test_blocks_of_lumina_2_compile_without_breaks(name):
    pipe = PIPELINES[name]()
    before = picture(pipe, steps=2)
    ernie_accel.optimize(pipe, Compile(), SetAttention("math"))
    changed = ernie_accel.report(pipe).entries[-1].applied.changed
    assert len(changed) == 4  # two layers and two refiners
    assert rel(picture(pipe, steps=2), before) < 1e-5
