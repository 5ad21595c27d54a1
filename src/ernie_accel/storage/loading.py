"""Load the pipeline that a command names: a local folder, a hub id, or the embedded model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from ernie_accel.common.collecting import without_collecting
from ernie_accel.common.packages import packages_looked_up_once
from ernie_accel.core.components import CallablePipeline
from ernie_accel.core.context import NOT_SUPPORTED_YET
from ernie_accel.core.dtypes import ALIASES, DTYPES, dtype_argument, dtype_name
from ernie_accel.core.errors import ErnieAccelError, SavedPipelineError, UnknownNameError
from ernie_accel.core.hardware import is_other_vendors
from ernie_accel.core.outputs import require_pictures
from ernie_accel.embedded import MODEL_FOLDER
from ernie_accel.families import family_of
from ernie_accel.storage.assembly import assemble, reading
from ernie_accel.storage.folders import current
from ernie_accel.storage.manifest import INDEX, MANIFEST, WEIGHTS, open_manifest
from ernie_accel.storage.reading import empty_model, load
from ernie_accel.storage.single_file.tensor_files import open_tensors
from ernie_accel.storage.single_file.transformer import fill_from_file
from ernie_accel.storage.vetting import Index, vet, vet_index

DEVICES = ("auto", "cpu", "cuda", "npu")
#: Files of a component that are fetched: settings, vocabularies, safetensors weights; no copies in other precisions.
_FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken")
_TRANSFORMER = "transformer"
_NOT_FETCHED = ("*.fp16.*", "*.bf16.*", "*.non_ema.*", "*/openvino_*", "*/flax_*")


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that `load_pipeline` does not know.

    Raises:
        UnknownNameError: It is none of the names, nor "auto".
    """
    if dtype not in ("auto", *DTYPES, *ALIASES):
        raise UnknownNameError("dtype", dtype, ("auto", *DTYPES, *ALIASES))


def load_pipeline(
    model: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    *,
    prompt_enhancer: bool = True,
    pictures: bool = False,
    on_host: bool = False,
    transformer: str | os.PathLike[str] | None = None,
) -> CallablePipeline:
    """Load a diffusers pipeline onto a device; nothing that comes with it is run, and weights are safetensors only.

    Args:
        model: A folder that `save_pretrained` or `ernie_accel.save` wrote, or a hub id; None for the embedded model.
        dtype: "float32", "bfloat16" or "float16" (also "fp32", "bf16", "fp16"); "auto" is bfloat16 on an accelerator
            and float32 on the CPU. What `ernie_accel.save` wrote keeps its own.
        device: "cpu", "cuda" or "npu"; "auto" is CUDA where there is one.
        prompt_enhancer: Keep the pipeline's prompt enhancer, if it has one; without it the device has its memory free.
        on_host: Leave the weights on the host, of the dtype that suits the device, for `optimize` to bring there. What
            `ernie_accel.save` wrote goes to the device, because its layers are made for that.
        pictures: Refuse, before anything large is fetched or loaded, a pipeline that makes something else.
        transformer: A single file with the transformer's weights, as ComfyUI keeps them; `model` gives all else.

    Raises:
        UnknownNameError: `dtype` or `device` is unknown.
        SavedPipelineError: The folder is damaged, or holds or names more than data.
        ErnieAccelError: There is no such model, or it is no pipeline, or it has another dtype of its own.
    """
    check_dtype(dtype)
    if device not in DEVICES:
        suggestion = "" if is_other_vendors(device) else None
        raise UnknownNameError("device", device, DEVICES, note=NOT_SUPPORTED_YET, suggestion=suggestion)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    single = None if transformer is None else Path(transformer)
    if single is not None:
        open_tensors(single).close()  # before anything large is fetched
    if model is not None and was_saved_here(model):
        refuse_transformer(model, single)
        if dtype != "auto":
            raise ErnieAccelError(
                f"{model} was written by ernie_accel.save and keeps its dtypes; found dtype={dtype!r}"
            )
        if pictures:
            check_makes_pictures(model)
        saved = load(model, device=device)
        return saved if prompt_enhancer else drop_enhancer(saved)
    name = dtype_name(dtype) if dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
    pipe = _from_anywhere(model, DTYPES[name], pictures, single)
    pipe = pipe if prompt_enhancer else drop_enhancer(pipe)
    # What `optimize` brings nowhere, as to an AMD GPU, goes there now.
    return pipe if on_host and torch.version.hip is None else pipe.to(device)


def refuse_transformer(model: str | os.PathLike[str], transformer: Path | None) -> None:
    """Refuse a file of the transformer's weights beside a folder that `save` wrote.

    Raises:
        ErnieAccelError: One was given.
    """
    if transformer is not None:
        raise ErnieAccelError(
            f"{os.fspath(model)} was written by ernie_accel.save, which keeps its own transformer; found "
            f"transformer={str(transformer)!r}: give it with a folder of diffusers, or a hub id"
        )


