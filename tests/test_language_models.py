"""Text encoders of every known architecture: rewritten, they give stock's hidden states, padded or not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import ernie_accel
from ernie_accel import BatchPromptEncoding, Context, RewriteTextEncoder
from ernie_accel.core.undo import Undo
from ernie_accel.models.language.architecture import ARCHITECTURES, architecture_of
from ernie_accel.models.language.text_encoder import RewrittenForward, unsupported_reasons
from tests.own_newbie import tiny_own_newbie
from tests.pipelines import picture, randomize, tiny_lumina2, tiny_newbie, tiny_z_image
from tests.test_rewrite_text_encoder import Recorder, ids, rel, rewritten, stock

CPU, HERE = torch.device("cpu"), Context.named("cpu")
SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def qwen3(**settings):
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**SIZES | settings))


def gemma2(**settings):
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**SIZES | settings))


def gemma3(**settings):
    from transformers import Gemma3TextConfig, Gemma3TextModel

    return Gemma3TextModel(Gemma3TextConfig(**SIZES | settings))


LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
VARIANTS = [
    (qwen3, {}),
    (qwen3, {"num_key_value_heads": 1, "attention_bias": True, "hidden_act": "gelu"}),
    (qwen3, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    (gemma2, {}),
    (gemma2, {"sliding_window": 5, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 9}),
    (gemma2, {"attn_logit_softcapping": None, "sliding_window": 6}),
    (gemma3, {}),
    (gemma3, {"sliding_window": 5, "rope_parameters": ROPES, **LAYERS}),
    (gemma3, {"num_key_value_heads": 4, "query_pre_attn_scalar": 16}),
]


def ready(make, dtype=torch.float32, std=0.3, **settings):
    torch.manual_seed(0)
    model = make(**settings)
    randomize(model, std=std)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(-0.5, 0.5)
            parameter.data += not architecture_of(model).has_unit_offset
    return model.to(dtype).eval().requires_grad_(False)


def distance(mine, want, where=None):
    pairs = zip(mine.hidden_states, want.hidden_states, strict=True)
    return max(rel(a, b) if where is None else rel(a[where], b[where]) for a, b in pairs)


def name(value):
    return getattr(value, "__name__", str(value))


def test_every_architecture_is_tried():
    assert {architecture_of(make()) for make in (qwen3, gemma2, gemma3)} == set(ARCHITECTURES[1:])


@pytest.mark.parametrize(("make", "settings"), VARIANTS, ids=name)
@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_all_hidden_states_are_those_of_stock(make, settings, tokens):
    model = ready(make, **settings)
    given = {"input_ids": ids(tokens=tokens), "output_hidden_states": True}
    want = stock(model, **given)
    _, seen = rewritten(model)
    with torch.no_grad():
        mine = model(**given)
    assert seen == []
    assert distance(mine, want) < 2e-6
    assert torch.equal(mine.last_hidden_state, mine.hidden_states[-1])


@pytest.mark.parametrize("make", [qwen3, gemma2, gemma3])
def test_in_bfloat16_it_is_as_near_to_float32_as_stock(make):
    model = ready(make, torch.bfloat16, std=0.05, hidden_size=256)
    exact = copy.deepcopy(model).float()
    given = {"input_ids": ids(4, 24), "output_hidden_states": True}
    want, theirs = stock(exact, **given), stock(model, **given)
    rewritten(model)
    with torch.no_grad():
        mine = model(**given)
    assert distance(mine, want) < 1.1 * distance(theirs, want)


UNEQUAL = torch.arange(12) < torch.tensor([[3], [9], [1]])


@pytest.mark.parametrize(("make", "settings"), VARIANTS[::2], ids=name)
@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_batches_of_unequal_texts_are_cut_to_the_longest_and_padding_is_zero(make, settings, kind):
    model = ready(make, **settings)
    given = {"input_ids": ids(3, 12), "attention_mask": UNEQUAL.to(kind), "output_hidden_states": True}
    want = stock(model, **given)
    mine_of, seen = rewritten(model)
    lengths, rotary = [], mine_of._rotary
    mine_of._rotary = lambda x_bth: lengths.append(x_bth.shape[1]) or rotary(x_bth)
    with torch.no_grad():
        mine = model(**given)
    assert (seen, lengths) == ([], [9])
    assert distance(mine, want, UNEQUAL) < 2e-6
    assert [state.shape for state in mine.hidden_states] == [state.shape for state in want.hidden_states]
    assert all(state[~UNEQUAL].abs().max() == 0 for state in mine.hidden_states)


@pytest.mark.parametrize("mask", [~UNEQUAL, torch.zeros(3, 12, dtype=torch.bool), UNEQUAL.float()], ids=str)
def test_padding_elsewhere_is_stocks_own_and_a_text_without_tokens_is_none(mask):
    model = ready(qwen3)
    if not mask.any():
        rewritten(model)
        with torch.no_grad():
            assert model(ids(3, 12), mask).last_hidden_state.abs().max() == 0
        return
    want = stock(model, input_ids=ids(3, 12), attention_mask=mask)
    _, seen = rewritten(model)
    with torch.no_grad():
        mine = model(ids(3, 12), mask)
    assert len(seen) == 1
    assert torch.equal(mine.last_hidden_state, want.last_hidden_state)


def test_graphs_serve_masked_texts_of_many_lengths():
    model, recorder = ready(gemma3), Recorder()
    want = stock(model, input_ids=ids(3, 12), attention_mask=UNEQUAL, output_hidden_states=True)
    rewritten(model, capture=recorder)
    for shift in (0, 0, 1):
        mask = UNEQUAL | (torch.arange(12) < shift)
        with torch.no_grad():
            mine = model(ids(3, 12), mask, output_hidden_states=True)
    assert (recorder.captures, recorder.replays) == (1, 2)
    assert distance(mine, want, UNEQUAL) < 2e-6


@pytest.mark.parametrize(
    ("make", "settings", "change", "reason"),
    [
        (gemma2, {}, lambda model: setattr(model, "embed_tokens", torch.nn.Embedding(32, 64)), "its embedding is a"),
        (gemma2, {}, lambda model: setattr(model.config, "_attn_implementation", "sdpa"), "ignores the cap"),
        (gemma3, {"use_bidirectional_attention": True}, lambda model: None, "looks ahead"),
        (
            gemma3,
            {},
            lambda model: model.config.rope_parameters["full_attention"].update(rope_type="dynamic"),
            "length",
        ),
        (qwen3, {}, lambda model: setattr(model, "forward", lambda: None), "was replaced already"),
    ],
)
def test_what_computes_otherwise_is_left_to_stock_with_the_reason(make, settings, change, reason):
    model = ready(make, **settings)
    change(model)
    assert reason in " ".join(unsupported_reasons(model))


@pytest.mark.parametrize("make", [qwen3, gemma2, gemma3])
def test_a_norm_that_someone_has_changed_is_called_as_it_is(make):
    for path in architecture_of(make()).norms:
        model = ready(make)
        getattr(model.layers[1], path).forward = lambda x: 2 * x
        _, seen = rewritten(model)
        with torch.no_grad():
            model(input_ids=ids())
        assert len(seen) == 1, path


def test_it_goes_beneath_a_hook_that_brings_the_weights():
    """Offload("model") puts its hook on the text encoder itself, which here is the language model."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Watching(ModelHook):
        seen = 0

        def pre_forward(self, module, *args, **kwargs):
            self.seen += 1
            return args, kwargs

    model, hook = ready(qwen3), Watching()
    want = stock(model, input_ids=ids()).last_hidden_state
    add_hook_to_module(model, hook)
    with Undo() as undo:
        RewrittenForward(model, 0, 4).install(undo)
        mine = vars(model)["_old_forward"]
        assert isinstance(mine, RewrittenForward)
        mine.inner_forward = None  # it must not be needed
        with torch.no_grad():
            assert rel(model(input_ids=ids()).last_hidden_state, want) < 2e-6
    assert hook.seen == 1
    undo()
    assert not isinstance(vars(model).get("_old_forward"), RewrittenForward)
    remove_hook_from_module(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids()).last_hidden_state, want)


