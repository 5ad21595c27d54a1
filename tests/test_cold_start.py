"""A saved folder holds what was made of the weights: loading it computes nothing anew, and takes no more than that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import ernie_accel
from ernie_accel import (
    CallDefaults,
    CastDtype,
    Compile,
    Context,
    FuseKernels,
    FuseVae,
    MakeContiguous,
    Quantize,
    RewriteBlocks,
    SwapScheduler,
)
from ernie_accel.core.errors import SavedPipelineError
from ernie_accel.kernels import reference
from ernie_accel.kernels.linear import Fp8Linear
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.layers import RECEIPT
from ernie_accel.storage.manifest import WEIGHTS
from ernie_accel.storage.parallel_read import ParallelReader
from tests.pipelines import picture, tiny_ernie, tiny_lumina2, tiny_z_image
from tests.saved_folders import change
from tests.test_saving import assert_same_bits, bits

H200 = Context("cuda", "NVIDIA H200", (9, 0), versions={**Context.detect().versions, "triton": "3.6"})
#: What `turbo-fp8` does, without the graphs that only a device can capture.
FP8 = (CastDtype("bf16"), RewriteBlocks(), FuseKernels("fp8"), MakeContiguous(), CallDefaults("turbo"))
REST = (Compile(), FuseVae())


@pytest.fixture
def on_h200(monkeypatch):
    """Plan as on an H200; the kernels' plain-torch twins draw the pictures here."""
    monkeypatch.setattr(Context, "detect", lambda *args, **kwargs: H200)


