"""What scripts do to a pipe: the columns of the matrix."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

import ernie_accel
from tests.lifecycle.subjects import LEFT_TO_DEFAULTS, Row, draw, part, stock


@dataclass(frozen=True)
class Case:
    """On what an action acts.

    Attributes:
        family: The tiny pipe.
        row: What is applied.
        own: The dtype that the denoiser has once it is; a script reads it off the pipe.
        given: Arguments of every call beside those of `draw`.
    """

    family: str
    row: Row
    own: torch.dtype | None = None
    given: tuple[tuple[str, Any], ...] = ()

    def dtype(self, pipe: Any) -> torch.dtype:
        """Return the dtype that a script means by the pipe's own: of an optimized one, if that is what it has."""
        return self.own or denoiser(pipe)[1].dtype  # type: ignore[no-any-return]

    def draw(self, pipe: Any, **kwargs: Any) -> torch.Tensor:
        return draw(pipe, self.row, **(dict(self.given) | kwargs))

    def with_defaults_of(self, pipe: Any) -> Case:
        """Return the case with what `draw` leaves to the pipe, given as the defaults that this pipe has now."""
        if not self.row.has("CallDefaults"):
            return self
        parameters = inspect.signature(type(pipe).__call__).parameters
        left = [name for name in LEFT_TO_DEFAULTS if name in parameters]
        return replace(self, given=tuple((name, parameters[name].default) for name in left))


#: Draws what is compared, one or several pictures.
Draw = Callable[[Any, Case], "list[torch.Tensor]"]


def _draw_one(pipe: Any, case: Case) -> list[torch.Tensor]:
    return [case.draw(pipe)]


def _leave(pipe: Any, case: Case) -> Any:
    return pipe


@dataclass(frozen=True)
class Action:
    """One thing that scripts do.

    Attributes:
        name: In words.
        group: The column of the page that it is a part of.
        prepare: What it does first, as loading a LoRA that it will fuse.
        do: Does it to a pipe; returns the pipe that the script goes on with.
        draw: What it draws then.
        before: What it does before the pipe is optimized.
        draws_first: Whether it draws a picture before it acts: what was remembered in it must not be used after.
        draw_stock: What a stock pipe has to do for the same pictures, if that differs.
        exact: Whether the picture has to be that of stock, bit for bit, whatever was applied.
        restores: Whether it matters to what `restore` gives afterwards.
        rounds: Whether what it brings takes the dtype that the pipe has by then, so that `restore` cannot give back
            the bits of stock: a LoRA, other weights, a cast.
        casts: Whether it casts components to the dtype that the denoiser has.
        calls_stock: Whether it makes another pipe: it shares the optimized parts, and its calls have stock's defaults.
    """

    name: str
    group: str
    do: Callable[[Any, Case], Any] = _leave
    prepare: Callable[[Any, Case], Any] = _leave
    draw: Draw = _draw_one
    before: Callable[[Any, Case], Any] = _leave
    draws_first: bool = True
    draw_stock: Draw | None = None
    exact: bool = False
    restores: bool = True
    rounds: bool = False
    casts: bool = False
    calls_stock: bool = False


GROUPS = {
    "LoRA": "LoRAs",
    "parts": "Replaced parts",
    "weights": "Changed weights",
    "casts": "Moved, cast",
    "memory": "Memory switches",
    "copies": "Copies, saves",
    "compile": "`torch.compile`",
    "calls": "Calls",
    "sharing": "Shared, threads",
    "requests": "`restore`, `optimize`",
}
ACTIONS: dict[str, Action] = {}


def _action(name: str, group: str, **settings: Any) -> None:
    ACTIONS[name] = Action(name, group, **settings)


def _does(name: str, group: str, **settings: Any) -> Callable[[Callable[[Any, Case], Any]], Callable[[Any, Case], Any]]:
    def register(do: Callable[[Any, Case], Any]) -> Callable[[Any, Case], Any]:
        _action(name, group, do=do, **settings)
        return do

    return register


