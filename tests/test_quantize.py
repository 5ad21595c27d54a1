"""Quantizing a pipe: what is left out and why, what was chosen and why, and the way back."""

from __future__ import annotations

import copy
import json
import re
import weakref

import pytest
import torch

import ernie_accel
from ernie_accel import CastDtype, Compile, ConflictError, Context, Quantize, RewriteBlocks, UnsupportedError
from ernie_accel.core.components import pipe_bytes
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.families import UNKNOWN
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.layers import linear_sites, sqnr_db
from tests.examples import differences, snapshot
from tests.pipelines import picture, tiny_ernie, tiny_flux
from tests.test_quantize_backends import every_pair

H200, A100, T4, B200, NPU = (Context.named(name) for name in ("h200", "a100", "t4", "b200", "ascend910b"))


def without(context, *packages):
    from dataclasses import replace

    return replace(context, versions={k: v for k, v in context.versions.items() if k not in packages})


# ---- the pipe as a whole, with every backend ------------------------------------------------------------------------


@every_pair
def test_plan_receipt_and_restore_agree(backend, scheme):
    pipe = tiny_ernie(dtype=torch.bfloat16)
    original, before = picture(pipe, steps=1), snapshot(pipe)
    request = Quantize(scheme, backend=backend.name, components=("transformer", "text_encoder"))
    step = ernie_accel.plan(pipe, request).steps[0]
    ernie_accel.optimize(pipe, request)
    applied = ernie_accel.report(pipe).entries[0].applied
    assert applied.changed == step.preview.changes == tuple(detail.name for detail in applied.details)
    assert pipe_bytes(pipe) == step.planned.nbytes < applied.bytes_before
    saved = sum(detail.bytes_before - detail.bytes_after for detail in applied.details)
    assert applied.bytes_before - applied.bytes_after == saved
    assert not torch.equal(picture(pipe, steps=1), original)
    ernie_accel.restore(pipe)
    assert differences(before, snapshot(pipe)) == []
    assert torch.equal(picture(pipe, steps=1), original)


@pytest.mark.parametrize("fuse", [True, False])
def test_plan_and_receipt_agree_on_blocks_that_are_rewritten_before(fuse):
    """Planned on stock blocks, the layers bear the names that they will have."""
    request = CastDtype("bf16"), RewriteBlocks(fuse=fuse), Quantize("int8-weight-only")
    pipe = tiny_ernie()
    step = ernie_accel.plan(pipe, *request).steps[2]
    ernie_accel.optimize(pipe, *request)
    applied = ernie_accel.report(pipe).entries[2].applied
    assert any(name.endswith(".to_qkv") for name in applied.changed) is fuse
    assert step.preview.changes == applied.changed
    assert step.planned.nbytes == pipe_bytes(pipe)


def test_excluding_a_part_excludes_the_layer_it_was_fused_into():
    pipe, request = tiny_ernie(), (RewriteBlocks(), Quantize("int8-weight-only", exclude=(r".*\.to_q$",)))
    preview = ernie_accel.plan(pipe, *request).steps[1].preview
    ernie_accel.optimize(pipe, *request)
    applied = ernie_accel.report(pipe).entries[1].applied
    assert preview.changes == applied.changed
    assert applied.skipped == {f"transformer.layers.{i}.self_attention.to_qkv": "excluded" for i in range(2)}


def test_a_lora_keeps_plan_and_receipt_in_agreement_too():
    from peft import LoraConfig

    pipe, request = tiny_ernie(), (RewriteBlocks(), Quantize("int8-weight-only"))
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    preview = ernie_accel.plan(pipe, *request).steps[1].preview
    ernie_accel.optimize(pipe, *request)
    changed = ernie_accel.report(pipe).entries[1].applied.changed
    assert preview.changes == changed
    assert any("to_q.base_layer" in name for name in changed) and any("gate_up_proj" in name for name in changed)


