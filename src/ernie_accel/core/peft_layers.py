"""PEFT's layers in a model: what of them a product beside a weight can add, and how a failed load is taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ernie_accel.common.language import said

#: Ways for an adapter to start that read no weights.
_PLAIN_STARTS = (True, False, "gaussian")


def config_problems(config: object) -> list[str]:
    """Return what an adapter of this configuration has beyond plain LoRA; empty if nothing."""
    kind = type(config).__name__
    if kind != "LoraConfig":
        return [f"it is a {kind}, and the kernels add LoRAs only"]
    problems = []
    if getattr(config, "use_dora", False):
        problems.append("it is a DoRA, which scales by the norm of the weight that the kernels have not")
    if getattr(config, "lora_bias", False) or getattr(config, "bias", "none") != "none":
        problems.append("it has a bias, which the kernels do not add")
    start = getattr(config, "init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        problems.append(f"it starts from the weights ({start!r}), which the kernels do not have")
    return problems


def layer_problem(layer: Any) -> str | None:
    """Return what a layer of PEFT's has beyond plain LoRAs, which a product beside the weight leaves out; or None."""
    if type(layer).__module__ != "peft.tuners.lora.layer":
        return said(
            "it has a {layer} of {module}, and the kernels add LoRAs only",
            layer=type(layer).__name__,
            module=type(layer).__module__,
        )
    if vars(layer).get("lora_variant"):
        return said("it has a variant of LoRA, such as DoRA, and the kernels add plain ones only")
    if any(up.bias is not None for up in layer._modules["lora_B"]._modules.values()):
        return said("it has a LoRA with a bias, which the kernels do not add")
    return None


@contextlib.contextmanager
def unchanged_if_it_fails(model: nn.Module) -> Iterator[None]:
    """Give `model` back the modules, PEFT's settings and the flags that it had, if the with-block raises.

    Diffusers deletes an adapter whose loading failed, but leaves PEFT's layers around those of the model. Tensors
    are not copied: only what holds them is remembered.
    """
    modules = list(model.modules())
    children = [(module, dict(module._modules)) for module in modules]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    settings = [(model, _settings_of(model, of_model=True))]
    settings += [(module, _settings_of(module)) for module in modules if "base_layer" in module._modules]
    try:
        yield
    except BaseException:
        for module, held in children:
            if module._modules != held:
                vars(module)["_modules"] = type(module._modules)(held)
        for module, kept in settings:
            for name in _settings_of(module, of_model=module is model).keys() - kept.keys():
                delattr(module, name)
            vars(module).update(kept)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


#: What PEFT and diffusers keep on a model, and what PEFT keeps on its layers under names that look private.
_OF_MODEL = frozenset({"peft_config", "_hf_peft_config_loaded"})
_OF_LAYER = frozenset({"_active_adapter", "_disable_adapters"})


def _settings_of(module: nn.Module, *, of_model: bool = False) -> dict[str, object]:
    """Return what a layer of PEFT's, or the model, knows of adapters; dicts and lists as copies."""
    found: dict[str, object] = {}
    for name, value in vars(module).items():
        is_plain = not name.startswith("_") and isinstance(value, (dict, list, bool, str))
        if name in _OF_MODEL if of_model else is_plain or name in _OF_LAYER:
            found[name] = value.copy() if isinstance(value, (dict, list)) else value
    return found
