"""A pipeline without weights: the true classes and shapes on torch's meta device, for plans that need no more."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from ernie_accel.core.components import CallablePipeline, mark_as_skeleton, weights_of
from ernie_accel.core.errors import ErnieAccelError
from ernie_accel.families.published import Checkpoint, PublishedModel, published
from ernie_accel.storage.manifest import INDEX
from ernie_accel.storage.reading import empty_model
from ernie_accel.storage.vetting import vet

#: Longest prompt of the placeholder tokenizer; that of ERNIE-Image's.
_MAX_TOKENS = 2048


def skeleton(model: str, dtype: torch.dtype = torch.bfloat16) -> CallablePipeline:
    """Return the pipeline of a published checkpoint or a folder without its weights: for `plan`, not for drawing.

    Nothing is downloaded: of a hub id the configuration must be known here (``families/published.py``) or be in the
    hub's cache.

    Args:
        model: A hub id or a folder of a pipeline; its weights need not be there.
        dtype: Of the weights, as they would be loaded.

    Raises:
        ErnieAccelError: It is neither a folder nor a checkpoint known here.
        SavedPipelineError: The folder is no pipeline, or holds or names more than data.
    """
    folder = Path(model)
    if folder.is_dir():
        return _of_folder(folder, dtype)
    checkpoint = published(model)
    if checkpoint is not None:
        return _of_checkpoint(checkpoint, dtype)
    downloaded = cached(model)
    if downloaded is not None:
        return _of_folder(downloaded, dtype)
    from ernie_accel.families.published import CHECKPOINTS

    known = ", ".join(name for each in CHECKPOINTS for name in each.names[:1])
    raise ErnieAccelError(
        f"the configuration of {model!r} is not known here, and it is no folder and not in the hub's cache. Known: "
        f"{known}. Download its configuration first (huggingface-cli download {model} --include '*.json'), or name a "
        "folder."
    )


def cached(model: str) -> Path | None:
    """Return the folder of a hub id in the hub's cache; None if there is none, or no configuration in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    return folder if (folder / INDEX).is_file() else None


def _of_folder(folder: Path, dtype: torch.dtype) -> CallablePipeline:
    index = vet(folder)
    parts: dict[str, object] = dict.fromkeys(getattr(index.pipeline_class, "_optional_components", ()))
    for name, cls in index.parts.items():
        if cls is None or not issubclass(cls, torch.nn.Module):
            parts[name] = None if cls is None else _placeholder(folder / name, cls)
            continue
        parts[name] = _bare(empty_model(folder / name, cls), dtype)
    return _finished(index.pipeline_class(**parts, **index.settings))


def _placeholder(place: Path, cls: type[Any]) -> object:
    if "Scheduler" in cls.__name__:
        return cls.from_pretrained(str(place), local_files_only=True)
    return _tokenizer()


def _of_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype) -> CallablePipeline:
    import diffusers

    parts: dict[str, object] = {name: _bare(_model(model), dtype) for name, model in checkpoint.models.items()}
    parts |= {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "tokenizer": _tokenizer()}
    if "pe" in parts:
        parts["pe_tokenizer"] = _tokenizer()
    pipe = getattr(diffusers, checkpoint.pipeline_class)(**parts)
    pipe.register_to_config(_name_or_path=checkpoint.names[0])
    return _finished(pipe)


def _model(model: PublishedModel) -> torch.nn.Module:
    cls: Any = getattr(importlib.import_module(model.library), model.model_class)
    with torch.device("meta"):
        if model.library == "diffusers":
            made: torch.nn.Module = cls(**model.config)
        else:
            made = cls._from_config(cls.config_class(**model.config))
    return made


def _bare(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for weight in weights_of(module):
        if weight.tensor.is_floating_point():
            weight.tensor.data = weight.tensor.data.to(dtype)
    return module.to("meta").eval().requires_grad_(False)


def _finished(pipe: CallablePipeline) -> CallablePipeline:
    pipe.set_progress_bar_config(disable=True)
    mark_as_skeleton(pipe)
    return pipe


def _tokenizer() -> object:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        model_max_length=_MAX_TOKENS,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
