"""An undo looks before it writes: what was moved, wrapped or replaced since, and what would be lost."""

from __future__ import annotations

import warnings
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn

from ernie_accel import RestoreWarning, Undo
from ernie_accel.core.components import Weight
from ernie_accel.core.stand_in import StandInForward
from ernie_accel.core.undo import HookedMethod, recorded


class Doubled:
    """Stands in for a forward."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, x):
        return 2 * self.forward(x)


class Wrapper(nn.Module):
    """What PEFT makes of a layer: another module in its place, with the layer as a child."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x) + 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


@pytest.fixture(autouse=True)
def no_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestoreWarning)
        yield


def test_an_attribute_that_a_script_set_since_is_left_to_it(model):
    with Undo() as undo:
        undo.setattr(model, "mode", "ours")
    assert undo.is_in_place()
    model.mode = "theirs"
    assert not undo.is_in_place()
    with pytest.warns(RestoreWarning, match=r"Sequential\.mode as it is: it is now 'theirs'"):
        undo()
    assert model.mode == "theirs"


def test_an_attribute_that_a_script_put_back_or_deleted_is_no_news(model):
    with Undo() as undo:
        undo.setattr(model, "mode", "ours")
    del model.mode
    undo()
    assert "mode" not in vars(model)


def test_what_a_later_transform_replaced_is_still_in_place_beneath_it(model):
    with Undo() as first:
        first.setattr(model, "mode", "first")
    with Undo() as second:
        second.setattr(model, "mode", "second")
    assert not first.is_in_place()
    assert first.is_in_place(second.replaced)
    second()
    first()
    assert "mode" not in vars(model)


def test_another_place_or_value_that_a_later_transform_replaced_covers_nothing(model):
    with Undo() as first:
        first.setattr(model, "mode", "first")
    model.mode = "theirs"
    with Undo() as second:
        second.setattr(model[0], "mode", "second")
        second.setattr(model, "mode", "second")
    assert not first.is_in_place([second])


@pytest.mark.parametrize("theirs", ["absent", "original", "equal"])
def test_a_script_that_left_nothing_to_lose_is_not_warned(theirs):
    owner = SimpleNamespace(shift="original")
    with Undo() as undo:
        undo.setattr(owner, "shift", float("3.25"))
    if theirs == "absent":
        del owner.shift
    else:
        owner.shift = "original" if theirs == "original" else float("3.25")  # another object
    undo()
    assert vars(owner) == ({} if theirs == "absent" else {"shift": "original"})


def test_a_value_of_another_type_is_another_value():
    owner = SimpleNamespace(flag=None)
    with Undo() as undo:
        undo.setattr(owner, "flag", True)
    owner.flag = 1
    with pytest.warns(RestoreWarning, match="is now 1"):
        undo()
    assert owner.flag is not True and owner.flag == 1


class InterruptedOnce:
    """Sets an attribute, and is interrupted right after that."""

    def __setattr__(self, name, value):
        first = not vars(self)
        object.__setattr__(self, name, value)
        if first:
            raise KeyboardInterrupt


def test_an_interrupt_right_after_the_change_finds_the_way_back():
    owner, undo = InterruptedOnce(), Undo()
    with pytest.raises(KeyboardInterrupt), undo:
        undo.setattr(owner, "mode", "ours")
    assert vars(owner) == {}


class WithDefault:
    mode = "of the class"


def test_an_attribute_of_the_class_shows_again_and_nothing_of_it_stays_on_the_instance():
    owner = WithDefault()
    with Undo() as undo:
        undo.setattr(owner, "mode", "ours")
    undo()
    assert (owner.mode, vars(owner)) == ("of the class", {})


def test_what_nobody_set_in_the_end_needs_no_way_back():
    owner = WithDefault()
    with Undo() as undo:
        undo.restore_attribute(owner, "mode")
    undo()
    assert vars(owner) == {}


def test_what_somebody_else_set_is_deleted_again():
    owner = WithDefault()
    with Undo() as undo:
        undo.restore_attribute(owner, "mode")
        owner.mode = "theirs"
    undo()
    assert vars(owner) == {}


def test_a_submodule_that_was_set_as_an_attribute_comes_back(model):
    """torch keeps it outside of the instance's ``__dict__``."""
    model.head = head = nn.Linear(3, 3)
    with Undo() as undo:
        undo.setattr(model, "head", nn.Identity())
    assert model.head is not head
    undo()
    assert model.head is head


def test_data_of_a_module_that_holds_none_by_then_gets_its_dtype_back(model):
    weight = Weight("0.weight", model[0], "weight")
    with Undo() as undo:
        undo.set_data(weight, model[0].weight.data.bfloat16())
    model.to("meta")
    undo()
    assert (model[0].weight.device.type, model[0].weight.dtype) == ("meta", torch.float32)


