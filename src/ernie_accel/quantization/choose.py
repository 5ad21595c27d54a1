"""Choose scheme and backend by hardware, and explain the choice: every candidate with every reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ernie_accel.common.text import table
from ernie_accel.core.context import Context
from ernie_accel.core.errors import UnknownNameError
from ernie_accel.quantization.backend import SCHEMES, QuantizationBackend, Scheme, add_scheme
from ernie_accel.quantization.bitsandbytes import BitsAndBytes
from ernie_accel.quantization.gguf import Gguf
from ernie_accel.quantization.layerwise import Layerwise
from ernie_accel.quantization.quanto import Quanto
from ernie_accel.quantization.torchao import TorchAO

_backends: dict[str, QuantizationBackend] = {
    backend.name: backend for backend in (TorchAO(), BitsAndBytes(), Quanto(), Gguf(), Layerwise())
}
#: All backends by name, the preferred first: torchao's layers compile best, layerwise casting has no scales.
#: Registered backends come last.
BACKENDS: Mapping[str, QuantizationBackend] = MappingProxyType(_backends)
#: What ``Quantize("auto")`` tries, the fastest first. Weight-only schemes save bytes and, uncompiled, cost time.
AUTO_SCHEMES = ("nvfp4", "fp8", "int8", "int8-weight-only", "fp8-weight-only")
AUTO = "auto"


def register_quantization_backend(backend: QuantizationBackend, *schemes: Scheme) -> QuantizationBackend:
    """Let ``Quantize`` use a backend of your own, for this process; return it.

    Args:
        backend: The backend; `ernie_accel.testing.check_backend` says whether it keeps its promises.
        *schemes: Schemes of it that the library does not know yet.

    Raises:
        TypeError: It is no `QuantizationBackend`.
        ValueError: Another backend or scheme of that name is known, or it names an unknown scheme.
    """
    if not isinstance(backend, QuantizationBackend):
        raise TypeError(f"expected a QuantizationBackend, got {backend!r}")
    known = _backends.get(backend.name)
    if known is not None and type(known) is not type(backend):
        raise ValueError(f"a quantization backend named {backend.name!r} is registered already: choose another name")
    for scheme in schemes:
        if SCHEMES.get(scheme.name, scheme) != scheme:
            raise ValueError(f"a scheme named {scheme.name!r} is registered already, and differs: choose another name")
    described = {*SCHEMES, *(scheme.name for scheme in schemes)}
    missing = [name for name in backend.schemes if name not in described]
    if missing:
        raise ValueError(f"{backend.name} has unknown schemes {', '.join(missing)}: pass a Scheme for each, too")
    for scheme in schemes:
        add_scheme(scheme)
    _backends.setdefault(backend.name, backend)
    return _backends[backend.name]


@dataclass(frozen=True)
class Candidate:
    """One way to quantize on one machine.

    Attributes:
        scheme: Name of the scheme.
        backend: Name of the backend.
        reasons: Why it cannot run there; empty if it can.
    """

    scheme: str
    backend: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The choice and all candidates; printable.

    Attributes:
        context: The machine.
        candidates: All candidates, the preferred first.
    """

    context: Context
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate | None:
        """The first candidate that can run; None if none can."""
        return next((candidate for candidate in self.candidates if not candidate.reasons), None)

    @property
    def reasons(self) -> list[str]:
        """Why nothing could be chosen, every candidate's reasons once; empty if something was."""
        if self.chosen is not None:
            return []
        return list(dict.fromkeys(reason for candidate in self.candidates for reason in candidate.reasons))

    def __str__(self) -> str:
        rows = []
        for candidate in self.candidates:
            verdict = "; ".join(candidate.reasons) or ("chosen" if candidate is self.chosen else "would do")
            rows.append((candidate.scheme, candidate.backend, verdict))
        return f"Quantization on {self.context}\n" + table(("scheme", "backend", "verdict"), rows)

    __repr__ = __str__


def choose(scheme: str, backend: str, context: Context) -> Choice:
    """Check every backend that has the scheme, the preferred first.

    Args:
        scheme: A key of `SCHEMES`; "auto" tries `AUTO_SCHEMES`.
        backend: A key of `BACKENDS`, or "auto" for all.
        context: The machine.
    """
    schemes = AUTO_SCHEMES if scheme == AUTO else (scheme,)
    pairs = [
        (name, candidate)
        for name in schemes
        for candidate in (BACKENDS.values() if backend == AUTO else (BACKENDS[backend],))
        if name in candidate.schemes or (backend != AUTO and scheme != AUTO)
    ]
    # On a CPU int8 is slower: the activations have to be quantized first.
    if scheme == AUTO and context.device == "cpu":
        pairs.sort(key=lambda pair: pair[0] in ("nvfp4", "fp8", "int8"))
    return Choice(context, tuple(Candidate(name, b.name, tuple(b.unsupported(name, context))) for name, b in pairs))


def check_names(scheme: str, backend: str) -> None:
    """Refuse unknown names; list the valid ones, and those that can run on this machine.

    Raises:
        UnknownNameError: There is no such scheme or backend, or the backend does not have the scheme.
    """
    if backend not in (AUTO, *BACKENDS):
        machine = Context.detect()
        here = [b.name for b in BACKENDS.values() if any(not b.unsupported(name, machine) for name in b.schemes)]
        raise UnknownNameError("backend", backend, (AUTO, *BACKENDS), note=f"This machine can run {', '.join(here)}.")
    if scheme == AUTO:
        return
    if scheme not in SCHEMES:
        here = [name for name in SCHEMES if choose(name, AUTO, Context.detect()).chosen is not None]
        raise UnknownNameError("scheme", scheme, (AUTO, *SCHEMES), note=f"This machine can run {', '.join(here)}.")
    if backend != AUTO and scheme not in BACKENDS[backend].schemes:
        have = [name for name, candidate in BACKENDS.items() if scheme in candidate.schemes]
        note = f"{scheme} is available from {', '.join(have)}."
        raise UnknownNameError(f"scheme of {backend}", scheme, BACKENDS[backend].schemes, note=note)
