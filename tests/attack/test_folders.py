"""Damaged and hostile folders of pipelines: no code runs, nothing appears, and there is one error or the same bits."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import inspect
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie_accel
from ernie_accel import CallDefaults, Compile, Quantize, SwapScheduler
from ernie_accel.core.errors import ErnieAccelError, SavedPipelineError
from ernie_accel.storage.folders import current
from ernie_accel.storage.loading import load_pipeline
from ernie_accel.storage.manifest import FORMAT_VERSION, INDEX, MANIFEST, read_manifest
from tests.attack import SEED, rounds
from tests.attack.test_interrupts import interrupted_at, lines_of
from tests.examples import ELSEWHERE, EXAMPLES, differences, snapshot
from tests.pipelines import picture, tiny_ernie
from tests.saved_folders import as_version_1, change
from tests.test_saving import assert_same_bits, bits

STORAGE = str(Path(ernie_accel.__file__).parent / "storage")

# ---- who watches ----------------------------------------------------------------------------------------------------

#: What nothing that reads a folder may do, by the names of Python's audit events.
FORBIDDEN = (
    "os.exec", "os.fork", "os.forkpty", "os.link", "os.mkdir", "os.posix_spawn", "os.remove", "os.rename", "os.rmdir",
    "os.spawn", "os.startfile", "os.symlink", "os.system", "os.truncate", "pickle.find_class", "pty.spawn",
    "shutil.copyfile", "shutil.rmtree", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "urllib.Request",
)  # fmt: skip
_seen: list[str] | None = None
_outside = ""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event in FORBIDDEN:
        _seen.append(f"{event}{arguments!r}"[:300])
    elif event == "import" and str(arguments[0]).startswith("evil"):
        _seen.append(f"import {arguments[0]}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = os.fsdecode(arguments[0]), str(arguments[1]), arguments[2]
        writes = any(letter in mode for letter in "wax+") or (isinstance(flags, int) and flags & os.O_ACCMODE)
        if (writes and path != os.devnull and "__pycache__" not in path) or path.startswith(_outside):
            _seen.append(f"open {path!r} {mode}")


@contextlib.contextmanager
def watched(outside: Path) -> Iterator[list[str]]:
    """Write down what happens meanwhile that reading a folder must not do; whatever lies in `outside` is forbidden."""
    global _seen, _outside
    if not _watch_is_on:
        sys.addaudithook(_watch)
        _watch_is_on.append(True)
    seen: list[str] = []
    gc.collect()  # pipes of earlier tests remove their temporary folders when they are collected: not meanwhile
    gc.disable()
    _seen, _outside = seen, str(outside)
    try:
        yield seen
    finally:
        _seen = None
        gc.enable()


_watch_is_on: list[bool] = []


class Canary:
    """What writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = str(file)

    def __reduce__(self) -> Any:
        return open, (self._file, "w")


