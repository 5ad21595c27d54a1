"""The table of hardware: what is known about each device without having it here, with the sources.

`Context.named`, presets by device name, ``recommend`` and the benchmarks read it; `register_hardware` adds to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from ernie_accel.common.language import said
from ernie_accel.core.errors import UnknownNameError, closest

GIB = 2**30

Evidence = Literal["measured", "published", "none"]

#: Words in a driver's name for a device that make it a different device from the row that its name begins with.
_VARIANTS = frozenset({"Ti", "SUPER", "Laptop", "D", "NVL"})

#: GB/s that a lane of each PCIe generation sustains from pinned host memory: 80 to 87 % of what its signals carry.
_LANE_GB_S = {3: 0.75, 4: 1.5625, 5: 3.4375}

#: What people, drivers and torch call GPUs of AMD, Apple and Intel, without spaces.
_OTHER_VENDORS = {
    "rocm": re.compile(r"amd|radeon|instinct|rocm|^hip|^gfx\d|^mi\d{2,3}[ax]?|^(rx|vega|w)\d{2,4}(xtx?|gre)?$"),
    "mps": re.compile(r"apple|metal|^mps|^m\d(pro|max|ultra)?$"),
    "xpu": re.compile(r"intel|xpu|^arc|^iris|^[ab](310|350|380|5[78]0|60|770)m?$"),
}

_SIZE_IN_NAME = re.compile(r"(\d+) ?gb", re.IGNORECASE)


@dataclass(frozen=True)
class Rates:
    """How fast a device is, by one source. None: the source does not say.

    Attributes:
        evidence: "published" for the vendor's peaks, "measured" for what a device sustained.
        source: Who says so, or the file with the measurement.
        bandwidth_tb_s: Device memory, TB/s; measured: by a copy, counting what is read and what is written.
        bf16_tflops: Dense products in bfloat16, accumulated in float32. GeForce cards are twice as fast in float16
            accumulated in float16, and data sheets often print the rate of sparse products, twice the dense one.
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
        driver_names: What else a driver calls it: Ascend's names the bin of the chip, too, as "Ascend910B3".
        device: torch device type: "cuda", "npu", "cpu".
        capability: CUDA compute capability (major, minor); None for other devices.
        memory_bytes: Memory of the device, as its vendor says; None if it varies.
        usable_bytes: What torch reports of it at least: error correction and the driver take 1 to 9 %; None: unknown.
        pcie: Generation and lanes of its PCIe link, as (4, 16); None: unknown, or it has none.
        host_gb_s: What it reads from pinned host memory, GB/s; left out, what a link such as `pcie` sustains.
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
    driver_names: tuple[str, ...] = field(default=(), kw_only=True)
    usable_bytes: int | None = field(default=None, kw_only=True)
    pcie: tuple[int, int] | None = field(default=None, kw_only=True)
    host_gb_s: float | None = field(default=None, kw_only=True)
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
        if self.usable_bytes is not None and not 0 < self.usable_bytes <= (self.memory_bytes or 0):
            raise ValueError(
                f"{self.key}: usable_bytes is a part of memory_bytes={self.memory_bytes!r}, got {self.usable_bytes!r}"
            )
        if self.pcie is not None:
            if len(self.pcie) != 2 or self.pcie[0] not in _LANE_GB_S or self.pcie[1] not in (1, 2, 4, 8, 16):
                known = ", ".join(map(str, _LANE_GB_S))
                raise ValueError(
                    f"{self.key}: pcie is a generation ({known}) and 1, 2, 4, 8 or 16 lanes, as in (4, 16); "
                    f"got {self.pcie!r}"
                )
            if self.host_gb_s is None:
                object.__setattr__(self, "host_gb_s", _LANE_GB_S[self.pcie[0]] * self.pcie[1])
        if self.host_gb_s is not None and not self.host_gb_s > 0:
            raise ValueError(f"{self.key}: host_gb_s must be above 0, got {self.host_gb_s!r}")
        if not self.source.strip():
            raise ValueError(f"{self.key}: say where the capability and the memory come from (source=...)")
        if self.evidence not in get_args(Evidence):
            raise ValueError(f"{self.key}: evidence is one of {', '.join(get_args(Evidence))}, got {self.evidence!r}")
        if self.preset is not None and not self.why:
            raise ValueError(f"{self.key}: say why it should run preset {self.preset!r} (why=...)")

    def published(self) -> Rates | None:
        """Return what its vendor publishes about its speed; None if nothing is known."""
        return next((rates for rates in self.rates if rates.evidence == "published"), None)

    def is_called(self, device_name: str) -> bool:
        """Return whether a driver that reports `device_name` means this device, and not its Ti or laptop variant."""
        if device_name in self.driver_names:
            return True
        rest = device_name.removeprefix(self.name)
        return device_name.startswith(self.name) and not rest[:1].isalnum() and not _VARIANTS & set(rest.split())


