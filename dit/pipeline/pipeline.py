"""The diffusers pipeline: text, and optionally an image and a mask, to image with a trained transformer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dit.config import DEFAULTS, STRENGTH
from dit.encoders.text import embed_captions, pad_tokens
from dit.encoders.vocabulary import truncated_text
from dit.errors import UserError
from dit.model.objectives import apply_cfg
from dit.model.transformer import DiT
from dit.pipeline.conditioning import Conditioning, Embeds, PromptEmbeds, Side, encode_sides, onload, read_texts
from dit.pipeline.hub import find_model
from dit.pipeline.img2img import SourceImage, check_source, get_timesteps
from dit.pipeline.inputs import callback_tensors, check_inputs, latent_shape
from dit.pipeline.loading import load_components
from dit.pipeline.lora import LoraMixin
from dit.pipeline.schedulers import fit_problem, predicts, set_timesteps, timesteps_to_sigmas
from dit.utils.autoencoder import decode_latents, vae_factor

logger = logging.getLogger(__name__)
MODEL_CLASS = ("dit.model", "DiT")  # as model_index.json has named it since version 0.1
Autoencoder: TypeAlias = (
    AutoencoderKL | AutoencoderKLFlux2 | AutoencoderTiny | AutoencoderDC
)  # diffusers looks at what this is at run time
Callback = Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, Any]], dict[str, Any]]


class DiTTextToImagePipeline(DiffusionPipeline, LoraMixin):
    """Generate images from captions, or change an image by a caption.

    Args:
        transformer: the trained `DiT`.
        scheduler: a diffusers scheduler for what the transformer predicts, see `make_scheduler`.
        vae: the autoencoder whose latents the transformer was trained on, of a class in `HAS_POSTERIOR`.
        text_encoder: the `CLIPTextModelWithProjection` it was trained with.
        tokenizer: its `CLIPTokenizer`.
        prediction_type: what the transformer predicts: "flow_prediction", "epsilon" or "v_prediction"; by default what the
            scheduler takes its output for.
        image_size: side in pixels of the square images it was trained on, or of squares of their area: the default height and
            width. Without it, each call needs both.
        sizes: width and height of the images, where it was trained on several sizes, that of most images first. If the square
            is none of them, the first is the default.
        long_captions: what becomes of more than 77 tokens, as in its training: "cut" or "chunks".
    """

    transformer: DiT
    scheduler: SchedulerMixin
    vae: Autoencoder
    text_encoder: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    vae_scale_factor: int
    _guidance_scale: float
    _guidance_rescale: float
    _num_timesteps: int
    _interrupt: bool
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", *PromptEmbeds._fields]  # noqa: RUF012 (diffusers reads a list)

    def __init__(
        self,
        transformer: DiT,
        scheduler: SchedulerMixin,
        vae: Autoencoder,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        prediction_type: str | None = None,  # a `PredictionType`; diffusers' own loader fails at a Literal
        image_size: int | None = None,
        sizes: list | None = None,
        long_captions: str = "cut",
    ):
        super().__init__()
        self.register_to_config(prediction_type=prediction_type or predicts(scheduler), image_size=image_size, sizes=sizes)
        self.register_to_config(long_captions=long_captions)
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.vae_scale_factor = vae_factor(vae.config)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: torch.dtype = torch.float32,
        transformer_dtype: torch.dtype | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **components: Any,
    ) -> DiTTextToImagePipeline:
        """Load what the train stage wrote, and the encoders that it names; or what `save_pretrained` or `dit export` wrote.

        Args:
            pretrained_model_name_or_path: a folder, `models/dit` or a copy of it; or owner/name on the Hugging Face Hub, as
                `dit push` filled it. Weights are read from safetensors alone, and nothing in it is executed.
            torch_dtype: of all networks.
            transformer_dtype: of the transformer, if another one.
            revision: branch, tag or commit on the Hub.
            subfolder: where in the folder, or in the repository, the model is.
            local_files_only: whether to take what is in the Hub's cache, and to ask nobody.
            token: for the Hub, instead of the one that the user is logged in with; False for none.
            components: used instead of those in the folder, for instance `scheduler`.

        Raises:
            UserError: the folder is no such model, it cannot be downloaded, an encoder is missing or has changed, or an argument
                is none of these.
        """
        for name in components:
            if name not in inspect.signature(cls).parameters:
                raise UserError(f"from_pretrained: {name} is no part of this pipeline, and no argument of it")
        for dtype in (torch_dtype, transformer_dtype):
            if not isinstance(dtype, (torch.dtype, type(None))):
                raise UserError(f"from_pretrained: {dtype!r} is no torch.dtype; torch.float32 or torch.bfloat16 would be right")
        folder = find_model(pretrained_model_name_or_path, revision, subfolder, local_files_only, token)
        return cls(**load_components(folder, torch_dtype, transformer_dtype or torch_dtype) | components)

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> None:
        """Save as diffusers does; model_index.json names the class of the transformer by its public place, `dit.model`."""
        self.register_to_config(transformer=MODEL_CLASS)
        super().save_pretrained(save_directory, **settings)

    @property
    def trained_sizes(self) -> list[tuple[int, int]]:
        """Return width and height of the images that it was trained on, the default of a call first."""
        side = self.config.image_size
        sizes = [(width, height) for width, height in self.config.sizes or ([(side, side)] if side else [])]
        return sorted(sizes, key=lambda size: size != (side, side))

    def enable_vae_slicing(self) -> None:
        """Decode images one by one: less memory for large batches."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all images of a batch at once, as is the default."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Encode and decode large images tile by tile, with blended borders: less memory, pixels that differ a little."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode images whole, as is the default."""
        self.vae.disable_tiling()

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
    def encode_prompt(
        self,
        prompt: str | list[str],
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
    ) -> PromptEmbeds:
        """Encode prompts as the encode stage does; a call with what this returns generates the same images as one with texts.

        CLIP reads 77 tokens; a warning is logged for a longer prompt, unless the model was trained on captions in
        chunks.

        Args:
            prompt: one caption or several.
            do_classifier_free_guidance: whether to encode negative prompts, too; a `guidance_scale` above 1 needs them.
            negative_prompt: one for all or one for each prompt; by default the empty caption.

        Returns:
            Six tensors under the names of the call's arguments: `pipeline(**pipeline.encode_prompt(prompt)._asdict())`.
        """
        prompts, negatives = read_texts(prompt, negative_prompt, PromptEmbeds(), self.transformer)
        sides = (prompts, negatives) if do_classifier_free_guidance else (prompts,)
        texts, rows = encode_sides(self._embed, sides, self._execution_device)
        given: list[torch.Tensor | None] = []
        for values in (texts.tokens, texts.pooled, texts.mask):
            given += [values[rows[0]], values[rows[1]] if do_classifier_free_guidance else None]
        return PromptEmbeds(*given)

    def _embed(self, prompts: list[str]) -> Embeds:
        for prompt in prompts:
            rest = truncated_text(self.tokenizer, prompt) if self.config.long_captions == "cut" else ""
            if rest:
                logger.warning("the prompt is longer than %d tokens; not read: %r", self.tokenizer.model_max_length, rest)
        rows, pooled = embed_captions(self.text_encoder, self.tokenizer, prompts, self.config.long_captions)
        return Embeds(*pad_tokens(rows), pooled)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = DEFAULTS.num_inference_steps,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = DEFAULTS.guidance_scale,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> ImagePipelineOutput | tuple:
        """Generate N images, or N changed ones of `image`; N is the number of prompts times `num_images_per_prompt`.

        Arguments have the names and the order of Stable Diffusion's and SD3's pipelines; docs/generation.md compares them.

        Args:
            prompt: one caption or several.
            height, width: in pixels; multiples of 8 x patch size. Default: the size that was trained on.
            num_inference_steps: evaluations of the transformer, of one batch with and without caption unless
                `guidance_scale` is 1. Heun's method makes half as many steps of two evaluations each. With `image`
                and `strength`, only those after the starting point are made.
            timesteps: a schedule of one's own instead, as the scheduler's `set_timesteps` takes it: falling from 1000 at most.
            sigmas: the same as noise levels, of a flow falling from 1 at most; 0 follows by itself. `EulerDiscreteScheduler`
                has a scale of its own, and its last one is 0.
            guidance_scale: of classifier-free guidance away from `negative_prompt`; 1 or less is without guidance.
            negative_prompt: what the images should not show, one for all or one for each prompt; by default the empty caption.
            num_images_per_prompt: images of each prompt.
            generator: one for all images, or a list of N, so that an image does not depend on its neighbours.
            latents: the noise to start from, (N, C, height / f, width / f) where a latent is f pixels wide and high, instead of
                noise from `generator`. The stochastic scheduler replaces it by fresh noise of `generator` step by step: with it
                this matters little.
            prompt_embeds, pooled_prompt_embeds, prompt_attention_mask: instead of `prompt`, as `encode_prompt` returns them.
            negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_attention_mask: instead of `negative_prompt`.
            output_type: "pil", "np" (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W) in [0, 1] or "latent" (N, C, H / f, W / f).
            return_dict: an `ImagePipelineOutput` with `images`, or else a tuple of them.
            guidance_rescale: in [0, 1], how far guidance keeps the prediction's standard deviation (Lin et al. 2023,
                arXiv:2305.08891, section 3.4), against too much contrast at a large `guidance_scale`; 0 is not at all.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each evaluation; may return a
                dictionary of tensors to replace them. One of `diffusers.callbacks` brings its own list of names.
            callback_on_step_end_tensor_inputs: which tensors it is given: "latents" and the arguments from `prompt_embeds` to
                `negative_prompt_attention_mask`, a row for each image.
            image: an image to start from, or several, one for each prompt: PIL images of any mode, numpy arrays (H, W, C) or
                tensors (C, H, W). Floats are in [0, 1], integers in [0, 255], those of uint16 in [0, 65,535]. What is
                transparent becomes white, as in training. PIL images are cropped to the shape of the result, and resized;
                others are stretched.
            mask_image: white (1) where `image` changes; pixels elsewhere stay as they are. It has the shape of `image`.
            strength: how much noise `image` starts with, in [0, 1]: at 0 the VAE's reconstruction is returned, at 1 nothing
                of it is kept. By default 0.6 without a mask (objects keep their places and may change colour), 1 with one.
            guidance_interval: the noise levels in [0, 1] with guidance (Kynkäänniemi et al. 2024, arXiv:2404.07724); outside
                of it, a step costs half.

        Raises:
            UserError: an argument is impossible; one line that says which, and what would be right.
        """
        given = PromptEmbeds(
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )
        sides = read_texts(prompt, negative_prompt, given, self.transformer)
        prompts = len(sides[0])
        generators = list(generator) if isinstance(generator, (list, tuple)) else generator
        default_width, default_height = self.trained_sizes[0] if self.trained_sizes else (None, None)
        height, width = default_height if height is None else height, default_width if width is None else width
        grid = self.vae_scale_factor, self.transformer.config.patch_size, self.transformer.config.in_channels
        shape = latent_shape(prompts * num_images_per_prompt, height, width, *grid)
        check_inputs(shape, num_inference_steps, guidance_rescale, guidance_interval, generators, latents, output_type)
        problem = fit_problem(self.scheduler, self.config.prediction_type)
        if problem:
            raise UserError(problem)
        names = callback_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        if strength is None:
            strength = STRENGTH if image is not None and mask_image is None else 1.0
        check_source(image, mask_image, strength)

        self._guidance_scale, self._guidance_rescale, self._interrupt = guidance_scale, guidance_rescale, False
        device = self._execution_device  # which is not where the networks are before `enable_model_cpu_offload` needs them
        set_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        first, levels = self._first_step(strength)
        # Noise and latents are fp32 throughout, whatever the dtype of the networks is.
        noise = randn_tensor(shape, generators, device, torch.float32) if latents is None else latents.to(device, torch.float32)
        source = None
        if image is not None:
            onload(self.vae)
            processors = self.image_processor, self.mask_processor
            source = SourceImage.prepare(self.vae, *processors, image, mask_image, noise, prompts, num_images_per_prompt)
        start = source.add_noise(self.scheduler, first) if source else noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        text = self._condition(sides, shape[0], device)

        def on_step_end(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            if callback_on_step_end is None:
                return latents
            tensors = {name: latents if name == "latents" else text.tensor(name) for name in names}
            returned = callback_on_step_end(self, step, timestep, tensors) or {}
            text.replace(returned)
            return returned.get("latents", latents)

        final = self._denoise(start, first, levels, text, guidance_interval, generators, source, on_step_end)
        images = self._decode(final, source, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _first_step(self, strength: float) -> tuple[int, torch.Tensor]:
        """Return the number of the scheduler's first step from `strength`, and the noise levels of all, in [0, 1]."""
        sigmas = timesteps_to_sigmas(self.scheduler)
        first = get_timesteps(self.scheduler, strength)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(min(first, len(sigmas) - 1))
        self._num_timesteps = len(sigmas) - first
        if strength > 0 and not self._num_timesteps:
            levels = sigmas.tolist()[:: self.scheduler.order]
            raise UserError(
                f"strength: {strength} is below {min(levels):.2g}, the least noise level of {len(levels)} steps: nothing would "
                "change; more strength or more steps would be right"
            )
        return first, sigmas

    def _condition(self, sides: tuple[Side, Side], count: int, device: torch.device) -> Conditioning:
        """Encode prompts and, with guidance, negative ones for `count` images."""
        texts, rows = encode_sides(self._embed, sides if self.guidance_scale > 1 else sides[:1], device)
        each = [row for side in rows for row in side for _ in range(count // len(side))]
        return Conditioning(self.transformer, texts, each, count)

    def _denoise(
        self,
        latents: torch.Tensor,
        first: int,
        sigmas: torch.Tensor,
        text: Conditioning,
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

    def _predict(self, inputs: torch.Tensor, sigma: torch.Tensor, text: Conditioning, guided: bool) -> torch.Tensor:
        """Return the transformer's output (N, C, h, w) at `sigma` in [0, 1]; where `guided`, both halves in one batch."""
        if not guided:
            return text.predict(inputs, sigma)
        conditional, unconditional = text.predict(inputs.repeat(2, 1, 1, 1), sigma).chunk(2)
        predicted = apply_cfg(conditional, unconditional, self.guidance_scale)
        return rescale_noise_cfg(predicted, conditional, self._guidance_rescale) if self._guidance_rescale else predicted

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
