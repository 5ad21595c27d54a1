"""Threads read a file onto a GPU: the same bits, also while the caller works on a stream of its own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ernie_accel.storage.parallel_read import BLOCK_BYTES, ParallelReader
from ernie_accel.storage.tensor_file import write_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("own_stream", [False, True])
def test_bits_arrive_on_the_gpu(own_stream, tmp_path):
    file = tmp_path / "weights.safetensors"
    large = torch.randint(0, 256, (2 * BLOCK_BYTES + 3,), dtype=torch.uint8)
    write_tensors(file, {"large": large, "matrix": torch.randn(37, 53).bfloat16(), "scalar": torch.tensor(7)})
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream), ParallelReader(file, "cuda") as reader:
        reader.start(reader.tensors)
        read = {name: reader.take(name) for name in reader.tensors}
    for name, tensor in load_file(file).items():
        assert read[name].device.type == "cuda"
        assert read[name].cpu().equal(tensor), name
