"""The doors: a transform, a family and a backend from outside the package, and the contracts that they keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from examples.plugin import register
from examples.plugin.backend import ROWS, PlainRows, RowsLinear
from examples.plugin.family import FLUX
from examples.plugin.transform import HideProgress

import ernie_accel
from ernie_accel import CallDefaults, CastDtype, Context, Effect, Phase, Preview, Quantize, SwapScheduler, testing
from ernie_accel.families import UNKNOWN, registry
from ernie_accel.quantization import backend as backends
from ernie_accel.quantization import choose
from tests.pipelines import picture, tiny_ernie, tiny_flux


@pytest.fixture
def plugin(monkeypatch):
    """Register the example for one test."""
    monkeypatch.setattr(registry, "_registered", [])
    before = [(names, dict(names)) for names in (choose._backends, backends._schemes)]
    register()
    yield
    for names, own in before:
        names.clear()
        names.update(own)


def default_picture(pipe):
    """Draw with the pipe's own defaults."""
    call = {"height": 64, "width": 64, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipe("a red circle", use_pe=False, **call).images.float()


def test_the_three_examples_keep_their_contracts(plugin):
    testing.check_transform(HideProgress(leave=True), shown_ernie, picture)
    testing.check_backend(PlainRows())
    testing.check_family(FLUX, tiny_flux, picture)


def shown_ernie():
    pipe = tiny_ernie()
    pipe.set_progress_bar_config(disable=False)
    return pipe


def test_a_family_from_outside_is_known_to_plans_presets_and_quantization(plugin):
    pipe = tiny_flux()
    plan = ernie_accel.plan(pipe, CallDefaults("turbo"), Quantize("int8-weight-only"))
    assert plan.family == "FLUX.1"
    assert plan.steps[1].preview.changes == ("num_inference_steps 28 -> 4", "guidance_scale 3.5 -> 0.0")
    assert "kept precise in FLUX.1" in plan.steps[0].preview.note
    assert ernie_accel.recommend(pipe=pipe, mode="turbo").preset.name.startswith("turbo-")


def test_a_backend_from_outside_quantizes_saves_and_loads(plugin, tmp_path):
    pipe = tiny_ernie(dtype=torch.bfloat16)
    before = picture(pipe)
    ernie_accel.optimize(pipe, Quantize("int8-rows"))
    drawn = picture(pipe)
    assert not torch.equal(drawn, before)
    assert "int8-rows by plain-rows" in str(ernie_accel.report(pipe))
    ernie_accel.save(pipe, tmp_path / "saved")
    assert torch.equal(picture(ernie_accel.load(tmp_path / "saved")), drawn)
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe), before)


def test_all_three_from_outside_go_through_a_preset_and_a_saved_folder(plugin, tmp_path):
    pipe = tiny_flux().to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=False)
    own = HideProgress(leave=True), Quantize("int8-rows"), CallDefaults("turbo")
    preset = replace(ernie_accel.presets["turbo-bf16"], name="flux-rows", transforms=own)
    ernie_accel.optimize(pipe, preset=preset)
    assert {entry.status for entry in ernie_accel.report(pipe).entries} == {"applied"}
    folder = ernie_accel.save(pipe, tmp_path / "saved")
    again = ernie_accel.load(folder, known=[HideProgress])
    assert ernie_accel.plan(again).family == "FLUX.1"
    entries = {entry.step.transform: entry.status for entry in ernie_accel.report(again).entries}
    assert entries[HideProgress(leave=True)] == entries[CallDefaults("turbo")] == "applied"
    assert any(isinstance(module, RowsLinear) for module in again.transformer.modules())
    assert torch.equal(picture(again), picture(pipe))


def test_a_backend_may_be_passed_as_an_object(plugin):
    assert Quantize("int8-rows", backend=PlainRows()) == Quantize("int8-rows", backend="plain-rows")


def test_a_family_may_be_given_for_one_pipe(monkeypatch):
    monkeypatch.setattr(registry, "_registered", [])  # a page of the docs registers it
    pipe = tiny_flux()
    plan = ernie_accel.plan(pipe, CallDefaults("turbo"), family=FLUX)
    assert plan.family == "FLUX.1"
    assert ernie_accel.plan(pipe, CallDefaults(num_inference_steps=2)).family is None
    ernie_accel.optimize(pipe, CallDefaults("turbo"), family=FLUX)
    assert ernie_accel.plan(pipe, CallDefaults("turbo")).family == "FLUX.1"
    ernie_accel.restore(pipe)
    assert registry.family_of(pipe) is UNKNOWN
    with pytest.raises(ernie_accel.UnsupportedError):
        ernie_accel.optimize(pipe, CallDefaults("turbo"), Quantize("fp8"), family=FLUX)
    assert registry.family_of(pipe) is UNKNOWN


def test_names_that_are_taken_are_refused(plugin):
    with pytest.raises(ValueError, match="is registered already, and differs"):
        ernie_accel.register_family(replace(FLUX, size_multiple=8))
    assert ernie_accel.register_family(FLUX) == FLUX
    with pytest.raises(ValueError, match="'unknown' is registered already, and differs"):
        ernie_accel.register_family(replace(FLUX, name="unknown"))
    with pytest.raises(ValueError, match="nothing says which pipes"):
        ernie_accel.register_family(replace(FLUX, name="other", transformer_classes=()))
    unknown = replace(FLUX, shape=None)
    with pytest.raises(ValueError, match="nothing says which pipes have an other code of 'other': each of them needs"):
        ernie_accel.register_family(replace(FLUX, name="other", other_codes=(unknown,)))
    with pytest.raises(ValueError, match="a scheme named 'int8-rows' is registered already"):
        ernie_accel.register_quantization_backend(PlainRows(), replace(ROWS, bits=7))
    with pytest.raises(TypeError, match="expected a QuantizationBackend"):
        ernie_accel.register_quantization_backend("plain-rows")


