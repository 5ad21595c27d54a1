"""The error of a call that ran out of device memory; apart from the other errors, which need no torch."""

from __future__ import annotations

import torch

from ernie_accel.core.errors import ErnieAccelError


class DeviceOutOfMemoryError(ErnieAccelError, torch.OutOfMemoryError):
    """A call ran out of device memory. The pipe is as it was before the call, and works on."""