def device_key(name: str) -> str:
    """Return what people write for a device ("NVIDIA GeForce RTX 4090") in the form of the table's keys."""
    key = re.sub(r"[\s_-]", "", name.lower())
    return re.sub(r"^(nvidia|huawei)?(tesla)?(geforce)?(rtx(?=a\d))?", "", key)


def hardware_named(name: str, note: str = "") -> Hardware:
    """Return the row of a device by its key, its name, or what people write for it.

    If cards differ only in memory, "RTX 4060 Ti 16GB" names one of them, and "RTX 4060 Ti" the first in the table.

    Raises:
        UnknownNameError: There is no such row.
    """
    key = device_key(name)
    base, memory = device_key(_SIZE_IN_NAME.sub("", name)), _memory_in(name)
    for row in HARDWARE.values():
        keys = (row.key, *map(device_key, (row.name, *row.driver_names)))
        if key in keys or f"ascend{key}" in keys:  # npu-smi writes "910B3"
            return row
    for row in HARDWARE.values():
        if memory is not None and row.memory_bytes == memory and base in (row.key, device_key(row.name)):
            return row
    begun = max((known for known in HARDWARE if len(known) > 3 and key.startswith(known)), key=len, default=None)
    suggestion = "" if is_other_vendors(name) else begun or closest(key, HARDWARE)
    raise UnknownNameError("device", name, HARDWARE, note=f"{note} {_instead(name)}".strip(), suggestion=suggestion)


def _instead(name: str) -> str:
    """Say how to name a device that is not in the table."""
    kind = other_vendors_device(name)
    if kind is not None:
        return f"{name!r} is one of these: write {kind!r} (--device {kind})."
    return (
        "A card that is not in the table is described by its CUDA compute capability and memory: 'cuda:8.9:16GiB' "
        "(--device cuda:8.9:16GiB)."
    )


def is_other_vendors(name: str) -> bool:
    """Return whether a name is that of an AMD, Apple or Intel GPU: similar names of the table mean something else."""
    return other_vendors_device(name) is not None


def other_vendors_device(name: str) -> str | None:
    """Return the type of device that an AMD, Apple or Intel GPU is: "rocm", "mps" or "xpu"; None for any other name."""
    key = re.sub(r"[\s_-]", "", name.lower())
    return next((kind for kind, names in _OTHER_VENDORS.items() if names.search(key)), None)


def hardware_called(device_name: str, memory_bytes: int | None = None) -> Hardware | None:
    """Return the most specific row for the name that a driver reports; None if there is none.

    Args:
        device_name: As the driver reports it: "NVIDIA A100-SXM4-40GB", "Ascend910B3".
        memory_bytes: The memory that the driver reports. It distinguishes cards with the same name; so does a size in
            the name.
    """
    memory = memory_bytes if memory_bytes is not None else _memory_in(device_name)

    def distance(row: Hardware) -> int:
        return 0 if memory is None or row.memory_bytes is None else abs(row.memory_bytes - memory)

    fitting = [row for row in HARDWARE.values() if row.is_called(device_name)]
    return min(fitting, key=lambda row: (-len(row.name), distance(row)), default=None)


def add_row(row: Hardware) -> None:
    """Add a row for this process; the same one again changes nothing.

    Raises:
        ValueError: Another row has its key, or its name and its memory.
    """
    for other in HARDWARE.values():
        same_card = device_key(other.name) == device_key(row.name) and other.memory_bytes == row.memory_bytes
        if other != row and (row.key in (other.key, device_key(other.name)) or same_card):
            raise ValueError(f"{row.key!r} ({row.name}) is in the table already, and differs: {other!r}")
    _ROWS[row.key] = row