# On pipes ------------------------------------------------------------------------------------------------------------

PIPES = {"z_image": tiny_z_image, "lumina2": tiny_lumina2, "newbie": tiny_newbie}
PROMPTS = ["a red circle", "a big blue square on red", "a red circle", "circle"]


def deep(make):
    """Return a pipe whose text encoder has four layers, so that one counts and one is skipped."""
    pipe = make()
    kind = {"Qwen3Model": qwen3, "Gemma2Model": gemma2}[type(pipe.text_encoder).__name__]
    pipe.text_encoder = ready(kind, hidden_size=32)
    return pipe


def encoded(pipe, prompts=PROMPTS, guided=True, **arguments):
    """Return the embeddings and masks that the pipe makes, as a flat list."""
    arguments |= {"prompt": list(prompts), "do_classifier_free_guidance": guided}
    with torch.no_grad():
        made = pipe.encode_prompt(max_sequence_length=48, **arguments)
    flat = []
    for part in made:
        flat += part if isinstance(part, (list, tuple)) else [part]
    return [each for each in flat if each is not None]


def counting_forwards(pipe):
    seen = []
    pipe.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])),
        with_kwargs=True,
    )
    return seen


def is_near(mine, want, limit=2e-6):
    assert [each.shape for each in mine] == [each.shape for each in want]
    for a, b in zip(mine, want, strict=True):
        if not a.is_floating_point():
            assert torch.equal(a, b)
        elif a.abs().sum():  # the tiny tokenizer makes no tokens of an empty prompt
            counts = a.abs().sum(-1) > 0  # padding is zero, and its mask hides it
            assert rel(a[counts], b[counts]) < limit
    assert mine[0].abs().sum()
    return True


