"""Keep what inductor compiles in a folder that the user names, and have room for the graphs of blocks."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ernie_accel.common.language import said

#: What inductor and Triton read to find their files, and the part of the folder each gets.
_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


#: How many graphs one kind of block may have. Torch's 8 are too few where blocks stand in three places (refiners and
#: layers, with and without modulation or a mask) and their LoRA is switched or fused: a full graph fails at the ninth.
RECOMPILE_LIMIT = 64

#: Graphs that there is room for once old ones are dropped for it: those of one picture.
_ROOM = 16


def drop_old_graphs(kinds: Iterable[type[torch.nn.Module]]) -> None:
    """Forget all graphs of those kinds of compiled blocks that have nearly as many as they may have.

    What made them, such as adapters that were unloaded, may never be back, and torch drops none: at the limit a full
    graph fails, for ever. What is still used is compiled again at its next call.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code

    for kind in kinds:
        code = getattr(kind.forward, "__code__", None)
        if code is not None and len(_debug_get_cache_entry_list(code)) > RECOMPILE_LIMIT - _ROOM:
            reset_code(code)


def _takes_limit() -> bool:
    """Return whether `torch.compile` takes a limit of its own; torch before it (2.11) knows one for all alone."""
    return "recompile_limit" in inspect.signature(torch.compile).parameters


class _WithinLimit:
    """What torch calls in place of a compiled module: it raises the limit of all that is compiled, and leaves it so.

    Before each call, because torch 2.12 has a limit for each thread.
    """

    def __init__(self, compiled: Callable[..., object]) -> None:
        self.compiled = compiled
        # By which a module that is compiled in place is known; see `is_compiled_in_place`.
        self._torchdynamo_orig_callable = getattr(compiled, "_torchdynamo_orig_callable", None)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Return what the module gives."""
        if not torch.compiler.is_compiling():  # else within something larger that is compiled
            config = torch._dynamo.config
            if config.recompile_limit < RECOMPILE_LIMIT:
                config.recompile_limit = RECOMPILE_LIMIT
        return self.compiled(*args, **kwargs)


@dataclass(frozen=True)
class InductorIn:
    """A backend for ``torch.compile``: inductor, with its files in one folder.

    A backend runs whenever a graph is compiled, so the settings hold only for that time: not while the model runs, and
    not for anything else that is compiled in this process. Equal backends share their graphs, which lets the blocks of
    a transformer take one.

    Torch's one-file alternative (``torch.compiler.save_cache_artifacts``) would hold what the whole process compiled,
    has to be written explicitly at some moment, and is unpacked into the shared default folder.

    Attributes:
        folder: Where the files are. Processes may share it; the files of each torch version, device and graph are
            separate.
        mode: As in ``torch.compile``.
        dynamic: As in ``torch.compile``.
    """

    folder: str
    mode: str | None
    dynamic: bool | None

    def __call__(
        self, graph: torch.fx.GraphModule, inputs: list[Tensor | int | torch.SymInt | None]
    ) -> Callable[..., object]:
        from torch._inductor import compile as inductor
        from torch._inductor import list_mode_options

        options = list_mode_options(self.mode, self.dynamic) if self.mode else None
        with _files_in(Path(self.folder)):
            compiled: Callable[..., object] = inductor(graph, inputs, options=options)
        return compiled


def compile_module(
    module: torch.nn.Module,
    folder: str | None,
    *,
    fullgraph: bool,
    dynamic: bool | None = None,
    mode: str | None = None,
) -> None:
    """Compile a module in place; with a folder, what inductor makes is kept there (see `InductorIn`)."""
    if folder is None:
        _compile(module, fullgraph=fullgraph, dynamic=dynamic, mode=mode)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be made must not fail the first picture
    _compile(module, backend=InductorIn(folder, mode, dynamic), fullgraph=fullgraph, dynamic=dynamic)


def _compile(module: torch.nn.Module, **kwargs: object) -> None:
    """Compile a module in place, with room for `RECOMPILE_LIMIT` graphs of its kind."""
    if _takes_limit():
        module.compile(recompile_limit=RECOMPILE_LIMIT, **kwargs)
        return
    module.compile(**kwargs)
    if module._compiled_call_impl is not None:
        module._compiled_call_impl = _WithinLimit(module._compiled_call_impl)


def as_folder(cache: str | os.PathLike[str] | None) -> str | None:
    """Return a folder as plain data, because a transform holds nothing else."""
    return None if cache is None else os.fspath(cache)


def unsupported_cache_reasons(folder: str | None, device: str) -> list[str]:
    """Return why compiled code cannot be kept in `folder`, which need not be there yet; empty if it can.

    Args:
        folder: Where to; None keeps nothing.
        device: Torch device type that is compiled for.
    """
    if folder is None:
        return []
    place = Path(folder).absolute()
    if device == "cpu" and any(letter.isspace() for letter in str(place)):
        return [
            said(
                "cache={folder!r}: inductor's C++ compiler command breaks at the space in {place}; give another folder",
                folder=folder,
                place=place,
            )
        ]
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return [
            said(
                "cache={folder!r}: {place} is a file; give a folder, which is made where it is missing",
                folder=folder,
                place=place,
            )
        ]
    if not os.access(place, os.W_OK | os.X_OK):
        return [said("cache={folder!r}: {place} cannot be written to; give another folder", folder=folder, place=place)]
    return []


@contextmanager
def _files_in(folder: Path) -> Iterator[None]:
    """Let inductor read and write its files in `folder` for the length of a with-block."""
    import torch._functorch.config as autograd
    import torch._inductor.config as inductor
    from torch._inductor.utils import clear_caches

    before = {name: os.environ.get(name) for name in _VARIABLES}
    with ExitStack() as scope:
        scope.enter_context(inductor.patch(fx_graph_cache=True))
        scope.enter_context(autograd.patch(enable_autograd_cache=True))
        try:
            for name, part in _VARIABLES.items():
                os.environ[name] = str(folder.absolute() / part)
            clear_caches()  # what was compiled in another folder and is still in memory would be missing in this one
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            clear_caches()
