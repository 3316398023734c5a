"""Text to image with a trained transformer: the diffusers pipeline that `sample` and `dit generate` use."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from dit.diffusion import PredictionType, guide
from dit.encoders import EncoderSource, load_text_encoder, load_vae
from dit.errors import UserError
from dit.images import to_images
from dit.model import DiT
from dit.padding import pad
from dit.precision import has_bf16
from dit.schedulers import fit_problem, make_scheduler, model_times, scheduler_steps


@dataclass
class PipelineOutput(BaseOutput):
    """`images`: a list of PIL pictures, or a tensor (N, C, H, W) where latents were asked for."""

    images: list[Image.Image] | torch.Tensor


class DiTTextToImagePipeline(DiffusionPipeline):
    """Draw what captions say.

    Args:
        transformer: the trained `DiT`.
        scheduler: a diffusers scheduler for what the transformer predicts, see `make_scheduler`.
        vae: the `AutoencoderKL` whose latents the transformer was trained on.
        text_encoder: the `CLIPTextModelWithProjection` it was trained with.
        tokenizer: its `CLIPTokenizer`.
        prediction_type: what the transformer predicts: "flow_prediction", "epsilon" or "v_prediction".
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, transformer, scheduler, vae, text_encoder, tokenizer, prediction_type: PredictionType = "flow_prediction"):
        super().__init__()
        self.register_to_config(prediction_type=prediction_type)
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
            encoders, prediction_type = index["encoders"], index["prediction_type"]
            vae_source, clip_source = EncoderSource(**encoders["vae"]), EncoderSource(**encoders["clip"])
            transformer = DiT.from_pretrained(folder, subfolder="transformer", torch_dtype=transformer_dtype or torch_dtype)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: not a trained model ({' '.join(str(error).split())[:120]}); run `dvc repro`") from None
        vae, _ = load_vae(vae_source, torch_dtype)
        text_encoder, tokenizer, _ = load_text_encoder(clip_source, torch_dtype)
        scheduler = make_scheduler("euler", prediction_type)
        pipeline = cls(transformer.eval(), scheduler, vae, text_encoder, tokenizer, prediction_type)
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
            num_inference_steps: evaluations of the transformer, of one batch with and without caption unless
                `guidance_scale` is 1. Heun's method makes half as many steps of two evaluations each.
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
        problem = fit_problem(self.scheduler, self.config.prediction_type)
        if problem:
            raise UserError(problem)
        guided = guidance_scale > 1
        tokens, mask, pooled = self.encode_prompt([*prompts, *([""] * len(prompts) if guided else [])])
        keys_values = self.transformer.text_keys_values(tokens)
        shape = (1, self.transformer.config.in_channels, height // factor, width // factor)
        latents = self._noise(shape, len(prompts), generator).to(self.device)  # fp32 all the way, whatever the networks are
        self.scheduler.set_timesteps(scheduler_steps(self.scheduler, num_inference_steps), device=self.device)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        takes_noise = "generator" in inspect.signature(self.scheduler.step).parameters
        fresh_noise = {"generator": generator} if takes_noise else {}
        rescale = getattr(self.scheduler, "scale_model_input", lambda latents, t: latents)
        times = model_times(self.scheduler)
        for t, time in zip(self.progress_bar(self.scheduler.timesteps), times, strict=True):
            inputs = rescale(latents, t)
            inputs = inputs.repeat(2, 1, 1, 1) if guided else inputs
            predicted = self.transformer(inputs, time.expand(len(inputs)), None, mask, pooled, keys_values)
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
    pipeline.scheduler = make_scheduler(scheduler, pipeline.config.prediction_type)
    return pipeline