def denoiser(pipe: Any) -> tuple[str, Any]:
    """Return the name of the first denoiser, and the denoiser."""
    return next((n, m) for n in ("unet", "transformer", "transformer_2") if (m := getattr(pipe, n, None)) is not None)


# ---- LoRAs -----------------------------------------------------------------------------------------------------------


@functools.cache
def _lora(family: str, seed: int) -> dict[str, torch.Tensor]:
    name, module = denoiser(stock(family))
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for path, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and path.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v"):
            down = torch.randn(4, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, 4, generator=generator)
            tensors |= {f"{name}.{path}.lora_A.weight": down * 0.3, f"{name}.{path}.lora_B.weight": up * 0.3}
    return tensors


def _load_lora(pipe: Any, case: Case, adapter: str = "a", seed: int = 1) -> Any:
    pipe.load_lora_weights(dict(_lora(case.family, seed)), adapter_name=adapter)
    return pipe


def _draw_with_lora(pipe: Any, case: Case) -> Any:
    _load_lora(pipe, case)
    case.draw(pipe)
    return pipe


def _with_lora(name: str, change: Callable[[Any], Any]) -> None:
    """Load a LoRA, draw a picture with it, then change something about it."""

    def do(pipe: Any, case: Case) -> Any:
        change(pipe)
        return pipe

    _action(name, "LoRA", do=do, prepare=_draw_with_lora, rounds=True)


def _switch(pipe: Any, case: Case) -> Any:
    _load_lora(pipe, case)
    _load_lora(pipe, case, "b", seed=2)
    pipe.set_adapters(["a"])
    case.draw(pipe)
    pipe.set_adapters(["b"])
    return pipe


def _fuse_and_unload(pipe: Any) -> None:
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _fuse_and_unfuse(pipe: Any) -> None:
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.set_adapters(["a"], [0.5])


_action("load", "LoRA", do=_load_lora, rounds=True)
_action("load before `optimize`", "LoRA", before=_load_lora, rounds=True)
_with_lora("scale", lambda pipe: pipe.set_adapters(["a"], [0.3]))
_action("switch", "LoRA", do=_switch, rounds=True)
_with_lora("disable", lambda pipe: pipe.disable_lora())
_with_lora("fuse", lambda pipe: pipe.fuse_lora())
_with_lora("fuse, unfuse, scale", _fuse_and_unfuse)
_with_lora("fuse and unload", _fuse_and_unload)
_with_lora("unload", lambda pipe: pipe.unload_lora_weights())


@_does("load before `optimize`, unload after", "LoRA", before=_load_lora, rounds=True)
def _unload(pipe: Any, case: Case) -> Any:
    pipe.unload_lora_weights()
    return pipe


# ---- Replaced parts, changed weights ---------------------------------------------------------------------------------


@_does("scheduler", "parts")
def _other_scheduler(pipe: Any, case: Case) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    fresh = stock(case.family).scheduler
    flow = isinstance(fresh, FlowMatchEulerDiscreteScheduler)
    pipe.scheduler = type(fresh).from_config(fresh.config, **({"shift": 5.0} if flow else {"beta_end": 0.03}))
    return pipe


def _replace(name: str) -> Callable[[Any, Case], Any]:
    def do(pipe: Any, case: Case) -> Any:
        which = denoiser(pipe)[0] if name == "transformer" else name
        old = getattr(pipe, which)
        if not isinstance(old, torch.nn.Module):
            raise NotImplementedError(f"the tiny pipe has no {which}")
        setattr(pipe, which, part(case.family, which, old))
        return pipe

    return do


for _name in ("transformer", "text_encoder", "vae"):
    _action(_name.replace("_", " "), "parts", do=_replace(_name), rounds=True)


