"""The rewritten text encoder: stock's hidden states, stock's own forward for all else, and when graphs are made."""

from __future__ import annotations

import copy

import pytest
import torch

import ernie_accel
from ernie_accel import Autocast, BatchPromptEncoding, Context, FreeAfterUse, Offload, Quantize, RewriteTextEncoder
from ernie_accel.batch.engines.prompts import PromptStage
from ernie_accel.models.language.layers import pass_on
from ernie_accel.models.language.text_encoder import RewrittenForward
from tests.pipelines import after, picture, randomize, tiny_ernie

CPU, H200 = torch.device("cpu"), Context("cuda", "NVIDIA H200", (9, 0))
PROMPTS = ["a red circle", "a big blue square on red", "circle"]


def rel(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def language_model(dtype=torch.float32, std=0.3, **settings):
    from transformers import Ministral3Config, Ministral3Model

    config = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    torch.manual_seed(0)
    model = Ministral3Model(Ministral3Config(**config | settings))
    randomize(model, std=std)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model.to(dtype).eval().requires_grad_(False)


def ids(rows=2, tokens=7, seed=0):
    return torch.randint(3, 32, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def stock(model, **arguments):
    """Return what the class's own forward gives."""
    with torch.no_grad():
        return type(model).forward(model, **arguments)


def counting(model):
    """Return a list that grows with every call of the forward as it was."""
    seen, forward = [], model.forward
    model.forward = lambda *args, **kwargs: seen.append(kwargs) or forward(*args, **kwargs)
    return seen


def rewritten(model, max_tokens=1024, keep=4, capture=None):
    """Rewrite the forward of `model` in place; return what stands in for it, and a list as of `counting`."""
    seen = counting(model)
    model.forward = RewrittenForward(model, max_tokens, keep, capture)
    return model.forward, seen


class Recorder:
    """Records work like a CUDA graph: a replay reads what the work read and overwrites what it returned."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, work, pool):
        self.captures += 1
        result = [torch.full_like(state, float("nan")) for state in work()]
        recorder = self

        class Graph:
            def pool(self):
                return "its memory"

            def replay(self):
                recorder.replays += 1
                for held, state in zip(result, work(), strict=True):
                    held.copy_(state)

        return Graph(), result


# The same hidden states ----------------------------------------------------------------------------------------------

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 1000.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.5,
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"rope_parameters": YARN, "max_position_embeddings": 64},
        {"hidden_act": "gelu", "rms_norm_eps": 1e-2},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_all_hidden_states_are_those_of_stock(settings, tokens):
    model = language_model(**settings)
    _, seen = rewritten(model)
    want = stock(model, input_ids=ids(tokens=tokens), output_hidden_states=True)
    with torch.no_grad():
        by_ids = model(input_ids=ids(tokens=tokens), output_hidden_states=True)
        by_embeds = model(inputs_embeds=model.embed_tokens(ids(tokens=tokens)), output_hidden_states=True)
        by_position = model(ids(tokens=tokens), None, None, None, None, False)
    assert seen == []
    assert len(want.hidden_states) == len(model.layers) + 1
    for mine in (by_ids, by_embeds):
        assert type(mine) is type(want)
        assert type(mine.hidden_states) is tuple
        pairs = list(zip(mine.hidden_states, want.hidden_states, strict=True))
        assert max(rel(a, b) for a, b in pairs) < 2e-6
        assert torch.equal(mine.last_hidden_state, mine.hidden_states[-1])
        assert mine.past_key_values is None
    assert torch.equal(by_position.last_hidden_state, by_ids.last_hidden_state)
    assert by_position.hidden_states is None


@pytest.mark.parametrize("tokens", [16, 40])
def test_in_bfloat16_it_is_no_further_from_float32_than_stock(tokens):
    """Measured over seeds, sizes and scales of the weights: 0.85 to 0.97 of stock's distance."""
    model = language_model(torch.bfloat16, std=0.05, num_hidden_layers=8, hidden_size=256)
    exact = copy.deepcopy(model).float()
    given = {"input_ids": ids(4, tokens), "output_hidden_states": True}
    want, theirs = stock(exact, **given), stock(model, **given)
    rewritten(model)
    with torch.no_grad():
        mine = model(**given)
    for number in range(1, 9):
        distances = [rel(each.hidden_states[number], want.hidden_states[number]) for each in (mine, theirs)]
        assert distances[0] <= distances[1], number


def test_embeddings_of_the_pipe_are_those_of_stock_also_where_prompts_are_padded(ernie):
    loop = ernie.encode_prompt([*PROMPTS, ""], CPU)
    for transforms in ([RewriteTextEncoder()], [RewriteTextEncoder(), BatchPromptEncoding()]):
        ernie_accel.optimize(ernie, *transforms)
        seen = counting_behind(ernie)
        mine = ernie.encode_prompt([*PROMPTS, ""], CPU)
        assert seen == []
        assert [t.shape for t in mine] == [t.shape for t in loop]
        assert max(rel(a, b) for a, b in zip(mine, loop, strict=True)) < 1e-6


# What is left to stock -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 2)},
        {"position_ids": torch.arange(3, 10)[None]},
        {"use_cache": True},
        {"output_attentions": True},
        {"output_hidden_states": [1]},
        {"return_dict": False},
        {"something_new": 1},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_other_calls_get_the_forward_as_it_was(arguments):
    model = language_model(attn_implementation="eager")
    want = stock(model, input_ids=ids(), **arguments)
    _, seen = rewritten(model)
    with torch.no_grad():
        mine = model(input_ids=ids(), **arguments)
    assert len(seen) == 1
    assert torch.equal(mine[0], want[0])
    if "use_cache" in arguments:
        assert mine.past_key_values.get_seq_length() == 7
        with torch.no_grad():
            model(input_ids=ids(tokens=1), past_key_values=mine.past_key_values)
        assert len(seen) == 2
        assert mine.past_key_values.get_seq_length() == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [("output_attentions", True), ("return_dict", False), ("is_causal", False), ("tie_last_hidden_states", False)],
)
def test_settings_of_the_model_count_as_arguments(name, value):
    model = language_model(attn_implementation="eager")
    setattr(model.config, name, value)
    _, seen = rewritten(model)
    with torch.no_grad():
        model(input_ids=ids())
    assert len(seen) == 1


def test_hidden_states_are_returned_if_the_config_says_so():
    model = language_model()
    model.config.output_hidden_states = True
    _, seen = rewritten(model)
    with torch.no_grad():
        assert len(model(input_ids=ids()).hidden_states) == 4
        assert model(input_ids=ids(), output_hidden_states=False).hidden_states is None
    assert seen == []


def test_errors_of_the_arguments_are_stocks_own():
    model = language_model()
    rewritten(model)
    with torch.no_grad(), pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(input_ids=ids(), inputs_embeds=torch.zeros(2, 7, 64))
    with torch.no_grad(), pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_gradients_training_and_autocast_get_the_forward_as_it_was():
    model = language_model()
    _, seen = rewritten(model)
    model(input_ids=ids(), inputs_embeds=None)
    assert len(seen) == 1
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids())
        assert len(seen) == 2
        model.train()(input_ids=ids())
        assert len(seen) == 3
        model.eval()(input_ids=ids())
    assert len(seen) == 3
    with torch.inference_mode():
        model(input_ids=ids())
    assert len(seen) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.layers[1].register_forward_hook(lambda module, args, out: out * 2),
        lambda model: model.layers[1].self_attn.register_forward_pre_hook(lambda *_: None),
        lambda model: model.layers[2].mlp.register_forward_hook(lambda module, args, out: out * 2),
        lambda model: model.norm.register_forward_hook(lambda module, args, out: out * 2),
        lambda model: setattr(model.layers[0].input_layernorm, "forward", lambda x: x),
        lambda model: setattr(model.layers[0], "forward", lambda x, **_: 3 * x),
        lambda model: setattr(model.layers[2].mlp, "_compiled_call_impl", lambda x: x),
        lambda model: setattr(model.layers[0], "_hf_hook", object()),
        lambda model: setattr(model.layers[0].mlp, "_diffusers_hook", object()),
        lambda model: setattr(model.layers[1], "mlp", torch.nn.Identity()),
        lambda model: setattr(model.config, "sliding_window", 3),
        lambda model: model.norm.double(),
    ],
)
def test_layers_that_someone_has_changed_are_called_as_they_are(change):
    model = language_model()
    _, seen = rewritten(model)
    change(model)
    want = stock(model, input_ids=ids(), output_hidden_states=True)
    with torch.no_grad():
        mine = model(input_ids=ids(), output_hidden_states=True)
    assert len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(mine.hidden_states, want.hidden_states, strict=True))
    assert mine[0].dtype == want[0].dtype


