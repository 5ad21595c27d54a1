"""What the trainer needs to know of an architecture: its untrained parts, and how its pipeline feeds them.

The scenes, the tokenizer's corpus, the judge and the trainer are the same for all. ERNIE-Image's miniature travels
with the package and brings a prompt enhancer. Those of Z-Image and Lumina 2 (which NewBie-image was made from) decode
with the same VAE weights, so their folders hold none: `load` puts the pipeline together.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ernie_accel.core.undo import Undo
from ernie_accel.models.lumina import blocks as lumina
from ernie_accel.models.next_dit.positions import Position
from ernie_accel.models.rewritten import rewritten_blocks
from ernie_accel.models.token_layout import prompt_lengths, remember_lengths
from ernie_accel.models.z_image import blocks as z_image
from tools.embedded_model import architecture

_BN_EPS = 1e-5
"""The pipeline's own, not the VAE config's."""
PROMPT_START = "<Prompt Start>"
"""What Lumina 2's pipeline puts between its system prompt and the prompt."""


@dataclass(frozen=True)
class Frame:
    """What a pipeline writes around every prompt, before and after it, and how it tokenizes an empty negative one."""

    before: str = ""
    after: str = ""
    around_empty: bool = True

    def around(self, prompt: str) -> str:
        """Return a prompt as the text encoder gets it."""
        return f"{self.before}{prompt}{self.after}"

    @property
    def empty(self) -> str:
        """The empty prompt as the text encoder gets it."""
        return self.around("") if self.around_empty else ""


class Miniature(ABC):
    """One architecture, for the trainer."""

    name: ClassVar[str]
    pipeline: ClassVar[str]
    """Name of diffusers' class."""
    has_enhancer: ClassVar[bool] = False
    trains_vae: ClassVar[bool] = False
    frame: ClassVar[Frame] = Frame()
    guidance_scale: ClassVar[float] = 1.0
    """What means none."""

    @abstractmethod
    def build_vae(self) -> Any:
        """Return the VAE; a trained one where it is not to be trained."""

    @abstractmethod
    def build_transformer(self) -> Any:
        """Return an untrained transformer."""

    @abstractmethod
    def build_text_encoder(self) -> Any:
        """Return an untrained text encoder."""

    @abstractmethod
    def normalized(self, vae: Any, latents: Tensor) -> Tensor:
        """Return the VAE's latents [B, C, H / 8, W / 8] as the transformer is to see them."""

    @abstractmethod
    def velocity(
        self, transformer: Any, noisy: Tensor, sigma: Tensor, states: Tensor, lengths: Tensor, at: Any | None = None
    ) -> Tensor:
        """Return the predicted noise - picture, as the pipeline reads it from the transformer.

        Args:
            transformer: The model.
            noisy: Latents as `normalized` gives them.
            sigma: Noise levels [B] in 0..1.
            states: Encoded prompts [B, T, H], padded at the right.
            lengths: Tokens of each [B].
            at: What `positions` returned of the same batch; None computes it.
        """

    def positions(self, transformer: Any, noisy: Tensor, lengths: Tensor, tokens: int) -> Any | None:
        """Return where the tokens of a batch are, for `velocity`; None if it has no use for that.

        Args:
            transformer: The model, once `made_faster` was called.
            noisy: Latents as `normalized` gives them.
            lengths: Tokens of each prompt [B].
            tokens: What the prompts are padded to.
        """
        return None

    def language_model(self, text_encoder: Any) -> Any:
        """Return the part of the text encoder that is trained."""
        return text_encoder

    def made_faster(self, transformer: Any, undo: Undo) -> None:  # noqa: B027  ERNIE-Image takes batches as they are
        """Make training steps of `transformer` faster, in place, for the same gradients."""

    def prepared(self, tokenizer: Any) -> Any:
        """Return the tokenizer as the pipeline wants it."""
        return tokenizer


