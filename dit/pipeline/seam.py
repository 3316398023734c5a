"""Hide the border between the generated part of an image and the pixels that a mask keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

REACH = 2  # pixels from which, and to which, the VAE's error is carried
RAMP = 3  # pixels beside the border on which a part that agrees with the original fades into it
CONTENT = 0.2  # of the range [-1, 1], 25 of 255 grey levels: whatever differs more is other content, not the VAE's error


def hide_seam(generated: torch.Tensor, original: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return `generated` with the pixels beside the mask's border brought nearer to the original's.

    The original's pixels, which are put back outside the mask, have not been through the VAE; the generated ones have. So first
    the VAE's error, which can be seen just outside, is taken off just inside. Then pixels inside that look as the original does
    fade into it. Both leave alone what differs by more than `CONTENT`: a mask that lies close around what it removes must
    not bring it back. The constants were chosen on 720 rendered scenes, see docs/generation.md.

    Args:
        generated: (N, 3, H, W) float32, decoded.
        original: (N, 3, H, W) in [-1, 1].
        mask: (N, 1, H, W), 1 where `generated` is shown and 0 where `original` is.

    Returns:
        (N, 3, H, W). Outside the mask its values mean nothing.
    """
    outside = 1 - mask
    error = original - generated
    seen = outside * (error.abs().amax(1, keepdim=True) < CONTENT)
    share = _mean_around(seen)
    corrected = generated + _mean_around(error * seen) / share.clamp(min=1e-6) * (2 * share).clamp(max=1)
    # Of the squares around a pixel, up to RAMP in each direction, the share that reaches over the border: 0 deep inside the mask.
    near = sum(F.max_pool2d(outside, 2 * r + 1, 1, r) for r in range(RAMP + 1)) / (RAMP + 1)
    rest = original - corrected
    return corrected + rest * near * (1 - rest.abs().amax(1, keepdim=True) / CONTENT).clamp(min=0)


def _mean_around(values: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(values, 2 * REACH + 1, 1, REACH, count_include_pad=False)
