"""The one table of hardware: what is known of each device without having it here, and where that comes from.

`Context.named`, presets by device name, ``recommend`` and the benchmarks read it; `register_hardware` adds to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from ernie_accel.core.errors import UnknownNameError, closest

GIB = 2**30

Evidence = Literal["measured", "published", "none"]

#: Words in a driver's name for a device that make it another one than the row its name begins with.
_VARIANTS = frozenset({"Ti", "SUPER", "Laptop"})


@dataclass(frozen=True)
class Rates:
    """How fast a device is, by one source. None: the source does not say.

    Attributes:
        evidence: "published" are peaks by the vendor, "measured" what a device sustained.
        source: Who says so, or the file with the measurement.
        bandwidth_tb_s: Device memory, TB/s; measured: by a copy, counting what is read and what is written.
        bf16_tflops: Dense products in bfloat16, accumulated in float32.
        fp16_tflops: Dense products in float16, accumulated in float32.
        fp8_tflops: Dense products in float8, accumulated in float32.
        int8_tops: Dense products in int8.
    """

    evidence: Evidence
    source: str
    bandwidth_tb_s: float | None = None
    bf16_tflops: float | None = None
    fp16_tflops: float | None = None
    fp8_tflops: float | None = None
    int8_tops: float | None = None

    def __post_init__(self) -> None:
        if self.evidence not in ("measured", "published") or not self.source:
            raise ValueError(
                f"rates are 'measured' or 'published', by a named source; got {self.evidence!r} by {self.source!r}"
            )
        for name, value in self.known().items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")

    def known(self) -> dict[str, float]:
        """Return the rates that the source gives, by attribute name."""
        names = ("bandwidth_tb_s", "bf16_tflops", "fp16_tflops", "fp8_tflops", "int8_tops")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Hardware:
    """One row of the table.

    Attributes:
        key: What `Context.named`, ``--device`` and ``preset=`` find it by, as "rtx3060": `device_key` of itself.
        name: As its driver writes it; drivers may add to it ("NVIDIA H100 80GB HBM3").
        device: torch device type: "cuda", "npu", "cpu".
        capability: CUDA compute capability (major, minor); None for other devices.
        memory_bytes: Memory of the device; None if it varies.
        source: Where the capability and the memory come from.
        rates: How fast it is, one entry a source.
        preset: Name of the preset it should run; None: what ``recommend`` finds by capability.
        why: Why this preset: the evidence in words, or that there is none.
        evidence: What `why` rests on.
    """

    key: str
    name: str
    device: str = "cuda"
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    source: str = field(kw_only=True)
    rates: tuple[Rates, ...] = ()
    preset: str | None = None
    why: str = ""
    evidence: Evidence = "none"

    def __post_init__(self) -> None:
        if not self.key or device_key(self.key) != self.key:
            raise ValueError(
                f"key={self.key!r} would not be found by what people write: use {device_key(self.key or self.name)!r}"
            )
        if not self.name.strip():
            raise ValueError(f"{self.key}: name must be the device's name as its driver writes it, got {self.name!r}")
        if (self.device == "cuda") != (self.capability is not None):
            raise ValueError(
                f"{self.key}: a CUDA device has a capability, as in (8, 6), and no other device does; "
                f"got device={self.device!r} with capability={self.capability!r}"
            )
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise ValueError(f"{self.key}: memory_bytes must be above 0, got {self.memory_bytes!r}")
        if not self.source.strip():
            raise ValueError(f"{self.key}: say where the capability and the memory come from (source=...)")
        if self.evidence not in get_args(Evidence):
            raise ValueError(f"{self.key}: evidence is one of {', '.join(get_args(Evidence))}, got {self.evidence!r}")
        if self.preset is not None and not self.why:
            raise ValueError(f"{self.key}: say why it should run preset {self.preset!r} (why=...)")

    def published(self) -> Rates | None:
        """Return what its vendor publishes of its speed; None if nothing is known."""
        return next((rates for rates in self.rates if rates.evidence == "published"), None)

    def is_called(self, device_name: str) -> bool:
        """Return whether a driver that says `device_name` means this device. Ti, SUPER and laptop ones are others."""
        rest = device_name.removeprefix(self.name)
        return device_name.startswith(self.name) and not rest[:1].isalnum() and not _VARIANTS & set(rest.split())


def device_key(name: str) -> str:
    """Return what people write for a device ("NVIDIA GeForce RTX 4090") in the way of the table's keys."""
    key = re.sub(r"[\s_-]", "", name.lower())
    return re.sub(r"^(nvidia|huawei)?(geforce)?(rtx(?=a\d))?", "", key)


def hardware_named(name: str, note: str = "") -> Hardware:
    """Return the row of a device by its key, its name, or what people write for it.

    Raises:
        UnknownNameError: There is no such row.
    """
    key = device_key(name)
    for row in HARDWARE.values():
        if key in (row.key, device_key(row.name)):
            return row
    raise UnknownNameError("device", name, HARDWARE, note=note, suggestion=closest(key, HARDWARE))


def hardware_called(device_name: str) -> Hardware | None:
    """Return the row of a device by what its driver calls it, the most particular one; None if there is none."""
    fitting = [row for row in HARDWARE.values() if row.is_called(device_name)]
    return max(fitting, key=lambda row: len(row.name), default=None)


def add_row(row: Hardware) -> None:
    """Add a row for this process; the same one again changes nothing.

    Raises:
        ValueError: Another row has its key or its name.
    """
    for other in HARDWARE.values():
        if other != row and {other.key, device_key(other.name)} & {row.key, device_key(row.name)}:
            raise ValueError(f"{row.key!r} ({row.name}) is in the table already, and differs: {other!r}")
    _ROWS[row.key] = row


