"""Text to image with a trained transformer: the diffusers pipeline that `sample` and `dit generate` use."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import BaseOutput
from PIL import Image

from dit.config import Scheduler
from dit.diffusion import guide
from dit.encoders import EncoderSource, load_text_encoder, load_vae
from dit.errors import UserError
from dit.images import to_images
from dit.latents import pad
from dit.model import DiT
from dit.precision import has_bf16

TRAINING_STEPS = 1000  # diffusers counts timesteps from 0 to 1000; the transformer from 0 to 1


def make_scheduler(name: str):
    """The diffusers scheduler that `sample.scheduler` names, for a rectified flow.

    All but one follow the flow from the noise to one image. `stochastic` goes at each step all the way to the predicted
    image and back to the next noise level with fresh noise (as Song et al. 2023, algorithm 1), so that later steps mend
    what earlier ones got wrong. More of its steps are spent on noisy images, where the layout is decided. Of 1,000 prompts
    after 1,200 steps of the default recipe `euler` drew 71 % right, this 80 %.

    DPM-Solver and UniPC are told that the model predicts a flow: made from another scheduler's config they would take
    it for a noise prediction.
    """
    flow = {
        "num_train_timesteps": TRAINING_STEPS,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 1.0,
    }
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(TRAINING_STEPS)
    if name == "stochastic":
        return FlowMatchEulerDiscreteScheduler(TRAINING_STEPS, shift=2.0, stochastic_sampling=True)
    if name == "heun":
        return FlowMatchHeunDiscreteScheduler(TRAINING_STEPS)
    if name == "dpm++":
        return DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **flow)
    if name == "unipc":
        return UniPCMultistepScheduler(**flow)
    raise UserError(f"sample.scheduler: {name!r} is unknown; one of {', '.join(get_args(Scheduler))} would be right")


@dataclass
class PipelineOutput(BaseOutput):
    """`images`: a list of PIL pictures, or a tensor (N, C, H, W) where latents were asked for."""

    images: list[Image.Image] | torch.Tensor


class DiTTextToImagePipeline(DiffusionPipeline):
    """Draw what captions say.

    Args:
        transformer: the trained `DiT`.
        scheduler: a diffusers scheduler of a flow, see `make_scheduler`.
        vae: the `AutoencoderKL` whose latents the transformer was trained on.
        text_encoder: the `CLIPTextModelWithProjection` it was trained with.
        tokenizer: its `CLIPTokenizer`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, transformer, scheduler, vae, text_encoder, tokenizer):
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, transformer_dtype: torch.dtype | None = None
    ) -> DiTTextToImagePipeline:
        """Load what the train stage wrote, and the encoders that it names.

        Args:
            folder: `models/dit`, or a copy of it.
            torch_dtype: of everything.
            transformer_dtype: of the transformer, where it should differ.

        The base class would look the transformer up in diffusers' own module of the name `dit`.

        Raises:
            UserError: the folder is no such model, or an encoder is not to be had or has changed.
        """
        folder = Path(folder)
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            encoders = index["encoders"]
            vae_source, clip_source = EncoderSource(**encoders["vae"]), EncoderSource(**encoders["clip"])
            transformer = DiT.from_pretrained(folder, subfolder="transformer", torch_dtype=transformer_dtype or torch_dtype)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: not a trained model ({' '.join(str(error).split())[:120]}); run `dvc repro`") from None
        vae, _ = load_vae(vae_source, torch_dtype)
        text_encoder, tokenizer, _ = load_text_encoder(clip_source, torch_dtype)
        pipeline = cls(transformer.eval(), make_scheduler("euler"), vae, text_encoder, tokenizer)
        pipeline.default_size = encoders["image_size"]
        return pipeline

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (N, L, E), mask (N, L) and pooled vectors (N, P), as the encode stage makes them."""
        length = self.text_encoder.config.max_position_embeddings
        inputs = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        out = self.text_encoder(input_ids=inputs.input_ids.to(self.device))
        lengths = inputs.attention_mask.sum(1).tolist()
        tokens, mask = pad([row[:n] for row, n in zip(out.last_hidden_state, lengths, strict=True)], max(lengths))
        return tokens, mask.to(self.device), out.text_embeds

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> PipelineOutput:
        """Draw one picture per prompt.

        Args:
            prompt: one caption or several.
            height, width: in pixels; multiples of 8 x patch size. Default: the size that was trained on.
            num_inference_steps: scheduler steps; each is two evaluations of the transformer unless `guidance_scale` is 1.
            guidance_scale: how far to lean away from what would be drawn without a caption; 1 is not at all.
            generator: one for all, or one for each prompt, so that a picture does not depend on its neighbours.
            output_type: "pil" or "latent".
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        height, width = height or self.default_size, width or self.default_size
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        cell = factor * self.transformer.config.patch_size
        if height % cell or width % cell:
            raise UserError(f"height and width must be multiples of {cell}, not {height} x {width}")
        guided = guidance_scale > 1
        tokens, mask, pooled = self.encode_prompt([*prompts, *([""] * len(prompts) if guided else [])])
        keys_values = self.transformer.text_keys_values(tokens)
        shape = (1, self.transformer.config.in_channels, height // factor, width // factor)
        latents = self._noise(shape, len(prompts), generator).to(self.device)  # fp32 all the way, whatever the networks are
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        takes_noise = "generator" in inspect.signature(self.scheduler.step).parameters
        fresh_noise = {"generator": generator} if takes_noise else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = latents.repeat(2, 1, 1, 1) if guided else latents
            times = (t / TRAINING_STEPS).expand(len(inputs))
            predicted = self.transformer(inputs, times, None, mask, pooled, keys_values)
            if guided:
                predicted = guide(*predicted.chunk(2), guidance_scale)
            latents = self.scheduler.step(predicted, t, latents, return_dict=False, **fresh_noise)[0]
        if output_type == "latent":
            return PipelineOutput(images=latents)
        scaling, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        return PipelineOutput(images=to_images(self.vae.decode((latents / scaling + shift).to(self.vae.dtype)).sample))

    @staticmethod
    def _noise(shape: tuple[int, ...], count: int, generator) -> torch.Tensor:
        """Standard normal noise (count, C, h, w), drawn on the CPU so that every device starts from the same."""
        if isinstance(generator, list):
            return torch.cat([torch.randn(shape, generator=one) for one in generator])
        return torch.randn((count, *shape[1:]), generator=generator)


def load_pipeline(folder: str | Path, scheduler: str) -> DiTTextToImagePipeline:
    """The pipeline as `sample` and `dit generate` use it: on the GPU if there is one, the transformer in bf16 where that is
    fast, the encoders in fp32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = torch.bfloat16 if has_bf16(device) else torch.float32
    pipeline = DiTTextToImagePipeline.from_pretrained(folder, transformer_dtype=fast).to(device)
    pipeline.scheduler = make_scheduler(scheduler)
    return pipeline