def _memory_in(name: str) -> int | None:
    """Return the bytes of the size that a name has in it: "A100-SXM4-40GB"."""
    found = _SIZE_IN_NAME.search(name)
    return None if found is None else int(found[1]) * GIB


def _cuda(
    key: str,
    name: str,
    capability: tuple[int, int],
    gib: tuple[int, float],
    pcie: tuple[int, int],
    rates: tuple[Rates, ...],
    preset: str | None = None,
    why: str = "",
    evidence: Evidence = "none",
) -> Hardware:
    return Hardware(
        key,
        name,
        "cuda",
        capability,
        gib[0] * GIB,
        usable_bytes=int(gib[1] * GIB),
        pcie=pcie,
        source="published by NVIDIA; usable memory: the least that out-of-memory messages of torch report",
        rates=rates,
        preset=preset,
        why=why,
        evidence=evidence,
    )


def _peaks(source: str, tb_s: float, **rates: float) -> tuple[Rates, ...]:
    return (Rates("published", source, bandwidth_tb_s=tb_s, **rates),)


def _geforce(source: str, tb_s: float, bf16: float, *, fp8: float | None = None, int8: float) -> tuple[Rates, ...]:
    return (
        Rates(
            "published", source, bandwidth_tb_s=tb_s, bf16_tflops=bf16, fp16_tflops=bf16, fp8_tflops=fp8, int8_tops=int8
        ),
    )


# For cards that no whitepaper lists, NVIDIA prints shaders, clock and "AI TOPS" alone. The rates follow from the
# whitepaper of their architecture: per shader TFLOP/s, 2 in bf16, 4 in fp8 (Ada) and 8 in int8, for every GeForce.
_FROM_SHADERS = "rates by shaders and boost clock as the architecture's whitepaper has them"
_AMPERE = f"NVIDIA's product page; {_FROM_SHADERS} (GA102)"
_ADA = f"NVIDIA's product page; {_FROM_SHADERS} (Ada)"

_FETCHES = said(
    "multiplies in fp8, and fetches blocks that do not fit while it computes, which takes longer by the published "
    "rates; nothing is published for this card"
)

