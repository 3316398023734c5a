"""Objectives: the path from image to noise, what the network predicts on it, and the way back. None knows the network.

`Flow` is the rectified flow of Liu et al. 2022 (arXiv:2209.03003) with the logit-normal timesteps of Esser et al. 2024
(arXiv:2403.03206, section 3.1); `DDPM` is Ho et al. 2020 (arXiv:2006.11239), predicting the noise or v (Salimans and Ho
2022, arXiv:2202.00512). Timesteps t are in [0, 1] for both: 0 is the image, 1 pure noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

TRAINING_STEPS = 1000  # diffusers counts timesteps from 0 to 1000; the transformer from 0 to 1
# The linear schedule of Ho et al.: its last step keeps 1/150 of the image, so that sampling may start from pure noise.
BETAS = {"num_train_timesteps": TRAINING_STEPS, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
# "trailing" starts at the last timestep, which is pure noise (Lin et al. 2023, arXiv:2305.08891, section 3.3).
FROM_PURE_NOISE = {"timestep_spacing": "trailing"}
PredictionType = Literal["flow_prediction", "epsilon", "v_prediction"]  # in the words of diffusers


def euler_scheduler(prediction_type: PredictionType) -> EulerDiscreteScheduler | FlowMatchEulerDiscreteScheduler:
    """Return diffusers' Euler scheduler for this prediction type; a trained model is saved with it.

    The other schedulers are in dit/pipeline/schedulers.py, which training does not use: editing it trains nothing again.
    """
    if prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(TRAINING_STEPS)
    return EulerDiscreteScheduler(**BETAS, **FROM_PURE_NOISE, prediction_type=prediction_type)


class Flow:
    """Rectified flow: x_t = (1 - t) x + t noise; the network predicts dx_t / dt = noise - x.

    Args:
        logit_mean: of the logit-normal timesteps, m in Esser et al. A larger one spends more of the training on noisy
            images, where it is decided what goes where.
    """

    prediction_type: PredictionType = "flow_prediction"

    def __init__(self, logit_mean: float = 0.0):
        self.logit_mean = logit_mean

    def timesteps(self, quantiles: torch.Tensor) -> torch.Tensor:
        """Return timesteps (N,) float32 at `quantiles` (N,) in [0, 1] of their distribution."""
        return torch.sigmoid(self.logit_mean + torch.special.ndtri(quantiles))

    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return alpha_t and sigma_t, the weights of image and noise at `t` (N,): each (N, 1, 1, 1)."""
        t = t[:, None, None, None]
        return 1 - t, t

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return x_t (N, C, H, W) of `images` and `noise` (N, C, H, W) at `t` (N,)."""
        alpha_t, sigma_t = self.alpha_sigma(t)
        return alpha_t * images + sigma_t * noise

    def target(self, images: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return what the network shall predict, (N, C, H, W)."""
        return noise - images

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Return the weight of each timestep's error in the loss, (N,)."""
        return torch.ones_like(t)

    def to_x0_and_noise(
        self, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Split `noisy` into the image and the noise that `prediction` implies, each (N, C, H, W)."""
        alpha_t, sigma_t = self.alpha_sigma(t)
        return noisy - sigma_t * prediction, noisy + alpha_t * prediction


class DDPM:
    """The variance-preserving path x_t = sqrt(a) x + sqrt(1 - a) noise, in 1,000 steps, through diffusers' scheduler.

    Args:
        logit_mean: of the timesteps: noise levels (in terms of the signal-to-noise ratio) come as often as with a `Flow` of
            this mean. Were all timesteps equally frequent, a quarter would go into images of almost nothing but noise.
        prediction_type: "epsilon", the noise, or "v_prediction", sqrt(a) noise - sqrt(1 - a) x.
        snr_gamma: of the min-SNR weighting (Hang et al. 2023, arXiv:2303.09556, section 3.4); None for equal weights.
    """

    def __init__(self, prediction_type: PredictionType, snr_gamma: float | None = None, logit_mean: float = 0.0):
        self.prediction_type, self.snr_gamma, self.logit_mean = prediction_type, snr_gamma, logit_mean
        self.scheduler = DDPMScheduler(**BETAS, prediction_type=prediction_type)

    def _index(self, t: torch.Tensor) -> torch.Tensor:
        return (t * TRAINING_STEPS).round().long().clamp(max=TRAINING_STEPS - 1)

    def timesteps(self, quantiles: torch.Tensor) -> torch.Tensor:
        """Return timesteps (N,) float32 at `quantiles` (N,) in [0, 1] of their distribution: thousandths, 0 to 0.999."""
        t = torch.sigmoid(self.logit_mean + torch.special.ndtri(quantiles))
        alpha_bar = (1 - t) ** 2 / ((1 - t) ** 2 + t**2)  # a flow's image and noise at t, scaled to variance 1
        alphas_cumprod = self.scheduler.alphas_cumprod.to(t.device)
        index = TRAINING_STEPS - torch.searchsorted(alphas_cumprod.flip(0), alpha_bar)
        return index.clamp(0, TRAINING_STEPS - 1) / TRAINING_STEPS

    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return alpha_t and sigma_t, the weights of image and noise at `t` (N,): each (N, 1, 1, 1)."""
        alpha_bar = self.scheduler.alphas_cumprod.to(t.device)[self._index(t)][:, None, None, None]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return x_t (N, C, H, W) of `images` and `noise` (N, C, H, W) at `t` (N,)."""
        return self.scheduler.add_noise(images, noise, self._index(t))

    def target(self, images: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return what the network shall predict, (N, C, H, W)."""
        return noise if self.prediction_type == "epsilon" else self.scheduler.get_velocity(images, noise, self._index(t))

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Return the weight of each timestep's error in the loss, (N,): min(SNR, gamma) of the error in the image."""
        if self.snr_gamma is None:
            return torch.ones_like(t)
        snr = compute_snr(self.scheduler, self._index(t))
        return snr.clamp(max=self.snr_gamma) / (snr if self.prediction_type == "epsilon" else snr + 1)

    def to_x0_and_noise(
        self, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Split `noisy` into the image and the noise that `prediction` implies, each (N, C, H, W)."""
        alpha_t, sigma_t = self.alpha_sigma(t)
        if self.prediction_type == "epsilon":
            return (noisy - sigma_t * prediction) / alpha_t, prediction
        return alpha_t * noisy - sigma_t * prediction, sigma_t * noisy + alpha_t * prediction


Objective = Flow | DDPM


def make_objective(
    objective: str, prediction_type: PredictionType, snr_gamma: float | None = None, logit_mean: float = 0.0
) -> Objective:
    """Return the objective that `train.objective` names; a flow has no `prediction_type` of its own and no `snr_gamma`."""
    return Flow(logit_mean) if objective == "flow" else DDPM(prediction_type, snr_gamma, logit_mean)


@torch.no_grad()
def euler_sample(
    objective: Objective, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, steps: int
) -> torch.Tensor:
    """Integrate from `noise` (N, C, H, W) at t = 1 to images at t = 0.

    Euler's method for a flow and DDIM (Song et al. 2020, arXiv:2010.02502) for DDPM are one: split the sample into image and
    noise, and mix them again at the next timestep.

    Args:
        objective: whose path it is.
        predict: returns the network's output (N, C, H, W) for latents (N, C, H, W) at timesteps (N,).
        noise: standard normal.
        steps: number of evaluations of `predict`, at equal distances.
    """
    x = noise
    times = torch.linspace(1, 0, steps + 1, device=noise.device)
    for t, t_next in zip(times[:-1].unsqueeze(1).expand(-1, len(x)), times[1:], strict=True):
        x0, predicted_noise = objective.to_x0_and_noise(predict(x, t), x, t)
        alpha_next, sigma_next = objective.alpha_sigma(t_next.expand(len(x)))
        x = alpha_next * x0 + sigma_next * predicted_noise if t_next > 0 else x0
    return x


def apply_cfg(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Apply classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598); a scale of 1 changes nothing."""
    return unconditional + guidance_scale * (conditional - unconditional)
