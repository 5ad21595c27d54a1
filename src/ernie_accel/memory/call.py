"""What a user will ask of a pipe, as far as memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_accel.common.language import said


@dataclass(frozen=True)
class Call:
    """A call of a pipeline.

    Attributes:
        width: Of the pictures, in pixels.
        height: Of the pictures, in pixels.
        pictures: How many at once.
        guidance: Whether each is denoised twice, with and without its prompt; None: as `CallDefaults` says.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens that the prompt enhancer writes, where there is one.
    """

    width: int = 1024
    height: int = 1024
    pictures: int = 1
    guidance: bool | None = None
    prompt_tokens: int = 256
    new_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("width", "height", "pictures", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def rows(self) -> int:
        """Rows that are encoded, and denoised at each step."""
        return self.pictures * (2 if self.guidance else 1)

    def __str__(self) -> str:
        return str(self.said())

    def said(self) -> str:
        """Return what is asked for as a message, which can be translated."""
        return said(
            "{pictures} of {width}x{height}, {tokens} tokens{guided}",
            pictures=said("{count} pictures", count=self.pictures) if self.pictures > 1 else said("a picture"),
            width=self.width,
            height=self.height,
            tokens=self.prompt_tokens,
            guided=said(", with guidance") if self.guidance else "",
        )
