"""The forward of a rewritten transformer that is replayed as CUDA graphs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ernie_accel.core.components import is_moved_in_parts
from ernie_accel.models.rewritten import RewrittenModel

#: Records calls: (forward, arguments) -> (replay, output that every replay overwrites).
Record = Callable[[Callable[..., Any], Mapping[str, Any]], tuple[Callable[[], None], Tensor]]


@dataclass
class _Graph:
    replay: Callable[[], None]
    step_inputs: dict[str, Tensor]
    picture_inputs: tuple[Tensor, ...]
    output: Tensor
    weights: tuple[int, ...]


class GraphedForward:
    """The forward of a rewritten transformer that replays graphs where it can; same arguments, same result.

    Steps of a picture are known by its text, the same tensor in each: one that is changed in place is not noticed.
    """

    def __init__(
        self, transformer: Any, blocks: RewrittenModel, max_tokens: int, keep: int, record: Record | None = None
    ) -> None:
        self._transformer, self._blocks, self._forward = transformer, blocks, transformer.forward
        self._max_tokens, self._keep, self._record = max_tokens, keep, record or _record
        self._graphs: OrderedDict[Any, _Graph | None] = OrderedDict()  # None: seen once, not yet captured
        self._is_hooked = False  # weights that come and go while the forward runs cannot be captured
        self._picture: tuple[Any, ...] = ()  # what the picture under way is known by
        self._prepared: Any = None  # its text and positions
        self._filled: _Graph | None = None  # the graph that has them

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedForward:
        transformer = copy.deepcopy(self._transformer, memo)
        copied = GraphedForward(transformer, self._blocks, self._max_tokens, self._keep, self._record)
        copied._forward = copy.deepcopy(self._forward, memo)
        return copied  # graphs stay behind: they read the weights of this one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(self._blocks.FORWARD_ARGUMENTS, args, strict=False)) | kwargs
        steps = {name: arguments[name] for name in self._blocks.STEP_INPUTS}
        device = next(iter(steps.values())).device
        tokens = self._blocks.token_count(self._transformer, arguments)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or tokens > self._max_tokens:
            return self._forward(**arguments)
        if torch.is_autocast_enabled(device.type):  # what it casts is kept for as long as the context lasts
            return self._forward(**arguments)
        shapes = tuple((x.shape, x.dtype, x.device) for x in steps.values())
        text = arguments[self._blocks.PICTURE_INPUT]
        picture = (shapes, self._blocks.host_facts(arguments), text)
        is_new = not self._picture or self._picture[:2] != picture[:2] or self._picture[2] is not text
        if is_new:
            self._picture = ()  # until all of the following is known
            self._filled = None
            self._prepared = self._blocks.prepare(self._transformer, arguments)
            self._is_hooked = is_moved_in_parts(self._transformer)
            self._picture = picture
        if self._is_hooked:
            return self._forward(**arguments)

        text, at = self._prepared
        key = (shapes, text.shape, text.dtype, tuple((x.shape, x.dtype) for x in at.tensors))
        graph = self._graphs.get(key)
        if graph is not None and is_new and graph.weights != self._weights():
            self._graphs.clear()
            graph = None
        if graph is None:
            if key not in self._graphs:
                # On what the capture will get, so that all that is compiled or planned for that is there.
                output = self._forward(**arguments | {self._blocks.PICTURE_INPUT: text, "at": at})
                self._remember(key, None)
                return output
            graph = self._capture(arguments, steps, text, at)
            self._remember(key, graph)
        self._graphs.move_to_end(key)
        if self._filled is not graph:
            for static, given in zip(graph.picture_inputs, (text, *at.tensors), strict=True):
                static.copy_(given)
            self._filled = graph
        for name, static in graph.step_inputs.items():
            static.copy_(steps[name])
        graph.replay()
        return self._blocks.as_output(graph.output.clone(), arguments)

    def _capture(self, arguments: dict[str, Any], steps: dict[str, Tensor], text: Tensor, at: Any) -> _Graph:
        # What is made here outlives the call, so its inference mode must not mark it.
        with torch.inference_mode(False), torch.no_grad():
            steps, text, at = {name: x.clone() for name, x in steps.items()}, text.clone(), at.clone()
            static = {**steps, self._blocks.PICTURE_INPUT: text, "at": at, "return_dict": False}
            replay, output = self._record(self._forward, arguments | static)
        return _Graph(replay, steps, (text, *at.tensors), output, self._weights())

    def _remember(self, key: Any, graph: _Graph | None) -> None:
        self._graphs[key] = graph
        while len(self._graphs) > self._keep:
            self._graphs.popitem(last=False)

    def _weights(self) -> tuple[int, ...]:
        # Asked with every picture; `parameters()` and `buffers()` take twice as long.
        owners = (vars(module) for module in self._transformer.modules())
        tensors = (tensor for own in owners for tensor in (*own["_parameters"].values(), *own["_buffers"].values()))
        return tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)


def _record(forward: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Callable[[], None], Tensor]:
    graph, device = torch.cuda.CUDAGraph(), next(x.device for x in arguments.values() if isinstance(x, Tensor))
    # Thread-local: in a batch, other threads wait for events of the pictures before, which a global capture forbids.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output: Tensor = forward(**arguments)[0]
    return graph.replay, output
