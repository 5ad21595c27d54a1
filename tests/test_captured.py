"""What was captured or remembered is not used once it is stale: adapters, weights, hooks and backends that change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tokenizers import models
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ernie_accel
from ernie_accel import BatchPromptEncoding, RewriteBlocks
from ernie_accel.core.captured import Contents, Fingerprint, version_of
from ernie_accel.models.ernie_image import blocks as ernie_image_blocks
from ernie_accel.models.graphed_forward import GraphedForward
from tests.pipelines import picture, tiny_ernie, tiny_vae

STEPS = 4


class Frozen:
    """Captures as CUDA does: kernels and numbers are fixed, tensors are read where they lay."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, work: Any, pool: Any) -> Any:
        self.captures += 1
        with _Tape() as tape:
            output = work()
        return tape, output


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._kernels: list[Any] = []

    def __torch_dispatch__(self, kernel: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = kernel(*args, **(kwargs or {}))
        self._kernels.append((kernel, args, kwargs or {}, out))
        return out

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        for kernel, args, kwargs, out in self._kernels:
            for into, made in zip(tree_leaves(out), tree_leaves(kernel(*args, **kwargs)), strict=True):
                if isinstance(into, torch.Tensor) and into is not made:
                    into.copy_(made)


def lora(transformer: Any, *, name: str = "a", seed: int = 3) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    transformer.add_adapter(config, adapter_name=name)


def draw(pipe: Any) -> torch.Tensor:
    return picture(pipe, steps=STEPS)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() < 1e-5 * b.norm())


def graphed(pipe: Any) -> Frozen:
    record = Frozen()
    pipe.transformer.forward = GraphedForward(pipe.transformer, ernie_image_blocks, 2048, 4, record)
    return record


def set_scale(transformer: Any) -> None:
    transformer.set_adapters(["a"], [0.3])


def switch(transformer: Any) -> None:
    lora(transformer, name="b", seed=4)
    transformer.set_adapters(["b"])


def hot_swap(transformer: Any) -> None:
    loras = {name: tensor for name, tensor in transformer.state_dict().items() if ".lora_" in name}
    other = {f"transformer.{name.replace('.a.', '.')}": tensor * 2 for name, tensor in loras.items()}
    transformer.load_lora_adapter(other, prefix="transformer", adapter_name="a", hotswap=True)


def scale_in_place(transformer: Any) -> None:
    with torch.no_grad():
        transformer.layers[0].adaLN_sa_ln.weight.mul_(3.0)


def scale_data(transformer: Any) -> None:
    transformer.layers[0].adaLN_sa_ln.weight.data.mul_(3.0)


def load(transformer: Any) -> None:
    state = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    state["final_linear.weight"] *= 3.0
    transformer.load_state_dict(state)


def load_assigned(transformer: Any) -> None:
    state = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    state["final_linear.weight"] *= 3.0
    transformer.load_state_dict(state, assign=True)


CHANGES = {
    "scaled": set_scale,
    "switched": switch,
    "swapped in place": hot_swap,
    "disabled": lambda transformer: transformer.disable_lora(),
    "fused": lambda transformer: transformer.fuse_lora(lora_scale=0.5),
    "unloaded": lambda transformer: transformer.unload_lora(),
    "fused and unloaded": lambda transformer: (transformer.fuse_lora(lora_scale=0.5), transformer.unload_lora()),
    "in place": scale_in_place,
    "data in place": scale_data,
    "loaded": load,
    "assigned": load_assigned,
}


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_draw_the_transformer_as_it_is_now(change: str) -> None:
    pipe, stock = ernie_accel.optimize(tiny_ernie(), RewriteBlocks()), tiny_ernie()
    for each in (pipe, stock):
        lora(each.transformer)
    graphed(pipe)
    before = draw(pipe)
    assert near(before, draw(stock))
    for each in (pipe, stock):
        CHANGES[change](each.transformer)
    expected = draw(stock)
    assert not near(expected, before)
    assert near(draw(pipe), expected)