def test_the_hooks_with_which_transformers_listens_change_nothing():
    model = language_model()
    stock(model, input_ids=ids(), output_hidden_states=True)
    assert model.layers[0]._forward_hooks
    _, seen = rewritten(model)
    with torch.no_grad():
        model(input_ids=ids(), output_hidden_states=True)
    assert seen == []


def test_fewer_layers_by_the_config_are_fewer_here():
    model = language_model()
    model.config.num_hidden_layers = 2
    want = stock(model, input_ids=ids(), output_hidden_states=True).hidden_states
    _, seen = rewritten(model)
    with torch.no_grad():
        mine = model(input_ids=ids(), output_hidden_states=True).hidden_states
    assert seen == []
    assert max(rel(a, b) for a, b in zip(mine, want, strict=True)) < 2e-6


def lora(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["up_proj", "q_proj"], init_lora_weights=False), model)


def hooked(model):
    model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: out * 2)


@pytest.mark.parametrize("change", [lora, hooked])
def test_linear_layers_of_others_are_called_and_not_captured(change):
    model, recorder = language_model(), Recorder()
    plain = stock(model, input_ids=ids()).last_hidden_state
    change(model)
    want = stock(model, input_ids=ids()).last_hidden_state
    _, seen = rewritten(model, capture=recorder)
    with torch.no_grad():
        for _ in range(3):
            mine = model(input_ids=ids()).last_hidden_state
    assert (len(seen), recorder.captures) == (0, 0)
    assert rel(mine, want) < 2e-6 < rel(plain, want)