def loaded(folder: Any, *transforms: Any, **options: Any) -> Any:
    pipe = ernie_accel.load(folder, *transforms, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reports(*pipes: Any) -> list[list[tuple[str, str, tuple[str, ...]]]]:
    return [
        [
            (repr(entry.step.transform), entry.status, entry.applied.changed if entry.applied else ())
            for entry in ernie_accel.report(pipe).entries
        ]
        for pipe in pipes
    ]


ENCODER = Quantize("fp8-weight-only", components=("text_encoder",))
WITHOUT_ORIGINALS = (FuseKernels("fp8", keep_originals=False), RewriteBlocks())


@pytest.mark.parametrize(
    "transforms",
    [(*FP8, *REST), (*WITHOUT_ORIGINALS, ENCODER), (RewriteBlocks(), FuseKernels("bf16"), FuseVae())],
    ids=["fp8", "fp8 and an 8-bit text encoder, without originals", "bf16"],
)
def test_fused_kernels_come_back_bit_equal_and_nothing_is_computed_anew(transforms, on_h200, tmp_path, monkeypatch):
    pipe = tiny_ernie(dtype=torch.bfloat16, layers=3)
    ernie_accel.optimize(pipe, *transforms, context=H200)
    folder = ernie_accel.save(pipe, tmp_path / "saved")
    expected = picture(pipe, steps=1)
    quantize_rows = reference.quantize_rows
    seen = []

    def watch(rows: torch.Tensor, *more: Any) -> Any:
        seen.append(rows.device.type)
        return quantize_rows(rows, *more)

    monkeypatch.setattr(reference, "quantize_rows", watch)
    again = loaded(folder)
    assert set(seen) <= {"meta"}
    assert_same_bits(bits(pipe), bits(again))
    assert torch.equal(picture(again, steps=1), expected)
    before, after = reports(pipe, again)
    assert after == before
    with pytest.raises(ernie_accel.RestoreError, match="the folder does not hold the originals"):
        ernie_accel.restore(again)


@pytest.mark.parametrize("make", [tiny_z_image, tiny_lumina2])
def test_other_families_come_back_on_their_kernels_too(make, on_h200, tmp_path):
    pipe = make()
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.to(torch.bfloat16)
    ernie_accel.optimize(pipe, RewriteBlocks(), FuseKernels("fp8"), context=H200)
    again = loaded(ernie_accel.save(pipe, tmp_path / "saved"))
    assert any(isinstance(layer, Fp8Linear) for layer in again.transformer.modules())
    assert_same_bits(bits(pipe), bits(again))
    assert torch.equal(picture(again, steps=1), picture(pipe, steps=1))


class _Written(TorchDispatchMode):
    """Sums the bytes of host memory that operations write to: not files that are mapped, nor memory never touched."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {each.untyped_storage()._cdata for each in tree_iter(args) if isinstance(each, torch.Tensor)}
        for made in tree_iter(result):
            if (
                type(made) is torch.Tensor
                and made.device.type == "cpu"
                and func is not torch.ops.aten.empty.memory_format
            ):
                self.nbytes += made.nbytes * (made.untyped_storage()._cdata not in before)
        return result


def test_loading_writes_what_the_folder_holds_and_hardly_more(on_h200, tmp_path, monkeypatch):
    pipe = tiny_ernie(dtype=torch.bfloat16, layers=6)
    ernie_accel.optimize(pipe, *FP8, context=H200)
    folder = ernie_accel.save(pipe, tmp_path / "saved")
    ernie_accel.load(folder)  # what is imported may allocate, too
    read = []
    once = ParallelReader._read
    monkeypatch.setattr(
        ParallelReader,
        "_read",
        lambda self, pieces, start: (read.extend(piece.numel() for piece in pieces), once(self, pieces, start))[1],
    )
    with _Written() as counter:
        again = ernie_accel.load(folder)
    held = sum(tensor.nbytes for tensor in bits(again).values())
    assert held <= sum(read) + counter.nbytes < 1.05 * held


@pytest.mark.parametrize(
    ("scheme", "backend"),
    [("fp8-weight-only", "torchao"), ("int8", "torchao"), ("int8-weight-only", "quanto"), ("nf4", "bitsandbytes")],
)
def test_a_quantizer_makes_one_blank_layer_of_each_kind(scheme, backend, tmp_path, monkeypatch):
    pipe = tiny_ernie(dtype=torch.bfloat16, layers=3)
    ernie_accel.optimize(pipe, Quantize(scheme, backend=backend))
    details = ernie_accel.report(pipe).entries[0].applied.details
    folder = ernie_accel.save(pipe, tmp_path / "saved")
    quantizer, made = type(BACKENDS[backend]), []
    blank = quantizer.blank
    monkeypatch.setattr(quantizer, "blank", lambda self, *args: made.append(args) or blank(self, *args))
    again = ernie_accel.load(folder)
    assert len(made) == len({detail.shape for detail in details}) < len(details)
    layers = [layer for layer in again.transformer.modules() if RECEIPT.of(layer) is not None]
    places = [tensor.data_ptr() for layer in layers for tensor in BACKENDS[backend].tensors(layer).values()]
    assert len(set(places)) == len(places)  # no two layers share memory


def test_what_follows_is_planned_as_on_the_pipe_that_was_saved(on_h200, tmp_path):
    """Blocks on kernels must not be compiled as well, for instance."""
    pipe = tiny_ernie(dtype=torch.bfloat16)
    ernie_accel.optimize(pipe, *FP8, *REST, context=H200)
    again = ernie_accel.load(ernie_accel.save(pipe, tmp_path / "saved"))
    assert not any(block._compiled_call_impl for block in again.transformer.layers)
    wanted = [entry.step.transform for entry in ernie_accel.report(pipe).entries]
    steps = [
        [(step.transform, step.verdict) for step in ernie_accel.plan(each, *wanted, SwapScheduler("unipc")).steps]
        for each in (pipe, again)
    ]
    assert steps[0] == steps[1]
    states = [ernie_accel.core.planned.PlannedPipe.of(each) for each in (pipe, again)]
    assert states[0].blocks is states[1].blocks
    assert states[0].concatenates_linears is states[1].concatenates_linears
    assert ernie_accel.optimize(again, *wanted) is again  # a no-op


def test_layers_that_were_fused_before_there_were_weights_can_be_split_for_a_lora(tmp_path):
    from peft import LoraConfig

    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, RewriteBlocks())
    again = loaded(ernie_accel.save(pipe, tmp_path / "saved"))
    expected = picture(pipe)
    again.transformer.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=True))
    assert torch.equal(picture(again), expected)
    assert again.transformer.layers[0].self_attention.to_k.weight.device.type == "cpu"


# ---- tampered weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(on_h200, tmp_path):
    pipe = tiny_ernie(dtype=torch.bfloat16)
    ernie_accel.optimize(pipe, *FP8, context=H200)
    return ernie_accel.save(pipe, tmp_path / "saved")


LAYER = "layers.1.self_attention.to_qkv"


def edited(**changes: Any) -> Any:
    """Return what changes tensors of the transformer's file; None removes one."""

    def edit(folder: Any) -> None:
        from safetensors.torch import load_file, save_file

        file = folder / "transformer" / WEIGHTS
        tensors = load_file(file)
        for name, do in changes.items():
            path = f"{LAYER}.{name}"
            new = do(tensors.pop(path, None))
            if new is not None:
                tensors[path] = new.contiguous()
        save_file(tensors, file)
        change(folder)

    return edit


def without_fused_kernels(folder: Any) -> None:
    change(
        folder,
        lambda manifest: manifest.update(
            transforms=[e for e in manifest["transforms"] if e["transform"]["transform"] != "FuseKernels"]
        ),
    )


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (edited(weight=lambda old: old.bfloat16()), "weight as torch.bfloat16, and the model as torch.float8_e4m3fn"),
        (edited(weight=lambda old: old.view(torch.int8)), "to_qkv.weight as torch.int8, and the model as torch.float8"),
        (edited(weight=lambda old: old.view(torch.float8_e5m2)), "as torch.float8_e5m2, and the model as torch.float8"),
        (edited(weight=lambda old: old[:16]), r"to_qkv.weight as \(16, 128\), and the model as \(384, 128\)"),
        (edited(weight_scale=lambda old: old[:, :1]), r"to_qkv.weight_scale as \(1, 1\), and the model as \(1, 384\)"),
        (edited(weight_scale=lambda old: None), f"lacks {LAYER}.weight_scale"),
        (edited(weight=lambda old: None), f"lacks {LAYER}.weight"),
        (edited(bias=lambda old: torch.zeros(384)), f"has {LAYER}.bias, which the model has not"),
        (without_fused_kernels, "weight as torch.float8_e4m3fn, and the model as torch.bfloat16"),
        (lambda folder: (folder / "transformer" / WEIGHTS).unlink(), f"incomplete: transformer/{WEIGHTS} is missing"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_the_kernels_are_one_clear_error(tamper, says, fused):
    tamper(fused)
    with pytest.raises(SavedPipelineError, match=says):
        ernie_accel.load(fused)


def test_the_layers_are_those_of_the_kernels(fused):
    assert isinstance(loaded(fused).transformer.get_submodule(LAYER), Fp8Linear)