def test_a_change_between_two_steps_counts_from_the_next_step_on() -> None:
    pipe, stock = ernie_accel.optimize(tiny_ernie(), RewriteBlocks()), tiny_ernie()
    for each in (pipe, stock):
        lora(each.transformer)
    record = graphed(pipe)

    def quieter(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        pipe.transformer.set_adapters(["a"], [1.0 if step < 3 else 0.2])
        return {}

    got, expected = (picture(each, steps=8, callback_on_step_end=quieter) for each in (pipe, stock))
    assert near(got, expected)
    assert record.captures == 2


def test_what_nobody_changed_is_captured_once() -> None:
    pipe = ernie_accel.optimize(tiny_ernie(), RewriteBlocks())
    lora(pipe.transformer)
    record = graphed(pipe)
    for _ in range(3):
        draw(pipe)
    assert record.captures == 1


def test_another_attention_backend_is_captured_anew() -> None:
    pipe = ernie_accel.optimize(tiny_ernie(), RewriteBlocks())
    record = graphed(pipe)
    draw(pipe)
    for layer in pipe.transformer.layers:
        layer.self_attention.processor._attention_backend = "_native_math"
    draw(pipe)
    assert record.captures == 2


def test_layers_with_hooks_are_not_captured_and_the_hooks_run() -> None:
    pipe = ernie_accel.optimize(tiny_ernie(), RewriteBlocks())
    record, seen = graphed(pipe), []
    draw(pipe)
    pipe.transformer.layers[0].register_forward_hook(lambda *_: seen.append(1))
    draw(pipe)
    assert (record.captures, len(seen)) == (1, STEPS)


def test_a_text_that_is_changed_in_place_is_noticed() -> None:
    pipe, stock = ernie_accel.optimize(tiny_ernie(), RewriteBlocks()).transformer, tiny_ernie().transformer
    pipe.forward = GraphedForward(pipe, ernie_image_blocks, 64, 2, Frozen())
    for mode in (torch.no_grad, torch.inference_mode):  # which counts no versions
        with mode():
            text = torch.randn(1, 3, 64)
            step = (torch.randn(1, 16, 4, 4), torch.full((1,), 500.0), text, torch.tensor([3]))
            for _ in range(4):
                text.mul_(1.5)
                assert torch.equal(pipe(*step).sample, stock(*step).sample)


# Prompts that are remembered ------------------------------------------------------------------------------------------


def adapted(encoder: Any) -> list[Any]:
    return [part for part in encoder.modules() if isinstance(part, LoraLayer)]


TEXT_CHANGES = {
    "in place": lambda encoder: encoder.language_model.embed_tokens.weight.mul_(3.0),
    "data in place": lambda encoder: encoder.language_model.embed_tokens.weight.data.mul_(3.0),
    "one row": lambda encoder: encoder.language_model.embed_tokens.weight[4].mul_(3.0),
    "loaded": lambda encoder: encoder.load_state_dict({k: v * 1.5 for k, v in encoder.state_dict().items()}),
    "scaled": lambda encoder: [part.set_scale("a", 0.3) for part in adapted(encoder)],
    "disabled": lambda encoder: [part.enable_adapters(False) for part in adapted(encoder)],
    "scaled and merged": lambda encoder: [part.set_scale("a", 0.3) or part.merge() for part in adapted(encoder)],
    "cast": lambda encoder: encoder.to(torch.bfloat16),
}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("change", TEXT_CHANGES)
def test_remembered_prompts_are_those_of_the_text_encoder_as_it_is_now(
    change: str, on_disk: bool, tmp_path: Any
) -> None:
    pipe, stock = tiny_ernie(), tiny_ernie()
    for each in (pipe, stock):
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        inject_adapter_in_model(config, each.text_encoder, "a")
    ernie_accel.optimize(pipe, BatchPromptEncoding(cache=4, folder=str(tmp_path) if on_disk else None))
    before = encoded(pipe)
    with torch.no_grad():
        for each in (pipe, stock):
            TEXT_CHANGES[change](each.text_encoder)
    expected = encoded(stock)
    assert not near(expected, before)
    got = encoded(pipe)
    assert got.dtype == expected.dtype
    assert float((got - expected).norm() / expected.norm()) < (1e-5 if got.dtype == torch.float32 else 2e-2)


def encoded(pipe: Any) -> torch.Tensor:
    return pipe.encode_prompt("a red circle", torch.device("cpu"))[0]


def test_another_text_encoder_or_tokenizer_answers_for_itself() -> None:
    pipe, other = ernie_accel.optimize(tiny_ernie(), BatchPromptEncoding(cache=4)), tiny_ernie()
    with torch.no_grad():
        other.text_encoder.language_model.embed_tokens.weight.mul_(2.0)
    encoded(pipe)
    pipe.text_encoder = other.text_encoder
    assert near(encoded(pipe), encoded(other))


@pytest.mark.parametrize("on_disk", [False, True])
def test_another_tokenizer_or_another_limit_of_one_asks_for_other_prompts(on_disk: bool, tmp_path: Any) -> None:
    pipe, stock = tiny_ernie(), tiny_ernie()
    ernie_accel.optimize(pipe, BatchPromptEncoding(cache=4, folder=str(tmp_path) if on_disk else None))
    first = encoded(pipe)
    assert near(first, encoded(stock))
    for each in (pipe, stock):
        each.tokenizer.model_max_length = 2
    assert encoded(pipe).shape == (2, 64)
    assert near(encoded(pipe), encoded(stock))
    words = ["circle", "red", "a", "<pad>", "<s>", "</s>", "<unk>", "on", "blue", "big", "small", "square"]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    for each in (pipe, stock):
        each.tokenizer = copy.deepcopy(each.tokenizer)
        each.tokenizer.model_max_length = 64
        each.tokenizer._tokenizer.model = model
    assert not near(encoded(pipe), first)
    assert near(encoded(pipe), encoded(stock))


def test_remembered_prompts_survive_weights_that_are_moved_or_freed(tmp_path: Any) -> None:
    pipe, read = tiny_ernie(), []
    ernie_accel.optimize(pipe, BatchPromptEncoding(cache=4), ernie_accel.FreeAfterUse("nowhere"))
    pipe.text_encoder.register_forward_pre_hook(lambda *_: read.append(1))
    first = draw(pipe)
    assert torch.equal(draw(pipe), first)
    assert len(read) == 1

    pipe, read = ernie_accel.optimize(tiny_ernie(), BatchPromptEncoding(cache=4)), []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: read.append(1))
    draw(pipe)
    for parameter in pipe.text_encoder.parameters():
        parameter.data = parameter.data.clone()  # as ``module.to(device)`` does
    draw(pipe)
    assert len(read) == 1