@pytest.mark.parametrize("make", PIPES.values(), ids=PIPES)
@pytest.mark.parametrize(
    "transforms",
    [[RewriteTextEncoder()], [BatchPromptEncoding()], [RewriteTextEncoder(), BatchPromptEncoding(max_batch=2)]],
    ids=["rewritten", "once", "both"],
)
def test_a_pipe_encodes_as_stock_does_and_is_restored_bit_for_bit(make, transforms):
    pipe = deep(make)
    arguments = {"negative_prompt": ["blue", "", "blue", "red"]}
    want, before = encoded(pipe, **arguments), picture(pipe, prompt=PROMPTS[:2], guidance_scale=3.0)
    ernie_accel.optimize(pipe, *transforms)
    if RewriteTextEncoder() in transforms:
        pipe.text_encoder.forward.inner_forward = None
    assert is_near(encoded(pipe, **arguments), want)
    assert rel(picture(pipe, prompt=PROMPTS[:2], guidance_scale=3.0), before) < 1e-5
    ernie_accel.restore(pipe)
    assert all(torch.equal(a, b) for a, b in zip(encoded(pipe, **arguments), want, strict=True))
    assert "forward" not in vars(pipe.text_encoder)


@pytest.mark.parametrize("make", PIPES.values(), ids=PIPES)
def test_each_text_is_encoded_once_with_the_negative_ones_and_the_empty_one_once_per_process(make):
    pipe = ernie_accel.optimize(deep(make), BatchPromptEncoding())
    seen, prompts = counting_forwards(pipe), list(PROMPTS)
    for _ in range(2):
        picture(pipe, prompt=prompts, guidance_scale=3.0, steps=1)
    assert seen == [4, 3]  # three texts and the empty one, which is kept
    assert prompts == PROMPTS  # stock's Z-Image writes its chats into the caller's list
    pipe.text_encoder.layers[0].mlp.up_proj.weight.data *= 2
    picture(pipe, prompt=PROMPTS, guidance_scale=3.0, steps=1)
    picture(pipe, prompt=PROMPTS, guidance_scale=0.0, steps=1)
    assert seen == [4, 3, 4, 3]


