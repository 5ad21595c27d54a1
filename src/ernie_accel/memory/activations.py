"""Run a module on tensors that have shapes and no data, and count what a device would hold at most."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

#: What torch's allocator rounds every block up to, in bytes.
_BLOCK = 512


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are made while it is on, for as long as each is alive."""

    def __init__(self, known: set[int], length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._length = length
        self._live: dict[int, int] = {}
        self._known = known

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        try:
            result = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return self._length  # all that a transformer reads on the host is how long its prompts are
        if func is torch.ops.aten.convolution.default:
            self._convolve(args[0], args[1], result)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _convolve(self, x: Tensor, weight: Tensor, result: Tensor) -> None:
        """Count what cuDNN copies: its kernels take channels-last tensors."""
        if x.ndim == 4 and not weight.is_contiguous(memory_format=torch.channels_last):
            self.peak = max(self.peak, self._now + x.nbytes + 2 * result.nbytes)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._known:
            return
        self._live[key] = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._now += self._live[key]
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._now -= self._live.pop(key, 0)


def peak_of(module: nn.Module, run: Callable[[nn.Module], object], length: int = 1) -> int:
    """Return the bytes that `run` needs at most beside the weights of `module`.

    Args:
        module: Its weights may be anywhere, the meta device included; it is left as it is.
        length: Of the prompts, where the module reads such on the host.
        run: Called with a copy whose tensors have no data, to do the work; tensors that it makes have none either.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = _without_data(module, mode)
    known = {t.untyped_storage()._cdata for t in (*fake.parameters(), *fake.buffers())}
    with torch.no_grad(), mode, _Counter(known, length) as counter:
        run(fake)
    peak: int = counter.peak
    return peak


def _without_data(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of a module with tensors that have shape, dtype and strides only."""
    memo: dict[int, object] = {}
    with mode:
        for tensor in (*module.parameters(), *module.buffers()):
            memo[id(tensor)] = _like(tensor)
    return copy.deepcopy(module, memo)


def _like(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from warning about tensors without data."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