@_does("`load_state_dict`", "weights", rounds=True)
def _load_state(pipe: Any, case: Case) -> Any:
    name, module = denoiser(pipe)
    module.load_state_dict(part(case.family, name, module).state_dict())
    return pipe


@_does("`load_state_dict(assign=True)`", "weights", rounds=True)
def _assign_state(pipe: Any, case: Case) -> Any:
    name, module = denoiser(pipe)
    module.load_state_dict(part(case.family, name, module).state_dict(), assign=True)
    return pipe


@_does("its own `state_dict`, changed", "weights", rounds=True)
def _own_state(pipe: Any, case: Case) -> Any:
    module = denoiser(pipe)[1]
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 and parameter.is_floating_point():
            state[name].mul_(1.5)
    module.load_state_dict(state)
    return pipe


def _scale_vectors(name: str) -> Callable[[Any, Case], Any]:
    """Scale, in place, what no quantization touches: norms and biases."""

    def do(pipe: Any, case: Case) -> Any:
        module = denoiser(pipe)[1] if name == "transformer" else getattr(pipe, name)
        if module is None:
            raise NotImplementedError(f"the tiny pipe has no {name}")
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 1 and parameter.is_floating_point():
                    parameter.mul_(1.5)
        return pipe

    return do


for _name in ("transformer", "text_encoder", "vae"):
    _action(f"in place: {_name.replace('_', ' ')}", "weights", do=_scale_vectors(_name), rounds=True)


# ---- Moved and cast, memory ------------------------------------------------------------------------------------------


def _half(pipe: Any, case: Case) -> Any:
    """Cast one component after the other, the denoiser first: it is the one that may refuse."""
    components = [each for each in pipe.components.values() if isinstance(each, torch.nn.Module)]
    for component in sorted(components, key=lambda each: each is not denoiser(pipe)[1]):
        component.half()
    return pipe


_action("`.to('cpu')`", "casts", do=lambda pipe, case: pipe.to("cpu"))
_action("`.to(own dtype)`", "casts", do=lambda pipe, case: pipe.to(case.dtype(pipe)), rounds=True, casts=True)
_action("`.to(float32)`", "casts", do=lambda pipe, case: pipe.to(torch.float32), rounds=True)
_action("`.to(bfloat16)`", "casts", do=lambda pipe, case: pipe.to(torch.bfloat16), rounds=True)
_action("`.half()`", "casts", do=_half, rounds=True)


def _on_parts(name: str, *args: Any, **kwargs: Any) -> Callable[[Any, Case], Any]:
    def do(pipe: Any, case: Case) -> Any:
        getattr(denoiser(pipe)[1], name)(*args, **kwargs)
        return pipe

    return do


def _on_vae(name: str) -> Callable[[Any, Case], Any]:
    def do(pipe: Any, case: Case) -> Any:
        getattr(pipe.vae, name)()
        return pipe

    return do


def _offload(pipe: Any, case: Case) -> Any:
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def _layerwise(pipe: Any, case: Case) -> Any:
    module = denoiser(pipe)[1]
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=module.dtype)
    return pipe


_CPU = torch.device("cpu")
_action("`enable_model_cpu_offload`", "memory", do=_offload)
_action(
    "group offload",
    "memory",
    do=_on_parts("enable_group_offload", onload_device=_CPU, offload_device=_CPU, offload_type="leaf_level"),
)
_action("layerwise casting", "memory", do=_layerwise, rounds=True)
_action("`enable_vae_tiling`", "memory", do=_on_vae("enable_tiling"))
_action("`enable_vae_slicing`", "memory", do=_on_vae("enable_slicing"))
_action("`set_attention_backend`", "memory", do=_on_parts("set_attention_backend", "_native_math"))


# ---- Copies, torch.compile -------------------------------------------------------------------------------------------


@_does("`from_pipe`", "copies", rounds=True, casts=True, calls_stock=True)
def _from_pipe(pipe: Any, case: Case) -> Any:
    made = type(pipe).from_pipe(pipe, torch_dtype=case.dtype(pipe))
    made.set_progress_bar_config(disable=True)
    return made