@pytest.mark.parametrize("make", [tiny_z_image, tiny_lumina2])
def test_the_skipped_layer_is_not_run_and_the_one_before_counts(make):
    pipe, ran = deep(make), []
    for number, layer in enumerate(pipe.text_encoder.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    ernie_accel.optimize(pipe, BatchPromptEncoding())
    encoded(pipe, guided=False)
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("make", [tiny_z_image, tiny_lumina2])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_what_is_kept_is_the_same_and_the_least_recently_used_goes(make, on_disk, tmp_path):
    pipe = deep(make)
    want = encoded(pipe, ["circle"], guided=False)
    ernie_accel.optimize(pipe, BatchPromptEncoding(cache=2, folder=str(tmp_path) if on_disk else None))
    seen = counting_forwards(pipe)
    for prompt in ("circle", "red", "circle", "blue", "circle"):
        mine = encoded(pipe, [prompt], guided=False)
    assert seen == [1, 1, 1]
    assert is_near(mine, want)
    encoded(pipe, ["red"], guided=False)
    assert seen == [1, 1, 1, 1]
    assert encoded(pipe, ["circle"], guided=False, device=CPU)[0].device == CPU
    short = pipe.encode_prompt(["circle"], do_classifier_free_guidance=False, max_sequence_length=8)
    assert len(seen) == 5  # another length is another result
    assert isinstance(short[0], (list, torch.Tensor))
    assert len(list(tmp_path.iterdir())) == (2 if on_disk else 0)


@pytest.mark.parametrize("make", [tiny_z_image, tiny_lumina2])
@pytest.mark.parametrize("before", [True, False])
def test_a_lora_on_the_text_encoder_counts_before_and_after(make, before):
    from peft import LoraConfig, inject_adapter_in_model

    def adapt(pipe):
        torch.manual_seed(1)
        config = LoraConfig(target_modules=["up_proj", "q_proj"], init_lora_weights=False)
        inject_adapter_in_model(config, pipe.text_encoder)

    plain, stock_pipe, pipe = encoded(deep(make)), deep(make), deep(make)
    adapt(stock_pipe)
    if before:
        adapt(pipe)
    ernie_accel.optimize(pipe, BatchPromptEncoding(cache=8), RewriteTextEncoder())
    if not before:
        assert is_near(encoded(pipe), plain)
        adapt(pipe)
    want, mine = encoded(stock_pipe), encoded(pipe)
    assert is_near(mine, want)
    assert rel(mine[0], plain[0]) > 1e-3


@pytest.mark.parametrize("make", PIPES.values(), ids=PIPES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_and_pickles_encode_with_their_own_weights(make, duplicate):
    pipe = ernie_accel.optimize(deep(make), BatchPromptEncoding(cache=4), RewriteTextEncoder())
    want = encoded(pipe)
    other = duplicate(pipe)
    for parameter in pipe.text_encoder.parameters():
        parameter.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(encoded(other), want, strict=True))
    assert rel(encoded(pipe)[0], want[0]) > 0.1


def test_all_pipelines_of_z_image_share_the_method():
    import diffusers

    parts, want = None, None
    for kind in ("", "Img2Img", "Inpaint", "Omni"):
        pipe = deep(tiny_z_image)
        if kind:
            extra = {"siglip": None, "siglip_processor": None} if kind == "Omni" else {}
            pipe = getattr(diffusers, f"ZImage{kind}Pipeline")(**pipe.components | extra)
        plan = ernie_accel.plan(pipe, BatchPromptEncoding(), RewriteTextEncoder())
        assert [step.verdict for step in plan.steps] == ["apply", "apply"], kind
        want = encoded(pipe)
        ernie_accel.optimize(pipe, BatchPromptEncoding(), RewriteTextEncoder())
        if kind == "Omni":  # a list of parts of each prompt
            want, parts = ([part for each in made for part in each] for made in (want, encoded(pipe)))
            assert is_near(parts, want)
        else:
            assert is_near(encoded(pipe), want)


def own_newbie():
    """Return a pipe of NewBie-image's own code: two encoders, captions beside the prompts."""
    pipe = tiny_own_newbie()
    pipe.text_encoder = ready(gemma3, hidden_size=32)
    return pipe


@torch.no_grad()
def test_newbies_own_method_encodes_each_pair_of_prompt_and_caption_once():
    pipe = own_newbie()
    arguments = ([*PROMPTS, ""], [*PROMPTS[:3], "another", ""])
    want = pipe._encode_prompt(*arguments)
    ernie_accel.optimize(pipe, BatchPromptEncoding(cache=8), RewriteTextEncoder())
    seen, captions = counting_forwards(pipe), []
    pipe.clip_model.embedding.register_forward_pre_hook(lambda _, args: captions.append(len(args[0])))
    for _ in range(2):
        mine = pipe._encode_prompt(*arguments)
        assert mine[2] is None
        assert is_near([each for each in mine if each is not None], [each for each in want if each is not None])
    assert (seen, captions) == ([4], [4])
    pipe.clip_model.embedding.weight.data += 1  # the second encoder counts, too
    assert not torch.equal(pipe._encode_prompt(*arguments)[3], want[3])
    assert seen == [4, 4]


def test_gradients_of_the_text_encoder_are_recorded_as_in_stock():
    pipe = ernie_accel.optimize(deep(tiny_z_image), BatchPromptEncoding(cache=4), RewriteTextEncoder())
    weight = pipe.text_encoder.layers[0].mlp.up_proj.weight.requires_grad_()
    pipe.encode_prompt(["circle"], do_classifier_free_guidance=False)[0][0].sum().backward()
    assert weight.grad.abs().max() > 0
    assert not encoded(pipe, ["circle"])[0].requires_grad


def test_a_method_that_returns_something_else_is_an_error_that_says_so():
    pipe = deep(tiny_z_image)
    pipe._encode_prompt = lambda prompt, device=None, prompt_embeds=None, max_sequence_length=8: [torch.ones(1)] * 7
    ernie_accel.optimize(pipe, BatchPromptEncoding())
    with pytest.raises(TypeError, match="_encode_prompt returned 7 entries for 3 texts; a list or a tensor with one"):
        encoded(pipe, guided=False)


def test_a_pipe_with_another_way_of_encoding_is_left_alone(monkeypatch):
    pipe = own_newbie()
    monkeypatch.setattr(type(pipe), "_encode_prompt", None)
    other = deep(tiny_lumina2)
    other.text_encoder = torch.nn.Linear(1, 1)
    for each in (pipe, other):
        plan = ernie_accel.plan(each, BatchPromptEncoding())
        assert plan.steps[0].verdict == "nothing to do"
        assert "is not known here" in plan.steps[0].preview.note
    assert "is a Linear, not a Ministral3Model, Qwen3Model," in str(ernie_accel.plan(other, RewriteTextEncoder()))
