"""Whatever was applied to a pipe, it reads the same names of LoRAs and refuses the same ones; restored, it is stock."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ernie_accel
from ernie_accel import CallDefaults, CastDtype, Compile, ErnieAccelError, RewriteBlocks, SliceVae, SwapScheduler
from ernie_accel.models.lora_loading import reads_loras, stop_reading_loras
from tests.examples import differences, snapshot
from tests.own_newbie import tiny_own_newbie
from tests.pipelines import tiny_ernie, tiny_flux, tiny_lumina2, tiny_sd, tiny_wan, tiny_z_image
from tests.test_lora import FAMILIES, FORMATS, TO_Q, adapter, latents, load, made

#: Requests that neither rewrite nor quantize: presets by name, and transforms.
PLAIN: dict[str, tuple[Any, ...]] = {
    "exact": (),
    "turbo-fp16": (),
    "npu-bf16": (),
    "SwapScheduler": (SwapScheduler("euler", shift=2.0),),
    "Compile": (Compile(),),
    "CallDefaults": (CallDefaults(num_inference_steps=3),),
    "CastDtype": (CastDtype("float32"),),
}
#: Ways to name a LoRA's tensors, by who names them so.
FORMS = {**FORMATS, "PEFT, without a prefix": lambda path, half: f"{path}.lora_{half}.weight"}


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def optimized(request: str, pipe: Any) -> Any:
    transforms = PLAIN.get(request, ())
    named = {} if transforms else {"preset": request, "on_unsupported": "skip"}
    return ernie_accel.optimize(pipe, *transforms, memory=None, **named)


def added(pipe: Any) -> list[str]:
    """Return which of its methods `optimize` stands in for, so that LoRAs are read."""
    return [name for name, value in vars(pipe).items() if reads_loras(name, value)]


def renamed(family: str, form: str) -> dict[str, torch.Tensor]:
    """Return the LoRA of `adapter` by the names of `form`, with an alpha of half its rank where these have one."""
    has_alpha = form in ("kohya", "ComfyUI, down and up")
    weights = {}
    for key, tensor in adapter(family).items():
        path, half = key.removeprefix("transformer.").removesuffix(".weight").rsplit(".lora_", 1)
        weights[FORMS[form](path, half)] = tensor * 2 if has_alpha and half == "B" else tensor
        if has_alpha:
            weights[FORMS[form](path, "A").replace("lora_down.weight", "alpha")] = torch.tensor(2.0)  # of rank 4
    return weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("request_", PLAIN)
def test_every_trainers_names_are_read_where_nothing_is_rewritten_or_quantized(request_: str, family: str) -> None:
    stock = optimized(request_, made(family))
    stop_reading_loras(stock)
    assert not added(stock)
    load(stock, family)
    expected = latents(stock)
    pipe = optimized(request_, made(family))
    plain = latents(pipe)
    assert not torch.equal(plain, expected)
    for form in FORMS:
        pipe.load_lora_weights(renamed(family, form), adapter_name="a")
        assert torch.equal(latents(pipe), expected), form
        pipe.unload_lora_weights()
        assert torch.equal(latents(pipe), plain), form


@pytest.mark.parametrize("preset", ernie_accel.presets)
def test_every_preset_reads_the_same_names(preset: str) -> None:
    expected, pipe = (optimized(preset, made("ernie")) for _ in range(2))
    load(expected, "ernie")
    pipe.load_lora_weights(renamed("ernie", "kohya"), adapter_name="a")
    assert torch.equal(latents(pipe), latents(expected))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["diffusers", "kohya", "ComfyUI", "PEFT"])
@pytest.mark.parametrize("request_", ["exact", "turbo-fp16", "npu-bf16", "SwapScheduler"])
def test_a_lora_of_another_architecture_is_refused_with_its_keys_counted(request_: str, form: str, family: str) -> None:
    pipe = optimized(request_, made(family))
    other = {"ernie": "lumina2", "z_image": "ernie", "lumina2": "z_image"}[family]
    weights = renamed(other, form)
    before, held = snapshot(pipe), dict(vars(pipe))
    count = len([name for name in weights if not name.endswith(".alpha")])
    refusal = rf"load_lora_weights: .*; nothing was changed\.\n.* \d+ of its {count} tensors match no layer of \w+: "
    with pytest.raises(ErnieAccelError, match=refusal):
        pipe.load_lora_weights(dict(weights), adapter_name="a")
    assert differences(before, snapshot(pipe)) == []
    assert dict(vars(pipe)) == held


def with_layers(component: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a LoRA of rank 2 for every linear layer."""
    tensors = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            for half, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
                tensors[f"{component}.{path}.lora_{half}.weight"] = torch.full(shape, 0.01)
    return tensors