def _draw_from_image(pipe: Any, case: Case) -> list[torch.Tensor]:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    steps = {} if case.row.has("CallDefaults") else {"num_inference_steps": 4}
    return [case.draw(pipe, image=image, strength=0.6, **steps)]


@_does("`from_pipe` to image to image", "copies", draw=_draw_from_image, rounds=True, casts=True, calls_stock=True)
def _image_to_image(pipe: Any, case: Case) -> Any:
    import diffusers

    names = {"z_image": "ZImageImg2ImgPipeline", "flux": "FluxImg2ImgPipeline"}
    names["sd"] = "StableDiffusionImg2ImgPipeline"
    if case.family not in names:
        raise NotImplementedError("diffusers has no such pipeline")
    made = getattr(diffusers, names[case.family]).from_pipe(pipe, torch_dtype=case.dtype(pipe))
    made.set_progress_bar_config(disable=True)
    return made


_action("`deepcopy`", "copies", do=lambda pipe, case: copy.deepcopy(pipe))
# hooks that transformers leaves on a text encoder that was called cannot be pickled, on stock neither
_action("pickle", "copies", do=lambda pipe, case: pickle.loads(pickle.dumps(pipe)), draws_first=False)


@_does("`save_pretrained`, `from_pretrained`", "copies", casts=True)
def _save(pipe: Any, case: Case) -> Any:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        pipe.save_pretrained(folder)
        made = type(pipe).from_pretrained(folder, torch_dtype=case.dtype(pipe))
    made.set_progress_bar_config(disable=True)
    return made


def _wrap(pipe: Any, case: Case) -> Any:
    name, module = denoiser(pipe)
    setattr(pipe, name, torch.compile(module, backend="eager"))
    return pipe


_action("`pipe.transformer = torch.compile(...)` before", "compile", before=_wrap)
_action("`transformer.compile()` before", "compile", before=_on_parts("compile", backend="eager"))
_action("`pipe.transformer = torch.compile(...)` after", "compile", do=_wrap)
_action("`transformer.compile()` after", "compile", do=_on_parts("compile", backend="eager"))
_action("`compile_repeated_blocks()` after", "compile", do=_on_parts("compile_repeated_blocks", backend="eager"))


# ---- Calls -----------------------------------------------------------------------------------------------------------


def _calls(name: str, **make: Callable[[Any], Any]) -> None:
    def draw_it(pipe: Any, case: Case) -> list[torch.Tensor]:
        return [case.draw(pipe, **{key: value(pipe) for key, value in make.items()})]

    _action(name, "calls", draw=draw_it, draws_first=False, restores=False)


def _quieter(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 0.9}


def _looks(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {}


_calls("callback that changes the latents", callback_on_step_end=lambda pipe: _quieter)
_calls(
    "callback with no inputs",
    callback_on_step_end=lambda pipe: _looks,
    callback_on_step_end_tensor_inputs=lambda pipe: [],
)
_calls("no callback, its inputs None", callback_on_step_end_tensor_inputs=lambda pipe: None)


def _stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = True
    return tensors


_calls("interrupt by the pipe's own switch", callback_on_step_end=lambda pipe: _stop)


def _draw_after(error: type[BaseException]) -> Draw:
    def draw_it(pipe: Any, case: Case) -> list[torch.Tensor]:
        def callback(*_: Any) -> dict[str, Any]:
            raise error

        with contextlib.suppress(error):
            case.draw(pipe, callback_on_step_end=callback)
            raise RuntimeError("the callback was not called")
        return [case.draw(pipe)]

    return draw_it


class _ScriptError(Exception):
    """Raised by a callback."""


_action("Ctrl-C in a call, then another call", "calls", draw=_draw_after(KeyboardInterrupt), draws_first=False)
_action(
    "error in a callback, then another call", "calls", draw=_draw_after(_ScriptError), draws_first=False, restores=False
)
_calls(
    "list of generators",
    num_images_per_prompt=lambda pipe: 2,
    generator=lambda pipe: [torch.Generator().manual_seed(seed) for seed in (0, 1)],
)
_calls("several images per prompt", num_images_per_prompt=lambda pipe: 2)
_calls("several prompts", prompt=lambda pipe: ["a red circle", "a big blue square on a red circle on blue"])
_calls("other size", height=lambda pipe: 48, width=lambda pipe: 64)
_calls("empty negative prompt", negative_prompt=lambda pipe: "", guidance_scale=lambda pipe: 3.0)
_calls("negative prompt", negative_prompt=lambda pipe: "small", guidance_scale=lambda pipe: 3.0)


def _latents_of(pipe: Any) -> torch.Tensor:
    """Return latents of the right shape, by asking for them."""
    seen: list[torch.Tensor] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return {}

    draw(pipe, callback_on_step_end=callback)
    return torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(9)).to(seen[0].dtype)


