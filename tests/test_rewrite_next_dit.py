"""`RewriteBlocks` on Z-Image and Lumina 2: the same picture bit for bit, under every use a stock pipe is put to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel import CaptureGraphs, Compile, Context, Quantize, RewriteBlocks
from ernie_accel.core.components import pipe_bytes
from ernie_accel.models.graphed_forward import GraphedForward
from ernie_accel.models.next_dit.blocks import rotate
from ernie_accel.models.next_dit.positions import real
from ernie_accel.models.rewritten import block_paths, rewritten_blocks
from tests.own_newbie import tiny_own_newbie
from tests.pipelines import picture, randomize, tiny_lumina2, tiny_z_image
from tests.test_graphs import Recorder

FAMILIES = {"z_image": tiny_z_image, "lumina2": tiny_lumina2, "own_newbie": tiny_own_newbie}
LORA_TARGETS = ["to_q", "to_v", "to_out.0"]
H200 = Context("cuda", "NVIDIA H200", (9, 0))
LONG = "a red circle on a blue square on " * 5  # more than 32 tokens

every_family = pytest.mark.parametrize("name", FAMILIES)
of_diffusers = pytest.mark.parametrize("name", ["z_image", "lumina2"])  # whose models load LoRAs and save themselves


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    pipe = FAMILIES[name]()
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        part.to(dtype)
    return pipe


def latents(pipe: Any, **call: Any) -> torch.Tensor:
    return picture(pipe, output_type="latent", steps=2, **call)


def rewritten(pipe: Any, **kwargs: Any) -> Any:
    return ernie_accel.optimize(pipe, RewriteBlocks(**kwargs))


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch": {"prompt": ["a red circle on blue", "a small square on red"]},
    "unequal": {"prompt": ["a red circle on blue", LONG]},
    "guided": {"guidance_scale": 4.0, "negative_prompt": LONG},
    "odd size": {"height": 96, "width": 32, "num_images_per_prompt": 2},  # tokens that no 32 divides
}


@every_family
@pytest.mark.parametrize(
    ("call", "dtype", "fuse"),
    [(call, torch.float32, True) for call in CALLS]
    + [("unequal", torch.bfloat16, True), ("guided", torch.float32, False)],
)
def test_pictures_are_bitwise_those_of_stock(name: str, call: str, dtype: torch.dtype, fuse: bool) -> None:
    pipe = made(name, dtype)
    expected = latents(pipe, **CALLS[call])
    assert torch.equal(latents(rewritten(pipe, fuse=fuse), **CALLS[call]), expected)
    assert torch.equal(latents(ernie_accel.restore(pipe), **CALLS[call]), expected)


@every_family
def test_a_padded_batch_equals_each_prompt_alone(name: str) -> None:
    pipe = rewritten(made(name))
    prompts = ["a red circle on blue", LONG]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    together = latents(pipe, prompt=prompts, latents=noise)
    alone = torch.cat([latents(pipe, prompt=p, latents=noise[i : i + 1]) for i, p in enumerate(prompts)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@every_family
def test_all_blocks_are_rewritten_and_named(name: str) -> None:
    pipe = rewritten(made(name))
    (entry,) = ernie_accel.report(pipe).entries
    assert entry.applied.changed == block_paths(pipe)
    assert {path.split(".")[1] for path in block_paths(pipe)} == {"noise_refiner", "context_refiner", "layers"}
    assert entry.applied.skipped == {}
    plan = Compile().preview(pipe, H200)
    assert set(plan.changes) == set(block_paths(pipe))


@of_diffusers
def test_weights_are_shared_and_state_dict_keys_stay(name: str, tmp_path: Path) -> None:
    pipe = made(name)
    before, names = pipe_bytes(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    rewritten(pipe)
    assert pipe_bytes(pipe) == before
    now = pipe.transformer.state_dict()
    assert set(now) == set(names)
    assert all(torch.equal(now[key], names[key]) for key in names)
    pipe.transformer.save_pretrained(tmp_path)
    again = type(pipe.transformer).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[key], names[key]) for key in names)
    pipe.transformer.load_state_dict({key: tensor * 2 for key, tensor in names.items()})
    ernie_accel.restore(pipe)
    assert all(torch.equal(tensor, names[key] * 2) for key, tensor in pipe.transformer.state_dict().items())
    assert pipe_bytes(pipe) == before


def lora(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(5)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=LORA_TARGETS, init_lora_weights=False))


@of_diffusers
def test_a_lora_counts_whether_it_comes_before_or_after(name: str) -> None:
    stock = made(name)
    plain = latents(stock)
    lora(stock)
    expected = latents(stock)
    assert not torch.equal(expected, plain)
    assert torch.equal(latents(rewritten(stock)), expected)
    assert (
        "to_q is a Linear" in ernie_accel.report(stock).entries[0].applied.skipped["transformer.layers.0." + qkv(name)]
    )
    assert torch.equal(latents(ernie_accel.restore(stock)), expected)
    pipe = rewritten(made(name))
    lora(pipe)
    assert torch.equal(latents(pipe), expected)
    ernie_accel.restore(pipe)
    assert torch.equal(latents(pipe), expected)
    pipe.transformer.unload_lora()
    assert torch.equal(latents(pipe), plain)


def qkv(name: str) -> str:
    return rewritten_blocks(FAMILIES[name]()).FUSED_LAYERS[0]


@of_diffusers
def test_the_scale_of_a_lora_is_obeyed(name: str) -> None:
    argument = {"z_image": "joint_attention_kwargs"}.get(name, "attention_kwargs")
    stock, pipe = made(name), made(name)
    for each in (stock, pipe):
        lora(each)
    call: dict[str, Any] = {argument: {"scale": 0.3}}
    assert torch.equal(latents(rewritten(pipe), **call), latents(stock, **call))
    assert not torch.equal(latents(stock, **call), latents(stock))


@every_family
def test_quantizing_acts_on_the_fused_layers(name: str) -> None:
    pipe = made(name)
    expected = latents(pipe)
    ernie_accel.optimize(pipe, RewriteBlocks(), Quantize("int8-weight-only"))
    changed = ernie_accel.report(pipe).entries[1].applied.changed
    for layer in rewritten_blocks(pipe).FUSED_LAYERS:
        assert f"transformer.layers.1.{layer}" in changed
    assert not [path for path in changed if "context_refiner" in path or "odulation" in path or "norm" in path]
    assert (latents(pipe) - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(latents(ernie_accel.restore(pipe)), expected)


@every_family
def test_steps_are_replayed_and_prompts_of_one_padded_length_share_a_graph(name: str) -> None:
    pipe, stock, recorder = rewritten(made(name)), made(name), Recorder()
    pipe.transformer.forward = GraphedForward(pipe.transformer, rewritten_blocks(pipe), 64, 2, recorder)
    calls = [{}, CALLS["guided"], {"prompt": "a"}, CALLS["unequal"]]
    for call in calls:
        got, want = (picture(each, steps=5, output_type="latent", **call) for each in (pipe, stock))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert recorder.replays > 3 * recorder.captures > 0


@every_family
def test_a_change_of_the_prompt_is_noticed_by_graphs(name: str) -> None:
    """The same list, or the same tensors changed in place, is another picture."""
    pipe, stock = rewritten(made(name)), made(name)
    pipe.transformer.forward = GraphedForward(pipe.transformer, rewritten_blocks(pipe), 64, 2, Recorder())
    for call in ({"prompt": "a"}, {"prompt": "red"}, {"prompt": "a"}):
        got, want = (picture(each, steps=4, output_type="latent", **call) for each in (pipe, stock))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@of_diffusers
def test_few_graphs_serve_all_prompt_lengths(name: str) -> None:
    torch._dynamo.reset()
    counted: list[Any] = []
    pipe = rewritten(made(name))
    pipe.transformer.compile_repeated_blocks(
        fullgraph=True, dynamic=True, backend=lambda graph, _: counted.append(graph) or graph.forward
    )
    numbers = []
    for prompt in ("a", LONG, "a red circle"):
        picture(pipe, output_type="latent", steps=1, guidance_scale=0.0, prompt=prompt)
        numbers.append(len(counted))
    torch._dynamo.reset()
    assert numbers[1] == numbers[2] <= 4  # blocks with modulation and without, prompts with padding and without


def test_what_it_needs_is_said() -> None:
    machine = Context("cpu", "a test")
    pipe = tiny_z_image()
    pipe.transformer.enable_gradient_checkpointing()
    assert "checkpointing" in RewriteBlocks().unsupported(pipe, machine)[0]
    pipe = tiny_z_image()
    pipe.transformer.layers[0].attention.processor = lambda *args, **kwargs: None
    assert "a processor of its own, function" in RewriteBlocks().unsupported(pipe, machine)[0]


@pytest.mark.parametrize("wide", [torch.complex64, torch.complex128])
def test_real_tables_rotate_as_complex_ones_do(wide: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 16, generator=generator)
    freqs = torch.polar(torch.ones(2, 5, 8), 9 * torch.randn(2, 5, 8, generator=generator)).to(wide)
    torch.testing.assert_close(rotate(x, real(freqs)), rotate(x, freqs), atol=2e-6, rtol=0)


def test_real_tables_draw_the_same_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerators compute."""
    for name in FAMILIES:
        expected = latents(made(name))
        with monkeypatch.context() as patched:
            for module in ("z_image.blocks", "next_dit.text_first"):
                patched.setattr(f"ernie_accel.models.{module}.table", real)
            got = latents(rewritten(made(name)))
        assert (got - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("lengths", [(0,), (0, 3)])
def test_a_prompt_of_no_tokens_is_one(lengths: tuple[int, ...]) -> None:
    """In Lumina 2; attention over nothing gives no number, which must not spread."""
    from ernie_accel.core.undo import Undo
    from ernie_accel.models.rewritten import kernels_of

    pipe, generator = tiny_lumina2(), torch.Generator().manual_seed(0)
    mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    rows = len(lengths)
    noise, text = (torch.randn(rows, *shape, generator=generator) for shape in ((4, 8, 8), (4, 32)))
    arguments = (noise, torch.full((rows,), 0.3), text, mask)
    expected = pipe.transformer(*arguments).sample
    assert torch.isfinite(expected).all()
    assert torch.equal(rewritten(pipe).transformer(*arguments).sample, expected)
    kernels_of(pipe).install(pipe.transformer, Undo(), "bf16")
    torch.testing.assert_close(pipe.transformer(*arguments).sample, expected, atol=1e-4, rtol=0)


def test_prompts_of_lumina_2_that_begin_with_padding_are_refused() -> None:
    pipe = rewritten(tiny_lumina2())
    mask = torch.tensor([[0, 0, 1, 1]])
    with pytest.raises(
        ernie_accel.ErnieAccelError, match=r"a prompt of 2 tokens begins with padding .*Pad on the right"
    ):
        pipe.transformer(torch.randn(1, 4, 8, 8), torch.full((1,), 0.3), torch.randn(1, 4, 32), mask)


# ---- Z-Image alone ---------------------------------------------------------------------------------------------------


def step(sizes: tuple[int, ...] = (8,), tokens: tuple[int, ...] = (5,)) -> tuple[list[Any], torch.Tensor, list[Any]]:
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(4, 1, size, 8, generator=generator) for size in sizes]
    captions = [torch.randn(n, 32, generator=generator) for n in tokens]
    return x, torch.full((len(x),), 0.3), captions


