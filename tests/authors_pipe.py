"""A tiny pipeline in the manner of the one that NewBie-image's authors publish, which is not in diffusers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from tests.copies import built_once
from tests.pipelines import NextDiT, tiny_lumina2


class AuthorsNextDiT(NextDiT):
    """A `NextDiT` that is called as the authors' own code calls theirs: both halves of guidance are one batch."""

    def forward_with_cfg(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        cap_feats: torch.Tensor,
        cap_mask: torch.Tensor,
        cfg_scale: float,
        **unused: object,
    ) -> torch.Tensor:
        """Return the guided prediction, twice [2B, C, H, W]; `x` holds the latents twice."""
        half = x[: len(x) // 2]
        both = torch.cat([half, half])
        guided, plain = self(both, t.expand(len(both)), cap_feats, cap_mask, return_dict=False)[0].chunk(2)
        guided = plain + cfg_scale * (guided - plain)
        return torch.cat([guided, guided])


class AuthorsPipeline(DiffusionPipeline):
    """A pipeline in the manner of that of NewBie-image's authors: no callback, and any other keyword is swallowed."""

    def __init__(self, transformer: Any, text_encoder: Any, tokenizer: Any, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae, scheduler=scheduler
        )

    def _encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        given = self.tokenizer(prompts, padding=True, return_tensors="pt")
        mask = given.attention_mask.to(self.text_encoder.device)
        encoded = self.text_encoder(
            input_ids=given.input_ids.to(mask.device), attention_mask=mask, output_hidden_states=True
        )
        return encoded.hidden_states[-2].to(self.transformer.dtype), mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str = "",
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 28,
        guidance_scale: float = 5.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        dtype = self.transformer.dtype
        if latents is None:
            shape = (len(prompts), 4, height // 8, width // 8)
            latents = randn_tensor(shape, generator=generator, device=self.transformer.device, dtype=dtype)
        latents = latents.to(dtype).repeat(2, 1, 1, 1)
        states, mask = self._encode_prompt([*prompts, *[negative_prompt or "a"] * len(prompts)])
        self.scheduler.set_timesteps(num_inference_steps=num_inference_steps, device=latents.device)
        for t in self.scheduler.timesteps:
            predicted = self.transformer.forward_with_cfg(
                latents, 1 - t / 1000, cap_feats=states, cap_mask=mask, cfg_scale=guidance_scale
            )
            latents = self.scheduler.step(
                model_output=-predicted.to(dtype), timestep=t, sample=latents, return_dict=False
            )[0]
        latents = latents[: len(prompts)]
        pictures = (self.vae.decode(latents / self.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        return SimpleNamespace(images=pictures)


@built_once
def tiny_authors_newbie() -> Any:
    """Return an `AuthorsPipeline`."""
    parts = tiny_lumina2().components
    torch.manual_seed(0)
    pipe = AuthorsPipeline(**parts | {"transformer": AuthorsNextDiT(parts["transformer"]).eval().requires_grad_(False)})
    pipe.set_progress_bar_config(disable=True)
    return pipe