@pytest.mark.parametrize("kwargs", [False, True])
def test_a_hook_leaves_nothing_behind(model, kwargs):
    calls = []
    with Undo() as undo:
        undo.hook_before_forward(model, lambda module, args, *named: calls.append(len(named)), kwargs=kwargs)
    model(torch.ones(1, 3))
    assert calls == [kwargs]
    undo()
    model(torch.ones(1, 3))
    assert calls == [kwargs]
    assert (dict(model._forward_pre_hooks), dict(model._forward_pre_hooks_with_kwargs)) == ({}, {})


class Guided(nn.Linear):
    """Calls its forward itself, which runs no hooks, as transformers of NewBie-image's authors do."""

    def forward_with_cfg(self, x):
        return self.forward(x)


def test_a_hook_before_a_method_goes_though_a_script_has_put_another_on_top():
    model, calls = Guided(3, 3), []
    with Undo() as undo:
        undo.hook_before_forward(model, lambda *given: calls.append(len(given)))
    below = model.forward_with_cfg
    own = model.forward_with_cfg = lambda x: below(x)
    model.forward_with_cfg(torch.ones(1, 3))
    assert calls == [2]
    undo()
    assert model.forward_with_cfg is own
    model.forward_with_cfg(torch.ones(1, 3))
    assert calls == [2]


def test_a_hook_before_a_method_goes_if_an_interrupt_comes_once_it_is_there(monkeypatch):
    model, calls, add = Guided(3, 3), [], HookedMethod.add

    def interrupted(method, hook):
        add(method, hook)
        raise KeyboardInterrupt

    monkeypatch.setattr(HookedMethod, "add", interrupted)
    with pytest.raises(KeyboardInterrupt), Undo() as undo:
        undo.hook_before_forward(model, lambda *given: calls.append(len(given)))
    assert "forward_with_cfg" not in vars(model)
    model.forward_with_cfg(torch.ones(1, 3))
    model(torch.ones(1, 3))
    assert calls == []


def hook_of_accelerate(model, calls):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    add_hook_to_module(model, Counting())
    return lambda: remove_hook_from_module(model)


def hook_of_diffusers(model, calls):
    from diffusers.hooks import HookRegistry, ModelHook

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(Counting(), "counting")
    return lambda: registry.remove_hook("counting")


