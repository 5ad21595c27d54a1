"""torchao: fp8 and int8 linears as tensor subclasses that torch.compile sees through."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ernie_accel.transforms.quantize.backend import Backend, Scheme


class TorchAO(Backend):
    """Quantize with ``torchao.quantization.quantize_``, one layer at a time."""

    name: ClassVar[str] = "torchao"
    package: ClassVar[str] = "torchao"
    schemes: ClassVar[tuple[str, ...]] = ("fp8", "fp8-weight-only", "int8", "int8-weight-only")

    def layer_problem(self, scheme: Scheme, linear: torch.nn.Linear) -> str | None:
        if type(linear.weight) is not torch.nn.Parameter:
            return "its weight is quantized already"
        if linear.in_features % 16 or linear.out_features % 16:
            return f"its shape {linear.out_features} x {linear.in_features} is no multiple of 16"
        return None

    def quantize(self, scheme: Scheme, linear: torch.nn.Linear) -> None:
        from torchao.quantization import quantize_

        quantize_(linear, _config(scheme.name))


def _config(scheme: str) -> Any:
    from torchao import quantization as ao

    if scheme == "fp8":
        # set_inductor_config would switch coordinate-descent tuning on for the whole process.
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)
    if scheme == "fp8-weight-only":
        return ao.Float8WeightOnlyConfig(set_inductor_config=False)
    if scheme == "int8":
        return ao.Int8DynamicActivationInt8WeightConfig(version=2)
    return ao.Int8WeightOnlyConfig(version=2)