def test_quantized_layers_are_computed_as_they_are(ernie):
    ernie_accel.optimize(ernie, Quantize("int8-weight-only", components=("text_encoder",)))
    want = ernie.encode_prompt(PROMPTS, CPU)
    ernie_accel.optimize(ernie, Quantize("int8-weight-only", components=("text_encoder",)), RewriteTextEncoder())
    seen = counting_behind(ernie)
    mine = ernie.encode_prompt(PROMPTS, CPU)
    assert seen == []
    assert max(rel(a, b) for a, b in zip(mine, want, strict=True)) < 1e-5


def counting_behind(pipe):
    """Return a list that grows with every call of stock's forward behind the rewritten one of a pipe."""
    mine, seen = pipe.text_encoder.language_model.forward, []
    forward = mine.inner_forward
    mine.inner_forward = lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs)
    return seen


def test_under_autocast_the_pipe_computes_as_without_it(ernie):
    ernie_accel.optimize(ernie, Autocast("bfloat16"))
    want = picture(ernie)
    ernie_accel.optimize(ernie, Autocast("bfloat16"), RewriteTextEncoder())
    assert torch.equal(picture(ernie), want)


# In the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda encoder: setattr(encoder, "language_model", torch.nn.Linear(1, 1)), "is a Linear, not a Ministral3"),
        (lambda encoder: setattr(encoder.language_model.config, "sliding_window", 8), "slides over 8 tokens"),
        (lambda encoder: encoder.language_model.config.rope_parameters.update(rope_type="longrope"), "the length"),
        (lambda encoder: setattr(encoder.language_model, "forward", lambda: None), "was replaced already"),
        (lambda encoder: setattr(encoder.language_model.layers[0], "_hf_hook", object()), "layer by layer"),
    ],
)
def test_a_text_encoder_it_does_not_know_is_left_to_stock_with_the_reason(ernie, change, reason):
    change(ernie.text_encoder)
    before = vars(ernie.text_encoder.language_model).get("forward")
    (step,) = ernie_accel.plan(ernie, RewriteTextEncoder()).steps
    assert step.verdict == "nothing to do"
    assert reason in step.preview.note
    ernie_accel.optimize(ernie, RewriteTextEncoder())
    assert vars(ernie.text_encoder.language_model).get("forward") is before


