"""A stand-in for diffusers' open pull request 12803, by which NewBie-image runs on the Lumina 2 transformer.

That transformer's forward takes a pooled embedding of the prompt, which its embedding of the time adds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor, nn

from tests.own_newbie import ClipText
from tests.pipelines import randomize, tiny_lumina2, tiny_tokenizer

WIDTH = 16
_STOCK = Lumina2Transformer2DModel.forward


class PooledCaptionEmbedding(nn.Module):
    """Adds the pooled embedding to the time's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.pooled_embedder = nn.Linear(WIDTH, inner.timestep_embedder.linear_2.out_features)
        self.given: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        time, caption = self.inner(hidden_states, timestep, encoder_hidden_states)
        pooled = self.given if pooled_projections is None else pooled_projections
        return time if pooled is None else time + self.pooled_embedder(pooled), caption


def pooled_forward(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    attention_kwargs: Any = None,
    return_dict: bool = True,
) -> Any:
    """Another order of arguments than today's, as the request may have it."""
    embed = self.time_caption_embed
    if isinstance(embed, PooledCaptionEmbedding):
        embed.given = pooled_projections
    try:
        given = (hidden_states, timestep, encoder_hidden_states, encoder_attention_mask)
        return _STOCK(self, *given, attention_kwargs=attention_kwargs, return_dict=return_dict)
    finally:
        embed.given = None


class PooledLumina2Pipeline(Lumina2Pipeline):
    """Encodes each prompt twice, and gives the transformer both."""

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
    ) -> None:
        super().__init__(transformer, scheduler, vae, text_encoder, tokenizer)
        self.register_modules(text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2)

    def _get_clip_prompt_embeds(
        self, prompt: Any, device: Any = None, max_sequence_length: int = 48, num_images_per_prompt: int = 1
    ) -> Tensor:
        prompt = [prompt] if isinstance(prompt, str) else prompt
        found = self.tokenizer_2(
            prompt, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
        )
        pooled = self.text_encoder_2.get_text_features(input_ids=found)
        return pooled.repeat(1, num_images_per_prompt).view(len(prompt) * num_images_per_prompt, -1)

    def encode_prompt(
        self,
        prompt: Any,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        device: Any = None,
        max_sequence_length: int = 48,
        **unused: Any,
    ) -> tuple[Any, ...]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        found: list[Any] = []
        others = negative_prompt or ""
        others = [others] * len(prompts) if isinstance(others, str) else others
        for texts in (prompts, others) if do_classifier_free_guidance else (prompts,):
            text, mask = self._get_gemma_prompt_embeds(
                prompt=texts, device=device, max_sequence_length=max_sequence_length
            )
            pooled = self._get_clip_prompt_embeds(
                prompt=texts,
                device=device,
                max_sequence_length=max_sequence_length,
                num_images_per_prompt=num_images_per_prompt,
            )
            text, mask = (each.repeat_interleave(num_images_per_prompt, 0) for each in (text, mask))
            found += [text, pooled, mask]
        return (*found, *[None] * (6 - len(found)))

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        width: int = 64,
        height: int = 64,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cfg_trunc_ratio: float = 1.0,
        max_sequence_length: int = 48,
    ) -> Any:
        self._guidance_scale = guidance_scale
        guided, device = self.do_classifier_free_guidance, self._execution_device
        found = self.encode_prompt(
            prompt,
            guided,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            device=device,
            max_sequence_length=max_sequence_length,
        )
        rows, channels = len(found[0]), self.transformer.config.in_channels
        latents = self.prepare_latents(rows, channels, height, width, found[0].dtype, device, generator, latents)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for i, t in enumerate(self.scheduler.timesteps):
            step = {
                "hidden_states": latents,
                "timestep": (1 - t / self.scheduler.config.num_train_timesteps).expand(rows),
                "return_dict": False,
                "attention_kwargs": None,
            }
            names = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")
            made = self.transformer(**step, **dict(zip(names, found[:3], strict=True)))[0]
            if guided and (i + 1) / num_inference_steps <= cfg_trunc_ratio:
                other = self.transformer(**step, **dict(zip(names, found[3:], strict=True)))[0]
                made = other + guidance_scale * (made - other)
            latents = self.scheduler.step(-made, t, latents, return_dict=False)[0]
        image = latents
        if output_type != "latent":
            config = self.vae.config
            image = self.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
            image = self.image_processor.postprocess(image, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)


def as_in_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change diffusers' class as the pull request does."""
    monkeypatch.setattr(Lumina2Transformer2DModel, "forward", pooled_forward)


def tiny_pooled_lumina2() -> Any:
    """Return such a pipeline, once diffusers is `as_in_the_request`."""
    parts = dict(tiny_lumina2().components)
    torch.manual_seed(0)
    transformer, clip = parts["transformer"], ClipText(width=WIDTH)
    transformer.time_caption_embed = PooledCaptionEmbedding(transformer.time_caption_embed)
    transformer.register_to_config(pooled_projection_dim=WIDTH)
    for part in (transformer.time_caption_embed, clip):
        randomize(part, seed=3, std=0.2)
        part.eval().requires_grad_(False)
    pipe = PooledLumina2Pipeline(text_encoder_2=clip, tokenizer_2=tiny_tokenizer(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