class ErnieMiniature(Miniature):
    """ERNIE-Image, the one in the package."""

    name = "ernie-image"
    pipeline = "ErnieImagePipeline"
    has_enhancer = trains_vae = True

    def build_vae(self) -> Any:
        return architecture.build_vae()

    def build_transformer(self) -> Any:
        return architecture.build_transformer()

    def build_text_encoder(self) -> Any:
        return architecture.build_text_encoder()

    def normalized(self, vae: Any, latents: Tensor) -> Tensor:
        mean, variance = (x.view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
        return (patchify(latents) - mean) / (variance + _BN_EPS).sqrt()

    def velocity(
        self, transformer: Any, noisy: Tensor, sigma: Tensor, states: Tensor, lengths: Tensor, at: Any | None = None
    ) -> Tensor:
        out: Tensor = transformer(
            hidden_states=noisy, timestep=sigma * 1000, text_bth=states, text_lens=lengths, return_dict=False
        )[0]
        return out

    def language_model(self, text_encoder: Any) -> Any:
        return text_encoder.language_model


class _WithEmbeddedVae(Miniature):
    """One whose VAE is the package's, its statistics folded into the convolutions on both sides of the latents."""

    def build_vae(self) -> Any:
        from diffusers import AutoencoderKL, AutoencoderKLFlux2

        from ernie_accel.embedded import MODEL_FOLDER

        trained: Any = AutoencoderKLFlux2.from_pretrained(MODEL_FOLDER, subfolder="vae", local_files_only=True).float()
        config, channels = trained.config, trained.config.latent_channels
        vae = AutoencoderKL(
            block_out_channels=config.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=config.layers_per_block,
            latent_channels=channels,
            norm_num_groups=config.norm_num_groups,
            sample_size=config.sample_size,
            mid_block_add_attention=False,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        vae.load_state_dict({name: value for name, value in trained.state_dict().items() if not name.startswith("bn.")})
        # ERNIE-Image's pipeline normalizes the four places of a patch apart; their statistics differ by about a tenth.
        mean = trained.bn.running_mean.view(channels, 4).mean(1)
        std = (trained.bn.running_var + _BN_EPS).view(channels, 4).mean(1).sqrt()
        with torch.no_grad():
            before, after = vae.quant_conv, vae.post_quant_conv
            after.bias += after.weight[:, :, 0, 0] @ mean
            after.weight *= std[:, None, None]
            before.weight[:channels] /= std[:, None, None, None]
            before.bias[:channels] = (before.bias[:channels] - mean) / std
            before.bias[channels:] -= 2 * std.log()
        return vae

    def made_faster(self, transformer: Any, undo: Undo) -> None:
        # Stock cuts and pads row by row, which takes longer than all else; a batch stays one here.
        pipe: Any = SimpleNamespace(transformer=transformer, components={"transformer": transformer}, config={})
        blocks = rewritten_blocks(pipe)
        blocks.rewrite(pipe, undo, fuse=False)

    def normalized(self, vae: Any, latents: Tensor) -> Tensor:
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor


class ZImageMiniature(_WithEmbeddedVae):
    """Z-Image: refiners, joint blocks, per-head QK norm, tanh gates, a Qwen 3 text encoder with a chat template."""

    name = "z-image"
    pipeline = "ZImagePipeline"
    frame = Frame(architecture.USER, architecture.OUTPUT)
    guidance_scale = 0.0

    def build_transformer(self) -> Any:
        from diffusers import ZImageTransformer2DModel

        return ZImageTransformer2DModel(
            in_channels=architecture.LATENT_CHANNELS,
            dim=96,  # its MLP is 8 / 3 as wide: a multiple of 96 makes both multiples of 32
            n_layers=10,
            n_refiner_layers=1,
            n_heads=3,
            n_kv_heads=3,
            cap_feat_dim=architecture.TEXT_WIDTH,
            axes_dims=[8, 12, 12],
            axes_lens=[512, 64, 64],
        )

    def build_text_encoder(self) -> Any:
        from transformers import Qwen3Config, Qwen3Model

        return Qwen3Model(Qwen3Config(**language_config()))

    def velocity(
        self, transformer: Any, noisy: Tensor, sigma: Tensor, states: Tensor, lengths: Tensor, at: Any | None = None
    ) -> Tensor:
        pictures = list(noisy.unsqueeze(2))
        if not z_image.is_rewritten(transformer):
            captions = [state[:length] for state, length in zip(states, lengths.tolist(), strict=True)]
            return -torch.stack(transformer(pictures, 1 - sigma, captions, return_dict=False)[0]).squeeze(2)
        # The same of a batch that stays one: cut and padded row by row, 512 captions take longer than all else.
        if at is None:
            at = self.positions(transformer, noisy, lengths, states.shape[1])
        real = _real(lengths, states.shape[1])
        text = nn.functional.pad(states * real[:, :, None], (0, 0, 0, at.text_pads.shape[1] - states.shape[1]))
        out: Tensor = transformer(pictures, 1 - sigma, text, at=at)[0]
        return -out.squeeze(2)

    def positions(self, transformer: Any, noisy: Tensor, lengths: Tensor, tokens: int) -> Position:
        grid = (1, noisy.shape[2] // 2, noisy.shape[3] // 2)
        return z_image.positioned(transformer, grid, prompt_lengths(lengths), noisy.device, for_graph=False)[1]

    def prepared(self, tokenizer: Any) -> Any:
        twin = copy.deepcopy(tokenizer)
        twin.chat_template = f"{self.frame.before}{{{{ messages[0]['content'] }}}}{self.frame.after}"
        return twin


class Lumina2Miniature(_WithEmbeddedVae):
    """Lumina 2, whose transformer is NewBie-image's but for the pooled embedding; a Gemma 2 text encoder."""

    name = "lumina2"
    pipeline = "Lumina2Pipeline"
    frame = Frame(f" {PROMPT_START} ", around_empty=False)

    def build_transformer(self) -> Any:
        from diffusers import Lumina2Transformer2DModel

        return Lumina2Transformer2DModel(
            sample_size=16,
            in_channels=architecture.LATENT_CHANNELS,
            hidden_size=192,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=32,
            ffn_dim_multiplier=2 / 3,
            axes_dim_rope=(16, 16, 16),
            axes_lens=(512, 64, 64),
            cap_feat_dim=architecture.TEXT_WIDTH,
        )

    def build_text_encoder(self) -> Any:
        from transformers import Gemma2Config, Gemma2Model

        return Gemma2Model(Gemma2Config(**language_config(), query_pre_attn_scalar=32))

    def velocity(
        self, transformer: Any, noisy: Tensor, sigma: Tensor, states: Tensor, lengths: Tensor, at: Any | None = None
    ) -> Tensor:
        out: Tensor = transformer(
            hidden_states=noisy,
            timestep=1 - sigma,
            encoder_hidden_states=states,
            encoder_attention_mask=_real(lengths, states.shape[1]),
            return_dict=False,
            **({} if at is None else {"at": at}),
        )[0]
        return -out

    def positions(self, transformer: Any, noisy: Tensor, lengths: Tensor, tokens: int) -> Position:
        mask = _real(lengths, tokens)
        remember_lengths(mask, prompt_lengths(lengths))
        text = noisy.new_empty(len(lengths), tokens, 0)  # only its shape counts
        given = {"hidden_states": noisy, "encoder_hidden_states": text, "encoder_attention_mask": mask}
        return cast(Position, lumina.prepare(transformer, given)[1])


def _real(lengths: Tensor, tokens: int) -> Tensor:
    """Return which of so many tokens are real [B, T]."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


MINIATURES = {each.name: each for each in (ErnieMiniature(), ZImageMiniature(), Lumina2Miniature())}


def language_config() -> dict[str, Any]:
    """Return the configuration of a text encoder of three layers, of which the last is not read."""
    return {
        "vocab_size": architecture.VOCABULARY,
        "hidden_size": architecture.TEXT_WIDTH,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": architecture.MAX_POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def patchify(latents: Tensor) -> Tensor:
    """Fold 2 x 2 latents into channels, in ERNIE-Image's order: [B, C, H, W] to [B, 4C, H / 2, W / 2]."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def put_together(miniature: Miniature, transformer: Any, text_encoder: Any, tokenizer: Any, vae: Any) -> Any:
    """Return the pipeline of a miniature without a prompt enhancer."""
    import diffusers

    pipe = getattr(diffusers, miniature.pipeline)(
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=miniature.prepared(tokenizer),
        scheduler=architecture.build_scheduler(),
    )
    if hasattr(pipe, "system_prompt"):
        pipe.system_prompt = ""  # an attribute, which no folder keeps; the default is longer than all captions
    return pipe


def save(folder: Path, transformer: nn.Module, text_encoder: nn.Module, tokenizer: Any) -> None:
    """Save the parts that the package does not have, as float16 safetensors."""
    for name, part in (("transformer", transformer), ("text_encoder", text_encoder)):
        half: Any = copy.deepcopy(part).to("cpu", torch.float16)
        half.save_pretrained(folder / name, safe_serialization=True)
    tokenizer.save_pretrained(folder / "tokenizer")


def load(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a miniature that `save` wrote, as a pipeline on the CPU.

    Args:
        folder: Where it is.
        name: Of its architecture, a key of `MINIATURES`, but for "ernie-image", which ``ernie_accel.demo.load`` loads.
        dtype: Of all weights.
    """
    from transformers import AutoTokenizer

    miniature = MINIATURES[name]
    models = {"transformer": type(miniature.build_transformer()), "text_encoder": type(miniature.build_text_encoder())}
    parts: dict[str, Any] = {
        part: cls.from_pretrained(folder / part, local_files_only=True).to(dtype).eval().requires_grad_(False)
        for part, cls in models.items()
    }
    vae = miniature.build_vae().to(dtype).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return put_together(miniature, **parts, tokenizer=tokenizer, vae=vae)