def test_other_pipes_have_nothing_to_do(flux, ernie):
    ernie.text_encoder = None
    for pipe in (flux, ernie):
        (step,) = ernie_accel.plan(pipe, RewriteTextEncoder(), context=H200).steps
        assert step.verdict == "nothing to do"
        assert "has no text encoder that is known here" in step.preview.note
        assert step.planned is None


@pytest.mark.parametrize(
    ("mode", "verdict"), [("sequential", "nothing to do"), ("group", "nothing to do"), ("model", "apply")]
)
def test_a_plan_knows_that_the_weights_will_come_layer_by_layer(ernie, mode, verdict):
    plan = ernie_accel.plan(ernie, RewriteTextEncoder(), Offload(mode), context=H200)
    assert (plan.steps[-1].transform, plan.steps[-1].verdict) == (RewriteTextEncoder(), verdict)


def test_the_first_call_captures_on_cuda_only(ernie):
    def captures(transform, context):
        return "text-encoder" in after(context, ernie, transform).planned(ernie).on_first_call

    assert captures(RewriteTextEncoder(), H200)
    assert not captures(RewriteTextEncoder(max_tokens=0), H200)
    assert not captures(RewriteTextEncoder(), Context.named("cpu"))
    ernie_accel.optimize(ernie, RewriteTextEncoder(), context=H200)
    assert RewriteTextEncoder().preview(ernie, H200).note == "the text encoder's forward is rewritten already"
    assert "text-encoder" in H200.planned(ernie).on_first_call


