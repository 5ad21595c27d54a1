"""Vet a pipeline's folder, wherever it comes from, before a library reads it: it may hold data and nothing else.

diffusers and transformers were made to load what their user trusts. A few words in a JSON file can make them import a
module, run a script of the folder, fetch code from the hub, or read a file elsewhere; which words do so differs from
release to release. So nothing here relies on their checks: classes are looked up among those that draw pictures, and
every setting that names code, a path or an address is refused with its place.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ernie_accel.core.errors import SavedPipelineError
from ernie_accel.storage.manifest import INDEX, read_json

#: Packages of ``transformers.models`` whose models read prompts and pictures for diffusers' pipelines. Others load
#: further models, indexes or dictionaries by a name in their settings (RAG, timm backbones, morphological analysers).
MODEL_PACKAGES = frozenset(
    re.findall(
        r"\w+",
        """
        altclip bert blip blip_2 byt5 clap clip dinov2 dinov2_with_registers gemma gemma2 gemma3 gemma3n
        gemma4 gemma4_unified glm glm4 glm4v glm_image gpt2 gpt_oss helium hunyuan_v1_dense llama llama4
        llava llava_next ministral ministral3 mistral mistral3 mistral4 mt5 olmo2 phi phi3 pixtral qwen2
        qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_vl qwen3 qwen3_5 qwen3_moe qwen3_vl roberta siglip siglip2
        smollm3 speecht5 t5 t5gemma t5gemma2 umt5 xlm_roberta
        """,
    )
)
#: Packages of ``diffusers.pipelines`` whose classes fetch a model when they are constructed.
_FETCHING_PIPELINES = frozenset({"cosmos"})
#: Allowed attention implementations: others may be separate packages, or are fetched from the hub.
_ATTENTION = frozenset({"eager", "sdpa"})
#: Quantized checkpoints that a plain folder may hold, beside those of `save`.
_QUANTIZATION = frozenset({"bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"})
#: Settings that name code or another place, and what they would do.
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "auto_map": "names code of the checkpoint's own",
        "custom_pipelines": "names code of the checkpoint's own",
        "configuration_files": "names another file",
        "fast_tokenizer_files": "names another file",
        "gguf_file": "names another file",
        "pretrained_cfg": "names a model of timm",
        "use_timm_backbone": "fetches a model of timm",
        "use_pretrained_backbone": "fetches another model",
        "custom_generate": "names code of the checkpoint's own",
        "kernel_config": "fetches code from the hub",
        "use_kernels": "fetches code from the hub",
    }
)
#: Classes that transformers renamed, by the names in older checkpoints.
_RENAMED: Mapping[str, str] = MappingProxyType({"CLIPFeatureExtractor": "CLIPImageProcessor"})
#: Settings that name another place by their own names, and those that libraries write down and never open.
_PLACE = re.compile(r"(^|_)(file|path|dir|folder|url|repo|repo_id|checkpoint)$")
_INERT_PLACES = frozenset(
    {
        "_name_or_path",
        "added_tokens_file",
        "chat_template_file",
        "name_or_path",
        "special_tokens_map_file",
        "tokenizer_config_file",
    }
)
_OWN_CODE = "which is never run here; if you trust it, load the pipe with diffusers and pass it to optimize"


@dataclass(frozen=True)
class Index:
    """What ``model_index.json`` says, vetted.

    Attributes:
        pipeline_class: A pipeline of diffusers.
        parts: Component name -> its class, or None for one that was left out.
        settings: Further arguments of the pipeline, plain values.
    """

    pipeline_class: type[Any]
    parts: Mapping[str, type[object] | None]
    settings: Mapping[str, object]


def vet(folder: Path, known: Iterable[type] = ()) -> Index:
    """Return the index of a folder that holds only data.

    Args:
        folder: Of a pipeline, as ``save_pretrained`` and `save` write them.
        known: Model classes of transformers that may be named beside those in `MODEL_PACKAGES`.

    Raises:
        SavedPipelineError: The folder names code, a class that is no part of a pipeline, or another place.
    """
    check_links(folder)
    packages = MODEL_PACKAGES | {package for cls in known if (package := _model_package(cls)) is not None}
    index = vet_index(folder, packages)
    for name, part in index.parts.items():
        if part is not None:
            _check_part(folder, name, part, packages)
    return index


def vet_index(folder: Path, packages: Iterable[str] = MODEL_PACKAGES) -> Index:
    """Return what ``model_index.json`` of a folder says, with every name in it looked up.

    Raises:
        SavedPipelineError: It names something else than a pipeline of diffusers and its parts.
    """
    data = read_json(folder, INDEX)
    pipeline_class = _pipeline_class(folder, data.get("_class_name"))
    parameters = inspect.signature(pipeline_class.__init__).parameters
    parts: dict[str, type[object] | None] = {}
    settings: dict[str, object] = {}
    for name, value in data.items():
        if name.startswith("_"):
            continue
        if name not in parameters or name == "self" or not name.isidentifier():
            raise SavedPipelineError(folder, f"{INDEX}: a {pipeline_class.__name__} has no part {name!r}")
        if not isinstance(value, list):
            if not isinstance(value, (bool, int, float, str, type(None))):
                raise SavedPipelineError(folder, f"{INDEX}: {name}: expected a plain value, got {value!r}")
            settings[name] = value
            continue
        if len(value) != 2 or not all(of is None or isinstance(of, str) for of in value):
            raise SavedPipelineError(folder, f"{INDEX}: {name}: expected [library, class], got {value!r}")
        library, class_name = value
        parts[name] = None if library is None else _part_class(folder, name, library, class_name, frozenset(packages))
    optional = {*getattr(pipeline_class, "_optional_components", ())}
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in {"self", *parts, *settings, *optional}
    ]
    if missing:
        raise SavedPipelineError(folder, f"{INDEX}: a {pipeline_class.__name__} needs {', '.join(missing)} as well")
    return Index(pipeline_class, MappingProxyType(parts), MappingProxyType(settings))


def _pipeline_class(folder: Path, name: object) -> type[object]:
    import diffusers

    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise SavedPipelineError(
            folder,
            f"needs {name}, which is not a pipeline of the diffusers installed here: upgrade diffusers if a newer one "
            "has it, or load the pipe with the code that it comes with, if you trust that, and pass it to optimize",
        )
    path = found.__module__.split(".")
    if path[:2] != ["diffusers", "pipelines"] or len(path) < 4 or path[2] in _FETCHING_PIPELINES:
        raise SavedPipelineError(folder, f"needs {name}, which is not loaded from folders; load it with diffusers")
    return found


def _part_class(
    folder: Path, name: str, library: str, class_name: str | None, packages: frozenset[str]
) -> type[object]:
    """Return the class of a component: a model, scheduler, tokenizer or processor of diffusers or transformers."""
    import diffusers
    import transformers
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin

    named = f"{INDEX}: {name}: {library}.{class_name}"
    home: object = None
    if library in ("diffusers", "transformers"):
        home = importlib.import_module(library)
    elif library.isidentifier() and library not in _FETCHING_PIPELINES:
        home = getattr(diffusers.pipelines, library, None)
        if not inspect.ismodule(home) or not home.__name__.startswith("diffusers.pipelines."):
            home = None
    if home is None:
        raise SavedPipelineError(folder, f"{named} is not of diffusers or transformers, {_OWN_CODE}")
    current = None if class_name is None else _RENAMED.get(class_name, class_name)
    found = getattr(home, current, None) if current is not None and current.isidentifier() else None
    ours = (diffusers.ModelMixin, diffusers.SchedulerMixin)
    theirs = (
        transformers.PreTrainedModel,
        transformers.PreTrainedTokenizerBase,
        transformers.ProcessorMixin,
        FeatureExtractionMixin,
        ImageProcessingMixin,
    )
    if not isinstance(found, type) or not issubclass(found, (*ours, *theirs)):
        raise SavedPipelineError(folder, f"{named} is no model, scheduler, tokenizer or processor of that library here")
    path = found.__module__.split(".")
    if path[0] == "transformers" and _model_package(found) not in (None, *packages):
        fix = f"if you trust the folder, load(..., known=({class_name},)), or load it with diffusers"
        raise SavedPipelineError(folder, f"{named} is not among the models that pipelines are known to use: {fix}")
    if path[0] not in ("diffusers", "transformers"):
        raise SavedPipelineError(folder, f"{named} is not a class of its own in that library")
    return found


def _model_package(cls: type) -> str | None:
    """Return "clip" of a class from ``transformers.models.clip``, and None of one that belongs to no model."""
    path = cls.__module__.split(".")
    return path[2] if path[:2] == ["transformers", "models"] and len(path) > 2 else None


def check_links(folder: Path) -> None:
    """Refuse links that lead out of the folder. The hub's cache is made of links, to files beside its snapshots.

    Raises:
        SavedPipelineError: There is one.
    """
    inside = [folder.resolve()]
    inside += [parent.parent / "blobs" for parent in inside[0].parents if parent.name == "snapshots"]
    for root, folders, files in os.walk(folder):
        for path in (Path(root) / name for name in (*folders, *files)):
            if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in inside):
                name = path.relative_to(folder).as_posix()
                raise SavedPipelineError(folder, f"{name} is a link out of the folder; put a copy in its place")


def _check_part(folder: Path, name: str, part: type[object], packages: frozenset[str]) -> None:
    place = folder / name
    if not place.is_dir():
        raise SavedPipelineError(folder, f"is incomplete: the folder {name} is missing")
    for path in sorted(place.iterdir()):
        file, lower = f"{name}/{path.name}", path.name.lower()  # some file systems do not tell cases apart
        refused = path.is_dir() and lower != "additional_chat_templates" and not lower.startswith(".")
        if refused or lower.endswith(".py") or lower == "adapter_config.json":
            raise SavedPipelineError(folder, f"holds {file}, {_OWN_CODE}")
        if lower.endswith(".index.json"):
            _check_shards(folder, file)
        elif lower.endswith(".json") and ("config" in lower or lower == "special_tokens_map.json"):
            _check_settings(folder, file, packages)  # a tokenizer takes any argument from both
    _check_names_of_classes(folder, name, part, packages)


def _check_settings(folder: Path, file: str, packages: frozenset[str]) -> None:
    for place, key, value in _settings(read_json(folder, file)):
        reason = None
        if key in _REFUSED and value not in (None, False):
            reason = f"{_REFUSED[key]}, {_OWN_CODE}"
        elif key == "model_type" and isinstance(value, str) and _package_of_type(value) not in packages:
            reason = f"names {value!r}, which is not among the models that pipelines are known to use"
        elif key == "backbone" and isinstance(value, str):
            reason = "names another model"
        elif "attn_implementation" in key or "experts_implementation" in key:
            names = value.values() if isinstance(value, dict) else (value,)
            if any(isinstance(each, str) and each not in _ATTENTION for each in names):
                reason = f"names {value!r}; expected {' or '.join(sorted(_ATTENTION))}"
        elif key == "quantization_config" and value is not None:
            method = value.get("quant_method", "bitsandbytes") if isinstance(value, dict) else value
            if not isinstance(method, str) or method not in _QUANTIZATION:
                reason = f"asks for {method!r}; of quantized checkpoints only bitsandbytes' and ernie_accel's are read"
        elif isinstance(value, str) and (_PLACE.search(key) or key in ("vocab", "merges")) and key not in _INERT_PLACES:
            reason = f"names {value!r}, and files are found by their usual names; remove the entry"
        if reason is not None:
            raise SavedPipelineError(folder, f"{file}: {place}: {reason}")


def _check_shards(folder: Path, file: str) -> None:
    shards = read_json(folder, file).get("weight_map")
    names = shards.values() if isinstance(shards, dict) else (None,)
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise SavedPipelineError(folder, f"{file}: weight_map: expected names of files beside it, got {name!r}")


def _check_names_of_classes(folder: Path, name: str, part: type[object], packages: frozenset[str]) -> None:
    """Look up the classes that a processor makes for itself, by names in its files."""
    import transformers

    if not issubclass(part, transformers.ProcessorMixin):
        return
    for path in sorted((folder / name).glob("*config.json")):
        for place, key, value in _settings(read_json(folder, f"{name}/{path.name}")):
            kinds = ("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type")
            if (key in kinds or key.endswith("_processor_type")) and isinstance(value, str):
                found = getattr(transformers, value, None) if value.isidentifier() else None
                if isinstance(found, type) and _model_package(found) in (None, *packages):
                    continue
                raise SavedPipelineError(folder, f"{name}/{path.name}: {place}: names {value!r}, which is not known")


def _package_of_type(model_type: str) -> str:
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    return str(model_type_to_module_name(model_type))


def _settings(data: object) -> Iterator[tuple[str, str, object]]:
    """Yield place, key and value of everything in nested settings."""
    left = [("", data)]
    while left:
        place, value = left.pop()
        if isinstance(value, dict):
            for key, each in value.items():
                here = f"{place}.{key}" if place else key
                yield here, key, each
                left.append((here, each))
        elif isinstance(value, list):
            left += [(f"{place}.{number}", each) for number, each in enumerate(value)]