def test_a_scheme_that_nobody_described_is_refused():
    class Unknown(PlainRows):
        name = "unknown"
        schemes: ClassVar[dict[str, tuple[int, int]]] = {"int3-rows": (0, 0)}

    with pytest.raises(ValueError, match="unknown schemes int3-rows"):
        ernie_accel.register_quantization_backend(Unknown())


@pytest.mark.parametrize("device", ["h200", "cuda:8.9:16GiB", "rocm"])
def test_a_plan_for_another_device_looks_for_the_packages_of_plug_ins(device, monkeypatch):
    monkeypatch.setattr("ernie_accel.core.context._REGISTERED", {})
    load = lambda: ernie_accel.register_package("peft", install="pip install peft")  # noqa: E731
    monkeypatch.setattr("ernie_accel.core.context.load_plugins", load)
    assert "peft" in Context.named(device).versions


def test_a_package_of_ones_own_can_be_looked_for(monkeypatch):
    monkeypatch.setattr("ernie_accel.core.context._REGISTERED", {})
    context = Context("cpu", "a test")
    with pytest.raises(ernie_accel.UnknownNameError, match=r"register_package"):
        context.missing("my_kernels")
    ernie_accel.register_package("my_kernels", install="pip install my-kernels")
    assert context.missing("my_kernels") == ["my_kernels is not installed: pip install my-kernels"]
    ernie_accel.register_package("peft", install="pip install peft")
    assert Context.detect().missing("peft") == []
    with pytest.raises(ValueError, match="registered already"):
        ernie_accel.register_package("torchao", install="pip install torchao")


@dataclass(frozen=True, repr=False)
class DoesNothing(ernie_accel.Transform):
    """Says that it changes the steps, and does not."""

    phase = Phase.CALL
    slot = "nothing"
    effect = Effect.RESAMPLES
    how: str = "attribute"

    def unsupported(self, pipe, context):
        return []

    def preview(self, pipe, context):
        return Preview(("num_inference_steps 50 -> 8",))

    def apply(self, pipe, context):
        with ernie_accel.Undo() as undo:
            if self.how == "attribute":
                undo.setattr(pipe, "_steps", 8)
        return ernie_accel.Applied(("num_inference_steps 50 -> 8",), undo=undo)


@dataclass(frozen=True, repr=False)
class Lies(DoesNothing):
    """Says that it is exact, and casts."""

    effect = Effect.EXACT

    def apply(self, pipe, context):
        return CastDtype("bf16").apply(pipe, context)

    def planned(self, pipe, context):
        return CastDtype("bf16").planned(pipe, context)


def test_the_contract_catches_a_transform_that_does_nothing():
    with pytest.raises(testing.ContractError, match="another picture is expected"):
        testing.check_transform(DoesNothing(), tiny_ernie, picture)
    with pytest.raises(testing.ContractError, match="nothing of the pipe is changed"):
        testing.check_transform(DoesNothing("not at all"), tiny_ernie, picture)


def test_the_contract_catches_receipts_that_are_not_the_plan():
    with pytest.raises(testing.ContractError, match="the receipt says what the plan said"):
        testing.check_transform(Lies(), tiny_ernie, picture)


@pytest.mark.parametrize(
    "transform", [SwapScheduler("unipc"), CastDtype("bfloat16"), Quantize("int8-weight-only"), CallDefaults("turbo")]
)
def test_the_contract_holds_for_the_catalogue(transform):
    draw = default_picture if isinstance(transform, CallDefaults) else picture
    testing.check_transform(transform, tiny_ernie, draw)


def test_the_contract_of_a_backend_catches_wrong_bytes_and_products():
    class Fat(PlainRows):
        def stored_bytes(self, scheme, spec):
            return 0

    class Wrong(PlainRows):
        def dequantize(self, layer):
            return super().dequantize(layer) * 2

    class Blind(PlainRows):
        def holds(self, layer):
            return type(layer) is RowsLinear

    class Own(PlainRows):
        def quantize(self, scheme, linear):
            layer = super().quantize(scheme, linear)
            layer._call_impl = layer.forward  # a call that bypasses the forward of its class
            return layer

    caught = (
        (Fat, "bytes are what was planned"),
        (Wrong, "promises 36 dB"),
        (Blind, "knows its layers once they are corrected"),
        (Own, "add a correction, or takes_correction is False"),
    )
    backends.add_scheme(ROWS)
    try:
        for cls, words in caught:
            with pytest.raises(testing.ContractError, match=words):
                testing.check_backend(cls())
    finally:
        del backends._schemes[ROWS.name]


def test_every_backend_of_the_library_keeps_its_contract():
    from ernie_accel.quantization.choose import BACKENDS

    here = Context.detect()
    checked = [each for each in BACKENDS.values() if any(not each.unsupported(name, here) for name in each.schemes)]
    for backend in checked:
        testing.check_backend(backend)
    assert len(checked) >= 3
