"""The hooks of accelerate and diffusers are found by one function, which knows where both keep them."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, apply_layerwise_casting
from diffusers.hooks import ModelHook as DiffusersHook

import ernie_accel
from ernie_accel.core.components import components_offloaded_by_accelerate, is_moved_in_parts
from ernie_accel.core.library_hooks import ACCELERATE, DIFFUSERS, library_hooks


def model():
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))


def test_a_module_without_hooks_has_none():
    found = library_hooks(model())
    assert (bool(found), found.accelerate, found.diffusers, found.named("layerwise_casting")) == (False, None, None, [])


def test_the_hook_of_accelerate_is_found_until_it_is_removed():
    module, hook = model(), ModelHook()
    add_hook_to_module(module[0], hook)
    assert library_hooks(module[0]) == (hook, None)
    assert library_hooks(module[0])
    assert not library_hooks(module), "hooks of a part are not those of the whole"
    assert is_moved_in_parts(module)
    remove_hook_from_module(module[0])
    assert not library_hooks(module[0])
    assert not is_moved_in_parts(module)


def test_the_hooks_of_diffusers_are_found_by_name():
    module, mine = model(), DiffusersHook()
    apply_layerwise_casting(module[1], storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    HookRegistry.check_if_exists_or_initialize(module[1]).register_hook(mine, "mine")
    found = library_hooks(module[1])
    assert found
    assert found.accelerate is None
    assert found.diffusers is HookRegistry.check_if_exists_or_initialize(module[1])
    (casting,) = found.named("layerwise_casting", "no such hook")
    assert casting.compute_dtype == torch.float32
    assert found.named("mine", "layerwise_casting") == [mine, casting]


def test_a_registry_stays_when_its_hooks_are_gone():
    module = model()
    registry = HookRegistry.check_if_exists_or_initialize(module[0])
    registry.register_hook(DiffusersHook(), "mine")
    registry.remove_hook("mine")
    assert library_hooks(module[0]).diffusers is registry
    assert library_hooks(module[0]).named("mine") == []


def test_components_that_accelerate_moves_are_named(ernie):
    assert components_offloaded_by_accelerate(ernie) == []
    for part in (ernie.vae, ernie.text_encoder):
        add_hook_to_module(part, ModelHook())
    add_hook_to_module(ernie.transformer.layers[0], ModelHook())
    assert sorted(components_offloaded_by_accelerate(ernie)) == ["text_encoder", "vae"]


def test_where_they_are_kept_is_written_in_one_place():
    package = Path(ernie_accel.__file__).parent
    spelled = {
        path.name for path in package.rglob("*.py") for name in (ACCELERATE, DIFFUSERS) if name in path.read_text()
    }
    assert spelled == {"library_hooks.py"}
