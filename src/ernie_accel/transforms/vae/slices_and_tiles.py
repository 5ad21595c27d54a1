"""Decode pictures piece by piece, so that the VAE's peak memory stays small."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ernie_accel.common.language import said
from ernie_accel.core.components import Pipeline
from ernie_accel.core.context import Context
from ernie_accel.core.transform import Applied, Effect, Phase, Preview, Transform
from ernie_accel.core.undo import Undo


@dataclass(frozen=True, repr=False)
class SliceVae(Transform):
    """Decode a batch one picture at a time. The peak memory of a batch falls to that of one picture.

    Another batch size may select other convolution kernels, so the effect is rounding, not exact.

    Pays:
        For batches of large pictures whose decoding runs out of memory. A single picture gains nothing.
    """

    phase: ClassVar[Phase] = Phase.MEMORY
    slot: ClassVar[str] = "vae-slicing"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        return _vae_lacks(pipe, "use_slicing", "slicing")

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        return _preview(pipe, {"use_slicing": True})

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        return _apply(pipe, {"use_slicing": True})


@dataclass(frozen=True, repr=False)
class TileVae(Transform):
    """Decode a picture in overlapping tiles that are blended. The peak memory falls to that of one tile.

    Group normalisation sees one tile at a time, so colours may differ a little between tiles. Pictures no larger than
    a tile are not touched.

    PSNR against the same latents decoded untiled, on the embedded model with an overlap of 0.25, the worse of two
    pictures: 20.4 dB with 2x2 tiles of 32 pixels (4 latents, the minimum), 26.6 dB with 64-pixel tiles at 128x128, and
    30.6 dB with 96-pixel tiles. At the seams, single pixels differ by up to half of the range, so small tiles are a
    last resort.

    Pays:
        For pictures whose decoding runs out of memory, for example above 1024x1024. Use the largest tile that fits.

    Attributes:
        tile_px: Side of a tile in pixels, a multiple of the VAE's scale factor; None keeps the VAE's own.
        overlap: Fraction of a tile that overlaps its neighbour, 0 < overlap < 1.
    """

    phase: ClassVar[Phase] = Phase.MEMORY
    slot: ClassVar[str] = "vae-tiling"
    effect: ClassVar[Effect] = Effect.LOSSY

    tile_px: int | None = field(default=None, kw_only=True)
    overlap: float = field(default=0.25, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.overlap < 1:
            raise ValueError(f"overlap must be between 0 and 1, got {self.overlap}")
        if self.tile_px is not None and self.tile_px <= 0:
            raise ValueError(f"tile_px must be > 0, got {self.tile_px}")

    @property
    def floor_db(self) -> float:
        """PSNR of the decoded picture against the untiled one; earned on the embedded model with 2x2 tiles."""
        return 20.0

    def unsupported(self, pipe: Pipeline, context: Context) -> list[str]:
        reasons = _vae_lacks(pipe, "use_tiling", "tiling")
        if reasons:
            return reasons
        if self.tile_px is None:
            return self._overlap_unsupported(pipe)
        if not hasattr(pipe.vae, "tile_sample_min_size"):
            return [
                said("{vae} has no single tile size; leave tile_px out to use its own", vae=type(pipe.vae).__name__)
            ]
        factor = _pixels_per_latent(pipe)
        if factor is None:
            return [
                said("{vae} does not say how many pixels a latent has; leave tile_px out", vae=type(pipe.vae).__name__)
            ]
        if self.tile_px % factor:
            below = self.tile_px - self.tile_px % factor
            return [
                said(
                    "tile_px={tile_px} is not a multiple of the {factor} pixels of a latent: use {fits}",
                    tile_px=self.tile_px,
                    factor=factor,
                    fits=below or factor,
                )
            ]
        return self._overlap_unsupported(pipe)

    def _overlap_unsupported(self, pipe: Pipeline) -> list[str]:
        """Return the reason if tiles would overlap by a part of a latent: pictures would change their size."""
        if not hasattr(pipe.vae, "tile_overlap_factor"):
            return []
        tile = self._settings(pipe).get("tile_latent_min_size", pipe.vae.tile_latent_min_size)
        if (tile * self.overlap).is_integer():
            return []
        whole = min(max(1, round(tile * self.overlap)), tile - 1) / tile
        found = said(
            "overlap={overlap:g} of a tile of {tile} latents is {overlapping:g} latents",
            overlap=self.overlap,
            tile=tile,
            overlapping=tile * self.overlap,
        )
        return [
            said(
                "{found}, which is not whole, so that pictures would change their size: use overlap={whole:g}",
                found=found,
                whole=whole,
            )
        ]

    def preview(self, pipe: Pipeline, context: Context) -> Preview:
        return _preview(pipe, self._settings(pipe))

    def apply(self, pipe: Pipeline, context: Context) -> Applied:
        return _apply(pipe, self._settings(pipe))

    def _settings(self, pipe: Pipeline) -> dict[str, Any]:
        settings: dict[str, object] = {"use_tiling": True}
        if hasattr(pipe.vae, "tile_overlap_factor"):
            settings["tile_overlap_factor"] = self.overlap
        if self.tile_px is not None:
            settings["tile_sample_min_size"] = self.tile_px
            settings["tile_latent_min_size"] = self.tile_px // (_pixels_per_latent(pipe) or 1)
        return settings


def _pixels_per_latent(pipe: Pipeline) -> int | None:
    """Return how many pixels one latent of the VAE covers along a side (each level but the last halves), if known."""
    config = pipe.vae.config
    levels = next((config[name] for name in ("block_out_channels", "ch_mult") if name in config), None)
    return None if levels is None else int(2 ** (len(levels) - 1))


def _vae_lacks(pipe: Pipeline, switch: str, what: str) -> list[str]:
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return [said("{pipe} has no component 'vae'", pipe=type(pipe).__name__)]
    return [] if hasattr(vae, switch) else [said("{vae} cannot do {what}", vae=type(vae).__name__, what=what)]


def _preview(pipe: Pipeline, settings: dict[str, object]) -> Preview:
    changes = _changes(pipe, settings)
    return Preview(changes, note="" if changes else said("the VAE has these settings already"))


def _apply(pipe: Pipeline, settings: dict[str, object]) -> Applied:
    changes = _changes(pipe, settings)
    with Undo() as undo:
        for name, value in settings.items():
            undo.setattr(pipe.vae, name, value)
    return Applied(changes, undo=undo)


def _changes(pipe: Pipeline, settings: dict[str, object]) -> tuple[str, ...]:
    old = {name: getattr(pipe.vae, name) for name in settings}
    return tuple(f"vae.{name} {old[name]} -> {new}" for name, new in settings.items() if old[name] != new)