_calls("latents", latents=_latents_of)


def _draw_embeds(pipe: Any, case: Case) -> list[torch.Tensor]:
    name = type(pipe).__name__
    if name.startswith(("Flux", "StableDiffusion", "Wan")):
        return [case.draw(pipe)]  # draws from embeddings anyway
    module = denoiser(pipe)[1]
    wide = {"ernie": 64}.get(case.family, 32)
    embeds = torch.randn(5, wide, generator=torch.Generator().manual_seed(4)).to(module.dtype)
    if name.startswith("Lumina2"):
        mask = {"prompt_attention_mask": torch.ones(1, 5, dtype=torch.long)}
        return [case.draw(pipe, prompt=None, prompt_embeds=embeds[None], **mask)]
    negative = {"negative_prompt_embeds": [embeds * 0.5]} if name.startswith("ZImage") else {}
    return [case.draw(pipe, prompt=None, prompt_embeds=[embeds], **negative)]


_action("`prompt_embeds`", "calls", draw=_draw_embeds, draws_first=False, restores=False)


def _draw_twice(pipe: Any, case: Case) -> list[torch.Tensor]:
    return [case.draw(pipe), case.draw(pipe, seed=1)]


_action("a call, then another", "calls", draw=_draw_twice, draws_first=False)


# ---- Shared components, threads --------------------------------------------------------------------------------------


def _second(pipe: Any) -> Any:
    cls = type(pipe)
    kept = {k: v for k, v in pipe.config.items() if k in ("boundary_ratio", "requires_safety_checker")}
    made = cls(**pipe.components, **kept)
    made.set_progress_bar_config(disable=True)
    return made


_action("a second pipe over the same components", "sharing", do=lambda pipe, case: _second(pipe), calls_stock=True)


def _draw_in_threads(pipes: list[Any], case: Case) -> list[torch.Tensor]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: draw(job[1], case.row, seed=job[0]), enumerate(pipes * 2)))


_action(
    "two threads",
    "sharing",
    draw=lambda pipe, case: _draw_in_threads([pipe], case),
    draw_stock=lambda pipe, case: [draw(pipe, case.row, seed=seed) for seed in (0, 1)],
)


# ---- Requests --------------------------------------------------------------------------------------------------------


def _restore(pipe: Any, case: Case) -> Any:
    return ernie_accel.restore(pipe)


def _ask_for_another(pipe: Any, case: Case) -> Any:
    return ernie_accel.optimize(pipe, ernie_accel.SliceVae())


_action("`restore`", "requests", do=_restore, exact=True, restores=False)
_action("`optimize` with another request", "requests", do=_ask_for_another, exact=True)
_action("`optimize` with the same request", "requests", do=lambda pipe, case: _again(pipe, case))


def _again(pipe: Any, case: Case) -> Any:
    return case.row.optimize(pipe) if ernie_accel.report(pipe).entries else pipe
