"""Assemble a pipeline from a vetted folder, without a loader that would do what the folder says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ernie_accel.core.components import CallablePipeline
from ernie_accel.core.errors import ErnieAccelError, SavedPipelineError
from ernie_accel.storage.vetting import Index


def assemble(folder: Path, index: Index, model: Callable[[str, type[object]], torch.nn.Module]) -> CallablePipeline:
    """Return the pipeline of a folder.

    Args:
        folder: The folder that `index` was read from.
        index: Its vetted index.
        model: Returns the model of a component, given its name and class. Schedulers, tokenizers and processors are
            read here.

    Raises:
        SavedPipelineError: A part cannot be made from what the folder holds.
    """
    parts: dict[str, object] = dict.fromkeys(getattr(index.pipeline_class, "_optional_components", ()))
    for name, cls in index.parts.items():
        with reading(folder, name):
            parts[name] = None if cls is None else _part(folder / name, name, cls, model)
    with reading(folder, index.pipeline_class.__name__):
        pipe: CallablePipeline = index.pipeline_class(**parts, **index.settings)
    pipe.register_to_config(_name_or_path=str(folder))
    return pipe


def _part(place: Path, name: str, cls: type[Any], model: Callable[[str, type[object]], torch.nn.Module]) -> object:
    import transformers

    if issubclass(cls, torch.nn.Module):
        return model(name, cls)
    if issubclass(cls, (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)):
        return cls.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
    return cls.from_pretrained(str(place), local_files_only=True)


@contextlib.contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Turn the errors of other libraries about a folder's content into one error that names the folder.

    Raises:
        SavedPipelineError: The body raised an error of another library.
    """
    try:
        yield
    except ErnieAccelError:
        raise
    except Exception as error:  # whatever their constructors make of odd settings; tokenizers raises Exception itself
        why = f"{what} cannot be made from its files: {type(error).__name__}: {error}"
        raise SavedPipelineError(folder, why) from error