@pytest.fixture(scope="module")
def bait(tmp_path_factory):
    """A folder outside of every pipeline with a module, a pickle, scripts and settings that nobody may touch."""
    place = tmp_path_factory.mktemp("bait")
    ran = place / "ran"
    (place / "evil_module.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    for name in ("cache", "inductor", "diffusion_pytorch_model.bin", "pytorch_model.bin", "tokenizer.json"):
        (place / name).write_bytes(pickle.dumps(Canary(ran)))
    (place / "config.json").write_text("{}")
    sys.path.insert(0, str(place))
    yield place
    sys.path.remove(str(place))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipe that was quantized, scheduled and saved; and what loads from it."""
    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, Quantize("int8-weight-only"), SwapScheduler("euler", shift=5.0), CallDefaults("turbo"))
    folder = ernie_accel.save(pipe, tmp_path_factory.mktemp("original") / "saved")
    ernie_accel.load(folder)  # imports what loading imports
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "plain"
    tiny_ernie().save_pretrained(folder)
    load_pipeline(str(folder), device="cpu")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_watch_sees_what_is_forbidden(bait):
    """Or the attacks below would pass whatever happened."""
    with watched(bait) as seen:
        import evil_module  # noqa: F401

        pickle.loads((bait / "cache").read_bytes())
        (bait / "ran").unlink()
        with contextlib.suppress(OSError):
            socket.create_connection(("localhost", 9), timeout=0.1)
        subprocess.run([sys.executable, "-c", ""], check=True)
    text = "\n".join(seen)
    for event in ("import evil_module", "pickle.find_class", "cache' r", "os.remove", "socket.", "subprocess.Popen"):
        assert event in text
    del sys.modules["evil_module"]


# ---- hostile folders ------------------------------------------------------------------------------------------------


def hostile_transforms(bait: Path) -> list[dict[str, Any]]:
    """Return every field of every transform, pointed at the bait; and transforms that are none."""
    fields = []
    for transform in EXAMPLES + ELSEWHERE:
        data = json.loads(json.dumps(transform.to_json()))
        for f in dataclasses.fields(transform):
            for value in (str(bait / "cache"), [str(bait / "cache")], "evil_module:Evil", {"path": str(bait)}):
                fields.append(data | {f.name: value})
    named = (
        "evil_module.Evil",
        "os.system",
        "Transform",
        "__import__",
        "ernie_accel.Compile",
        "",
        None,
        7,
        ["Compile"],
    )
    others = [{"transform": name, "cache": str(bait / "cache")} for name in named]
    return [*fields, *others, {}, {"transform": "Compile", "__class__": "evil_module.Evil"}]


def test_no_field_of_a_transform_can_name_a_place(saved, bait, tmp_path):
    chance = random.Random(SEED)
    entries = hostile_transforms(bait)
    chosen = chance.sample(entries, min(len(entries), rounds(short=8, full=100_000)))
    folder = shutil.copytree(saved, tmp_path / "saved")
    for number, data in enumerate(chosen):
        change(folder, lambda manifest, data=data: manifest.update(transforms=[_entry(data)]))
        if number % 2:
            change(folder, lambda manifest: manifest.update(_sizes_only(manifest)))
        try_to_read(folder, bait, data)
        change(folder, lambda manifest: manifest.update(format_version=FORMAT_VERSION))


def _entry(data: dict[str, Any]) -> dict[str, Any]:
    return {"transform": data, "changed": ["transformer"], "skipped": {}}


def _sizes_only(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"format_version": 1, "files": {name: file["bytes"] for name, file in manifest["files"].items()}}


def try_to_read(folder: Path, bait: Path, what: object) -> bool:
    """Load a folder, and draw a picture if that works, and check that nothing else happened; return whether it did."""
    before = contents(folder)
    with watched(bait) as seen:
        try:
            pipe = load_pipeline(str(folder), device="cpu")
            pipe.set_progress_bar_config(disable=True)
        except ErnieAccelError:
            pipe = None
    if pipe is not None and seen == []:  # a picture may compile, which may run a compiler; it may not find the bait
        with watched(bait) as seen, contextlib.suppress(Exception):  # odd settings may well draw nothing
            picture(pipe, steps=1)
        seen = [event for event in seen if str(bait) in event or "evil" in event]
    assert seen == [], what
    assert not (bait / "ran").exists(), what
    assert contents(folder) == before, what
    return pipe is not None


def hostile_edits(bait: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (file, entries): what a stranger could write into the settings of a pipeline."""
    code = {"auto_map": dict.fromkeys(("AutoModel", "AutoConfig", "AutoTokenizer"), "evil_module.Evil")}
    files = {
        INDEX: [
            {"vae": ["evil_module", "Evil"]},
            {"text_encoder": ["evil_module", "Evil"]},
            {"scheduler": ["evil_module", "Evil"]},
            {"vae": ["os", "system"]},
            {"vae": [str(bait), "Evil"]},
            {"vae": ["diffusers.utils.dynamic_modules_utils", "get_class_from_dynamic_module"]},
            {str(bait): ["diffusers", "AutoencoderKL"]},
            {"../../bait": ["diffusers", "AutoencoderKL"]},
            {"_class_name": ["evil_module", "Evil"]},
            {"_class_name": "evil_module"},
            {"_class_name": str(bait / "evil_module.py")},
            {"custom_pipeline": str(bait / "evil_module.py")},
            {"_name_or_path": str(bait)},
            {"tokenizer": ["transformers", "AutoTokenizer"]},
            {"text_encoder": ["transformers", "AutoModel"]},
            {"text_encoder": ["transformers", "RagModel"]},
        ],
        "text_encoder/config.json": [
            code,
            {"text_config": code},
            {"vision_config": code | {"model_type": "pixtral"}},
            {"text_config": {"model_type": "rag", "index_path": str(bait / "cache")}},
            {"_name_or_path": str(bait)},
            {"attn_implementation": "evil/kernels"},
            {"_attn_implementation": "evil/kernels"},
            {"_attn_implementation_internal": "evil/kernels"},
            {"experts_implementation": "evil/kernels"},
            {"configuration_files": [str(bait / "config.5.0.0.json"), "../../bait/config.4.0.0.json"]},
            {"quantization_config": {"quant_method": "gptq", "tokenizer": str(bait)}},
            {"quantization_config": {"quant_method": "fp8"}},
            {"architectures": ["evil_module.Evil"], "transformers_weights": str(bait / "cache")},
            {"dtype": "evil_module"},
            {"torch_dtype": "storage"},
            {"model_type": "evil_module"},
        ],
        "transformer/config.json": [
            code,
            {"_class_name": "evil_module.Evil"},
            {"_class_name": ["evil_module", "Evil"]},
            {"_name_or_path": str(bait)},
            {"quantization_config": {"quant_method": "nunchaku"}},
            {"quantization_config": {"quant_method": "torchao", "quant_type": {"_type": "evil_module.Evil"}}},
            {"_use_default_values": [str(bait)]},
        ],
        "vae/config.json": [{"act_fn": "evil_module.Evil"}, {"down_block_types": ["evil_module.Evil"] * 4}],
        "scheduler/scheduler_config.json": [
            {"_class_name": "evil_module.Evil"},
            {"trained_betas": str(bait / "cache")},
            {"time_shift_type": "evil_module"},
        ],
        "tokenizer/tokenizer_config.json": [
            code,
            *({name: str(bait / "tokenizer.json")} for name in ("tokenizer_file", "vocab_file", "merges_file")),
            *({name: str(bait / "tokenizer.json")} for name in ("vocab", "merges", "gguf_file", "spm_file")),
            {"tokenizer_class": "evil_module.Evil"},
            {"slow_tokenizer_class": "evil_module.Evil"},
            {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
            {"chat_template_file": str(bait / "config.json")},
            {"special_tokens_map_file": str(bait / "config.json")},
            {"init_inputs": [str(bait / "tokenizer.json")]},
            {"name_or_path": str(bait)},
            {"fast_tokenizer_files": [str(bait / "tokenizer.5.0.0.json")]},
        ],
        "tokenizer/special_tokens_map.json": [
            code,
            *({name: str(bait / "tokenizer.json")} for name in ("tokenizer_file", "vocab_file", "vocab", "gguf_file")),
            {"pad_token": str(bait / "tokenizer.json")},
        ],
    }
    return [(file, entries) for file, edits in files.items() for entries in edits]


def one_of_each_file_first(edits: list[tuple[str, dict[str, Any]]], chance: random.Random) -> list[tuple[str, Any]]:
    """Return the edits in a random order in which each file comes once before any comes again."""
    times: Counter[str] = Counter()
    ordered = []
    for file, entries in chance.sample(edits, len(edits)):
        ordered.append((times[file], file, entries))
        times[file] += 1
    ordered.sort(key=lambda each: each[0])
    return [(file, entries) for _, file, entries in ordered]


def files_of(edits: list[tuple[str, dict[str, Any]]]) -> set[str]:
    return {file for file, _ in edits}


@pytest.mark.parametrize("kind", ["saved", "plain"])
def test_no_settings_can_run_code_or_leave_the_folder(kind, saved, plain, bait, tmp_path):
    chance = random.Random(SEED)
    edits = one_of_each_file_first(hostile_edits(bait), chance)
    for number, (file, entries) in enumerate(edits[: rounds(short=len(files_of(edits)), full=1000)]):
        folder = shutil.copytree(saved if kind == "saved" else plain, tmp_path / f"{number}")
        path = folder / file
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | entries))
        if kind == "saved":
            change(folder)
        try_to_read(folder, bait, (file, entries))
        shutil.rmtree(folder)