@pytest.mark.parametrize("settings", [{"max_tokens": -1}, {"keep": 0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="max_tokens must be >= 0 and keep >= 1, got"):
        RewriteTextEncoder(**settings)


def test_restore_gives_the_forward_back_and_a_pipe_can_be_copied(ernie):
    want = ernie.encode_prompt(PROMPTS, CPU)
    ernie_accel.optimize(ernie, RewriteTextEncoder())
    mine = ernie.encode_prompt(PROMPTS, CPU)
    copied = copy.deepcopy(ernie)
    model, seen = copied.text_encoder.language_model, counting_behind(copied)
    ernie_accel.restore(ernie)
    assert "forward" not in vars(ernie.text_encoder.language_model)
    assert all(torch.equal(a, b) for a, b in zip(ernie.encode_prompt(PROMPTS, CPU), want, strict=True))
    for parameter in ernie.text_encoder.parameters():
        parameter.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(copied.encode_prompt(PROMPTS, CPU), mine, strict=True))
    assert seen == []
    with torch.enable_grad():  # stock's forward, of the copy's own weights
        assert model(input_ids=torch.tensor([[4, 5]])).last_hidden_state.abs().max() > 0


def test_weights_that_are_freed_after_use_come_back(ernie):
    ernie_accel.optimize(ernie, RewriteTextEncoder())
    want = picture(ernie)
    ernie_accel.optimize(ernie, FreeAfterUse(), RewriteTextEncoder())
    for _ in range(2):
        assert torch.equal(picture(ernie), want)
        assert ernie.text_encoder.language_model.norm.weight.numel() == 0


@pytest.mark.parametrize("freed_by", ["FreeAfterUse", "a batch"])
def test_graphs_go_with_the_weights_that_are_freed(ernie, freed_by):
    recorder = Recorder()
    rewritten(ernie.text_encoder.language_model, capture=recorder)
    if freed_by == "FreeAfterUse":
        ernie_accel.optimize(ernie, FreeAfterUse())
    stage = PromptStage(ernie, free=freed_by == "a batch")
    forward = ernie.text_encoder.language_model.forward
    ernie.encode_prompt(PROMPTS[:1] * 2, CPU)
    assert (recorder.captures, len(forward._graphs.names)) == (1, 1)
    if freed_by == "FreeAfterUse":
        picture(ernie, prompt=PROMPTS[0])
    else:
        stage.free()
    assert (recorder.captures, len(forward._graphs.names), len(forward._graphs)) == (1, 0, 0)


# With `BatchPromptEncoding`, which skips the last layer --------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("first_undone", [0, 1])
def test_the_skipped_layer_is_skipped_here_in_both_orders_and_runs_again_when_it_is_undone(order, first_undone):
    pipe, cpu = tiny_ernie(), Context.named("cpu")
    model = pipe.text_encoder.language_model
    given = {"input_ids": ids(), "output_hidden_states": True}

    def hidden():
        with torch.no_grad():
            return pipe.text_encoder(**given).hidden_states

    def is_near(mine, want):
        assert max(rel(a, b) for a, b in zip(mine, want, strict=True)) < 2e-6
        return True

    all_run = hidden()
    skipping = BatchPromptEncoding().apply(pipe, cpu)
    last_skipped = hidden()
    skipping.undo()
    assert rel(last_skipped[-1], all_run[-1]) > 1e-3

    applied = {}
    for transform in [RewriteTextEncoder(), BatchPromptEncoding()][::order]:
        applied[type(transform)] = transform.apply(pipe, cpu)
    assert vars(model.layers[-1])["forward"] is pass_on
    seen = counting_behind(pipe)
    assert is_near(hidden(), last_skipped)
    assert seen == []
    undone = [RewriteTextEncoder, BatchPromptEncoding][first_undone]
    applied.pop(undone).undo()
    if undone is BatchPromptEncoding:
        assert is_near(hidden(), all_run)
        assert seen == []
    else:
        assert all(torch.equal(a, b) for a, b in zip(hidden(), last_skipped, strict=True))
    for receipt in applied.values():
        receipt.undo()
    assert all(torch.equal(a, b) for a, b in zip(hidden(), all_run, strict=True))
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.layers[-1])


# Graphs: a stand-in records calls; tests/gpu has the real ones -------------------------------------------------------


def encode(model, *args, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids(*args, **kwargs), output_hidden_states=True).hidden_states


def is_stock(model, mine, *args, **kwargs):
    want = stock(model, input_ids=ids(*args, **kwargs), output_hidden_states=True).hidden_states
    assert [a.shape for a in mine] == [b.shape for b in want]
    return max(rel(a, b) for a, b in zip(mine, want, strict=True)) < 2e-6


def test_the_first_forward_runs_the_second_is_captured_and_lengths_share_a_graph():
    model, recorder = language_model(), Recorder()
    rewritten(model, capture=recorder)
    done = []
    for seed, (rows, tokens) in enumerate([(2, 7), (2, 7), (2, 64), (2, 1), (2, 65), (1, 7), (2, 7)]):
        mine = encode(model, rows, tokens, seed=seed)
        assert is_stock(model, mine, rows, tokens, seed=seed)
        done.append((recorder.captures, recorder.replays))
    assert done == [(0, 0), (1, 1), (1, 2), (1, 3), (1, 3), (1, 3), (1, 4)]


def test_the_first_forward_gives_the_bits_of_the_later_ones_and_results_are_the_callers():
    model, recorder = language_model(torch.bfloat16), Recorder()
    rewritten(model, capture=recorder)
    first, second = encode(model, seed=1), encode(model, seed=1)
    before = [state.clone() for state in second]
    other = encode(model, seed=2)
    assert recorder.replays == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, second, strict=True))
    assert not torch.equal(other[-1], second[-1])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids(seed=1)).last_hidden_state, first[-1])


