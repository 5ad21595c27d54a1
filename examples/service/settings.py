"""What the service is asked to be: environment variables with the prefix SERVICE_, all of them optional."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from ernie_accel.core.errors import ErnieAccelError

PREFIX = "SERVICE_"

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]


class Settings(BaseModel):
    """All settings; `SERVICE_MAX_QUEUE=128` sets `max_queue`.

    Attributes:
        model: Hub id or folder, as `ernie_accel.load` takes it; None: the embedded model.
        served_name: What requests call the model; None: the last part of `model`.
        preset: A preset, or "auto".
        memory: Device memory to use: "auto", "12GiB", "-2GiB".
        enhancer: Whether the pipe's prompt enhancer is used.
        host: Where to listen.
        port: The port.
        api_key: What requests must carry as a bearer token; None: nothing.
        batch_size: Pictures rendered together; None: tuned as the service runs.
        max_queue: Pictures that may wait; more are refused with 429.
        timeout_s: Seconds for a request, from its last byte to the picture; then 504.
        body_s: Seconds that a client has to send its request (then 408), its head, or to read on (then it is cut off).
        drain_s: Seconds that requests have to finish once the service is to stop.
        connections: Connections at once; more are refused with 503.
        max_json_bytes: Of a request in JSON.
        max_upload_bytes: Of a request with pictures.
        max_upload_pixels: Of a picture in a request.
        max_prompt: Characters of a prompt, or a negative one.
        max_n: Pictures of a request.
        max_pixels: Width times height.
        max_steps: Denoising steps.
        max_guidance: Guidance scale.
        multiple: What width and height must be a multiple of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: Name | None = None
    served_name: Name | None = None
    preset: str = "auto"
    memory: str = "auto"
    enhancer: bool = True
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: Annotated[SecretStr, Field(min_length=1)] | None = None
    batch_size: Count | None = None
    max_queue: Count = 64
    timeout_s: Seconds = 120.0
    body_s: Seconds = 30.0
    drain_s: Seconds = 60.0
    connections: Count = 256
    max_json_bytes: Count = 2**18
    max_upload_bytes: Count = 2**24
    max_upload_pixels: Count = 2**24
    max_prompt: Count = 4000
    max_n: Count = 4
    max_pixels: Count = 1536 * 1536
    max_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    max_guidance: Annotated[float, Field(ge=0, le=100)] = 20.0
    multiple: Count = 16

    @property
    def name(self) -> str:
        """What requests call the model; no folder of this machine."""
        return self.served_name or PurePath(self.model or "ernie-image-embedded").name

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings:
        """Return what the environment says.

        Raises:
            ErnieAccelError: With every variable that is unknown or out of range; an API key is never shown.
        """
        given = {name[len(PREFIX) :].lower(): value for name, value in environment.items() if name.startswith(PREFIX)}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
            lines = [f"  {PREFIX}{'_'.join(map(str, each['loc'])).upper()}: {_reason(each)}" for each in problems]
            known = ", ".join(f"{PREFIX}{name.upper()}" for name in cls.model_fields)
            raise ErnieAccelError("\n".join(["Cannot start the service:", *lines, f"Known are {known}"])) from None


def _reason(problem: Mapping[str, object]) -> str:
    if problem["type"] == "extra_forbidden":
        return "there is no such setting"
    shown = "" if "api_key" in str(problem["loc"]) else f"{problem['input']!r}: "
    return f"{shown}{problem['msg']}"
