"""How an optimized pipe loads LoRAs, whatever was applied: by all trainers' names, and all of one or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from ernie_accel.core.compiled import seen_through
from ernie_accel.core.components import Pipeline, inside_of
from ernie_accel.core.peft_layers import unchanged_if_it_fails
from ernie_accel.core.stand_in import StandInMethod, method_standing_in, remove_method
from ernie_accel.models.adapters import ChecksAdapters, adapter_problems_of, refusal
from ernie_accel.models.lora_keys import ReadsForeignKeys
from ernie_accel.models.rewritten import rewritten_model

_READS = "lora_state_dict"
_LOADS = "load_lora_into_"


class ChecksLoading(StandInMethod):
    """`load_lora_into_transformer` and the like of a pipe, which refuse a LoRA that does not match the component.

    A component that checks adapters itself, as quantized and rewritten ones do, is left to its own method.
    """

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Load a LoRA into a component.

        Raises:
            ErnieAccelError: Some of its tensors match no layer; nothing was changed.
        """
        given = inspect.signature(self._inner()).bind(*args, **kwargs).arguments
        component = self.name.removeprefix(_LOADS)
        model, weights = given.get(component), given.get("state_dict")
        if not isinstance(model, nn.Module) or not isinstance(weights, Mapping):
            return self.call_inner(*args, **kwargs)
        model = inside_of(model)
        if method_standing_in(model, "load_lora_adapter", ChecksAdapters) is not None:
            return self.call_inner(*args, **kwargs)
        prefix = given.get("prefix", component)
        problems = adapter_problems_of(model, weights, prefix, given.get("_pipeline"), on_kernels=False)
        if problems:
            raise refusal(f"{type(self.owner).__name__}.load_lora_weights", problems)
        with unchanged_if_it_fails(model):
            return self.call_inner(*args, **kwargs)


def read_loras(pipe: Pipeline) -> None:
    """Let a pipe load LoRAs as every optimized one does, in place; a no-op if it does, or if it loads none.

    Trainers' names are read for the families that can be rewritten; diffusers has converters of its own for others.
    """
    if not hasattr(pipe, "load_lora_weights"):
        return
    if hasattr(pipe, _READS) and rewritten_model(seen_through(pipe)) is not None:
        _stand_in(pipe, _READS, ReadsForeignKeys)
    for name in _loading(pipe):
        _stand_in(pipe, name, ChecksLoading)


def stop_reading_loras(pipe: Pipeline) -> None:
    """Undo `read_loras`, in place; a no-op if there is nothing to undo."""
    remove_method(pipe, _READS, ReadsForeignKeys)
    for name in _loading(pipe):
        remove_method(pipe, name, ChecksLoading)


def reads_loras(name: str, value: object) -> bool:
    """Return whether an attribute of a pipe is what `read_loras` has put there."""
    return (name == _READS or name.startswith(_LOADS)) and isinstance(value, (ReadsForeignKeys, ChecksLoading))


def _stand_in(pipe: Pipeline, name: str, kind: type[StandInMethod]) -> None:
    if method_standing_in(pipe, name, kind) is None:
        setattr(pipe, name, kind(pipe, name))


def _loading(pipe: Pipeline) -> list[str]:
    """Return the methods by which a pipe loads LoRAs into its components, but for those of transformers' own models."""
    components: tuple[str, ...] = getattr(pipe, "_lora_loadable_modules", ())
    names = (f"{_LOADS}{component}" for component in components if not component.startswith("text_encoder"))
    return [name for name in names if hasattr(pipe, name)]