@every_pair
def test_a_failure_half_way_leaves_no_trace(backend, scheme, monkeypatch):
    pipe = tiny_ernie(dtype=torch.bfloat16)
    before = snapshot(pipe)
    real, calls = type(backend).quantize, []

    def fails_at_the_third(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return real(self, *args)

    monkeypatch.setattr(type(backend), "quantize", fails_at_the_third)
    for keep in (True, False):
        calls.clear()
        with pytest.raises(ernie_accel.ApplyError, match="out of memory"):
            ernie_accel.optimize(pipe, Quantize(scheme, backend=backend.name, keep_originals=keep))
        assert differences(before, snapshot(pipe)) == []


def test_layer_receipts_say_what_happened_and_are_json():
    pipe = tiny_ernie(dtype=torch.bfloat16)
    ernie_accel.optimize(pipe, Quantize("nf4"))
    report = ernie_accel.report(pipe)
    first = report.entries[0].applied.details[0]
    assert first.name == "transformer.layers.0.mlp.linear_fc2"
    assert (first.scheme, first.backend, first.dtype, first.shape) == ("nf4", "bitsandbytes", "bfloat16", (128, 256))
    assert (first.bytes_before, first.bytes_after) == (65536, 128 * 256 // 2 + 4 * 128 * 256 // 64)
    assert 18 < first.sqnr_db < 24
    document = json.loads(report.to_json())["entries"][0]
    assert document["details"][0]["sqnr_db"] == round(first.sqnr_db, 3)
    assert document["skipped"]["transformer.final_linear"] == "kept precise in ERNIE-Image"
    assert len(str(report).splitlines()) < 8


def test_a_plan_shows_bytes_per_component_what_stays_and_who_does_it(ernie):
    request = Quantize("int8-weight-only", components=("transformer", "text_encoder"))
    text = str(ernie_accel.plan(ernie, CastDtype("bf16"), request))
    assert "int8-weight-only by torchao" in text
    assert re.search(r"transformer 1.0 MB -> 821.8 kB, text_encoder 261.\d kB -> ", text)  # by release of transformers
    first = "transformer.text_proj, transformer.time_embedding.linear_1 and "
    assert f"kept precise in ERNIE-Image: {first}" in text
    plan = ernie_accel.plan(ernie, CastDtype("bf16"), request)
    ernie_accel.optimize(ernie, CastDtype("bf16"), request)
    assert pipe_bytes(ernie) == plan.steps[1].planned.nbytes
    applied = ernie_accel.report(ernie).entries[1].applied
    assert plan.steps[1].preview.skipped == applied.skipped
    assert json.loads(plan.to_json())["steps"][1]["skipped"] == applied.skipped


def test_a_shape_that_does_not_fit_is_skipped_with_its_reason(ernie):
    odd = torch.nn.Linear(100, 128)  # 100 is not a multiple of 16, 32 or 64
    ernie.transformer.layers[1].register_module("odd", odd)
    for scheme, multiple in (("int8-weight-only", 16), ("gguf-q8_0", 32), ("nf4", 64)):
        ernie_accel.optimize(ernie, Quantize(scheme))
        reason = ernie_accel.report(ernie).entries[0].applied.skipped["transformer.layers.1.odd"]
        assert reason == f"its 100 inputs are not a multiple of {multiple}"
        told = f"1 its 100 inputs are not a multiple of {multiple}: transformer.layers.1.odd"
        assert told in str(ernie_accel.plan(tiny(odd), Quantize(scheme)))
        assert ernie.transformer.layers[1].odd is odd
        ernie_accel.restore(ernie)


def tiny(odd):
    pipe = tiny_ernie()
    pipe.transformer.layers[1].register_module("odd", odd)
    return pipe


def test_each_component_has_exclusions_of_its_own():
    """Text encoder: what text-to-image never calls. Prompt enhancer: the head, which decides the next token."""
    pipe = ernie_accel.demo.load(torch.bfloat16)
    lengths = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompt = torch.arange(3, 9)[None]
    request = Quantize("int8-weight-only", components=("transformer", "text_encoder", "pe"))
    ernie_accel.optimize(pipe, request)
    applied = ernie_accel.report(pipe).entries[0].applied
    by_component = {name: [] for name in request.components}
    for name in applied.skipped:
        by_component[name.split(".")[0]].append(name.split(".", 1)[1])
    assert by_component["pe"] == ["lm_head"]
    assert {path.split(".")[0] for path in by_component["text_encoder"]} == {"vision_tower", "multi_modal_projector"}
    assert {"final_linear", "layers.0.self_attention.to_q"} < set(by_component["transformer"])
    assert set(applied.skipped.values()) == {"kept precise in ERNIE-Image"}
    layers = range(pipe.pe.config.num_hidden_layers)
    assert {name for name in applied.changed if name.startswith("pe.")} == {
        f"pe.model.layers.{i}.{part}"
        for i in layers
        for part in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    }
    assert pipe.pe.generate(prompt, **lengths).shape == (1, 10)
    ernie_accel.restore(pipe)


def test_the_head_stays_where_no_family_knows_the_model(monkeypatch):
    pipe = ernie_accel.demo.load(torch.bfloat16)
    pipe.pe.lm_head.weight = torch.nn.Parameter(pipe.pe.lm_head.weight.clone())  # untied, so only the list keeps it
    monkeypatch.setattr("ernie_accel.families.family_of", lambda pipe: UNKNOWN)
    left_out = {site.name: site.left_out for site in linear_sites(pipe, ("pe",), None) if site.left_out}
    assert left_out == {"pe.lm_head": "kept precise: outside blocks, or modulates"}


def test_own_exclusions_replace_the_familys(ernie):
    request = Quantize("int8-weight-only", exclude=(r"layers\.1\b", "x_embedder"))
    changes = ernie_accel.plan(ernie, request).steps[0].preview.changes
    assert "transformer.layers.0.self_attention.to_q" in changes
    assert not any("layers.1." in name for name in changes)


def test_an_unknown_family_keeps_what_is_outside_blocks_or_modulates():
    flux = tiny_flux()
    ernie_accel.optimize(flux, Quantize("int8-weight-only"))
    applied = ernie_accel.report(flux).entries[0].applied
    assert all("blocks." in name and "norm" not in name for name in applied.changed)
    for left in ("transformer.x_embedder", "transformer.proj_out", "transformer.transformer_blocks.0.norm1.linear"):
        assert applied.skipped[left] == "kept precise: outside blocks, or modulates"


def test_a_tied_weight_stays(ernie):
    blocks = ernie.transformer.layers
    blocks[1].mlp.up_proj.weight = blocks[1].mlp.gate_proj.weight
    ernie_accel.optimize(ernie, Quantize("int8-weight-only"))
    skipped = ernie_accel.report(ernie).entries[0].applied.skipped
    assert skipped["transformer.layers.1.mlp.up_proj"] == "it shares its weight with another layer"


def test_an_offloaded_pipe_is_refused_with_the_fix(ernie):
    ernie.transformer.to("meta")
    (reason,) = ernie_accel.plan(ernie, Quantize("int8-weight-only")).steps[0].reasons
    assert "its weight is not loaded (meta device): quantize before offloading" in reason


# ---- twice, and the way back ----------------------------------------------------------------------------------------


def test_components_may_have_schemes_of_their_own():
    pipe = tiny_ernie(enhancer=True)
    both = [Quantize("int8-weight-only"), Quantize("fp8-weight-only", components=("pe",))]
    before = snapshot(pipe)
    ernie_accel.optimize(pipe, *both)
    first, second = (entry.applied for entry in ernie_accel.report(pipe).entries)
    assert {receipt.name.split(".")[0] for receipt in first.details} == {"transformer"}
    assert {receipt.name.split(".")[0] for receipt in second.details} == {"pe"}
    ernie_accel.restore(pipe)
    assert differences(before, snapshot(pipe)) == []


def test_a_component_cannot_have_two_schemes():
    pipe = tiny_ernie(enhancer=True)
    first = Quantize("int8-weight-only", components=("transformer", "pe"))
    with pytest.raises(UnsupportedError, match="pe is quantized in the same plan already"):
        ernie_accel.optimize(pipe, first, Quantize("fp8-weight-only", components=("pe",)))
    with pytest.raises(ConflictError):
        ernie_accel.optimize(pipe, first, Quantize("fp8-weight-only"))


def test_quantizing_twice_is_refused_by_name(ernie):
    ernie_accel.optimize(ernie, Quantize("nf4"))
    (reason,) = Quantize("int8").unsupported(ernie, Context.detect(ernie))
    assert "transformer is quantized already (8 layers, transformer.layers.0.mlp.linear_fc2 as nf4" in reason
    assert "restore(pipe) first" in reason
    assert Quantize("nf4").preview(ernie, Context.detect(ernie)).changes == ()
    ernie_accel.optimize(ernie, Quantize("int8"))  # a new request: the old one is undone first
    assert {detail.scheme for detail in ernie_accel.report(ernie).entries[0].applied.details} == {"int8"}


def test_what_others_quantized_is_refused_too(ernie):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(ernie.transformer.layers[1].mlp.up_proj, Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    (reason,) = ernie_accel.plan(ernie, Quantize("nf4")).steps[0].reasons
    assert "1 layers, transformer.layers.1.mlp.up_proj as another scheme by torchao" in reason


def test_without_originals_restore_says_plainly_why_not(ernie):
    request = Quantize("int8-weight-only", keep_originals=False)
    ernie_accel.optimize(ernie, request)
    with pytest.raises(ernie_accel.RestoreError, match="the weights are gone") as caught:
        ernie_accel.restore(ernie)
    assert caught.value.transform == request
    assert "cannot be undone: keep_originals=False" in str(ernie_accel.report(ernie))


# ---- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "scheme", "backend"),
    [
        (B200, "nvfp4", "torchao"),
        (H200, "fp8", "torchao"),
        (A100, "int8", "torchao"),
        (T4, "int8", "bitsandbytes"),
        (Context.named("v100"), "int8-weight-only", "quanto"),
        (Context.named("cpu"), "int8-weight-only", "torchao"),
        (NPU, "fp8-weight-only", "layerwise"),
        (without(H200, "torchao"), "int8", "bitsandbytes"),
        (without(H200, "torchao", "bitsandbytes", "optimum.quanto"), "fp8-weight-only", "layerwise"),
    ],
    ids=lambda value: str(value),
)
def test_auto_picks_by_hardware_and_says_why(context, scheme, backend):
    choice = Quantize("auto").choose(context)
    assert (choice.chosen.scheme, choice.chosen.backend) == (scheme, backend)
    for candidate in choice.candidates[: choice.candidates.index(choice.chosen)]:
        assert candidate.reasons
        assert candidate.reasons[0] in str(choice)
    assert "chosen" in str(choice)


@pytest.mark.parametrize(
    ("scheme", "context", "reason"),
    [
        ("fp8", A100, "fp8 needs CUDA compute capability >= 8.9; this device has 8.0"),
        ("fp8", Context.named("cpu"), "fp8 needs CUDA compute capability >= 8.9; this device has no CUDA (cpu)"),
        ("nvfp4", H200, "nvfp4 needs CUDA compute capability >= 10.0; this device has 9.0"),
        ("mxfp8", H200, "mxfp8 needs CUDA compute capability >= 10.0; this device has 9.0"),
        ("nf4", NPU, "bitsandbytes runs on cuda and cpu, not on npu"),
        (
            "nf4",
            without(H200, "bitsandbytes"),
            "bitsandbytes is not installed: pip install 'ernie-accel[bitsandbytes]'",
        ),
        ("gguf-q8_0", without(H200, "gguf"), "gguf is not installed: pip install 'ernie-accel[gguf]'"),
        ("fp8", without(H200, "torchao"), "torchao is not installed: pip install 'ernie-accel[torchao]'"),
        (
            "int8-weight-only",
            without(H200, "optimum.quanto"),
            "optimum.quanto is not installed: pip install 'ernie-accel[quanto]'",
        ),
    ],
)
def test_what_cannot_run_says_why(scheme, context, reason, ernie):
    assert reason in Quantize(scheme).unsupported(ernie, context)


def test_what_would_be_far_slower_on_cuda_is_not_chosen_there():
    """Measured: benchmarks/results/quantization_h200_202611.md."""
    choice = Quantize("int8-weight-only").choose(H200)
    assert choice.chosen.backend == "quanto"
    assert "500 times as long as bfloat16" in str(choice)
    for scheme in ("fp8-weight-only", "int4"):
        assert any("builds with nvcc" in reason for reason in BACKENDS["quanto"].unsupported(scheme, H200))
    pipe = tiny_ernie(dtype=torch.bfloat16)
    assert "tinygemm is made for single tokens" in str(ernie_accel.plan(pipe, Quantize("int4"), context=H200))
    assert "faster only when compiled" in str(ernie_accel.plan(pipe, Quantize("fp8"), context=H200))


def test_int4_on_the_cpu_goes_to_quanto_and_says_why_not_torchao():
    choice = Quantize("int4").choose(Context.named("cpu"))
    assert choice.chosen.backend == "quanto"
    assert "int4 needs CUDA compute capability >= 8.0; this device has no CUDA (cpu)" in str(choice)
    assert Quantize("int4").choose(H200).chosen.backend == "torchao"


def test_unknown_names_get_the_valid_ones_and_those_that_run_here():
    with pytest.raises(ernie_accel.UnknownNameError, match=r"Unknown scheme 'int3'. Did you mean 'int\d'") as caught:
        Quantize("int3")
    assert "This machine can run" in str(caught.value)
    with pytest.raises(
        ernie_accel.UnknownNameError, match="Valid: auto, torchao, bitsandbytes, quanto, gguf"
    ) as caught:
        Quantize("int8", backend="awq")
    assert "This machine can run torchao, bitsandbytes, quanto, gguf, layerwise." in str(caught.value)
    with pytest.raises(ernie_accel.UnknownNameError, match="nf4 is available from bitsandbytes"):
        Quantize("nf4", backend="torchao")
    with pytest.raises(ernie_accel.UnknownNameError, match="gguf-q4_0"):
        Quantize("gguf-q4_k")  # no package encodes K-quants


# ---- what precedes and follows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_a_pipe_can_move_but_not_be_cast(backend):
    pipe = tiny_ernie(dtype=torch.bfloat16)
    scheme = next(s for s, need in backend.schemes.items() if need == (0, 0))
    ernie_accel.optimize(pipe, Quantize(scheme, backend=backend.name))
    y = picture(pipe)
    for cast in (
        lambda: pipe.to(torch.float16),
        lambda: pipe.to("cpu", torch.float32),
        lambda: pipe.to(dtype=torch.float32),
        lambda: pipe.transformer.to(torch.float16),
        lambda: pipe.transformer.half(),
        lambda: pipe.transformer.float(),
    ):
        with pytest.raises(ErnieAccelError, match=r"its weights are quantized.*restore\(pipe\) first"):
            cast()
    assert pipe.to("cpu") is pipe
    assert pipe.transformer.to(device="cpu") is pipe.transformer
    assert torch.equal(picture(pipe), y)
    assert not [name for name in ("to", "half") if name in vars(type(pipe.transformer)) and name == "half"]
    ernie_accel.restore(pipe)
    pipe.to(torch.float32)
    assert pipe.transformer.dtype == torch.float32


def test_a_deep_copy_moves_itself_and_not_its_origin(ernie):
    ernie_accel.optimize(ernie, Quantize("int8-weight-only"))
    twin = copy.deepcopy(ernie.transformer)
    assert twin.to("cpu") is twin
    with pytest.raises(ErnieAccelError, match="quantized"):
        twin.half()


def test_lora_loaded_before_survives():
    from peft import LoraConfig

    pipe = tiny_ernie(dtype=torch.bfloat16)
    plain = picture(pipe, output_type="latent")
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "up_proj"], init_lora_weights=False))
    with_lora = picture(pipe, output_type="latent")
    before = snapshot(pipe)
    ernie_accel.optimize(pipe, Quantize("int8-weight-only"))
    applied = ernie_accel.report(pipe).entries[0].applied
    assert "transformer.layers.1.self_attention.to_q.base_layer" in applied.changed
    assert applied.skipped["transformer.layers.1.self_attention.to_q.lora_A.default"] == "a LoRA adapter"
    quantized = picture(pipe, output_type="latent")
    assert sqnr_db(with_lora, quantized) > sqnr_db(with_lora, plain) + 6
    pipe.transformer.disable_adapters()
    assert sqnr_db(plain, picture(pipe, output_type="latent")) > sqnr_db(with_lora, plain) + 6
    pipe.transformer.enable_adapters()
    ernie_accel.restore(pipe)
    assert differences(before, snapshot(pipe)) == []