# The fingerprints themselves ------------------------------------------------------------------------------------------


def test_versions_are_none_where_torch_counts_none() -> None:
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) != before
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) is None


def test_fingerprints_hold_nothing_and_of_the_same_module_are_equal() -> None:
    vae = tiny_vae()
    before = Fingerprint.of(vae)
    assert Fingerprint.of(vae) == before
    assert Contents.of(vae).updated_by(Contents.of(vae)) is not None
    assert not any(isinstance(fact, (torch.Tensor, torch.nn.Module)) for fact in before.facts)


MODULE_CHANGES = {
    "train": lambda part: part.train(),
    "cast": lambda part: part.to(torch.bfloat16),
    "data": lambda part: setattr(part[0].weight, "data", torch.rand(4, 4)),
    "parameter": lambda part: setattr(part[0], "weight", torch.nn.Parameter(torch.rand(4, 4))),
    "buffer": lambda part: setattr(part[1], "running_mean", torch.ones(4)),
    "child": lambda part: setattr(part, "0", torch.nn.Linear(4, 4)),
    "added": lambda part: part.append(torch.nn.ReLU()),
    "removed": lambda part: part.pop(2),
    "forward": lambda part: setattr(part[0], "forward", lambda x: x),
    "hook": lambda part: part[0].register_forward_hook(lambda *_: None),
    "pre-hook": lambda part: part[2].register_forward_pre_hook(lambda *_: None),
    "accelerate": lambda part: __import__("accelerate").hooks.add_hook_to_module(
        part[0], __import__("accelerate").hooks.ModelHook()
    ),
}


@pytest.mark.parametrize("change", MODULE_CHANGES)
def test_every_change_of_a_module_is_noticed(change: str) -> None:
    part = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU()).eval()
    part.requires_grad_(False)
    before = Fingerprint.of(part)
    MODULE_CHANGES[change](part)
    assert Fingerprint.of(part) != before
    assert Fingerprint.of(part).is_hooked == (change in ("hook", "pre-hook", "accelerate"))
