"""Text (and an image, and a mask) to image with a trained transformer: the diffusers pipeline that everything draws with."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dit.config import DEFAULTS, STRENGTH
from dit.encoders.text import embed_captions, pad_tokens
from dit.encoders.vae import decode_latents, encode_image
from dit.errors import UserError, one_line
from dit.model.objectives import PredictionType, apply_cfg
from dit.model.transformer import DiT
from dit.pipeline.img2img import add_noise, get_timesteps, latent_mask, side_lengths
from dit.pipeline.loading import load_components
from dit.pipeline.prompts import truncated_text
from dit.pipeline.schedulers import fit_problem, predicts, set_timesteps, timesteps_to_sigmas

logger = logging.getLogger(__name__)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DiTTextToImagePipeline(DiffusionPipeline):
    """Draw what captions say, or change an image as they say.

    Args:
        transformer: the trained `DiT`.
        scheduler: a diffusers scheduler for what the transformer predicts, see `make_scheduler`.
        vae: the `AutoencoderKL` whose latents the transformer was trained on.
        text_encoder: the `CLIPTextModelWithProjection` it was trained with.
        tokenizer: its `CLIPTokenizer`.
        prediction_type: what the transformer predicts: "flow_prediction", "epsilon" or "v_prediction"; by default what the
            scheduler takes its output for.
        image_size: side of the images it was trained on, in pixels: the default height and width. Without it, each call
            has to say both.
    """

    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers reads a list)

    def __init__(
        self,
        transformer: DiT,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        prediction_type: PredictionType | None = None,
        image_size: int | None = None,
    ):
        super().__init__()
        self.register_to_config(prediction_type=prediction_type or predicts(scheduler), image_size=image_size)
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        torch_dtype: torch.dtype = torch.float32,
        transformer_dtype: torch.dtype | None = None,
        **components: Any,
    ) -> DiTTextToImagePipeline:
        """Load what the train stage wrote, and the encoders that it names; or what `save_pretrained` or `dit export` wrote.

        Args:
            folder: `models/dit`, or a copy of it.
            torch_dtype: of everything.
            transformer_dtype: of the transformer, where it should differ.
            components: what to take instead of what is there, such as `scheduler`.

        Raises:
            UserError: the folder is no such model, an encoder is not to be had or has changed, or an argument is none of these.
        """
        for name in components:
            if name not in inspect.signature(cls).parameters:
                raise UserError(f"from_pretrained: {name} is no part of this pipeline, and no argument of it")
        for dtype in (torch_dtype, transformer_dtype):
            if not isinstance(dtype, (torch.dtype, type(None))):
                raise UserError(f"from_pretrained: {dtype!r} is no torch.dtype; torch.float32 or torch.bfloat16 would be right")
        return cls(**load_components(Path(folder), torch_dtype, transformer_dtype or torch_dtype) | components)

    def enable_vae_slicing(self) -> None:
        """Decode images one by one: less memory for large batches."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all images of a batch at once, as is the default."""
        self.vae.disable_slicing()

    @property
    def guidance_scale(self) -> float:
        """Of the call that is going on; a callback may set `_guidance_scale`, to 1 or less for steps without guidance."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the transformer in the call that is going on."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, so that the remaining steps are left out."""
        return self._interrupt

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (N, L, E), mask (N, L) and pooled vectors (N, P), as the encode stage makes them.

        What of a prompt is beyond CLIP's 77 tokens is not read, and logged as a warning.
        """
        for prompt in prompts:
            rest = truncated_text(self.tokenizer, prompt)
            if rest:
                logger.warning("the prompt is longer than %d tokens; not read: %r", self.tokenizer.model_max_length, rest)
        rows, pooled = embed_captions(self.text_encoder, self.tokenizer, prompts)
        return *pad_tokens(rows), pooled

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = DEFAULTS.num_inference_steps,
        guidance_scale: float = DEFAULTS.guidance_scale,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw, or change `image`. N is the number of prompts times `num_images_per_prompt`.

        Args:
            prompt: one caption or several.
            negative_prompt: what to lean away from, one for all or one for each prompt; by default the empty caption.
            image: an image to start from (PIL, numpy or tensor in [0, 1]; or several, one for each prompt). PIL images
                are cropped to the shape of what is drawn, and resized.
            mask_image: white (1) where `image` is redrawn; pixels elsewhere stay as they are. It has the shape of `image`.
            strength: how much noise `image` starts with, in [0, 1]: at 0 the VAE's reconstruction is returned, at 1 nothing
                of it is kept. By default 0.6 without a mask (things keep their places and may change their colours), 1 with one.
            height, width: in pixels; multiples of 8 x patch size. Default: the size that was trained on.
            num_inference_steps: evaluations of the transformer, of one batch with and without caption unless
                `guidance_scale` is 1. Heun's method makes half as many steps of two evaluations each. With `image`
                and `strength`, only those after the starting point are made.
            guidance_scale: how far to lean away from what would be drawn with `negative_prompt`; 1 or less is not at all.
            guidance_interval: the noise levels in [0, 1] between which it leans (Kynkäänniemi et al. 2024,
                arXiv:2404.07724); outside, a step costs half.
            num_images_per_prompt: how often each prompt is drawn.
            generator: one for all images, or a list of N, so that an image does not depend on its neighbours.
            latents: the noise to start from, (N, C, height / 8, width / 8), instead of drawing it from `generator`. The
                stochastic scheduler puts fresh noise of `generator` in its place step by step: with it this matters little.
            output_type: "pil", "np" (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W) in [0, 1] or "latent" (N, C, H / 8, W / 8).
            return_dict: an `ImagePipelineOutput` with `images`, or else a tuple of them.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": …}) after each evaluation; may
                return {"latents": …} to replace them.
            callback_on_step_end_tensor_inputs: which of "latents" it is given.

        Raises:
            UserError: an argument is impossible; one line that says which, and what would be right.
        """
        prompts: list[str] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        if negative_prompt is None or isinstance(negative_prompt, str):
            negatives = [negative_prompt or ""] * len(prompts)
        else:
            negatives = list(negative_prompt)
        height, width = (self.config.image_size if size is None else size for size in (height, width))
        if height is None or width is None:
            raise UserError(
                "height, width: this pipeline was not told what size it was trained on; say both, or give it image_size"
            )
        if not all(isinstance(text, str) for text in [*prompts, *negatives]):
            raise UserError("prompt, negative_prompt: texts, or lists of texts, would be right")
        count = len(prompts) * num_images_per_prompt
        if strength is None:
            strength = STRENGTH if image is not None and mask_image is None else 1.0
        cell = self.vae_scale_factor * self.transformer.config.patch_size
        if height % cell or width % cell or min(height, width) < 1:
            raise UserError(f"height and width must be multiples of {cell}, not {height} x {width}")
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps: {num_inference_steps} is not a positive number")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise UserError(f"callback_on_step_end_tensor_inputs: {unknown.pop()!r} cannot be given; latents can")
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type: {output_type!r}; one of {', '.join(OUTPUT_TYPES)} would be right")
        shape = (count, self.transformer.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        generator = list(generator) if isinstance(generator, tuple) else generator
        self._check(prompts, negatives, image, mask_image, strength, count, shape, latents, generator, guidance_interval)
        self._guidance_scale, self._interrupt = guidance_scale, False
        device = self.transformer.device

        set_timesteps(self.scheduler, num_inference_steps, device)
        times = timesteps_to_sigmas(self.scheduler)
        levels = times.tolist()  # once, so that no step waits for the device
        first = get_timesteps(self.scheduler, strength)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(min(first, len(times) - 1))
        self._num_timesteps = len(times) - first
        if strength > 0 and not self._num_timesteps:
            least = min(levels[:: self.scheduler.order])
            raise UserError(
                f"strength: {strength} is below {least:.2g}, the least noise level of {num_inference_steps} steps: nothing would "
                "change; more strength or more steps would be right"
            )

        # Noise and latents are fp32 all the way, whatever the networks are.
        noise = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents.to(device, torch.float32)
        if image is None:
            latents = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        else:
            pixels = self._pixels("image", image, height, width, len(prompts), num_images_per_prompt)
            original = encode_image(self.vae, pixels)
            latents = add_noise(self.scheduler, original, noise, first)
        if mask_image is not None:
            mask = self._pixels("mask_image", mask_image, height, width, len(prompts), num_images_per_prompt)
            redrawn = latent_mask(mask, self.vae_scale_factor)

        both = guidance_scale > 1
        text = self._text([p for p in prompts for _ in range(num_images_per_prompt)], negatives, both)
        fresh_noise = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        rescale = getattr(self.scheduler, "scale_model_input", lambda latents, t: latents)
        with self.progress_bar(total=self.num_timesteps) as progress:
            for k in range(first, len(times)):
                if self.interrupt:
                    continue
                t = self.scheduler.timesteps[k]
                guided = both and self.guidance_scale > 1 and guidance_interval[0] <= levels[k] <= guidance_interval[1]
                predicted = self._predict(rescale(latents, t), times[k], text, guided)
                latents = self.scheduler.step(predicted, t, latents, return_dict=False, **fresh_noise)[0]
                if mask_image is not None:
                    latents = torch.where(redrawn > 0, latents, add_noise(self.scheduler, original, noise, k + 1))
                if callback_on_step_end is not None:
                    given = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, k - first, t, given) or {}).get("latents", latents)
                progress.update()

        if not torch.isfinite(latents).all():
            raise UserError(
                f"no picture came out: numbers grew beyond what {self.transformer.dtype} holds; a lower guidance_scale, "
                "fewer steps, another scheduler or float32 would be right"
            )
        images = latents
        if output_type != "latent":
            images = decode_latents(self.vae, latents)
            if mask_image is not None:
                images = torch.where(mask > 0, images, pixels)
            images = self.image_processor.postprocess(images, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _pixels(self, name: str, pictures: PipelineImageInput, height: int, width: int, prompts: int, times: int) -> torch.Tensor:
        """Preprocess the argument `name`, one image for each that is generated.

        Returns (N, 3, H, W) in [-1, 1], of a mask (N, 1, H, W), 0 or 1; float32, on the transformer's device.
        """
        processor, channels = (self.image_processor, 3) if name == "image" else (self.mask_processor, 1)
        pictures = list(pictures) if isinstance(pictures, tuple) else pictures
        if getattr(pictures, "dtype", None) in (bool, torch.bool):
            pictures = pictures * 1.0
        try:
            pixels = processor.preprocess(pictures, height, width, resize_mode="crop")
            shape = tuple(pixels.shape)
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise UserError(f"{name}: not a picture, nor several ({one_line(error)})") from None
        if shape[1:] != (channels, height, width):
            raise UserError(f"{name}: {shape} are no pictures of {channels} x {height} x {width}")
        if len(pixels) not in (1, prompts):
            raise UserError(f"{name}: one for all, or one for each of {prompts} prompts")
        repeats = times * (prompts if len(pixels) == 1 else 1)
        return pixels.to(self.transformer.device, torch.float32).repeat_interleave(repeats, 0)

    def _text(self, prompts: list[str], negatives: list[str], guided: bool):
        """Encode the texts of each image's half with its caption and, if `guided`, of its half without one.

        Returns mask, pooled vectors, and keys and values of every block, computed once for each different text: (2 N or N) rows.
        """
        negatives = [text for text in negatives for _ in range(len(prompts) // len(negatives))] if guided else []
        different = list(dict.fromkeys([*prompts, *negatives]))
        tokens, mask, pooled = self.encode_prompt(different)
        rows = torch.tensor([different.index(text) for text in [*prompts, *negatives]], device=tokens.device)
        keys_values = [(k[rows], v[rows]) for k, v in self.transformer.text_keys_values(tokens)]
        return mask[rows], pooled[rows], keys_values

    def _predict(self, inputs: torch.Tensor, time: torch.Tensor, text, guided: bool) -> torch.Tensor:
        """Return the transformer's output (N, C, h, w) at `time` in [0, 1]; where `guided`, both halves in one batch."""
        mask, pooled, keys_values = text
        inputs = inputs.repeat(2, 1, 1, 1) if guided else inputs
        count = len(inputs)
        keys_values = [(k[:count], v[:count]) for k, v in keys_values]  # those with a caption come first
        predicted = self.transformer(inputs, time.expand(count), None, mask[:count], pooled[:count], keys_values)
        if not guided:
            return predicted
        conditional, unconditional = predicted.chunk(2)
        return apply_cfg(conditional, unconditional, self.guidance_scale)

    def _check(self, prompts, negatives, image, mask_image, strength, count, latent_shape, latents, generator, guidance_interval):
        """Raise a `UserError` for the first argument of a call that is impossible by itself or beside the others."""
        problems = {
            "prompt: at least one is needed": not prompts,
            f"num_images_per_prompt: {count} pictures cannot be drawn; 1 or more would be right": count < 1,
            f"guidance_interval: {guidance_interval} does not rise from 0 to 1": not (
                0 <= guidance_interval[0] <= guidance_interval[1] <= 1
            ),
            f"strength: {strength} is not between 0 and 1": not 0 <= strength <= 1,
            "strength, mask_image: they need an image to change": image is None and (mask_image is not None or strength < 1),
            f"negative_prompt: one for all, or one for each of {len(prompts)} prompts": len(negatives) != len(prompts),
            f"generator: a list needs one for each of {count} pictures": isinstance(generator, list) and len(generator) != count,
            f"latents: must be of shape {latent_shape}": latents is not None and tuple(latents.shape) != latent_shape,
        }
        if image is not None and mask_image is not None:
            (width, height), (mask_width, mask_height) = side_lengths(image), side_lengths(mask_image)
            problems[f"mask_image: {mask_width} x {mask_height} pixels do not lie over the image's {width} x {height}"] = (
                width * mask_height != height * mask_width
            )
        for problem in (text for text, wrong in problems.items() if wrong):
            raise UserError(problem)
        misfit = fit_problem(self.scheduler, self.config.prediction_type)
        if misfit:
            raise UserError(misfit)
