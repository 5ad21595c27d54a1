"""Every known way in which quantizing goes wrong with the stock tools, and what happens here instead."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import ernie_accel
from ernie_accel import CastDtype, Context, Quantize
from ernie_accel.quantization.backend import LinearSpec
from ernie_accel.quantization.choose import BACKENDS
from ernie_accel.quantization.layers import sqnr_db
from tests.conftest import quanto_stand_in
from tests.pipelines import picture, tiny_ernie
from tests.test_quantize_backends import linear

OUTSIDE = "x_embedder", "text_proj", "time_embedding", "adaLN_modulation", "final_norm", "final_linear"


@pytest.mark.parametrize("scheme", ["int8-weight-only", "fp8-weight-only", "nf4"])
def test_blocks_only_beats_all_linears_by_a_factor(scheme):
    """Stock tools quantize every linear; adaLN, embedders and the final layer then cost most of the quality.

    Here by a factor of 15 to 24 in the error of the latents; on the trained model by far less, see
    test_quantize_quality.py.
    """
    pipe = tiny_ernie(layers=3)
    before = picture(pipe, output_type="latent", steps=4)
    errors = {}
    for exclude in (None, ()):
        ernie_accel.optimize(pipe, Quantize(scheme, exclude=exclude))
        errors[exclude] = (picture(pipe, output_type="latent", steps=4) - before).norm()
        ernie_accel.restore(pipe)
    assert errors[()] > 10 * errors[None]


def test_inductor_settings_stay_as_they_are(ernie):
    """torchao's default switches coordinate-descent tuning on for the whole process: first call 34 s instead of 7."""
    import torch._inductor.config as config

    before = config.coordinate_descent_tuning, config.epilogue_fusion, config.force_fuse_int_mm_with_mul
    precision = torch.get_float32_matmul_precision()
    for scheme in ("int8", "int8-weight-only", "fp8-weight-only"):
        ernie_accel.optimize(ernie, Quantize(scheme, backend="torchao"))
    after = config.coordinate_descent_tuning, config.epilogue_fusion, config.force_fuse_int_mm_with_mul
    assert after == before
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("scheme", ["fp8", "int4", "nvfp4", "mxfp8"])
def test_torchao_kernels_that_take_bfloat16_only_refuse_float32_before_anything_is_touched(scheme, ernie):
    context = Context.named("b200")
    (reason,) = Quantize(scheme, backend="torchao").unsupported(ernie, context)
    assert f"{scheme} starts from bfloat16 weights, and this is float32: add CastDtype('bfloat16')" in reason
    assert ernie_accel.plan(ernie, CastDtype("bfloat16"), Quantize(scheme), context=context).ok
    assert not ernie_accel.plan(ernie, CastDtype("float16"), Quantize(scheme), context=context).ok


def test_quanto_int8_on_the_cpu_meets_no_row_it_would_read_past():
    """torch._weight_int8pack_mm segfaults where K is not a multiple of 16."""
    problem = BACKENDS["quanto"].layer_problem("int8-weight-only", LinearSpec(64, 40, torch.bfloat16))
    assert problem == "its 40 inputs are not a multiple of 16"


def test_quanto_int4_on_the_cpu_needs_a_compiler_and_says_so(ernie):
    """It builds a C++ extension at the first use; without a compiler it would fail half-way."""
    bare = replace(Context.named("cpu"), no_compile="there is no C++ compiler")
    (reason,) = BACKENDS["quanto"].unsupported("int4", bare)
    assert "needs a C++ compiler, and none is on the PATH" in reason
    assert BACKENDS["quanto"].unsupported("int8-weight-only", bare) == []
    assert ernie_accel.plan(ernie, Quantize("int4"), context=bare).problems[Quantize("int4")][-1] == reason


#: What quanto's source takes of torch's headers; to read all of them takes the compiler three quarters of a minute.
TORCH_EXTENSION = """
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/from_blob.h>
namespace torch { using at::Tensor; using at::cat; constexpr auto kUInt8 = at::kByte; }
"""
UNPACKED = """
#include "unpack.cpp"
extern "C" void unpacked(uint8_t *packed, int64_t count, int bits, uint8_t *out) {
  at::Tensor bytes = at::from_blob(packed, {count}, at::kByte), numbers = unpack(bytes, bits);
  std::copy_n(numbers.data_ptr<uint8_t>(), numbers.numel(), out);
}
"""


