"""Render batches somewhere: in this process, in a child process, on image servers, or on Ray.

base     the interface: `Engine`, `Request`, what can go wrong
local    a pipeline in this process
process  a pipeline in a child process, which a hung step or a crash cannot take the job down with
http     image servers that speak the OpenAI images API: SGLang, vLLM-Omni
ray      Ray actors, each with a pipeline of its own
"""

from __future__ import annotations

from ernie_accel.batch.engines.base import (
    BatchTimeoutError,
    Engine,
    EngineLostError,
    Outcome,
    Request,
    WorkerLostError,
)
from ernie_accel.batch.engines.local import LocalEngine

__all__ = [
    "BatchTimeoutError",
    "Engine",
    "EngineLostError",
    "LocalEngine",
    "Outcome",
    "Request",
    "WorkerLostError",
]
