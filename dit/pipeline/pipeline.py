"""The diffusers pipeline: text, and optionally an image and a mask, to image with a trained transformer."""

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
from dit.encoders.vocabulary import truncated_text
from dit.errors import UserError
from dit.model.objectives import PredictionType, apply_cfg
from dit.model.transformer import DiT
from dit.pipeline.img2img import SourceImage, check_source, get_timesteps
from dit.pipeline.loading import load_components
from dit.pipeline.lora import LoraMixin
from dit.pipeline.schedulers import fit_problem, predicts, set_timesteps, timesteps_to_sigmas
from dit.utils.images import decode_latents

logger = logging.getLogger(__name__)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MODEL_CLASS = ("dit.model", "DiT")  # as model_index.json has named it since version 0.1
# Of the texts of a call: mask (N, L), pooled vectors (N, P), and keys and values of every block.
Text = tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]
Callback = Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, Any]], dict[str, Any]]


class DiTTextToImagePipeline(DiffusionPipeline, LoraMixin):
    """Generate images from captions, or change an image by a caption.

    Args:
        transformer: the trained `DiT`.
        scheduler: a diffusers scheduler for what the transformer predicts, see `make_scheduler`.
        vae: the `AutoencoderKL` whose latents the transformer was trained on.
        text_encoder: the `CLIPTextModelWithProjection` it was trained with.
        tokenizer: its `CLIPTokenizer`.
        prediction_type: what the transformer predicts: "flow_prediction", "epsilon" or "v_prediction"; by default what the
            scheduler takes its output for.
        image_size: side of the images it was trained on, in pixels: the default height and width. Without it, each call
            needs both.
    """

    transformer: DiT
    scheduler: SchedulerMixin
    vae: AutoencoderKL
    text_encoder: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    vae_scale_factor: int
    _guidance_scale: float
    _num_timesteps: int
    _interrupt: bool
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
            torch_dtype: of all networks.
            transformer_dtype: of the transformer, if another one.
            components: used instead of those in the folder, for instance `scheduler`.

        Raises:
            UserError: the folder is no such model, an encoder is missing or has changed, or an argument is none of these.
        """
        for name in components:
            if name not in inspect.signature(cls).parameters:
                raise UserError(f"from_pretrained: {name} is no part of this pipeline, and no argument of it")
        for dtype in (torch_dtype, transformer_dtype):
            if not isinstance(dtype, (torch.dtype, type(None))):
                raise UserError(f"from_pretrained: {dtype!r} is no torch.dtype; torch.float32 or torch.bfloat16 would be right")
        return cls(**load_components(Path(folder), torch_dtype, transformer_dtype or torch_dtype) | components)

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> None:
        """Save as diffusers does; model_index.json names the class of the transformer by its public place, `dit.model`."""
        self.register_to_config(transformer=MODEL_CLASS)
        super().save_pretrained(save_directory, **settings)

    def enable_vae_slicing(self) -> None:
        """Decode images one by one: less memory for large batches."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all images of a batch at once, as is the default."""
        self.vae.disable_slicing()

    @property
    def guidance_scale(self) -> float:
        """Return that of the running call; a callback may set `_guidance_scale`, to 1 or less for steps without guidance."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Return the number of steps of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Return whether a callback has set `_interrupt`, so that the remaining steps are skipped."""
        return self._interrupt

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens (N, L, E), mask (N, L) and pooled vectors (N, P), as the encode stage computes them.

        CLIP reads 77 tokens; a warning is logged for a longer prompt.
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
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate N images, or N changed ones of `image`; N is the number of prompts times `num_images_per_prompt`.

        Args:
            prompt: one caption or several.
            negative_prompt: what the images should not show, one for all or one for each prompt; by default the empty caption.
            image: an image to start from, or several, one for each prompt: PIL images of any mode, numpy arrays (H, W, C) or
                tensors (C, H, W). Floats are in [0, 1], integers in [0, 255], those of uint16 in [0, 65,535]. What is
                transparent becomes white, as in training. PIL images are cropped to the shape of the result, and resized;
                others are stretched.
            mask_image: white (1) where `image` changes; pixels elsewhere stay as they are. It has the shape of `image`.
            strength: how much noise `image` starts with, in [0, 1]: at 0 the VAE's reconstruction is returned, at 1 nothing
                of it is kept. By default 0.6 without a mask (objects keep their places and may change colour), 1 with one.
            height, width: in pixels; multiples of 8 x patch size. Default: the size that was trained on.
            num_inference_steps: evaluations of the transformer, of one batch with and without caption unless
                `guidance_scale` is 1. Heun's method makes half as many steps of two evaluations each. With `image`
                and `strength`, only those after the starting point are made.
            guidance_scale: of classifier-free guidance away from `negative_prompt`; 1 or less is without guidance.
            guidance_interval: the noise levels in [0, 1] with guidance (Kynkäänniemi et al. 2024, arXiv:2404.07724); outside
                of it, a step costs half.
            num_images_per_prompt: images of each prompt.
            generator: one for all images, or a list of N, so that an image does not depend on its neighbours.
            latents: the noise to start from, (N, C, height / 8, width / 8), instead of noise from `generator`. The
                stochastic scheduler replaces it by fresh noise of `generator` step by step: with it this matters little.
            output_type: "pil", "np" (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W) in [0, 1] or "latent" (N, C, H / 8, W / 8).
            return_dict: an `ImagePipelineOutput` with `images`, or else a tuple of them.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": …}) after each evaluation; may
                return {"latents": …} to replace them.
            callback_on_step_end_tensor_inputs: which of "latents" it is given.

        Raises:
            UserError: an argument is impossible; one line that says which, and what would be right.
        """
        prompts, negatives = _read_texts(prompt, negative_prompt)
        generators = list(generator) if isinstance(generator, (list, tuple)) else generator
        shape = self._latent_shape(len(prompts) * num_images_per_prompt, height, width)
        self._check_inputs(shape, num_inference_steps, guidance_interval, generators, latents, output_type)
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise UserError(f"callback_on_step_end_tensor_inputs: {unknown.pop()!r} cannot be given; latents can")
        if strength is None:
            strength = STRENGTH if image is not None and mask_image is None else 1.0
        check_source(image, mask_image, strength)

        self._guidance_scale, self._interrupt = guidance_scale, False
        first, sigmas = self._prepare_timesteps(num_inference_steps, strength)
        device = self.transformer.device
        # Noise and latents are fp32 throughout, whatever the dtype of the networks is.
        noise = randn_tensor(shape, generators, device, torch.float32) if latents is None else latents.to(device, torch.float32)
        source = None
        if image is not None:
            processors, counts = (self.image_processor, self.mask_processor), (len(prompts), num_images_per_prompt)
            source = SourceImage.prepare(self.vae, *processors, image, mask_image, noise, *counts)
        start = source.add_noise(self.scheduler, first) if source else noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        text = self._encode_texts([text for text in prompts for _ in range(num_images_per_prompt)], negatives, guidance_scale > 1)

        def on_step_end(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            if callback_on_step_end is None:
                return latents
            given = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
            return (callback_on_step_end(self, step, timestep, given) or {}).get("latents", latents)

        final = self._denoise(start, first, sigmas, text, guidance_interval, generators, source, on_step_end)
        images = self._decode(final, source, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _latent_shape(self, count: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Return the shape of the latents of `count` images of this size, or of the size of training."""
        height, width = (self.config.image_size if size is None else size for size in (height, width))
        if height is None or width is None:
            raise UserError("height, width: this pipeline does not know the size of its training; give both, or image_size to it")
        cell = self.vae_scale_factor * self.transformer.config.patch_size
        if height % cell or width % cell or min(height, width) < 1:
            raise UserError(f"height and width must be multiples of {cell}, not {height} x {width}")
        return count, self.transformer.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def _check_inputs(
        self,
        shape: tuple[int, ...],
        num_inference_steps: int,
        guidance_interval: tuple[float, float],
        generators: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
    ) -> None:
        """Raise a `UserError` for the first argument of a call that is impossible."""
        count, (low, high) = shape[0], guidance_interval
        problems = {
            f"num_images_per_prompt: {count} images cannot be generated; 1 or more would be right": count < 1,
            f"num_inference_steps: {num_inference_steps} is not a positive number": num_inference_steps < 1,
            f"guidance_interval: {guidance_interval} does not rise from 0 to 1": not 0 <= low <= high <= 1,
            f"generator: a list needs one for each of {count} images": isinstance(generators, list) and len(generators) != count,
            f"latents: must be of shape {shape}": latents is not None and tuple(latents.shape) != shape,
            f"output_type: {output_type!r}; one of {', '.join(OUTPUT_TYPES)} would be right": output_type not in OUTPUT_TYPES,
        }
        problem = next((text for text, wrong in problems.items() if wrong), None)
        problem = problem or fit_problem(self.scheduler, self.config.prediction_type)
        if problem:
            raise UserError(problem)

    def _prepare_timesteps(self, num_inference_steps: int, strength: float) -> tuple[int, torch.Tensor]:
        """Set the scheduler's timesteps; return the number of the first step, and the noise levels of all, in [0, 1]."""
        set_timesteps(self.scheduler, num_inference_steps, self.transformer.device)
        sigmas = timesteps_to_sigmas(self.scheduler)
        first = get_timesteps(self.scheduler, strength)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(min(first, len(sigmas) - 1))
        self._num_timesteps = len(sigmas) - first
        if strength > 0 and not self._num_timesteps:
            least = min(sigmas.tolist()[:: self.scheduler.order])
            raise UserError(
                f"strength: {strength} is below {least:.2g}, the least noise level of {num_inference_steps} steps: nothing would "
                "change; more strength or more steps would be right"
            )
        return first, sigmas

    def _encode_texts(self, prompts: list[str], negatives: list[str], guided: bool) -> Text:
        """Encode the prompts and, if `guided`, the negative ones after them: each different text once, (2 N or N) rows."""
        negatives = [text for text in negatives for _ in range(len(prompts) // len(negatives))] if guided else []
        different = list(dict.fromkeys([*prompts, *negatives]))
        tokens, mask, pooled = self.encode_prompt(different)
        rows = torch.tensor([different.index(text) for text in [*prompts, *negatives]], device=tokens.device)
        keys_values = [(k[rows], v[rows]) for k, v in self.transformer.text_keys_values(tokens)]
        return mask[rows], pooled[rows], keys_values

    def _denoise(
        self,
        latents: torch.Tensor,
        first: int,
        sigmas: torch.Tensor,
        text: Text,
        guidance_interval: tuple[float, float],
        generators: torch.Generator | list[torch.Generator] | None,
        source: SourceImage | None,
        on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Return the latents (N, C, h, w) after all steps from the one of number `first` on."""
        levels = sigmas.tolist()  # once, so that no step waits for the device
        both = self.guidance_scale > 1
        fresh_noise = {"generator": generators} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        rescale = getattr(self.scheduler, "scale_model_input", lambda latents, t: latents)
        with self.progress_bar(total=self.num_timesteps) as progress:
            for k in range(first, len(levels)):
                if self.interrupt:
                    continue
                t = self.scheduler.timesteps[k]
                guided = both and self.guidance_scale > 1 and guidance_interval[0] <= levels[k] <= guidance_interval[1]
                predicted = self._predict(rescale(latents, t), sigmas[k], text, guided)
                latents = self.scheduler.step(predicted, t, latents, return_dict=False, **fresh_noise)[0]
                if source is not None:
                    latents = source.restore_latents(self.scheduler, latents, k + 1)
                latents = on_step_end(k - first, t, latents)
                progress.update()
        return latents

    def _predict(self, inputs: torch.Tensor, sigma: torch.Tensor, text: Text, guided: bool) -> torch.Tensor:
        """Return the transformer's output (N, C, h, w) at `sigma` in [0, 1]; where `guided`, both halves in one batch."""
        mask, pooled, keys_values = text
        inputs = inputs.repeat(2, 1, 1, 1) if guided else inputs
        count = len(inputs)
        keys_values = [(k[:count], v[:count]) for k, v in keys_values]  # those of the prompts come first
        predicted = self.transformer(inputs, sigma.expand(count), None, mask[:count], pooled[:count], keys_values)
        if not guided:
            return predicted
        conditional, unconditional = predicted.chunk(2)
        return apply_cfg(conditional, unconditional, self.guidance_scale)

    def _decode(self, latents: torch.Tensor, source: SourceImage | None, output_type: str) -> Any:
        """Return the images of `latents` as `output_type` says."""
        if not torch.isfinite(latents).all():
            raise UserError(
                f"no image came out: numbers grew beyond what {self.transformer.dtype} holds; a lower guidance_scale, "
                "fewer steps, another scheduler or float32 would be right"
            )
        if output_type == "latent":
            return latents
        pixels = decode_latents(self.vae, latents)
        return self.image_processor.postprocess(source.restore_pixels(pixels) if source else pixels, output_type)


def _read_texts(prompt: str | list[str], negative_prompt: str | list[str] | None) -> tuple[list[str], list[str]]:
    """Return the prompts, and a negative one for each."""
    prompts: list[str] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives = [negative_prompt or ""] * len(prompts)
    else:
        negatives = list(negative_prompt)
    if not all(isinstance(text, str) for text in [*prompts, *negatives]):
        raise UserError("prompt, negative_prompt: texts, or lists of texts, would be right")
    if not prompts:
        raise UserError("prompt: at least one is needed")
    if len(negatives) != len(prompts):
        raise UserError(f"negative_prompt: one for all, or one for each of {len(prompts)} prompts")
    return prompts, negatives