def _cuda(
    key: str,
    name: str,
    capability: tuple[int, int],
    gib: int,
    rates: tuple[Rates, ...],
    preset: str | None = None,
    why: str = "",
    evidence: Evidence = "none",
) -> Hardware:
    source = "published by NVIDIA"
    return Hardware(
        key,
        f"NVIDIA {name}",
        "cuda",
        capability,
        gib * GIB,
        source=source,
        rates=rates,
        preset=preset,
        why=why,
        evidence=evidence,
    )


def _peaks(source: str, tb_s: float, **rates: float) -> tuple[Rates, ...]:
    return (Rates("published", source, bandwidth_tb_s=tb_s, **rates),)


_OWN = (
    Hardware("cpu", "cpu", "cpu", source="CPUs differ: nothing is assumed"),
    _cuda(
        "v100", "V100", (7, 0), 32,
        rates=_peaks("NVIDIA V100 datasheet, SXM2", 0.9, fp16_tflops=125),
    ),
    _cuda(
        "t4", "T4", (7, 5), 16,
        rates=_peaks("NVIDIA T4 datasheet", 0.32, fp16_tflops=65, int8_tops=130),
    ),
    _cuda(
        "a100", "A100", (8, 0), 80,
        rates=_peaks("NVIDIA A100 datasheet, SXM 80 GB", 2.039, bf16_tflops=312, fp16_tflops=312, int8_tops=624),
        preset="turbo-bf16", why="has the memory for bf16; whether int8 is faster here nobody has published",
    ),
    _cuda(
        "a6000", "RTX A6000", (8, 6), 48,
        rates=_peaks("NVIDIA RTX A6000 datasheet", 0.768, bf16_tflops=154.8, fp16_tflops=154.8, int8_tops=309.7),
        preset="turbo-int8", why="the same architecture as the RTX 3090, where int8 takes 0.56 of the time",
    ),
    _cuda(
        "rtx3060", "GeForce RTX 3060", (8, 6), 12, rates=_peaks("NVIDIA's product page", 0.36),
        preset="turbo-int8", why="published: bf16 43 s, fp8 28.7 s, int8 14.4 s", evidence="published",
    ),
    _cuda(
        "rtx3090", "GeForce RTX 3090", (8, 6), 24,
        rates=_peaks("NVIDIA GA102 whitepaper", 0.936, bf16_tflops=71, fp16_tflops=71, int8_tops=284),
        preset="turbo-int8",
        why="published: bf16 12.4 s, fp8 12.7 s (no fp8 units), int8 7.0 s", evidence="published",
    ),
    _cuda(
        "rtx4060", "GeForce RTX 4060", (8, 9), 8, rates=_peaks("NVIDIA's product page", 0.272),
        preset="turbo-q4",
        why="in 8 bits the transformer alone (8 GB) fills the card; nothing is published",
    ),
    _cuda(
        "rtx4090", "GeForce RTX 4090", (8, 9), 24,
        rates=_peaks(
            "NVIDIA Ada whitepaper", 1.008, bf16_tflops=165.2, fp16_tflops=165.2, fp8_tflops=330.3, int8_tops=660.6
        ),
        preset="turbo-fp8", why="multiplies in fp8; nothing is published for this card",
    ),
    _cuda(
        "l40s", "L40S", (8, 9), 48,
        rates=_peaks("NVIDIA L40S datasheet", 0.864, bf16_tflops=362, fp16_tflops=362, fp8_tflops=733, int8_tops=733),
    ),
    _cuda(
        "h100", "H100", (9, 0), 80,
        rates=_peaks(
            "NVIDIA H100 datasheet, SXM", 3.35, bf16_tflops=989.4, fp16_tflops=989.4, fp8_tflops=1978.9,
            int8_tops=1978.9,
        ),
        preset="turbo-fp8",
        why="measured on an H200: a step of the stock model takes 95 ms in fp8 and 134 ms in bf16, both compiled",
        evidence="measured",
    ),
    _cuda(
        "h200", "H200", (9, 0), 141,
        rates=(
            *_peaks(
                "NVIDIA H200 datasheet, SXM", 4.8, bf16_tflops=989.4, fp16_tflops=989.4, fp8_tflops=1978.9,
                int8_tops=1978.9,
            ),
            Rates(
                "measured", "benchmarks/results/ladder_by_lengths_h200_202611.json",
                bandwidth_tb_s=4.2, bf16_tflops=674.9, fp8_tflops=1308.2,
            ),
        ),
    ),
    _cuda(
        "b200", "B200", (10, 0), 180,
        rates=_peaks("NVIDIA HGX B200 datasheet", 8.0, bf16_tflops=2250, fp16_tflops=2250, fp8_tflops=4500),
    ),
    _cuda(
        "rtx5090", "GeForce RTX 5090", (12, 0), 32,
        rates=_peaks(
            "NVIDIA RTX Blackwell whitepaper", 1.792, bf16_tflops=209.5, fp16_tflops=209.5, fp8_tflops=419,
            int8_tops=838,
        ),
    ),
    Hardware(
        "ascend910b", "Ascend 910B", "npu", None, 64 * GIB, source="published by Huawei",
        preset="npu-bf16",
        why="masks as its kernels take them; no quantized kernels are known to work through diffusers here",
    ),
)  # fmt: skip

_ROWS: dict[str, Hardware] = {row.key: row for row in _OWN}
#: All rows by key. Seconds in a row's `why` are of one ERNIE-Image-Turbo picture at 1024x1024 in 8 steps.
HARDWARE: Mapping[str, Hardware] = MappingProxyType(_ROWS)