def test_no_file_beside_the_weights_is_run(plain, bait, tmp_path):
    """Scripts and pickles under every name that a library looks for, beside every component."""
    folder = shutil.copytree(plain, tmp_path / "plain")
    script, canary = f"open({str(bait / 'ran')!r}, 'w')", pickle.dumps(Canary(bait / "ran"))
    places = [folder / component for component in ("vae", "text_encoder", "tokenizer", "scheduler", ".")]
    scripts = ("None", "pipeline", "diffusers", "transformers", "ErnieImagePipeline", "modeling", "tokenization")
    for place in places:
        for name in scripts:
            (place / f"{name}.py").write_text(script)
        assert try_to_read(folder, bait, scripts) == (place == folder), place  # among a component's files: refused
        for name in scripts:
            (place / f"{name}.py").unlink()
    pickles = ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt", "vocab.pkl", "scheduler.pt")
    for place in places:
        for name in pickles:
            (place / name).write_bytes(canary)
    assert try_to_read(folder, bait, "pickles beside safetensors")  # whole, so every component was looked at
    for component in ("vae", "text_encoder", "transformer"):
        for name in pickles:
            (folder / component / name).write_bytes(canary)
        (weights,) = (folder / component).glob("*.safetensors")
        kept = weights.rename(tmp_path / weights.name)
        assert not try_to_read(folder, bait, f"pickles in place of the safetensors of {component}")
        kept.rename(weights)