def was_saved_here(model: str | os.PathLike[str]) -> bool:
    """Return whether `ernie_accel.save` wrote this folder."""
    return (current(Path(model)) / MANIFEST).is_file()


def check_makes_pictures(model: str | os.PathLike[str]) -> None:
    """Refuse a folder that `save` wrote of a pipeline that makes something else than pictures; nothing is loaded.

    Raises:
        ErnieAccelError: It does.
        SavedPipelineError: The folder is damaged.
    """
    require_pictures(vet_index(current(Path(model))).pipeline_class)


def saved_name(model: str | os.PathLike[str]) -> str:
    """Return a name for what `save` wrote into a folder, which changes when something else is saved there.

    Raises:
        SavedPipelineError: Its manifest cannot be read.
    """
    return f"as saved ({open_manifest(current(Path(model))).digest[:12]})"


def drop_enhancer(pipe: CallablePipeline) -> CallablePipeline:
    """Take the prompt enhancer from a pipeline that has one, and return the pipeline."""
    how = family_of(pipe).prompt_enhancement
    if how is not None:
        pipe.register_modules(**{how.model: None, how.tokenizer: None})
    return pipe


def _from_anywhere(model: str | None, dtype: torch.dtype, pictures: bool, single: Path | None) -> CallablePipeline:
    if model is None and single is not None:
        model = str(MODEL_FOLDER)
    if model is None:
        from ernie_accel.storage.embedded import load_embedded

        embedded: CallablePipeline = load_embedded(dtype)
        return embedded
    folder = Path(model)
    if folder.is_dir() and not (folder / INDEX).is_file():
        raise ErnieAccelError(f"{model} holds no pipeline: there is no {INDEX}, as save_pretrained writes it")
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            raise ErnieAccelError(f"there is no folder {model!r}, and it is not a hub id either (owner/name)")
        folder = _fetch(model, pictures, without_transformer=single is not None)
    elif pictures:
        require_pictures(vet_index(folder).pipeline_class)
    return _load_plain(folder, dtype, single)


def _fetch(model: str, pictures: bool, without_transformer: bool = False) -> Path:
    """Return the folder of a hub id in the hub's cache, fetched if it is not there: its index first, then its parts.

    Without the transformer, only its configuration is fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, allow_patterns=[INDEX]))
        if not (folder / INDEX).is_file():
            raise ErnieAccelError(f"cannot load {model!r}: there is no {INDEX}, so it is not a pipeline")
        index = vet_index(folder)
        if pictures:
            require_pictures(index.pipeline_class)
        parts = [name for name, cls in index.parts.items() if cls is not None]
        patterns = {name: ("*.json",) if without_transformer and name == _TRANSFORMER else _FETCHED for name in parts}
        wanted = [f"{name}/{pattern}" for name in parts for pattern in patterns[name]]
        return Path(snapshot_download(model, allow_patterns=[INDEX, *wanted], ignore_patterns=[*_NOT_FETCHED]))
    except (OSError, ValueError) as error:  # no such repository, no network, nothing in the cache
        raise ErnieAccelError(f"cannot load {model!r}: {error}") from error


@without_collecting()
@packages_looked_up_once()
def _load_plain(folder: Path, dtype: torch.dtype, single: Path | None = None) -> CallablePipeline:
    index = vet(folder)
    filled = None if single is None else _filled(folder, index, single, dtype)

    def model(name: str, cls: type[Any]) -> torch.nn.Module:
        import diffusers

        if filled is not None and name == _TRANSFORMER:
            return filled
        ours = issubclass(cls, diffusers.ModelMixin)
        if ours and (folder / name / WEIGHTS).is_file():  # as `save` names them, and diffusers does not
            raise SavedPipelineError(folder, f"is incomplete: {MANIFEST} is missing")
        wanted = dtype_argument(dtype) if ours else {"dtype": dtype}
        found: torch.nn.Module = cls.from_pretrained(
            str(folder / name), use_safetensors=True, local_files_only=True, **wanted
        )
        return found.eval()

    return assemble(folder, index, model)


def _filled(folder: Path, index: Index, single: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Return the transformer that a folder configures, with the weights of a single file."""
    cls = index.parts.get(_TRANSFORMER)
    if cls is None:
        raise SavedPipelineError(folder, f"has no {_TRANSFORMER}, whose weights are in {single}")
    with reading(folder, _TRANSFORMER):
        model = empty_model(folder / _TRANSFORMER, cls)
    fill_from_file(model, single, dtype)
    return model
