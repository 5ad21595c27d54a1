"""A stand-in for NewBie-image's own code, which comes with its checkpoint: the same names, arguments and order of work.

The transformer is a plain module, and its pipeline computes both halves of guidance as one batch. The original attends
by the package flash_attn in half precision; this one always by torch's kernel, with a mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from tests.copies import built_once

THETA = 10000.0


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, frequencies: int = 32) -> None:
        super().__init__()
        self.frequency_embedding_size = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: int = 10000) -> Tensor:
        half = dim // 2  # the table is made on the host, as the authors' code does
        rates = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device="cpu") / half)
        angles = t[:, None].float() * rates.to(t.device)[None]
        return torch.cat([angles.cos(), angles.sin()], -1)

    def forward(self, t: Tensor) -> Tensor:
        embedded = self.timestep_embedding(t, self.frequency_embedding_size)
        return self.mlp(embedded.to(self.mlp[0].weight.dtype))


class JointAttention(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.n_local_heads, self.n_local_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.qkv = nn.Linear(dim, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, x_mask: Tensor, freqs_cis: Tensor) -> Tensor:
        heads = (self.n_local_heads, self.n_local_kv_heads, self.n_local_kv_heads)
        made = self.qkv(x).split([n * self.head_dim for n in heads], -1)
        q, k, v = (each.unflatten(-1, (n, self.head_dim)) for each, n in zip(made, heads, strict=True))
        q, k = turned(self.q_norm(q), freqs_cis), turned(self.k_norm(k), freqs_cis)
        k, v = (each.repeat_interleave(heads[0] // heads[1], 2) for each in (k, v))
        mask = x_mask.bool()[:, None, None, :].expand(-1, heads[0], x.shape[1], -1)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=(1 / self.head_dim) ** 0.5)
        return self.out(out.transpose(1, 2).flatten(2))


def turned(x: Tensor, freqs_cis: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis[:, :, None]).flatten(3).type_as(x)


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class JointTransformerBlock(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, hidden_dim: int, modulation: bool = True) -> None:
        super().__init__()
        self.attention = JointAttention(dim, n_heads, n_kv_heads)
        self.feed_forward = FeedForward(dim, hidden_dim)
        self.attention_norm1, self.ffn_norm1 = RMSNorm(dim, 1e-5), RMSNorm(dim, 1e-5)
        self.attention_norm2, self.ffn_norm2 = RMSNorm(dim, 1e-5), RMSNorm(dim, 1e-5)
        self.modulation = modulation
        if modulation:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 4 * dim))

    def forward(self, x: Tensor, x_mask: Tensor, freqs_cis: Tensor, adaln_input: Tensor | None = None) -> Tensor:
        if not self.modulation:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), x_mask, freqs_cis))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        found = self.adaLN_modulation(adaln_input)[:, None].chunk(4, -1)
        scale_msa, gate_msa, scale_mlp, gate_mlp = found
        attended = self.attention(self.attention_norm1(x) * (1 + scale_msa), x_mask, freqs_cis)
        x = x + gate_msa.tanh() * self.attention_norm2(attended)
        return x + gate_mlp.tanh() * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp)))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.norm_final(x) * (1 + self.adaLN_modulation(c)[:, None]))


class RopeEmbedder:
    """No module; its tables move to where they are needed."""

    def __init__(self, axes_dims: tuple[int, ...], axes_lens: tuple[int, ...]) -> None:
        self.freqs_cis = []
        for dim, length in zip(axes_dims, axes_lens, strict=True):
            rates = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles = torch.outer(torch.arange(length, dtype=torch.float64), rates).float()
            self.freqs_cis.append(torch.polar(torch.ones_like(angles), angles))

    def __call__(self, ids: Tensor) -> Tensor:
        self.freqs_cis = [each.to(ids.device) for each in self.freqs_cis]
        return torch.cat([each[ids[..., axis].long()] for axis, each in enumerate(self.freqs_cis)], -1)


class NextDiT(nn.Module):
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 4,
        dim: int = 64,
        n_layers: int = 2,
        n_refiner_layers: int = 1,
        n_heads: int = 2,
        n_kv_heads: int = 1,
        hidden_dim: int = 160,
        cap_feat_dim: int = 32,
        axes_dims: tuple[int, ...] = (8, 12, 12),
        axes_lens: tuple[int, ...] = (256, 64, 64),
    ) -> None:
        super().__init__()
        sizes = (dim, n_heads, n_kv_heads, hidden_dim)
        self.in_channels = self.out_channels = in_channels
        self.patch_size, self.dim = patch_size, dim
        self.x_embedder = nn.Linear(patch_size**2 * in_channels, dim)
        self.noise_refiner = nn.ModuleList(JointTransformerBlock(*sizes) for _ in range(n_refiner_layers))
        plain = (JointTransformerBlock(*sizes, modulation=False) for _ in range(n_refiner_layers))
        self.context_refiner = nn.ModuleList(plain)
        self.t_embedder = TimestepEmbedder(dim)
        self.cap_embedder = nn.Sequential(RMSNorm(cap_feat_dim, 1e-5), nn.Linear(cap_feat_dim, dim))
        self.layers = nn.ModuleList(JointTransformerBlock(*sizes) for _ in range(n_layers))
        self.norm_final = RMSNorm(dim, 1e-5)  # of no use, as in the original
        self.final_layer = FinalLayer(dim, patch_size**2 * in_channels)
        self.rope_embedder = RopeEmbedder(axes_dims, axes_lens)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def patchify_and_embed(self, x: Any, cap_feats: Tensor, cap_mask: Tensor, t: Tensor) -> tuple[Any, ...]:
        device, patch = x[0].device, self.patch_size
        lengths = cap_mask.sum(1).tolist()
        sizes = [(img.shape[1], img.shape[2]) for img in x]
        counts = [(height // patch) * (width // patch) for height, width in sizes]
        longest = max(cap + count for cap, count in zip(lengths, counts, strict=True))
        ids = torch.zeros(len(x), longest, 3, dtype=torch.int32, device=device)
        for row, cap, count, (_, width) in zip(ids, lengths, counts, sizes, strict=True):
            row[:cap, 0] = torch.arange(cap)
            row[cap : cap + count, 0] = cap
            row[cap : cap + count, 1] = torch.arange(count) // (width // patch)
            row[cap : cap + count, 2] = torch.arange(count) % (width // patch)
        freqs = self.rope_embedder(ids)

        text_freqs = freqs.new_zeros(len(x), cap_feats.shape[1], freqs.shape[-1])
        image_freqs = freqs.new_zeros(len(x), max(counts), freqs.shape[-1])
        images = x[0].new_zeros(len(x), max(counts), patch**2 * self.in_channels)
        image_mask = torch.zeros(len(x), max(counts), dtype=torch.bool, device=device)
        for i, (cap, count) in enumerate(zip(lengths, counts, strict=True)):
            text_freqs[i, :cap], image_freqs[i, :count] = freqs[i, :cap], freqs[i, cap : cap + count]
            tokens = x[i].unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).permute(1, 3, 2, 4, 0)
            images[i, :count] = tokens.flatten(2).flatten(0, 1)
            image_mask[i, :count] = True
        for layer in self.context_refiner:
            cap_feats = layer(cap_feats, cap_mask, text_freqs)
        images = self.x_embedder(images)
        for layer in self.noise_refiner:
            images = layer(images, image_mask, image_freqs, t)

        mask = torch.zeros(len(x), longest, dtype=torch.bool, device=device)
        rows = x[0].new_zeros(len(x), longest, self.dim)
        for i, (cap, count) in enumerate(zip(lengths, counts, strict=True)):
            mask[i, : cap + count] = True
            rows[i, :cap], rows[i, cap : cap + count] = cap_feats[i, :cap], images[i, :count]
        return rows, mask, sizes, lengths, freqs

    def unpatchify(
        self, x: Tensor, img_size: list[tuple[int, int]], cap_size: list[int], return_tensor: bool = False
    ) -> Any:
        patch, images = self.patch_size, []
        for row, (height, width), begin in zip(x, img_size, cap_size, strict=True):
            shape = (height // patch, width // patch, patch, patch, self.out_channels)
            tokens = row[begin : begin + shape[0] * shape[1]].view(shape)
            images.append(tokens.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2))
        return torch.stack(images) if return_tensor else images


class NextDiT_CLIP(NextDiT):
    def __init__(self, *args: Any, clip_text_dim: int = 16, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.time_text_embed = nn.Sequential(nn.SiLU(), nn.Linear(self.dim + clip_text_dim, self.dim))
        self.clip_text_pooled_proj = nn.Sequential(RMSNorm(clip_text_dim), nn.Linear(clip_text_dim, clip_text_dim))

    def forward(self, x: Any, t: Tensor, cap_feats: Tensor, cap_mask: Tensor, **kwargs: Any) -> Any:
        adaln_input, pooled = self.t_embedder(t), kwargs.get("clip_text_pooled")
        cap_feats = self.cap_embedder(cap_feats)
        if pooled is not None:
            adaln_input = self.time_text_embed(torch.cat([adaln_input, self.clip_text_pooled_proj(pooled)], -1))
        if kwargs.get("clip_img_pooled") is not None:  # as in the original, whose layer for it is not there
            adaln_input = adaln_input + self.clip_img_pooled_embedder(kwargs["clip_img_pooled"])
        is_tensor = isinstance(x, Tensor)
        x, mask, sizes, lengths, freqs_cis = self.patchify_and_embed(x, cap_feats, cap_mask, adaln_input)
        for layer in self.layers:
            x = layer(x, mask, freqs_cis, adaln_input)
        return self.unpatchify(self.final_layer(x, adaln_input), sizes, lengths, return_tensor=is_tensor)

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        cap_feats: Tensor,
        cap_mask: Tensor,
        cfg_scale: float,
        cfg_trunc: float = 100,
        renorm_cfg: float = 1,
        **kwargs: Any,
    ) -> Tensor:
        half = len(x) // 2
        if t[0] < cfg_trunc:
            with_prompt, without = self.forward(x, t, cap_feats, cap_mask, **kwargs).chunk(2)
            guided = without + cfg_scale * (with_prompt - without)
            if float(renorm_cfg) > 0.0:
                sides = tuple(range(1, guided.ndim))
                most = torch.linalg.vector_norm(with_prompt, dim=sides, keepdim=True) * float(renorm_cfg)
                found = torch.linalg.vector_norm(guided, dim=sides, keepdim=True)
                if found.item() >= most.item():  # so it takes one picture at a time
                    guided = guided * (most / found)
        else:
            tensors = {name: value[:half] for name, value in kwargs.items() if isinstance(value, Tensor)}
            guided = self.forward(x[:half], t[:half], cap_feats[:half], cap_mask[:half], **tensors)
        return torch.cat([guided, guided])


class NextDiT_CLIP_CNN(NextDiT_CLIP):
    """A variant that sees the image in another way, too."""

    def patchify_and_embed(self, x: Any, cap_feats: Tensor, cap_mask: Tensor, adaln_input: Tensor) -> tuple[Any, ...]:
        return super().patchify_and_embed(x * 1.5, cap_feats, cap_mask, adaln_input)


class ClipText(nn.Module):
    """A text encoder that gives one vector for each text, as Jina CLIP does."""

    def __init__(self, words: int = 32, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def get_text_features(self, input_ids: Any) -> Tensor:
        """Return the mean over the words of each text; like the original, it is given all that a tokenizer returns."""
        words, mask = self.embedding(input_ids["input_ids"]), input_ids["attention_mask"][..., None].to(self.dtype)
        return (words * mask).sum(1) / mask.sum(1).clamp_min(1)


@dataclass
class NewbiePipelineOutput(BaseOutput):
    images: Any
    latents: Any = None


class NewbiePipeline(DiffusionPipeline):
    model_cpu_offload_seq = "text_encoder->clip_model->transformer->vae"

    def __init__(
        self,
        transformer: Any,
        text_encoder: Any,
        tokenizer: Any,
        clip_model: Any,
        clip_tokenizer: Any,
        vae: Any,
        scheduler: Any,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            clip_model=clip_model,
            clip_tokenizer=clip_tokenizer,
            vae=vae,
            scheduler=scheduler,
        )

    @property
    def device(self) -> torch.device:
        """Asked of a part that knows: newer versions of diffusers ask all parts that are on the CPU."""
        return self.clip_model.device

    @torch.no_grad()
    def _encode_prompt(
        self,
        prompts: list[str],
        clip_captions: list[str] | None = None,
        max_length: int = 48,
        clip_max_length: int = 48,
    ) -> tuple[Any, ...]:
        given = {"padding": True, "truncation": True, "return_tensors": "pt"}
        found = self.tokenizer(prompts, pad_to_multiple_of=8, max_length=max_length, **given)
        found = found.to(self.text_encoder.device)
        hidden = self.text_encoder(**found, output_hidden_states=True).hidden_states[-2]
        clip = self.clip_tokenizer(clip_captions or prompts, max_length=clip_max_length, **given)
        clip = clip.to(self.clip_model.device)
        pooled = self.clip_model.get_text_features(input_ids=clip)
        return hidden, found.attention_mask, None, pooled.clone(), clip.attention_mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        height: int = 64,
        width: int = 64,
        num_inference_steps: int = 28,
        guidance_scale: float = 5.0,
        cfg_trunc: float = 1.0,
        renorm_cfg: bool = True,
        system_prompt: str = "",
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_latents: bool = False,
        **kwargs: Any,
    ) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        others = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            shape = (len(prompts), self.transformer.in_channels, height // 8, width // 8)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        latents = latents.to(device, dtype).repeat(2, 1, 1, 1)
        texts = [system_prompt + each if each else "" for each in (*prompts, *others)]
        cap_feats, cap_mask, _, pooled, _ = self._encode_prompt(texts, clip_captions=prompts + others)
        given = {
            "cap_feats": cap_feats.to(device, dtype),
            "cap_mask": cap_mask.to(device),
            "cfg_scale": float(guidance_scale),
            "cfg_trunc": float(cfg_trunc),
            "renorm_cfg": bool(renorm_cfg) and len(prompts) == 1,
            "clip_text_sequence": None,
            "clip_text_pooled": pooled.to(device, dtype),
            "clip_img_pooled": None,
        }
        self.scheduler.set_timesteps(num_inference_steps=num_inference_steps, device=device)
        for t in self.scheduler.timesteps:
            # The model counts from noise, 0, to the image, 1, and has a time for each row.
            time = (1 - t / self.scheduler.config.num_train_timesteps).to(dtype).expand(len(latents))
            found = -self.transformer.forward_with_cfg(latents, time, **given)
            latents = self.scheduler.step(found, t, latents, return_dict=False)[0].to(dtype)
        latents = latents[: len(prompts)]
        images: Any = latents
        if output_type != "latent":
            config = self.vae.config
            decoded = self.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
            images = (decoded / 2 + 0.5).clamp(0, 1)
        if output_type == "pil":
            images = self.numpy_to_pil(images.float().cpu().permute(0, 2, 3, 1).numpy())
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, (latents if return_latents else None)
        return NewbiePipelineOutput(images=images, latents=latents if return_latents else None)


@built_once
def tiny_own_newbie() -> Any:
    """Return such a pipeline, with random weights; 64x64 pixels are 16 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import Gemma3TextConfig, Gemma3TextModel

    from tests.pipelines import _assembled, randomize, tiny_tokenizer, tiny_vae

    torch.manual_seed(0)
    encoder = Gemma3TextModel(
        Gemma3TextConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    pipe = _assembled(
        NewbiePipeline,
        transformer=NextDiT_CLIP(),
        vae=tiny_vae(),
        text_encoder=encoder,
        tokenizer=tiny_tokenizer(),
        clip_model=ClipText(),
        clip_tokenizer=tiny_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )
    randomize(pipe.transformer, seed=4, std=0.03)  # small enough for int8 where a script scales all norms
    return pipe