# ---- damaged folders ------------------------------------------------------------------------------------------------


def damage(folder: Path, chance: random.Random) -> str:
    """Damage a folder in one way, and say in which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = chance.choice(files)
    name, content = file.relative_to(folder).as_posix(), bytearray(file.read_bytes())
    how = chance.choice(("truncate", "flip", "flip", "zero", "swap", "remove", "empty", "append", "folder", "rename"))
    if how == "truncate":
        file.write_bytes(content[: chance.randrange(len(content))])
    elif how == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif how == "zero":
        start = chance.randrange(len(content))
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
        file.write_bytes(content)
    elif how == "swap":
        other = chance.choice([path for path in files if path != file])
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
        name = f"{name} and {other.relative_to(folder).as_posix()}"
    elif how == "remove":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "append":
        file.write_bytes(content + b"\n" * chance.randint(1, 3))
    elif how == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.rename(file.with_name(f"{file.name}.bak.json"))
    return f"{how} {name}"


def test_a_damaged_folder_is_one_error_or_loads_the_same_bits(saved, tmp_path):
    chance = random.Random(SEED)
    original = ernie_accel.load(saved)
    expected, report = bits(original), [entry.step.transform for entry in ernie_accel.report(original).entries]
    refused = 0
    for number in range(rounds(short=25, full=600)):
        folder = shutil.copytree(saved, tmp_path / "saved")
        what = f"{damage(folder, chance)}, round {number}"
        try:
            pipe = ernie_accel.load(folder)
        except SavedPipelineError:
            refused += 1
        else:
            assert_same_bits(bits(pipe), expected)
            assert [entry.step.transform for entry in ernie_accel.report(pipe).entries] == report, what
            assert dict(pipe.scheduler.config) == dict(original.scheduler.config), what
            assert pipe.tokenizer.get_vocab() == original.tokenizer.get_vocab(), what
        shutil.rmtree(folder)
    assert refused > number // 2


ODD = (None, True, -1, 0, 0.5, "", "x", "../x", "a\x00b", [], {}, [None], {"a": 1}, "é\u202e", [[]] * 3, 17)


def mutate(data: Any, chance: random.Random) -> Any:
    """Return JSON with one thing changed, removed, doubled or put elsewhere, anywhere in it."""
    data = copy.deepcopy(data)
    places = []
    left = [data]
    while left:
        value = left.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            places.append((value, key))
            left.append(value[key])
    owner, key = chance.choice(places)
    how = chance.choice(("odd", "odd", "remove", "other", "key"))
    if how == "odd":
        owner[key] = chance.choice(ODD)
    elif how == "remove":
        del owner[key]
    elif how == "other":
        other, elsewhere = chance.choice(places)
        owner[key] = copy.deepcopy(other[elsewhere])
    elif isinstance(owner, dict):
        owner[chance.choice(("x", "../x", "", "self", "__class__"))] = owner[key]
    return data


def test_a_tampered_folder_is_one_error_or_loads(saved, bait, tmp_path):
    """Any entry of any file of settings changed, with checksums to match: no KeyError, no TypeError, no traceback."""
    chance = random.Random(SEED)
    names = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*.json"))
    for number in range(rounds(short=6, full=150)):
        folder = shutil.copytree(saved, tmp_path / "saved")
        name = chance.choice([*names, MANIFEST, MANIFEST, MANIFEST])
        if number % 5 == 0:
            as_version_1(folder)
        path = folder / name
        path.write_text(json.dumps(mutate(json.loads(path.read_text()), chance)))
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # a manifest so odd that it cannot be signed
            change(folder)
        try_to_read(folder, bait, f"{name}, round {number}")
        shutil.rmtree(folder)


# ---- interrupts and kills -------------------------------------------------------------------------------------------


def optimized() -> tuple[Any, dict[str, Any]]:
    """Return a pipe with transforms before and after quantization, and what it was before them."""
    pipe = tiny_ernie()
    pipe.to_json_string(), pipe.scheduler.to_json_string()  # diffusers notes its release when it is first asked
    original = snapshot(pipe)
    ernie_accel.optimize(pipe, Quantize("int8-weight-only"), SwapScheduler("unipc"), Compile(), CallDefaults("turbo"))
    return pipe, original


def which(folder: Path) -> str:
    """Return whether a folder holds the old pipe or the new one; it holds one of them whole."""
    transforms = read_manifest(current(folder)).transforms
    return "new" if any(saved.transform["transform"] == "Quantize" for saved in transforms) else "old"


def places_in_storage(do: Any, most: int) -> list[tuple[Any, int]]:
    """Return some of the lines of storage/ that run in ``do()``, each with which of its runs to stop at."""
    chance = random.Random(SEED)
    for _ in range(2):  # the first time imports modules and fills caches
        hits = lines_of(do)
    lines = {place: count for place, count in hits.items() if place[0].startswith(STORAGE)}
    places = [(place, hit) for place, count in lines.items() for hit in {1, count, chance.randint(1, count)}]
    return chance.sample(places, min(most, len(places)))


def test_an_interrupt_while_saving_leaves_the_folder_and_the_pipe_whole(tmp_path):
    folder, old = tmp_path / "saved", tiny_ernie()
    pipe, original = optimized()

    def save_new() -> None:
        ernie_accel.save(pipe, folder)

    expected, transforms = bits(pipe), [entry.step.transform for entry in ernie_accel.report(pipe).entries]
    for place, hit in places_in_storage(save_new, rounds(short=6, full=150)):
        ernie_accel.save(old, folder)
        interrupted_at(place, hit, save_new)
        assert which(folder) in ("old", "new")
        if [entry.step.transform for entry in ernie_accel.report(pipe).entries] != transforms:
            ernie_accel.optimize(pipe, *transforms)
        assert [entry.step.transform for entry in ernie_accel.report(pipe).entries] == transforms, (place, hit)
        assert_same_bits(bits(pipe), expected)
    save_new()
    ernie_accel.restore(pipe)
    assert differences(original, snapshot(pipe)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_an_interrupt_while_loading_leaves_nothing_behind(saved, tmp_path):
    expected, before = bits(ernie_accel.load(saved)), contents(saved)
    for place, hit in places_in_storage(lambda: ernie_accel.load(saved), rounds(short=8, full=150)):
        interrupted_at(place, hit, lambda: ernie_accel.load(saved))
        assert inspect.isfunction(torch.nn.Module.register_parameter)
        assert torch.nn.Module.register_parameter.__module__ == "torch.nn.modules.module", (place, hit)
        assert torch.nn.Linear(2, 2).weight.device.type == "cpu", (place, hit)
    assert contents(saved) == before
    assert_same_bits(bits(ernie_accel.load(saved)), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
def test_a_kill_while_saving_leaves_the_old_folder_or_the_new(tmp_path):
    folder, old = tmp_path / "saved", tiny_ernie()
    pipe, _ = optimized()
    ernie_accel.save(old, folder)

    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for place, hit in places_in_storage(lambda: ernie_accel.save(pipe, folder), rounds(short=4, full=120)):
        ernie_accel.save(old, folder)
        child = os.fork()
        if not child:
            torch.set_num_threads(1)  # OpenMP's other threads stayed in the parent
            with contextlib.suppress(BaseException):
                interrupted_at(place, hit, lambda: ernie_accel.save(pipe, folder), killed)
            os._exit(0)
        os.waitpid(child, 0)
        assert which(folder) in ("old", "new"), (place, hit)
    ernie_accel.save(pipe, folder)
    assert (which(folder), [path.name for path in tmp_path.iterdir()]) == ("new", ["saved"])