@pytest.mark.parametrize(
    ("make", "component"), [(tiny_flux, "transformer"), (tiny_wan, "transformer"), (tiny_sd, "unet")]
)
def test_a_part_that_matches_nothing_is_counted_on_any_pipeline(make: Callable[[], Any], component: str) -> None:
    pipe = ernie_accel.optimize(make(), SliceVae())
    weights = with_layers(component, getattr(pipe, component))
    strange = {f"{component}.layers.9.strange.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    before = snapshot(pipe)
    with pytest.raises(
        ErnieAccelError, match=rf" 2 of its {len(weights) + 2} tensors match no layer of \w+: layers\.9"
    ):
        pipe.load_lora_weights({**weights, **strange}, adapter_name="a")
    half = {**weights}
    half.popitem()
    error: Any = KeyError if make is tiny_flux else ErnieAccelError  # FLUX.1's looks for the other half itself
    with pytest.raises(error, match=r"has lora_A, and no lora_B|lora_B\.weight"):
        pipe.load_lora_weights(half, adapter_name="a")
    assert differences(before, snapshot(pipe)) == []
    pipe.load_lora_weights(dict(weights), adapter_name="a")
    loaded = [part for part in getattr(pipe, component).modules() if "a" in getattr(part, "lora_A", ())]
    assert len(loaded) == len(weights) // 2
    assert not added(ernie_accel.restore(pipe))


def test_what_peft_fails_at_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    pipe = optimized("exact", made("ernie"))
    before = snapshot(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(peft, "set_peft_model_state_dict", fails)
        with pytest.raises(RuntimeError, match="out of luck"):
            load(pipe, "ernie")
    assert differences(before, snapshot(pipe)) == []
    load(pipe, "ernie")


@pytest.mark.parametrize("request_", [*PLAIN, "turbo-fp32"])
def test_restored_refused_or_asked_for_nothing_a_pipe_has_diffusers_own_methods(request_: str) -> None:
    pipe = made("z_image")
    before = set(vars(pipe))
    with pytest.raises(ernie_accel.UnsupportedError):
        ernie_accel.optimize(pipe, SliceVae(), ernie_accel.MoveTo("npu"), memory=None)
    assert set(vars(pipe)) == before
    for way_back in (ernie_accel.restore, ernie_accel.optimize):
        optimized(request_, pipe)
        assert added(pipe) == ["lora_state_dict", "load_lora_into_transformer"]
        there = [vars(pipe)[name] for name in added(pipe)]
        optimized(request_, pipe)
        ernie_accel.optimize(pipe, SliceVae())  # another request
        assert [vars(pipe)[name] for name in added(pipe)] == there
        assert [each.inner for each in there] == [None, None]
        way_back(pipe)
        assert set(vars(pipe)) == before
        assert pipe.lora_state_dict == type(pipe).lora_state_dict


def test_what_a_script_put_in_their_place_stays() -> None:
    pipe = optimized("exact", made("ernie"))
    ours = pipe.lora_state_dict
    pipe.lora_state_dict = lambda *args, **kwargs: ours(*args, **kwargs)
    theirs = pipe.lora_state_dict
    assert vars(ernie_accel.restore(pipe))["lora_state_dict"] is theirs


def pickled(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_read_for_themselves(copied: Callable[[Any], Any]) -> None:
    pipe = optimized("exact", made("ernie"))
    other = copied(pipe)
    other.load_lora_weights(renamed("ernie", "kohya"), adapter_name="a")
    assert not hasattr(pipe.transformer, "peft_config")
    load(pipe, "ernie")
    assert torch.equal(latents(other), latents(pipe))
    with pytest.raises(ErnieAccelError, match="match no layer"):
        other.load_lora_weights(adapter("lumina2"), adapter_name="b")


def test_a_pipe_made_from_it_is_stock_as_its_calls_are() -> None:
    pipe = optimized("exact", made("ernie"))
    made_from_it = type(pipe).from_pipe(pipe)
    assert not added(made_from_it)
    load(made_from_it, "ernie")
    assert type(made_from_it) is type(ernie_accel.restore(pipe))


@pytest.mark.parametrize("when", ["before", "after"])
def test_names_are_read_where_a_script_has_compiled_the_transformer(when: str) -> None:
    pipe, expected = made("ernie"), optimized("exact", made("ernie"))
    load(expected, "ernie")
    if when == "before":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    optimized("exact", pipe)
    if when == "after":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ErnieAccelError, match="match no layer"):
        pipe.load_lora_weights(adapter("lumina2"), adapter_name="a")
    pipe.load_lora_weights(renamed("ernie", "kohya"), adapter_name="a")
    assert torch.equal(latents(pipe), latents(expected))


@pytest.mark.parametrize("by", ["file", "folder", "name"])
def test_a_file_with_an_alpha_in_its_metadata_counts_as_on_a_stock_pipe(by: str, tmp_path: Path) -> None:
    stock, pipe = made("ernie"), optimized("exact", made("ernie"))
    ours = {name.removeprefix("transformer."): tensor for name, tensor in adapter("ernie", only="to_q").items()}
    settings = {"r": 4, "lora_alpha": 1, "target_modules": ["to_q"]}
    stock.save_lora_weights(tmp_path, ours, transformer_lora_adapter_metadata=settings)
    (file,) = tmp_path.iterdir()
    source = str(file if by == "file" else tmp_path)
    for each in (stock, pipe):
        each.load_lora_weights(source, adapter_name="a", **({"weight_name": file.name} if by == "name" else {}))
    scaled = stock.transformer.get_submodule(TO_Q).scaling["a"]
    assert pipe.transformer.get_submodule(TO_Q).scaling["a"] == scaled
    assert torch.equal(latents(pipe), latents(stock))
    if by == "name":
        assert scaled == 0.25


@pytest.mark.parametrize("transforms", [(SliceVae(),), (RewriteBlocks(),)], ids=str)
def test_a_saved_pipe_reads_them(transforms: tuple[Any, ...], tmp_path: Path) -> None:
    pipe = ernie_accel.optimize(made("ernie"), *transforms)
    again = ernie_accel.load(ernie_accel.save(pipe, tmp_path / "saved"), device="cpu")
    for each, form in ((pipe, "diffusers"), (again, "kohya")):
        each.load_lora_weights(renamed("ernie", form), adapter_name="a")
    assert torch.equal(latents(pipe), latents(again))


def test_without_peft_diffusers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers.loaders.lora_base
    import diffusers.utils

    said = []
    for pipe in (made("ernie"), optimized("exact", made("ernie"))):
        with monkeypatch.context() as patch:
            patch.setattr(diffusers.loaders.lora_base, "USE_PEFT_BACKEND", False)
            patch.setattr(diffusers.loaders.lora_pipeline, "USE_PEFT_BACKEND", False, raising=False)
            patch.setattr(diffusers.utils, "USE_PEFT_BACKEND", False)
            patch.setattr(diffusers.utils.deprecation_utils, "USE_PEFT_BACKEND", False, raising=False)
            with pytest.raises(ValueError, match="PEFT backend") as error:
                load(pipe, "ernie")
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_pipe_that_loads_no_loras_is_left_alone() -> None:
    pipe = tiny_own_newbie()
    assert not hasattr(pipe, "load_lora_weights")
    assert not added(optimized("exact", pipe))


@pytest.mark.parametrize("named", ["diffusion_model.{}", "transformer.{}", "base_model.model.{}", "{}", "lora_unet_{}"])
@pytest.mark.parametrize(("kind", "names"), [("LoKr", ["lokr_w1", "lokr_w2"]), ("LoHa", ["hada_w1_a", "hada_w1_b"])])
def test_what_a_pipeline_does_not_load_is_refused_by_its_kind_under_all_names(
    named: str, kind: str, names: list[str]
) -> None:
    pipe = ernie_accel.optimize(tiny_ernie(), preset="exact")
    path = "layers.0.self_attention.to_q"
    layer = named.format(path.replace(".", "_") if named.endswith("_{}") else path)
    with pytest.raises(ErnieAccelError, match=rf"this is a {kind} \(2 tensors such as {re.escape(layer)}\."):
        pipe.load_lora_weights({f"{layer}.{name}": torch.ones(4, 4) for name in names})
    assert not pipe.get_list_adapters()


@pytest.mark.parametrize("part", ["lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_what_only_some_layers_have_is_refused_and_what_all_have_is_loaded(part: str) -> None:
    weights = adapter("ernie", only="to_q")
    layers = [name.removesuffix(".lora_B.weight") for name in weights if name.endswith(".lora_B.weight")]
    more = {f"{layer}.{part}": torch.ones(128) for layer in layers}
    pipe = ernie_accel.optimize(tiny_ernie(), preset="exact")
    first = {f"{layers[0]}.{part}": more[f"{layers[0]}.{part}"]}
    with pytest.raises(ErnieAccelError, match=rf"1 of its 2 layers have .* and {TO_Q}, for example, has none"):
        pipe.load_lora_weights({**weights, **first})
    assert not pipe.get_list_adapters()
    pipe.load_lora_weights({**weights, **more})
    latents(pipe)


@pytest.mark.parametrize("named", ["diffusion_model.{}", "transformer.{}"])
def test_a_lokr_is_loaded_where_the_pipeline_loads_some(named: str) -> None:
    pipe = ernie_accel.optimize(tiny_z_image(), preset="exact")
    layer = pipe.transformer.layers[0].attention.to_q
    right = torch.full((layer.out_features // 4, layer.in_features // 4), 0.1)
    path = named.format("layers.0.attention.to_q")
    pipe.load_lora_weights({f"{path}.lokr_w1": torch.ones(4, 4), f"{path}.lokr_w2": right})
    assert hasattr(pipe.transformer.layers[0].attention.to_q, "lokr_w1")


@pytest.mark.parametrize("make", [tiny_z_image, tiny_lumina2])
def test_what_diffusers_cannot_convert_is_not_dropped(make: Callable[[], Any]) -> None:
    pipe = ernie_accel.optimize(make(), preset="exact")
    with pytest.raises((ValueError, KeyError)):
        pipe.load_lora_weights({"diffusion_model.layers.0.attention.to_q.diff": torch.ones(4, 4)})


def test_a_lokr_for_layers_that_diffusers_fuses_for_it_is_loaded() -> None:
    stock, pipe = tiny_flux(), ernie_accel.optimize(tiny_flux(), SliceVae())
    to_q = stock.transformer.transformer_blocks[0].attn.to_q
    rows, columns = 3 * to_q.out_features, to_q.in_features
    path = "transformer.transformer_blocks.0.attn.to_qkv"
    weights = {f"{path}.lokr_w1": torch.ones(1, 1), f"{path}.lokr_w2": torch.full((rows, columns), 0.1)}
    for each in (stock, pipe):
        each.load_lora_into_transformer(dict(weights), None, each.transformer, adapter_name="a", _pipeline=each)
        assert hasattr(each.transformer.transformer_blocks[0].attn.to_qkv, "lokr_w1")