def test_what_a_longer_text_left_in_the_padding_is_never_seen():
    model, recorder = language_model(), Recorder()
    rewritten(model, capture=recorder)
    with torch.no_grad():
        for _ in range(2):
            model(inputs_embeds=torch.full((2, 64, 64), float("nan")))
    assert is_stock(model, encode(model, 2, 7), 2, 7)
    assert recorder.replays == 2


def test_only_short_forwards_are_captured_and_only_the_last_shapes_are_kept():
    model, recorder = language_model(), Recorder()
    mine, seen = rewritten(model, max_tokens=128, keep=2, capture=recorder)
    for rows, tokens in [(1, 129), (3, 7), (2, 65)] * 3:
        assert is_stock(model, encode(model, rows, tokens), rows, tokens)
    assert (recorder.captures, len(mine._graphs.names)) == (0, 0)
    for rows, tokens in [(1, 7), (2, 7), (1, 80)] * 3:  # each is gone when it comes again
        encode(model, rows, tokens)
    assert (recorder.captures, len(mine._graphs.names)) == (0, 2)
    for rows, tokens in [(1, 7), (1, 80)] * 3:
        encode(model, rows, tokens)
    assert (recorder.captures, recorder.replays) == (2, 5)
    assert len(mine._graphs) == 2
    for rows, tokens in [(1, 80), (2, 7), (1, 80)]:  # the least recently used goes, that of 1 x 7
        encode(model, rows, tokens)
    assert (recorder.captures, recorder.replays) == (2, 7)
    assert seen == []


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.float64),
        lambda model: setattr(model.layers[1].mlp.up_proj.weight, "data", torch.randn(128, 64)),
        lambda model: setattr(model.norm, "weight", torch.nn.Parameter(torch.rand(64), requires_grad=False)),
        lambda model: setattr(model.rotary_emb, "inv_freq", model.rotary_emb.inv_freq * 2),
        lambda model: setattr(model.layers[2], "forward", pass_on),
        lambda model: setattr(model.config, "num_hidden_layers", 2),
    ],
)
def test_what_was_captured_of_other_weights_is_not_replayed(change):
    model, recorder = language_model(), Recorder()
    rewritten(model, capture=recorder)
    for _ in range(2):
        encode(model)
    old = encode(model)
    assert (recorder.captures, recorder.replays) == (1, 2)
    change(model)
    for _ in range(2):
        mine = encode(model)
        assert is_stock(model, mine)
        assert rel(mine[-1], old[-1]) > 1e-9
    assert (recorder.captures, recorder.replays) == (2, 3)


def test_graphs_made_in_inference_mode_serve_calls_outside_of_it():
    model, recorder = language_model(), Recorder()
    mine, _ = rewritten(model, capture=recorder)
    with torch.inference_mode():
        for _ in range(2):
            encode(model)
    assert is_stock(model, encode(model))
    assert not any(static.is_inference() for static in [entry.inputs for entry in mine._graphs._entries.values()])
    assert (recorder.captures, recorder.replays) == (1, 2)


def test_a_copy_leaves_the_graphs_behind():
    model, recorder = language_model(), Recorder()
    model.forward = RewrittenForward(model, 1024, 4, recorder)
    for _ in range(2):
        encode(model)
    copied = copy.deepcopy(model)
    assert not copied.forward._graphs.names
    assert is_stock(copied, encode(copied))
    assert recorder.replays == 1


def test_work_that_failed_counts_as_not_done(monkeypatch):
    model, recorder = language_model(), Recorder()
    rewritten(model, capture=recorder)
    for expected in ((0, 0), (1, 1)):
        with monkeypatch.context() as broken:
            broken.setattr("ernie_accel.models.language.text_encoder.signed", None)
            with pytest.raises(TypeError, match="not callable"):
                encode(model)
        assert is_stock(model, encode(model))
        assert recorder.replays == expected[1]