def forward_of_diffusers(model, calls):
    """A hook that runs in the place of the forward, which it keeps elsewhere."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Counting(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            calls.append(1)
            return self.fn_ref.original_forward(*args, **kwargs)

    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(Counting(), "counting")
    return lambda: registry.remove_hook("counting")


@pytest.mark.parametrize("attach", [hook_of_accelerate, hook_of_diffusers, forward_of_diffusers])
def test_a_forward_below_a_hook_is_undone_there(model, attach):
    x = torch.ones(1, 3)
    stock = model(x)
    with Undo() as undo:
        undo.setattr(model, "forward", Doubled(model.forward))
    calls = []
    detach = attach(model, calls)
    assert undo.is_in_place()
    assert torch.equal(model(x), 2 * stock)
    undo()
    assert torch.equal(model(x), stock)
    assert len(calls) == 2, "the hook of the script stays"
    detach()
    assert torch.equal(model(x), stock)
    assert len(calls) == 2


@pytest.mark.parametrize("attach", [hook_of_accelerate, hook_of_diffusers])
def test_of_two_forwards_below_a_hook_the_second_gives_way_to_the_first(model, attach):
    x = torch.ones(1, 3)
    stock = model(x)
    first, second = Undo(), Undo()
    first.setattr(model, "forward", Doubled(model.forward))
    second.setattr(model, "forward", Doubled(model.forward))
    attach(model, [])
    assert torch.equal(model(x), 4 * stock)
    second()
    assert torch.equal(model(x), 2 * stock)
    first()
    assert torch.equal(model(x), stock)


def test_a_module_that_a_script_put_back_is_no_news(model):
    stock, new = model[0], nn.Linear(3, 3)
    with Undo() as undo:
        undo.put_module(model, "0", new, lambda placed: stock)
    model[0] = stock
    undo()
    assert model[0] is stock


def test_only_what_is_made_meanwhile_is_recorded_in_its_order():
    journal = []
    two = recorded(journal, lambda: (Undo(), Undo()))
    after = Undo()
    assert journal == list(two)
    assert after not in journal


def test_a_module_is_put_back_where_it_is_by_then(model):
    stock, new = model[0], nn.Linear(3, 3)
    with Undo() as undo:
        undo.put_module(model, "0", new, lambda placed: stock)
    model[0] = Wrapper(new)
    assert undo.is_in_place()
    undo()
    assert isinstance(model[0], Wrapper)
    assert model[0].base_layer is stock


def test_a_module_is_put_back_although_what_it_was_put_into_is_gone(model):
    model[0] = Wrapper(model[0])
    stock, new = model[0].base_layer, nn.Linear(3, 3)
    with Undo() as undo:
        undo.put_module(model, "0.base_layer", new, lambda placed: stock)
    model[0] = new  # what unloading a LoRA does
    undo()
    assert model[0] is stock


def test_a_module_that_was_replaced_is_left(model):
    stock, new, theirs = model[0], nn.Linear(3, 3), nn.Identity()
    with Undo() as undo:
        undo.put_module(model, "0", new, lambda placed: stock)
    model[0] = theirs
    assert not undo.is_in_place()
    with pytest.warns(RestoreWarning, match=r"Sequential\.0 as it is"):
        undo()
    assert model[0] is theirs


def test_data_comes_back_bit_for_bit_through_other_dtypes(model):
    weight = Weight("0.weight", model[0], "weight")
    model[0].weight.data[0, 0] = float("nan")
    before = model[0].weight.data.clone()
    with Undo() as undo:
        undo.set_data(weight, model[0].weight.data.bfloat16(), keep_on="cpu")
    model.to(torch.float16).to(torch.bfloat16)
    undo()
    assert torch.equal(model[0].weight.data.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_data_that_a_script_has_cast_since_keeps_that_dtype_and_comes_from_the_original(model, given):
    before = model[0].weight.data.clone()
    with Undo() as undo:
        undo.set_data(Weight("0.weight", model[0], "weight"), before.to(given, copy=True))
    model.to(torch.float16)
    undo()
    assert torch.equal(model[0].weight.data, before.half())


def test_values_that_were_changed_since_stay_in_the_old_dtype_and_layout(model):
    weight = Weight("0.weight", model[0], "weight")
    with Undo() as undo:
        undo.set_data(weight, model[0].weight.data.bfloat16(), keep_on="cpu")
    model[0].weight.data += 1  # as fusing a LoRA does
    changed = model[0].weight.data.float()
    with pytest.warns(RestoreWarning, match=r"0\.weight as it is: it got other values"):
        undo()
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight.data, changed)


def test_a_weight_of_another_shape_is_left(model):
    weight = Weight("0.weight", model[0], "weight")
    with Undo() as undo:
        undo.set_data(weight, model[0].weight.data.bfloat16())
    model[0].weight = nn.Parameter(torch.zeros(5, 3))
    with pytest.warns(RestoreWarning, match=r"0\.weight as it is: it was replaced"):
        undo()
    assert model[0].weight.shape == (5, 3)


def test_objections_are_asked_when_they_are_wanted(model):
    undo, problem = Undo(), []
    undo.object_if(lambda: problem[0] if problem else None)
    assert not list(undo.objections())
    problem.append("a LoRA is fused")
    assert list(undo.objections()) == ["a LoRA is fused"]


def test_an_attribute_that_others_set_is_remembered(model):
    with Undo() as undo:
        undo.restore_attribute(model, "_compiled_call_impl")
        model._compiled_call_impl = MethodType(lambda self, x: x, model)
    undo()
    assert model._compiled_call_impl is None


def test_changes_are_taken_back_the_last_one_first():
    """Two changes of one attribute: the first one's old value is the original."""
    owner, undo = SimpleNamespace(value="original"), Undo()
    undo.setattr(owner, "value", "first")
    undo.setattr(owner, "value", "second")
    undo()
    assert owner.value == "original"


def test_what_was_given_up_stays_when_the_block_raises():
    """Part of it can no longer be taken back: taking back the rest would leave a mixture that nobody reports."""
    owner = SimpleNamespace(kept="original", lost="original")
    undo = Undo()

    def change():
        with undo:
            undo.setattr(owner, "kept", "changed")
            undo.give_up("the original is gone")
            owner.lost = "changed"
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        change()
    assert vars(owner) == {"kept": "changed", "lost": "changed"}
    assert undo.no_way_back == "the original is gone"


@pytest.mark.parametrize("attach", [hook_of_accelerate, hook_of_diffusers])
def test_a_stand_in_below_a_hook_is_taken_away_there(model, attach):
    class Twice(StandInForward):
        def __call__(self, x):
            return 2 * self.inner_forward(x)

    x = torch.ones(1, 3)
    stock = model(x)
    with Undo() as undo:
        Twice(model).install(undo)
    attach(model, [])
    assert undo.is_in_place()
    assert torch.equal(model(x), 2 * stock)
    undo()
    assert not undo.is_in_place()
    assert torch.equal(model(x), stock)