def test_pictures_of_several_sizes_in_one_batch_are_those_of_stock() -> None:
    arguments = step((8, 4), (5, 40))
    expected = tiny_z_image().transformer(*arguments).sample
    got = rewritten(tiny_z_image()).transformer(*arguments).sample
    assert all(map(torch.equal, got, expected))


def test_a_controlnet_adds_to_the_hidden_states() -> None:
    arguments = step()
    controls = {1: torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(2))}
    stock, pipe = tiny_z_image().transformer, rewritten(tiny_z_image())
    expected = stock(*arguments, controlnet_block_samples=controls).sample[0]
    assert not torch.equal(stock(*arguments).sample[0], expected)
    assert torch.equal(pipe.transformer(*arguments, controlnet_block_samples=controls).sample[0], expected)
    recorder = Recorder()
    pipe.transformer.forward = GraphedForward(pipe.transformer, rewritten_blocks(pipe), 64, 4, recorder)
    with torch.no_grad():
        for given, captures in ((controls, 1), ({1: controls[1] * 2}, 1), ({0: controls[1]}, 2), (None, 3)):
            expected = stock(*arguments, controlnet_block_samples=given).sample[0]
            for _ in range(3):
                got = pipe.transformer(*arguments, controlnet_block_samples=given).sample[0]
                assert torch.equal(got, expected)
            assert recorder.captures == captures


def test_rows_of_the_omni_variant_are_those_of_stock() -> None:
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    pipe = tiny_z_image()
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    pipe.transformer = ZImageTransformer2DModel(**{**config, "siglip_feat_dim": 16}).eval().requires_grad_(False)
    randomize(pipe.transformer)
    generator = torch.Generator().manual_seed(1)
    x = [[torch.randn(4, 1, 8, 8, generator=generator) for _ in range(2)]]
    captions = [[torch.randn(n, 32, generator=generator) for n in (5, 3)]]
    seen = [[torch.randn(2, 3, 16, generator=generator), None]]
    call = (x, torch.full((1,), 0.3), captions)
    more = {"siglip_feats": seen, "image_noise_mask": [[0, 1]]}
    expected = pipe.transformer(*call, **more).sample[0]
    ernie_accel.optimize(pipe, RewriteBlocks(), CaptureGraphs(), context=H200)
    with torch.no_grad():
        assert torch.equal(pipe.transformer(*call, **more).sample[0], expected)