_OWN = (
    Hardware("cpu", "cpu", "cpu", source="CPUs differ: nothing is assumed"),
    _cuda(
        "v100", "Tesla V100", (7, 0), (32, 31.73), (3, 16),
        rates=_peaks("NVIDIA V100 datasheet, SXM2", 0.9, fp16_tflops=125),
        preset="turbo-fp16", why=said("has no bfloat16; nothing is published for this card"),
    ),
    _cuda(
        "t4", "Tesla T4", (7, 5), (16, 14.56), (3, 16),
        rates=_peaks("NVIDIA T4 product brief", 0.32, fp16_tflops=65, int8_tops=130),
        preset="turbo-fp16", why=said("has no bfloat16; nothing is published for this card"),
    ),
    _cuda(
        "a100", "NVIDIA A100", (8, 0), (80, 79.14), (4, 16),
        rates=_peaks("NVIDIA A100 datasheet, SXM 80 GB", 2.039, bf16_tflops=312, fp16_tflops=312, int8_tops=624),
        preset="turbo-bf16", why=said("has the memory for bf16; whether int8 is faster here nobody has published"),
    ),
    _cuda(
        "a10040gb", "NVIDIA A100", (8, 0), (40, 39.38), (4, 16),
        rates=_peaks("NVIDIA A100 datasheet, 40 GB", 1.555, bf16_tflops=312, fp16_tflops=312, int8_tops=624),
        preset="turbo-bf16", why=said("has the memory for bf16; whether int8 is faster here nobody has published"),
    ),
    _cuda(
        "a100pcie", "NVIDIA A100 80GB PCIe", (8, 0), (80, 79.14), (4, 16),
        rates=_peaks("NVIDIA A100 datasheet, PCIe 80 GB", 1.935, bf16_tflops=312, fp16_tflops=312, int8_tops=624),
        preset="turbo-bf16", why=said("has the memory for bf16; whether int8 is faster here nobody has published"),
    ),
    _cuda(
        "a6000", "NVIDIA RTX A6000", (8, 6), (48, 47.4), (4, 16),
        rates=_peaks(
            "NVIDIA GA102 whitepaper, RTX A6000", 0.768, bf16_tflops=154.8, fp16_tflops=154.8, int8_tops=309.7
        ),
        preset="turbo-int8", why=said("the same architecture as the RTX 3090, where int8 takes 0.56 of the time"),
    ),
    _cuda(
        "a10g", "NVIDIA A10G", (8, 6), (24, 21.96), (4, 16),
        rates=_peaks("NVIDIA A10G datasheet", 0.6, bf16_tflops=70, fp16_tflops=70, int8_tops=140),
        preset="turbo-int8", why=said("the same architecture as the RTX 3090, where int8 takes 0.56 of the time"),
    ),
    _cuda(
        "rtx3060", "NVIDIA GeForce RTX 3060", (8, 6), (12, 11.62), (4, 16),
        rates=_geforce(_AMPERE, 0.36, 25.5, int8=101.9),
        preset="turbo-int8", why=said("published: bf16 43 s, fp8 28.7 s, int8 14.4 s"), evidence="published",
    ),
    _cuda(
        "rtx3090", "NVIDIA GeForce RTX 3090", (8, 6), (24, 23.55), (4, 16),
        rates=_geforce("NVIDIA GA102 whitepaper", 0.936, 71, int8=284),
        preset="turbo-int8",
        why=said("published: bf16 12.4 s, fp8 12.7 s (no fp8 units), int8 7.0 s"), evidence="published",
    ),
    _cuda(
        "rtx4060", "NVIDIA GeForce RTX 4060", (8, 9), (8, 7.6), (4, 8),
        rates=_geforce(_ADA, 0.272, 30.2, fp8=60.5, int8=121),
        preset="turbo-fp8",
        why=_FETCHES,
    ),
    _cuda(
        "rtx4060ti", "NVIDIA GeForce RTX 4060 Ti", (8, 9), (8, 7.6), (4, 8),
        rates=_geforce(_ADA, 0.288, 44.1, fp8=88.3, int8=176.5),
        preset="turbo-fp8",
        why=_FETCHES,
    ),
    _cuda(
        "rtx4060ti16gb", "NVIDIA GeForce RTX 4060 Ti", (8, 9), (16, 15.51), (4, 8),
        rates=_geforce(_ADA, 0.288, 44.1, fp8=88.3, int8=176.5),
        preset="turbo-fp8", why=said("multiplies in fp8; nothing is published for this card"),
    ),
    _cuda(
        "rtx4070tisuper", "NVIDIA GeForce RTX 4070 Ti SUPER", (8, 9), (16, 15.51), (4, 16),
        rates=_geforce(_ADA, 0.672, 88.2, fp8=176.4, int8=352.8),
        preset="turbo-fp8", why=said("multiplies in fp8; nothing is published for this card"),
    ),
    _cuda(
        "rtx4080", "NVIDIA GeForce RTX 4080", (8, 9), (16, 15.51), (4, 16),
        rates=_geforce("NVIDIA Ada whitepaper", 0.717, 97.5, fp8=194.9, int8=389.9),
        preset="turbo-fp8", why=said("multiplies in fp8; nothing is published for this card"),
    ),
    _cuda(
        "rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), (24, 23.51), (4, 16),
        rates=_geforce("NVIDIA Ada whitepaper", 1.008, 165.2, fp8=330.3, int8=660.6),
        preset="turbo-fp8", why=said("multiplies in fp8; nothing is published for this card"),
    ),
    _cuda(
        "rtx4090d", "NVIDIA GeForce RTX 4090 D", (8, 9), (24, 23.51), (4, 16),
        rates=_geforce(_ADA, 1.008, 147.1, fp8=294.2, int8=588.4),
        preset="turbo-fp8", why=said("multiplies in fp8; nothing is published for this card"),
    ),
    _cuda(
        "l4", "NVIDIA L4", (8, 9), (24, 21.96), (4, 16),
        rates=_peaks(
            "NVIDIA L4 datasheet, half of its rates with sparsity", 0.3, bf16_tflops=121, fp16_tflops=121,
            fp8_tflops=242.5, int8_tops=242.5,
        ),
        preset="turbo-fp8", why=said("multiplies in fp8; nothing is published for this card"),
    ),
    _cuda(
        "l40s", "NVIDIA L40S", (8, 9), (48, 44.34), (4, 16),
        rates=_peaks("NVIDIA L40S datasheet", 0.864, bf16_tflops=362, fp16_tflops=362, fp8_tflops=733, int8_tops=733),
        preset="turbo-fp8", why=said("multiplies in fp8; nothing is published for this card"),
    ),
    _cuda(
        "h100", "NVIDIA H100", (9, 0), (80, 79.1), (5, 16),
        rates=_peaks(
            "NVIDIA Hopper whitepaper, H100 SXM", 3.35, bf16_tflops=989.4, fp16_tflops=989.4, fp8_tflops=1978.9,
            int8_tops=1978.9,
        ),
        preset="turbo-fp8",
        why=said("measured on an H200: a step of the stock model takes 95 ms in fp8 and 134 ms in bf16, both compiled"),
        evidence="measured",
    ),
    _cuda(
        "h100pcie", "NVIDIA H100 PCIe", (9, 0), (80, 79.1), (5, 16),
        rates=_peaks(
            "NVIDIA H100 PCIe product brief, half of its rates with sparsity", 2.0, bf16_tflops=756.5,
            fp16_tflops=756.5, fp8_tflops=1513, int8_tops=1513,
        ),
        preset="turbo-fp8", why=said("multiplies in fp8; nothing is published for this card"),
    ),
    _cuda(
        "h100nvl", "NVIDIA H100 NVL", (9, 0), (94, 93), (5, 16),
        rates=_peaks(
            "NVIDIA H100 datasheet, NVL, half of its rates with sparsity", 3.9, bf16_tflops=835.5, fp16_tflops=835.5,
            fp8_tflops=1670.5, int8_tops=1670.5,
        ),
        preset="turbo-fp8", why=said("multiplies in fp8; nothing is published for this card"),
    ),
    _cuda(
        "h200", "NVIDIA H200", (9, 0), (141, 139.72), (5, 16),
        rates=(
            *_peaks(
                "NVIDIA H200 datasheet, SXM, half of its rates with sparsity", 4.8, bf16_tflops=989.4,
                fp16_tflops=989.4, fp8_tflops=1978.9, int8_tops=1978.9,
            ),
            Rates(
                "measured", "benchmarks/results/ladder_by_lengths_h200_202611.json",
                bandwidth_tb_s=4.2, bf16_tflops=674.9, fp8_tflops=1308.2,
            ),
        ),
        preset="turbo-fp8",
        why=said("measured: a step of the stock model takes 95 ms in fp8 and 134 ms in bf16, both compiled"),
        evidence="measured",
    ),
    _cuda(
        "b200", "NVIDIA B200", (10, 0), (180, 178.35), (5, 16),
        rates=_peaks(
            "NVIDIA HGX B200 datasheet, an eighth, half of its rates with sparsity", 8.0, bf16_tflops=2250,
            fp16_tflops=2250, fp8_tflops=4500, int8_tops=4500,
        ),
        preset="turbo-fp8", why=said("multiplies in fp8; nothing is published for this card"),
    ),
    _cuda(
        "rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), (32, 31.34), (5, 16),
        rates=_geforce("NVIDIA RTX Blackwell whitepaper", 1.792, 209.5, fp8=419, int8=838),
        preset="turbo-fp8", why=said("multiplies in fp8; nothing is published for this card"),
    ),
    Hardware(
        "ascend910b", "Ascend 910B", "npu", None, 64 * GIB, usable_bytes=int(60.97 * GIB), pcie=(4, 16),
        driver_names=("Ascend910B1", "Ascend910B2", "Ascend910B2C", "Ascend910B3", "Ascend910B4-1"),  # B4 has 32 GB
        source="users of 910B3 servers; Huawei has no data sheet of the chip",
        rates=(
            Rates(
                "published", "users of the 910B3, the slowest one with 64 GB, citing Huawei's forum; int8 in doubt",
                bandwidth_tb_s=1.6, bf16_tflops=313, fp16_tflops=313,
            ),
        ),
        preset="npu-bf16",
        why=said("masks as its kernels take them; no quantized kernels are known to work through diffusers here"),
    ),
)  # fmt: skip

_ROWS: dict[str, Hardware] = {row.key: row for row in _OWN}
#: All rows by key. Seconds in a row's `why` are of one ERNIE-Image-Turbo picture at 1024x1024 in 8 steps.
HARDWARE: Mapping[str, Hardware] = MappingProxyType(_ROWS)