def test_compile_refuses_in_the_plan_what_cannot_be_traced(ernie):
    context = Context.detect(ernie)
    plan = ernie_accel.plan(ernie, Quantize("fp8-weight-only", backend="layerwise"), Compile(), context=context)
    (reason,) = plan.problems[Compile()]
    assert "layerwise casting changes the dtype of parameters inside the forward" in reason
    assert ernie_accel.plan(ernie, Quantize("fp8-weight-only"), Compile()).ok


# ---- on the way to a device -----------------------------------------------------------------------------------------


@every_pair
def test_streaming_holds_one_unquantized_layer_and_moves_the_rest_last(backend, scheme, monkeypatch):
    """The bytes on a device that has some are measured in tests/gpu."""
    pipe = tiny_ernie(dtype=torch.bfloat16)
    before, sources, alive, moved_after = snapshot(pipe), [], [], []
    quantize, move = type(backend).quantize, type(pipe).to

    def watch_quantize(self, name, linear):
        alive.append(sum(source() is not None for source in sources))
        sources.append(weakref.ref(linear))
        return quantize(self, name, linear)

    def watch_move(self, *args, **kwargs):
        moved_after.append(len(sources))
        return move(self, *args, **kwargs)

    monkeypatch.setattr(type(backend), "quantize", watch_quantize)
    monkeypatch.setattr(type(pipe), "to", watch_move)
    request = Quantize(scheme, backend=backend.name, device="cpu")
    assert request.moves_to == "cpu"
    ernie_accel.optimize(pipe, request)
    assert alive == [0] * 8
    assert moved_after == [8]
    ernie_accel.restore(pipe)
    assert differences(before, snapshot(pipe)) == []


def test_a_device_that_is_not_there_is_refused(ernie):
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    (step,) = ernie_accel.plan(ernie, Quantize("int8-weight-only", device="cuda")).steps
    assert "device='cuda' is not the device that was planned for, cpu" in step.reasons[0]


def test_a_plan_for_a_device_needs_no_device(ernie):
    plan = ernie_accel.plan(ernie, CastDtype("bf16"), Quantize("fp8", device="cuda"), context=H200)
    assert plan.ok
    assert "fp8 by torchao on its way to cuda" in str(plan)
