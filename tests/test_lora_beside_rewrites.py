"""A LoRA of the text encoder or the enhancer beside what rewrites their forward: as stock, whenever it comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

import ernie_accel
from ernie_accel import RewriteEnhancer, RewriteTextEncoder, Transform
from tests.pipelines import tiny_ernie


def load(model: Any) -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, model, "a")


def layers(model: Any) -> list[Any]:
    return [part for part in model.modules() if isinstance(part, LoraLayer)]


def scale(model: Any) -> None:
    for part in layers(model):
        part.set_scale("a", 0.3)


def disable(model: Any) -> None:
    for part in layers(model):
        part.enable_adapters(False)


def unload(model: Any) -> None:
    for path, part in list(model.named_modules()):
        if isinstance(part, LoraLayer):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, part.get_base_layer())


def encoded(pipe: Any) -> torch.Tensor:
    return pipe.encode_prompt("a red circle", torch.device("cpu"))[0]


def continued(pipe: Any) -> torch.Tensor:
    ids = torch.tensor([[4, 5, 6]])
    made = pipe.pe.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=6,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(made.logits)


@pytest.mark.parametrize("loaded", ["before", "after"])
@pytest.mark.parametrize(
    ("transform", "component", "result"),
    [(RewriteTextEncoder(), "text_encoder", encoded), (RewriteEnhancer(), "pe", continued)],
    ids=["text encoder", "enhancer"],
)
def test_a_lora_is_there_as_on_a_stock_pipe(transform: Transform, component: str, result: Any, loaded: str) -> None:
    pipe, stock = tiny_ernie(enhancer=True), tiny_ernie(enhancer=True)
    changes = [load, scale, disable, unload]
    with torch.no_grad():
        plain = result(stock)
        if loaded == "before":
            for each in (pipe, stock):
                load(getattr(each, component))
            changes.pop(0)
        ernie_accel.optimize(pipe, transform)
        for change in changes:
            for each in (pipe, stock):
                change(getattr(each, component))
            expected = result(stock)
            assert torch.equal(expected, plain) == (change in (disable, unload)), change.__name__
            torch.testing.assert_close(result(pipe), expected, rtol=0, atol=1e-5, msg=change.__name__)
        ernie_accel.restore(pipe)
        assert torch.equal(result(pipe), plain)
