"""`RewriteBlocks`: the same picture bit for bit, from the same weights, under every use a stock pipe is put to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel.core.components import pipe_bytes
from ernie_accel.core.outputs import images_of
from ernie_accel.models.token_layout import prompt_lengths, remember_lengths
from tests.pipelines import picture, tiny_ernie, tiny_flux

LORA_TARGETS = ["to_q", "to_v", "gate_proj", "linear_fc2", "to_out.0"]


def rewritten(pipe: Any, **kwargs: Any) -> Any:
    return ernie_accel.optimize(pipe, ernie_accel.RewriteBlocks(**kwargs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"prompt": ["a red circle on blue", "a small square on red"]},  # equal lengths: no padding
        {"prompt": ["a red circle on blue", "a"]},  # padded: the mask has to stay
        {"guidance_scale": 4.0},  # the empty negative prompt pads
        {"height": 96, "width": 32, "num_images_per_prompt": 2},
    ],
    ids=["plain", "batch", "padded", "guided", "oblong"],
)
def test_pictures_are_bitwise_those_of_stock(dtype: torch.dtype, fuse: bool, call: dict[str, Any]) -> None:
    pipe = tiny_ernie(dtype=dtype)
    expected = picture(pipe, **call)
    assert torch.equal(picture(rewritten(pipe, fuse=fuse), **call), expected)
    assert torch.equal(picture(ernie_accel.restore(pipe), **call), expected)


def test_a_padded_batch_equals_each_prompt_alone() -> None:
    pipe = rewritten(tiny_ernie())
    prompts = ["a red circle on blue", "a"]
    noise = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    together = picture(pipe, prompt=prompts, latents=noise)
    alone = torch.cat([picture(pipe, prompt=p, latents=noise[i : i + 1]) for i, p in enumerate(prompts)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_weights_are_shared_and_state_dict_keys_stay() -> None:
    pipe = tiny_ernie()
    before, names = pipe_bytes(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    rewritten(pipe)
    assert pipe_bytes(pipe) == before
    now = pipe.transformer.state_dict()
    assert set(now) == set(names)
    assert all(torch.equal(now[name], names[name]) for name in names)
    pipe.transformer.load_state_dict({name: tensor * 2 for name, tensor in names.items()})
    assert torch.equal(
        pipe.transformer.layers[1].self_attention.to_qkv.weight[:128], names["layers.1.self_attention.to_q.weight"] * 2
    )
    ernie_accel.restore(pipe)
    assert torch.equal(pipe.transformer.layers[1].mlp.up_proj.weight, names["layers.1.mlp.up_proj.weight"] * 2)
    assert pipe_bytes(pipe) == before


def test_it_saves_as_stock(tmp_path: Path) -> None:
    pipe = rewritten(tiny_ernie())
    pipe.transformer.save_pretrained(tmp_path)
    again = type(pipe.transformer).from_pretrained(tmp_path)
    expected = tiny_ernie().transformer.state_dict()
    assert {k for k, v in again.state_dict().items() if torch.equal(v, expected[k])} == set(expected)


def lora(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(5)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=LORA_TARGETS, init_lora_weights=False))


def test_a_lora_loaded_before_stays_and_is_named() -> None:
    pipe = tiny_ernie()
    lora(pipe)
    expected = picture(pipe)
    rewritten(pipe)
    assert torch.equal(picture(pipe), expected)
    (entry,) = ernie_accel.report(pipe).entries
    assert "to_q is a Linear" in entry.applied.skipped["transformer.layers.0.self_attention.to_qkv"]
    assert torch.equal(picture(ernie_accel.restore(pipe)), expected)


def test_a_lora_loaded_after_splits_the_fused_layers() -> None:
    stock = tiny_ernie()
    plain = picture(stock)
    lora(stock)
    expected = picture(stock)
    pipe = rewritten(tiny_ernie())
    lora(pipe)
    assert torch.equal(picture(pipe), expected)
    ernie_accel.restore(pipe)
    assert torch.equal(picture(pipe), expected)
    pipe.transformer.unload_lora()
    assert torch.equal(picture(pipe), plain)


def test_a_lora_file_loads_through_the_pipeline(tmp_path: Path) -> None:
    stock = tiny_ernie()
    lora(stock)
    stock.transformer.save_lora_adapter(tmp_path)
    expected = picture(stock)
    pipe = rewritten(tiny_ernie())
    pipe.transformer.load_lora_adapter(str(tmp_path), weight_name="pytorch_lora_weights.safetensors", prefix=None)
    assert torch.equal(picture(pipe), expected)


def test_layerwise_casting_stays_on_the_layers_that_were_fused() -> None:
    casting = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    stock = tiny_ernie()
    stock.transformer.enable_layerwise_casting(**casting)
    pipe = rewritten(tiny_ernie())
    pipe.transformer.enable_layerwise_casting(**casting)
    assert torch.equal(picture(pipe), picture(stock))
    assert torch.equal(picture(ernie_accel.restore(pipe)), picture(stock))
    assert pipe.transformer.layers[0].self_attention.to_q.weight.dtype == torch.float8_e4m3fn


def test_quantizing_acts_on_the_fused_layers_and_leaves_the_first_block_precise() -> None:
    pipe = ernie_accel.optimize(tiny_ernie(), ernie_accel.RewriteBlocks(), ernie_accel.Quantize("int8-weight-only"))
    changed = ernie_accel.report(pipe).entries[1].applied.changed
    assert "transformer.layers.1.self_attention.to_qkv" in changed
    assert "transformer.layers.1.mlp.gate_up_proj" in changed
    assert "transformer.layers.0.mlp.linear_fc2" in changed
    assert not [name for name in changed if name.startswith("transformer.layers.0.self_attention")]
    assert "transformer.layers.0.mlp.gate_up_proj" not in changed
    expected = picture(tiny_ernie())
    assert (picture(pipe) - expected).abs().max() < 0.05
    assert torch.equal(picture(ernie_accel.restore(pipe)), expected)


@pytest.fixture
def graphs() -> Any:
    """Count the graphs that are compiled, without generating code."""
    torch._dynamo.reset()
    counted: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        counted.append(graph)
        return graph.forward

    yield counted, backend
    torch._dynamo.reset()


def test_one_graph_serves_all_prompt_lengths_and_one_more_all_batches(graphs: Any) -> None:
    counted, backend = graphs
    pipe = rewritten(tiny_ernie())
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for length in (9, 1, 2, 300, 512, 77, 128, 3, 40, 41, 42, 43):
            forward(pipe.transformer, [length])
        assert len(counted) == 1
        for lengths in ([4, 4], [7, 7, 7], [5] * 8):
            forward(pipe.transformer, lengths)
        assert len(counted) == 2
        for lengths in ([4, 3], [7, 1, 7]):  # padded batches have a mask
            forward(pipe.transformer, lengths)
        assert len(counted) == 3


def forward(transformer: Any, lengths: list[int]) -> torch.Tensor:
    batch = len(lengths)
    return transformer(  # type: ignore[no-any-return]
        torch.randn(batch, 16, 4, 4),
        torch.full((batch,), 500.0),
        torch.randn(batch, max(lengths), 64),
        torch.tensor(lengths),
        return_dict=False,
    )[0]


def test_the_library_compiles_the_rewritten_blocks(graphs: Any) -> None:
    pipe = tiny_ernie()
    machine = ernie_accel.Context("cuda", "a test", (9, 0))
    found = ernie_accel.Compile().preview(rewritten(pipe), machine)
    assert found.changes == ("transformer.layers.0", "transformer.layers.1")


def test_steps_share_one_computation_of_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = rewritten(tiny_ernie())
    calls = []
    embed = pipe.transformer.pos_embed.forward
    monkeypatch.setattr(pipe.transformer.pos_embed, "forward", lambda ids: calls.append(1) or embed(ids))
    picture(pipe, steps=4)
    assert len(calls) == 1
    picture(pipe, steps=4, prompt="a")
    assert len(calls) == 2


def test_prompt_lengths_are_read_once_and_again_after_a_change() -> None:
    lengths = torch.tensor([3, 5])
    assert prompt_lengths(lengths) == (3, 5)
    remember_lengths(lengths, (1, 2))
    assert prompt_lengths(lengths) == (1, 2)
    lengths[0] = 4
    assert prompt_lengths(lengths) == (4, 5)
    with torch.inference_mode():
        assert prompt_lengths(torch.tensor([6])) == (6,)


def test_the_attention_backend_of_the_model_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    # diffusers makes it the default of every other model in the process, too
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    pipe = rewritten(tiny_ernie())
    pipe.transformer.set_attention_backend("_native_math")
    assert {block.self_attention.processor._attention_backend.value for block in pipe.transformer.layers} == {
        "_native_math"
    }
    torch.testing.assert_close(picture(pipe), picture(tiny_ernie()), atol=1e-4, rtol=0)


def test_what_cannot_be_rewritten_says_why() -> None:
    machine = ernie_accel.Context("cpu", "a test")
    rewrite = ernie_accel.RewriteBlocks()
    assert "of no known family" in rewrite.unsupported(tiny_flux(), machine)[0]
    pipe = tiny_ernie()
    pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)
    assert "hooks already" in rewrite.unsupported(pipe, machine)[0]
    pipe = tiny_ernie()
    pipe.transformer.enable_gradient_checkpointing()
    assert "checkpointing" in rewrite.unsupported(pipe, machine)[0]


def test_group_offloading_works_on_rewritten_blocks() -> None:
    pipe = rewritten(tiny_ernie())
    expected = picture(tiny_ernie())
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    assert torch.equal(picture(pipe), expected)


def test_the_embedded_models_picture_stays_bitwise_the_same() -> None:
    pipe = ernie_accel.demo.load()
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "pt", "use_pe": False}

    def draw(**more: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return images_of(pipe("a red circle on a grey background", generator=generator, **(call | more)))  # type: ignore[no-any-return]

    expected = [draw(guidance_scale=scale) for scale in (1.0, 3.0)]
    rewritten(pipe)
    assert all(torch.equal(draw(guidance_scale=s), e) for s, e in zip((1.0, 3.0), expected, strict=True))
