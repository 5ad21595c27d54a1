"""What the package exports: the one list behind lazy loading, the stub for type checkers and the catalogue.

After a change run ``python docs/generate_stub.py``, which writes ``__init__.pyi``; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: Of the package.
VERSION = "0.2.0"

#: Module within the package -> the names it is the home of. What lives below ``transforms`` is the catalogue.
HOMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "batch.errors": (
            "BatchChangedError",
            "BatchInputError",
            "BatchOutputError",
        ),
        "core.components": ("CallablePipeline", "Pipeline"),
        "core.context": ("Context", "register_package"),
        "core.errors": (
            "ApplyError",
            "ConflictError",
            "ErnieAccelError",
            "MissingExtraError",
            "RestoreError",
            "RestoreWarning",
            "SavedPipelineError",
            "UnknownNameError",
            "UnsupportedError",
        ),
        "core.out_of_memory": ("DeviceOutOfMemoryError",),
        "core.hardware": ("Hardware", "Rates"),
        "api": ("load", "optimize", "plan", "report", "restore"),
        "core.plan": ("Plan",),
        "core.preset": ("Preset",),
        "recipes.recommend": ("Recommendation", "recommend"),
        "recipes.presets": ("presets", "register_hardware"),
        "core.report": ("Report",),
        "core.transform": (
            "Applied",
            "Effect",
            "MACHINE_LOCAL",
            "LayerReceipt",
            "Phase",
            "Preview",
            "Transform",
        ),
        "core.undo": ("Undo",),
        "core.planned": ("PlannedPipe",),
        "editing.edit": ("image_to_image", "inpaint", "refine"),
        "editing.files": ("PictureError",),
        "editing.pipelines": ("ErnieImageImg2ImgPipeline", "ErnieImageInpaintPipeline"),
        "families.family": ("Family",),
        "families.registry": ("register_family",),
        "quantization.choose": ("register_quantization_backend",),
        "fidelity.compare": ("evaluate",),
        "memory.call": ("Call",),
        "fidelity.evaluation": (
            "Evaluation",
            "Thresholds",
        ),
        "storage.exporting": ("OnnxModel", "export_onnx"),
        "storage.saving": ("save",),
        "transforms": ("transform_from_json",),
        "transforms.calls.autocast": ("Autocast",),
        "transforms.calls.call_defaults": ("CallDefaults",),
        "transforms.calls.few_steps": ("FewSteps",),
        "transforms.calls.explain_out_of_memory": ("ExplainOutOfMemory",),
        "transforms.calls.check_finite": ("CheckFinite",),
        "transforms.calls.warm_up": ("Warmup",),
        "transforms.denoiser.batch_guidance": ("BatchGuidance",),
        "transforms.denoiser.cache_steps.cache_steps": ("CacheSteps",),
        "transforms.denoiser.capture_graphs": ("CaptureGraphs",),
        "transforms.denoiser.compile": ("Compile",),
        "transforms.denoiser.elide_mask": ("ElideMask",),
        "transforms.denoiser.expand_mask": ("ExpandAttentionMask",),
        "transforms.denoiser.fuse_kernels": ("FuseKernels",),
        "transforms.denoiser.rewrite_blocks": ("RewriteBlocks",),
        "transforms.denoiser.set_attention": ("SetAttention",),
        "transforms.prompts.encode_prompts": ("BatchPromptEncoding",),
        "transforms.prompts.rewrite_enhancer": ("RewriteEnhancer",),
        "transforms.prompts.rewrite_text_encoder": ("RewriteTextEncoder",),
        "transforms.prompts.truncate_prompts": ("TruncatePrompts",),
        "transforms.scheduler.keep_timesteps_on_host": ("KeepTimestepsOnHost",),
        "transforms.scheduler.swap_scheduler": ("SwapScheduler",),
        "transforms.vae.decoder": (
            "CompileVae",
            "FuseVae",
        ),
        "transforms.vae.slices_and_tiles": (
            "SliceVae",
            "TileVae",
        ),
        "transforms.weights.cast_dtype": ("CastDtype",),
        "transforms.weights.free_after_use": ("FreeAfterUse",),
        "transforms.weights.make_contiguous": ("MakeContiguous",),
        "transforms.weights.move_to": ("MoveTo",),
        "transforms.weights.offload": ("Offload",),
        "transforms.weights.quantize": ("Quantize",),
        "transforms.weights.residency": ("Residency",),
    }
)

#: Subpackages that are reached as attributes.
SUBPACKAGES = ("batch", "demo", "fidelity", "testing")

#: Exported name -> its module, whole.
HOME_OF: Mapping[str, str] = MappingProxyType(
    {name: f"ernie_accel.{home}" for home, names in HOMES.items() for name in names}
)

#: Class name -> module of every transform of the catalogue.
TRANSFORMS: Mapping[str, str] = MappingProxyType(
    {name: home for name, home in HOME_OF.items() if home.startswith("ernie_accel.transforms.")}
)
