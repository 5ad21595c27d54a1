"""What a pipe will need, worked out from shapes, and where its weights are put so that it fits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ernie_accel
from ernie_accel import (
    CallDefaults,
    CastDtype,
    Context,
    ExplainOutOfMemory,
    FuseKernels,
    MoveTo,
    Offload,
    Quantize,
    Residency,
    RewriteBlocks,
    SliceVae,
    TileVae,
)
from ernie_accel.common.text import human_gib
from ernie_accel.core.components import pipe_bytes
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.core.hardware import GIB
from ernie_accel.core.planned import PlannedPipe
from ernie_accel.families import family_of
from ernie_accel.families.published import CHECKPOINTS, published
from ernie_accel.memory import planner, stages
from ernie_accel.memory.activations import _Counter, peak_of
from ernie_accel.memory.call import Call
from ernie_accel.memory.planner import budget_of, check_fits, free_on_device, plan_memory
from ernie_accel.memory.stages import _TRACED, activations_of
from ernie_accel.recipes.presets import find_preset
from ernie_accel.storage.loading import load_pipeline
from ernie_accel.storage.skeleton import skeleton
from tests.pipelines import tiny_ernie, tiny_flux, tiny_lumina2, tiny_sd, tiny_z_image

TURBO = "baidu/ERNIE-Image-Turbo"


@pytest.fixture(scope="module")
def turbo(counted) -> Any:
    return skeleton(TURBO)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda each: each.names[0])
def test_published_checkpoints_have_the_sizes_of_their_files(checkpoint):
    pipe = skeleton(checkpoint.names[0].upper())
    family = family_of(pipe)
    assert family.is_known
    assert checkpoint.mode in family.modes
    for name, nbytes in family.weight_bytes.items():
        if name == "transformer":
            assert PlannedPipe.of(pipe).bytes_of(name) == pytest.approx(nbytes, rel=0.001)
    assert all(
        tensor.is_meta
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module)
        for tensor in part.parameters()
    )


def test_a_checkpoint_that_is_not_known_is_refused_with_those_that_are(monkeypatch):
    assert published("somebody/something") is None
    with pytest.raises(ErnieAccelError, match=r"somebody/something.*Known: baidu/ERNIE-Image-Turbo"):
        skeleton("somebody/something")


def test_a_folder_is_planned_without_its_weights(tmp_path):
    tiny_ernie().save_pretrained(tmp_path / "pipe")
    loaded = PlannedPipe.of(load_pipeline(str(tmp_path / "pipe"), "bfloat16", "cpu"))
    for file in (tmp_path / "pipe").rglob("*.safetensors"):
        file.unlink()
    bare = PlannedPipe.of(skeleton(str(tmp_path / "pipe")))
    sizes = [{name: (each.shape, each.dtype) for name, each in pipe.weights.items()} for pipe in (bare, loaded)]
    assert sizes[0] == sizes[1]


PARTS = {
    "ernie": (tiny_ernie, 64),
    "z_image": (tiny_z_image, 64),
    "lumina2": (tiny_lumina2, 512),  # where its tables of positions are small beside the rest
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_counted_without_data_is_what_a_run_with_data_needs(name, rows):
    make, pixels = PARTS[name]
    pipe = make()
    module, vary = "ernie_accel.models.", {"ernie": "ernie_image", "z_image": "z_image", "lumina2": "lumina"}
    inputs = __import__(f"{module}{vary[name]}.inputs", fromlist=["x"]).forward_inputs

    def run(transformer: Any) -> None:
        transformer(**inputs(transformer, rows, pixels, pixels, 7))

    known = {t.untyped_storage()._cdata for t in (*pipe.transformer.parameters(), *pipe.transformer.buffers())}
    with torch.no_grad():
        run(pipe.transformer)  # some keep tables of positions from the first call on
        with _Counter(known, 7) as counter:
            run(pipe.transformer)
    assert peak_of(pipe.transformer, run, 7) == pytest.approx(counter.peak, rel=0.02)


def test_full_size_stages_are_what_an_h200_measured():
    """MiB at 1024, 512 and 1264 px, stock and on fused kernels (NVIDIA H200, torch 2.11, cuDNN attention in fp8)."""
    pipe = skeleton(TURBO)
    pipe.transformer.layers = pipe.transformer.layers[:2]  # one after the other, they need no more than one
    pipe.register_modules(text_encoder=None, pe=None)
    measured = {
        (1024, 1, False): {"denoise": 762, "decode": 2435},
        (512, 1, False): {"denoise": 208, "decode": 609},
        (1264, 1, False): {"denoise": 1148, "decode": 3709},
        (1024, 1, True): {"denoise": 579, "decode": 1282},
        (512, 1, True): {"denoise": 163, "decode": 321},
        (1024, 2, True): {"denoise": 1162, "decode": 2564},
    }
    context = Context("cuda", "NVIDIA H200", (9, 0), 141 * GIB, {"triton": "3.6", "cudnn": "1.32"})
    fast = find_preset("turbo-fp8").transforms
    for (pixels, pictures, on_kernels), needs in measured.items():
        call = Call(pixels, pixels, pictures, prompt_tokens=128)
        found = activations_of(pipe, fast if on_kernels else (), context, call)
        for stage, mib in needs.items():
            assert (found[stage] or 0) / 2**20 == pytest.approx(mib, rel=0.03), (pixels, pictures, on_kernels, stage)


def shorter(encoder: Any) -> None:
    encoder.language_model.layers = encoder.language_model.layers[:1]


def doubled(encoder: Any) -> None:
    encoder.language_model.norm.register_forward_hook(lambda module, args, output: torch.cat([output] * 40))


def replaced(encoder: Any) -> None:
    encoder.language_model.norm.forward = lambda x: torch.cat([x] * 40)


CHANGES = [
    *(shorter, doubled, replaced),
    lambda encoder: encoder.to(torch.bfloat16),
    lambda encoder: encoder.set_attn_implementation("eager"),
    lambda encoder: encoder.config.text_config.update({"hidden_act": "relu"}),
]


def test_a_language_model_is_counted_once_and_again_where_it_or_its_work_is_another(monkeypatch):
    counted, context = [], Context.named("rtx3060")
    monkeypatch.setattr(stages, "_language_models", {})
    monkeypatch.setattr(stages, "peak_of", lambda part, *rest: counted.append(part) or peak_of(part, *rest))

    def need(pipe: Any, **call: int) -> tuple[int | None, int]:
        counted.clear()
        found = activations_of(pipe, (), context, Call(64, 64, **call))["encode"]
        return found, sum(isinstance(part, PreTrainedModel) for part in counted)

    stock, times = need(tiny_ernie())
    assert times == 1
    assert need(tiny_ernie()) == (stock, 0)
    assert need(tiny_ernie(), prompt_tokens=300)[1] == 1
    assert need(tiny_ernie(), pictures=2)[1] == 1
    for change in CHANGES:
        pipe = tiny_ernie()
        change(pipe.text_encoder)
        assert need(pipe)[1] == 1
    assert need(tiny_ernie()) == (stock, 0)


def test_stages_are_traced_once_for_all_devices_that_compute_them_alike(monkeypatch):
    traced: list[Any] = []
    monkeypatch.setattr(stages, "_stages", {})
    monkeypatch.setattr(stages, "peak_of", lambda part, *rest: traced.append(part) or peak_of(part, *rest))

    def need(pipe: Any, *transforms: Any, card: str = "rtx4090", **call: int) -> tuple[Any, int]:
        traced.clear()
        found = activations_of(pipe, transforms, Context.named(card), Call(64, 64, **call))
        return found, sum(not isinstance(part, PreTrainedModel) for part in traced)

    stock, times = need(tiny_ernie())
    assert times == 2
    assert need(tiny_ernie()) == (stock, 0)
    assert need(tiny_ernie(), card="l4") == (stock, 0), "a name and a size of memory change nothing"
    assert need(tiny_ernie(), SliceVae())[1] == 1, "what only the VAE has leaves the denoiser's need"
    assert need(tiny_ernie(), FuseKernels("bf16"))[1] == 1
    assert need(tiny_ernie(), FuseKernels("bf16"), card="rtx3060")[1] == 2, "another capability"
    assert need(tiny_ernie(), pictures=2)[1] == 2
    for change in (
        lambda pipe: pipe.to(torch.float16),
        lambda pipe: pipe.vae.enable_tiling(),
        lambda pipe: setattr(pipe.transformer, "layers", pipe.transformer.layers[:1]),
        lambda pipe: pipe.vae.to(memory_format=torch.channels_last),
        lambda pipe: pipe.transformer.register_forward_hook(lambda module, args, output: output),
        lambda pipe: setattr(pipe.vae, "forward", pipe.vae.forward),
    ):
        pipe = tiny_ernie()
        change(pipe)
        assert need(pipe)[1] == 2
    assert need(tiny_ernie()) == (stock, 0)
    for pixels in range(64, 64 + 16 * stages._MAX_STAGES, 16):
        stages._stages[pixels] = 0
    activations_of(tiny_ernie(), (), Context.named("h200"), Call(64, 64))
    assert len(stages._stages) <= stages._MAX_STAGES


@pytest.fixture(scope="module")
def counted():
    """Count what a stage of the full-size pipe needs once for all budgets: it takes a second."""
    known: dict[Any, dict[str, int | None]] = {}

    def count(pipe: Any, transforms: Any, context: Context, call: Call, *rest: Any) -> dict[str, int | None]:
        traced = tuple(each for each in transforms if isinstance(each, _TRACED))
        key = pipe, traced, context.device_name, call
        if key not in known:
            known[key] = activations_of(pipe, traced, context, call, *rest)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "activations_of", count)
        yield


@functools.cache
def planned(pipe: Any, card: str, preset: str = "turbo-fp8", *transforms: Any, **kwargs: Any) -> Any:
    return plan_memory(pipe, transforms, find_preset(preset), Context.named(card), **kwargs)


def test_the_fastest_way_that_fits_is_chosen(turbo):
    on_all = planned(turbo, "h200")
    assert on_all.transforms == (MoveTo("cuda"), ExplainOutOfMemory(predicted=on_all.needed))
    on_24 = planned(turbo, "rtx4090")
    assert on_24.transforms[1] == MoveTo("cuda")
    assert on_24.transforms[0].components == ("text_encoder", "pe")
    on_8 = planned(turbo, "rtx4060")
    assert on_8.fits
    assert on_8.host < 20e9
    assert any(isinstance(each, Residency) for each in on_8.transforms)
    for found in (on_24, on_8):
        assert found.fits
        assert found.needed <= found.budget


def test_unquantized_weights_wait_on_the_host_only_where_everything_stays_on_the_device(turbo):
    lean = FuseKernels("fp8", keep_originals=False)
    on_all, on_8 = planned(turbo, "h200"), planned(turbo, "h200", memory="8GiB")
    assert lean not in on_all.transforms
    assert on_all.host == pytest.approx(7.2e9 * 2, rel=0.1)  # the linear layers of the blocks in bfloat16
    assert "wait in host memory for restore()" in str(on_all)
    assert lean in on_8.transforms
    assert "restore() cannot bring them back" in str(on_8)
    own = planned(turbo, "h200", "turbo-fp8", FuseKernels("fp8"), memory="8GiB")
    assert not any(isinstance(each, FuseKernels) for each in own.transforms)
    assert own.host == on_8.host + on_all.host


@pytest.mark.parametrize(
    ("make", "transforms", "guided"),
    [
        (tiny_ernie, (), True),
        (tiny_ernie, (CallDefaults("turbo"),), False),
        (tiny_lumina2, (CallDefaults("quality"),), True),  # the mode leaves the pipe's own scale
        (tiny_lumina2, (CallDefaults(guidance_scale=1.0),), False),
        (tiny_flux, (), False),  # its scale is an input of the model
    ],
)
def test_guidance_is_what_calls_have_by_default(monkeypatch, make, transforms, guided):
    monkeypatch.setattr("ernie_accel.memory.planner.activations_of", lambda *args, **kwargs: {})
    assert plan_memory(make(), transforms, None, Context.named("cpu")).call.guidance == guided


def test_what_other_work_holds_on_the_card_is_not_counted_on(turbo):
    alone, shared = (planned(turbo, "h200", free=free) for free in (200 * GIB, 12 * GIB))
    assert any(isinstance(each, Residency) for each in shared.transforms)
    assert shared.budget == 12 * GIB
    assert "other work on the card holds" in str(shared)
    assert "other work" not in str(alone)
    assert planned(turbo, "h200", memory="-2GiB", free=12 * GIB).budget == 12 * GIB
    assert planned(turbo, "h200", memory="16GiB", free=12 * GIB).budget == 16 * GIB


def test_memory_is_free_that_the_pipe_has_already_or_that_is_cached(monkeypatch):
    pipe = tiny_ernie()
    assert free_on_device(pipe, "cpu") is None
    sizes = {"mem_get_info": (10 * GIB, 24 * GIB), "memory_reserved": 3 * GIB, "memory_allocated": 2 * GIB}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert free_on_device(pipe, "cuda:0") == 11 * GIB - GIB // 4
    monkeypatch.setattr(planner, "device_of", lambda pipe: torch.device("cuda"))
    assert free_on_device(pipe, "cuda:0") == 11 * GIB - GIB // 4 + pipe_bytes(pipe)


def test_weights_stay_unquantized_as_long_as_that_fits(turbo):
    found = planned(turbo, "rtx4090", "turbo-bf16")
    assert [type(each).__name__ for each in found.transforms] == ["Residency", "ExplainOutOfMemory"]
    roomy = planned(turbo, "rtx4090", "turbo-bf16", memory="27GiB")  # 8-bit text encoders would all stay on the device
    assert [type(each).__name__ for each in roomy.transforms] == ["Residency", "ExplainOutOfMemory"]


def test_what_the_user_chose_wins(turbo):
    own = Quantize("int8-weight-only", components=("text_encoder",))
    found = planned(turbo, "rtx4060", "turbo-fp8", own)
    assert all("text_encoder" not in getattr(each, "components", ()) for each in found.transforms)
    placed = planned(turbo, "rtx4060", "turbo-fp8", Offload("stages"))
    assert placed.transforms == ()
    assert not placed.fits


def test_larger_calls_need_more(turbo):
    small = planned(turbo, "h200")
    large = planned(turbo, "h200", call=Call(1376, 768, pictures=4))
    assert large.peak > small.peak
    assert "4 pictures of 1376x768" in str(large)


def test_guidance_is_what_the_preset_calls_with(turbo):
    assert not planned(turbo, "h200").call.guidance
    guided = planned(turbo, "h200", "quality-fp8")
    assert guided.call.guidance
    need = {stage.name: stage.activations for stage in guided.stages}
    assert need["denoise"] > 1.8 * next(s.activations for s in planned(turbo, "h200").stages if s.name == "denoise")
    assert not planned(turbo, "h200", "quality-fp8", call=Call(guidance=False)).call.guidance


def test_tiles_need_less_to_decode(turbo):
    call = Call(768, 768)
    whole = planned(turbo, "h200", call=call)
    tiled = planned(turbo, "h200", "turbo-fp8", TileVae(tile_px=512), call=call)
    assert tiled.stages[-1].activations < 0.6 * whole.stages[-1].activations


def test_pictures_are_decoded_in_tiles_only_where_nothing_else_fits(turbo):
    large = Call(1152, 1024)
    roomy, tight = (planned(turbo, "rtx4060", call=large, memory=memory) for memory in ("7GiB", "6GiB"))
    assert roomy.fits
    assert not any(isinstance(each, TileVae) for each in roomy.transforms)
    assert tight.fits
    assert TileVae() in tight.transforms
    assert "decoded in tiles" in str(tight)
    placed = planned(turbo, "rtx4060", "turbo-fp8", Offload("stages"), call=large)
    assert placed.transforms == ()


@pytest.mark.parametrize("memory", ["3GiB", "1GiB", 1])
def test_a_pipe_that_cannot_fit_is_refused_with_what_would(turbo, memory):
    """Also below what is computed with alone, where no weight at all could stay."""
    found = planned(turbo, "rtx4060", memory=memory, call=Call(512, 512))
    assert not found.fits
    assert found.needed < 5 * GIB
    assert f"weights within {human_gib(found.stages[0].weights)}, the rest fetched" in str(found)
    with pytest.raises(ErnieAccelError, match=r"(?s)does not fit: .* are needed at least.*denoise.*smallest budget"):
        check_fits(found)
    assert f"--memory {found.least}" in str(found)


def test_the_smallest_budget_that_is_named_works_and_less_does_not(turbo):
    call = Call(512, 512)
    shown = ernie_accel.plan(turbo, preset="turbo-fp8", context=Context.named("rtx4060"), memory="1GiB", call=call)
    assert shown.ok, "what is shown is what would work with more memory"
    found = shown.memory
    assert planned(turbo, "rtx4060", memory=found.least, call=call).fits
    assert not planned(turbo, "rtx4060", memory=found.needed - 1, call=call).fits


@pytest.mark.parametrize(("memory", "fits"), [("auto", True), ("12GiB", False)])
def test_what_a_preset_moves_to_a_device_is_planned_as_resident_there(turbo, memory, fits, monkeypatch):
    monkeypatch.setattr(planner, "activations_of", lambda *args, **kwargs: {"denoise": GIB, "decode": 2 * GIB})
    preset, context = find_preset("npu-bf16"), Context.named("ascend910b")
    found = plan_memory(turbo, (), preset, context, memory)
    assert found.fits is fits
    assert MoveTo("npu") in found.transforms
    assert "the request says" not in str(found)
    assert "everything stays on the device: the preset moves it there as a whole" in str(found)
    own = plan_memory(turbo, (MoveTo("npu"),), preset, context, memory)
    assert own.transforms == ()
    assert "the request says where the weights live" in str(own)


@pytest.mark.parametrize("card", ["v100", "rtx4090", "rtx5090", "ascend910b"])
def test_recommend_warns_where_not_everything_stays_on_the_device(turbo, card, monkeypatch):
    monkeypatch.setattr(planner, "activations_of", lambda *args, **kwargs: {"denoise": GIB, "decode": 5 * GIB // 2})
    advice = ernie_accel.recommend(Context.named(card), turbo)
    found = plan_memory(turbo, (), advice.preset, Context.named(card))
    resident = isinstance(found.transforms[0], MoveTo)
    assert any("do not fit into" in warning for warning in advice.warnings) is not resident


def test_too_little_host_memory_is_said_before_anything_is_loaded(turbo):
    found = planned(turbo, "rtx4060")
    assert check_fits(found, found.host) is found
    with pytest.raises(ErnieAccelError, match=r"(?s)not enough host memory: .* and 4\.0 GiB can be had.*denoise"):
        check_fits(found, 4 * GIB)


@pytest.mark.parametrize(
    ("memory", "nbytes"),
    [("12GiB", 12 * GIB), ("12gb", 12 * 10**9), ("500 MiB", 500 * 2**20), (10**9, 10**9)],
)
def test_a_budget_is_read(memory, nbytes):
    assert budget_of(memory, Context.named("h100")) == nbytes


def test_a_reserve_is_left_free():
    card = Context.named("rtx4090")
    assert budget_of("-2GiB", card) == card.memory_bytes - 2 * GIB
    assert budget_of("auto", card) == card.memory_bytes - int(0.7 * GIB)
    with pytest.raises(ErnieAccelError, match="is not known"):
        budget_of("-2GiB", Context("cuda", "something"))


@pytest.mark.parametrize("memory", ["12", "lots", "", 0, -5, True, None, 1.5, "GiB"])
def test_what_is_no_budget_is_refused(memory):
    with pytest.raises(ErnieAccelError, match="memory takes"):
        budget_of(memory, Context.named("h100"))
    if memory == "12":
        with pytest.raises(ErnieAccelError, match="write 12GiB"):
            budget_of(memory, Context.named("h100"))


def test_of_an_unknown_architecture_the_weights_are_planned():
    found = plan_memory(tiny_flux(), (CastDtype("bfloat16"),), None, Context.named("rtx3060"))
    assert found.fits
    assert [stage.activations is None for stage in found.stages if stage.name == "denoise"] == [True]
    assert "unknown" in str(found)


def test_for_what_is_not_known_memory_is_left():
    found = plan_memory(tiny_flux(), (), None, Context.named("rtx3060"), memory="2.3GiB")
    assert not found.fits
    assert found.needed > 2 * GIB
    assert "what denoise computes is not known of this pipeline: 2.0 GiB are left" in str(found)


def test_an_encoder_of_an_unknown_architecture_is_not_run():
    from transformers import CLIPTextConfig, CLIPTextModel

    pipe = tiny_sd()
    tiny = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=77
    )
    pipe.register_modules(text_encoder=CLIPTextModel(tiny).eval())
    found = plan_memory(pipe, (), None, Context.named("rtx3060"))  # of prompts longer than that
    assert [stage.activations for stage in found.stages if stage.name == "encode"] == [None]


@pytest.mark.parametrize("left", [("transformer",), ("transformer", "vae"), ("transformer", "text_encoder")])
def test_a_pipe_may_lack_components(left):
    pipe = tiny_ernie()
    pipe.register_modules(**{name: None for name in ("vae", "text_encoder") if name not in left})
    found = plan_memory(pipe, (), None, Context.named("rtx3060"))
    assert found.fits
    assert found.stages


@pytest.mark.parametrize(("card", "scheme"), [("rtx3090", "int8-weight-only"), ("rtx4090", "fp8-weight-only")])
def test_text_encoders_get_the_eight_bits_that_the_card_computes_with(card, scheme):
    (eight,) = planner._eight_bits(tiny_ernie(), (), Context.named(card))
    assert eight.scheme == scheme


def test_what_is_offloaded_waits_on_the_host():
    pipe = tiny_ernie()
    assert plan_memory(pipe, (Offload("model"),), None, Context.named("rtx4090"), call=Call(64, 64)).host == pipe_bytes(
        pipe
    )
    assert plan_memory(pipe, (), None, Context.named("rtx4090"), call=Call(64, 64)).host == 0


def test_a_pipe_with_weights_is_left_as_it_is():
    pipe = tiny_ernie(layers=3)
    before = {name: id(part) for name, part in pipe.components.items()}
    plan_memory(pipe, (RewriteBlocks(), FuseKernels("bf16")), None, Context.named("h100"))
    assert {name: id(part) for name, part in pipe.components.items()} == before
    assert not any(tensor.is_meta for tensor in pipe.transformer.parameters())
