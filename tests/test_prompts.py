"""Prompts: batched encoding equals the loop and does less, lengths are the tokenizer's, nothing is cut in silence."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import ernie_accel
from ernie_accel import BatchPromptEncoding, CallDefaults, Context, TruncatePrompts
from ernie_accel.core.outputs import images_of
from tests.pipelines import picture, tiny_ernie, tiny_lumina2, tiny_z_image

PROMPTS = ["a red circle", "a big blue square on red", "a red circle", "circle"]
CPU = torch.device("cpu")


def count_forwards(pipe):
    """Return a list that grows by (batch, tokens) with every forward of the text encoder."""
    seen = []
    pipe.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


# BatchPromptEncoding


def test_embeddings_equal_those_of_the_loop(ernie):
    loop = ernie.encode_prompt([*PROMPTS, ""], CPU, 2)
    ernie_accel.optimize(ernie, BatchPromptEncoding())
    batched = ernie.encode_prompt([*PROMPTS, ""], CPU, 2)
    assert [t.shape for t in batched] == [t.shape for t in loop]
    assert max(rel(a, b) for a, b in zip(batched, loop, strict=True)) < 5e-7


def test_one_forward_for_prompts_and_negatives_and_each_text_once(ernie):
    arguments = {"prompt": PROMPTS, "negative_prompt": ["", "blue", "", "circle"], "guidance_scale": 3.0, "steps": 1}
    seen = count_forwards(ernie)
    before = picture(ernie, **arguments)
    assert len(seen) == 8
    seen.clear()
    ernie_accel.optimize(ernie, BatchPromptEncoding())
    after = picture(ernie, **arguments)
    assert seen == [(5, 6)]  # three prompts, "" and "blue"; "circle" is a prompt, too
    assert rel(after, before) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "forwards"),
    [
        ({"guidance_scale": 1.0}, [(1, 5)]),
        ({"guidance_scale": 3.0, "negative_prompt": None}, [(2, 5)]),
        ({"guidance_scale": 3.0, "negative_prompt_embeds": [torch.zeros(1, 64)]}, [(1, 5)]),
        ({"guidance_scale": 3.0, "prompt": None, "prompt_embeds": [torch.zeros(2, 64)]}, [(1, 1)]),
    ],
    ids=str,
)
def test_no_more_is_encoded_than_the_call_needs(ernie, arguments, forwards):
    before = picture(ernie, steps=1, **arguments)
    ernie_accel.optimize(ernie, BatchPromptEncoding())
    seen = count_forwards(ernie)
    assert rel(picture(ernie, steps=1, **arguments), before) < 1e-5
    assert seen == forwards


def test_the_guidance_of_call_defaults_is_seen(ernie):
    ernie_accel.optimize(ernie, BatchPromptEncoding(), CallDefaults(guidance_scale=2.0, num_inference_steps=1))
    seen = count_forwards(ernie)
    ernie("a red circle", height=64, width=64, output_type="latent")
    assert seen == [(2, 3)]


def test_large_batches_are_split_and_little_is_padded(ernie):
    ernie_accel.optimize(ernie, BatchPromptEncoding(max_batch=2))
    seen = count_forwards(ernie)
    ernie.encode_prompt(PROMPTS, CPU)
    assert seen == [(2, 3), (1, 6)]


def test_the_unused_layer_does_not_run_and_stays_in_its_place(ernie):
    """The trap: with the module replaced, hidden_states[-2] silently is another layer's."""
    layers = ernie.text_encoder.language_model.layers
    ran = []
    for number, layer in enumerate(layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    ernie_accel.optimize(ernie, BatchPromptEncoding())
    ernie.encode_prompt("circle", CPU)
    assert ran == list(range(len(layers) - 1))


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_the_cache_gives_the_same_and_forgets_the_least_recently_used(ernie, on_disk, tmp_path):
    ernie_accel.optimize(ernie, BatchPromptEncoding(cache=2, folder=str(tmp_path) if on_disk else None))
    seen = count_forwards(ernie)
    first = [ernie.encode_prompt(p, CPU)[0] for p in ("circle", "red", "circle")]
    assert len(seen) == 3 - 1
    assert torch.equal(first[0], first[2])
    ernie.encode_prompt("blue", CPU)  # "red" goes
    ernie.encode_prompt("circle", CPU)
    assert len(seen) == 3
    ernie.encode_prompt("red", CPU)
    assert len(seen) == 4
    assert len(list(tmp_path.iterdir())) == (2 if on_disk else 0)


def test_without_a_cache_nothing_outlives_a_call(ernie):
    ernie_accel.optimize(ernie, BatchPromptEncoding())
    seen = count_forwards(ernie)
    for _ in range(2):
        picture(ernie, steps=1)
    assert len(seen) == 2


def test_files_of_other_weights_are_not_taken(ernie, tmp_path):
    ernie_accel.optimize(ernie, BatchPromptEncoding(cache=9, folder=str(tmp_path)))
    old = ernie.encode_prompt("circle", CPU)[0]
    ernie_accel.restore(ernie)
    ernie.text_encoder.language_model.layers[0].mlp.up_proj.weight.data *= 2
    ernie_accel.optimize(ernie, BatchPromptEncoding(cache=9, folder=str(tmp_path)))
    assert rel(ernie.encode_prompt("circle", CPU)[0], old) > 1e-6
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_was_cut_off_is_encoded_anew(ernie, tmp_path):
    ernie_accel.optimize(ernie, BatchPromptEncoding(cache=9, folder=str(tmp_path)))
    want = ernie.encode_prompt("circle", CPU)[0]
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    for pipe in (ernie, copy.deepcopy(ernie)):
        assert torch.equal(pipe.encode_prompt("circle", CPU)[0], want)


def test_a_cache_that_keeps_nothing_is_a_mistake(flux):
    with pytest.raises(ValueError, match="folder='x' with cache=0 keeps nothing"):
        BatchPromptEncoding(folder="x")
    (step,) = ernie_accel.plan(flux, BatchPromptEncoding()).steps
    assert step.preview.note == "FluxPipeline encodes the prompts of a call together already"


# TruncatePrompts

LONG = "a big red circle on a small blue square on a red circle"  # 13 tokens


@pytest.mark.parametrize(
    ("keep", "rest", "lost"), [("head", "a big red circle on", "end"), ("tail", "square on a red circle", "beginning")]
)
def test_a_long_prompt_is_shortened_and_the_result_says_so(ernie, keep, rest, lost):
    want = picture(ernie, prompt=[rest, "red"], steps=1)
    ernie_accel.optimize(ernie, TruncatePrompts(5, keep=keep))
    with pytest.warns(UserWarning, match="has 13 tokens"):
        result = ernie(
            [LONG, "red"],
            height=64,
            width=64,
            num_inference_steps=1,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
    assert torch.equal(images_of(result), want)
    warning = f"prompt 'a big red circle on a small blue square ...' has 13 tokens; its {lost} was cut to leave 5"
    assert result.warnings == (warning,)
    assert ernie("red", height=64, width=64, num_inference_steps=1).warnings == ()


def test_prompts_within_the_limit_are_not_touched(ernie):
    before = picture(ernie, prompt=LONG, guidance_scale=3.0, steps=1)
    ernie_accel.optimize(ernie, TruncatePrompts(13))  # exactly as many as it has
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(picture(ernie, prompt=LONG, guidance_scale=3.0, steps=1), before)
    assert ernie(LONG, height=64, width=64, num_inference_steps=1).warnings == ()


@pytest.mark.parametrize("order", [1, -1])
def test_negatives_are_shortened_also_where_they_are_encoded_ahead(ernie, order):
    arguments = {"prompt": "red", "guidance_scale": 3.0, "steps": 1}
    want = picture(ernie, negative_prompt="a big red", **arguments)
    ernie_accel.optimize(ernie, *[TruncatePrompts(3), BatchPromptEncoding()][::order])
    seen = count_forwards(ernie)
    with pytest.warns(UserWarning, match="cut to leave 3"):
        image = picture(ernie, negative_prompt=LONG, **arguments)
    assert rel(image, want) < 1e-5
    assert seen == [(2, 3)]


def test_an_enhanced_prompt_is_shortened_after_it_was_enhanced(ernie):
    vars(ernie).update(pe=object(), pe_tokenizer=object())
    ernie._enhance_prompt_with_pe = lambda prompt, device, **_: LONG
    ernie_accel.optimize(ernie, TruncatePrompts(4))
    with pytest.warns(UserWarning, match="has 13 tokens"):
        result = ernie("red", height=64, width=64, num_inference_steps=1, guidance_scale=1.0)
    assert len(result.warnings) == 1


@pytest.mark.parametrize("empty", ["", "   "])
def test_a_prompt_without_tokens_is_an_error_that_names_it(ernie, empty):
    ernie_accel.optimize(ernie, TruncatePrompts(8))
    with pytest.raises(ernie_accel.ErnieAccelError, match=f"prompt 2 of 2, {empty!r}, has no tokens"):
        picture(ernie, prompt=["red", empty])


def test_a_tuple_of_results_is_left_a_tuple(ernie):
    ernie_accel.optimize(ernie, TruncatePrompts(2))
    arguments = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent", "return_dict": False}
    with pytest.warns(UserWarning, match="cut to leave 2"):
        assert len(ernie("a red circle", **arguments)) == 1


def test_limits_that_make_no_sense_are_refused(ernie, flux):
    cpu = Context.named("cpu")
    assert "tokenizer itself cuts at 64: use at most 64" in TruncatePrompts(65).unsupported(ernie, cpu)[0]
    assert "FluxPipeline has no tokenizer" in TruncatePrompts(8).unsupported(flux, cpu)[0]
    ernie.tokenizer.model_max_length = 10**30  # what a tokenizer without a limit says
    assert TruncatePrompts(4096).unsupported(ernie, cpu) == []
    with pytest.raises(ValueError, match="max_tokens must be >= 1"):
        TruncatePrompts(0)
    with pytest.raises(ernie_accel.UnknownNameError, match="end of a prompt"):
        TruncatePrompts(5, keep="middle")


@pytest.mark.parametrize("make", [tiny_ernie, tiny_z_image, tiny_lumina2])
def test_a_pipe_that_gets_its_prompts_encoded_has_nothing_to_encode_them_with(make):
    """Services encode elsewhere, and load no text encoder: presets must not refuse that."""
    pipe = make()
    pipe.text_encoder = pipe.tokenizer = None
    (step,) = ernie_accel.plan(pipe, BatchPromptEncoding()).steps
    assert (step.verdict, step.preview.changes) == ("nothing to do", ())
    assert "nothing to encode" in step.preview.note
    ernie_accel.optimize(pipe, BatchPromptEncoding())