@pytest.mark.slow
def test_what_stands_in_for_the_extension_of_quanto_does_what_it_does(tmp_path):
    from optimum.quanto.library.extensions.cpp import ext

    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "extension.h").write_text(TORCH_EXTENSION)
    (tmp_path / "unpacked.cpp").write_text(UNPACKED)
    built = cpp_extension.load(
        "unpacked",
        str(tmp_path / "unpacked.cpp"),
        extra_cflags=["-O0"],
        extra_include_paths=[str(tmp_path), str(Path(ext.sources[0]).parent)],
        build_directory=str(tmp_path),
        is_python_module=False,
    )
    unpacked = ctypes.CDLL(built).unpacked
    unpacked.argtypes = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    packed = torch.arange(256, dtype=torch.uint8)
    for bits in (2, 4):
        numbers = torch.full((256 * 8 // bits,), 99, dtype=torch.uint8)
        unpacked(packed.data_ptr(), 256, bits, numbers.data_ptr())
        assert torch.equal(numbers, quanto_stand_in().unpack(packed, bits))


def test_quanto_int4_does_not_change_by_being_repacked():
    """Every move packs it anew, through the plain format and back, and says itself that this loses bits: it loses none.

    On the CPU it is tinygemm's packing, as in bfloat16 on CUDA.
    """
    packed = BACKENDS["quanto"].quantize("int4", linear()).weight
    assert type(packed).__name__ == "TinyGemmWeightQBitsTensor"
    plain = packed.weight_qbits_tensor()
    arguments = plain._qtype, plain._axis, plain._group_size, plain.size(), plain.stride()
    again = type(packed).create(*arguments, plain._data, plain._scale, plain._shift)
    assert torch.equal(again._scale_shift, packed._scale_shift)
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_quanto_offers_no_quantized_activations():
    """Uncalibrated, they give noise; and there is no data to calibrate on."""
    assert {"int8", "fp8"}.isdisjoint(BACKENDS["quanto"].schemes)
    quantized = BACKENDS["quanto"].quantize("int8-weight-only", linear())
    assert quantized.activation_qtype is None


def test_bitsandbytes_scales_are_buffers_that_move_and_are_saved():
    """Linear8bitLt keeps them beside its tensors: a pipe that moves after its first picture leaves them behind."""
    for scheme in BACKENDS["bitsandbytes"].schemes:
        quantized = BACKENDS["bitsandbytes"].quantize(scheme, linear())
        quantized(torch.randn(2, 512).to(torch.bfloat16))
        assert set(quantized.state_dict()) == {"weight", "absmax", "bias"}
        assert {tensor.device.type for tensor in quantized.to("meta").state_dict().values()} == {"meta"}


def test_bitsandbytes_int8_survives_activations_beyond_float16():
    """Its own quantizer takes float16 only: 1e5 is infinite there, and the whole row becomes NaN."""
    layer = linear()
    x = torch.randn(4, 512).to(torch.bfloat16) * 1e5
    y = BACKENDS["bitsandbytes"].quantize("int8", layer)(x)
    assert y.isfinite().all()
    assert sqnr_db(layer(x).float(), y) > 30


def test_bitsandbytes_matches_its_own_library():
    """The layers here are other vessels for the same bits."""
    import bitsandbytes as bnb

    layer = linear(torch.float16, bias=False)
    stock = bnb.nn.Linear8bitLt(512, 256, bias=False, has_fp16_weights=False)
    stock.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    mine = BACKENDS["bitsandbytes"].quantize("int8", layer)
    assert (mine.weight.int() - stock.weight.CB.int()).abs().max() <= 1  # halves may round either way
    assert (mine.weight != stock.weight.CB).float().mean() < 1e-2
    packed, state = bnb.functional.quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4")
    nf4 = BACKENDS["bitsandbytes"].quantize("nf4", layer)
    assert torch.equal(nf4.weight, packed)
    assert torch.equal(nf4.absmax, state.absmax)


def test_gguf_encodes_what_diffusers_decodes():
    """No K-quants are offered: the gguf package cannot encode them."""
    assert set(BACKENDS["gguf"].schemes) == {"gguf-q8_0", "gguf-q5_0", "gguf-q4_0"}
    problem = BACKENDS["gguf"].layer_problem("gguf-q4_0", LinearSpec(64, 48, torch.bfloat16))
    assert problem == "its 48 inputs are not a multiple of 32"


def test_layerwise_casting_is_not_undone_by_a_cast_in_silence():
    pipe = tiny_ernie(dtype=torch.bfloat16)
    ernie_accel.optimize(pipe, Quantize("fp8-weight-only", backend="layerwise"))
    with pytest.raises(ernie_accel.ErnieAccelError, match="quantized"):
        pipe.to(torch.bfloat16)
    weight = pipe.transformer.layers[1].mlp.up_proj.weight
    picture(pipe)
    assert weight.dtype == torch.float8_e4m3fn
    assert ernie_accel.plan(pipe, Quantize("fp8-weight-only", backend="layerwise")).blockers == ()


def test_bitsandbytes_needs_no_gpu_here():
    """Diffusers' quantization_config route refuses it without one."""
    pipe = tiny_ernie()
    ernie_accel.optimize(pipe, Quantize("nf4"))
    assert picture(pipe).isfinite().all()


def test_asking_imports_no_backend():
    script = """
import sys
from ernie_accel import Context, Quantize
print(Quantize("auto").choose(Context.named("h200")), Quantize("int4").choose(Context.named("cpu")))
assert not {"torchao", "optimum.quanto", "bitsandbytes", "gguf", "diffusers"} & set(sys.modules)
"""
    # Its assertion ends it with an error.
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, stdout=subprocess.DEVNULL)
