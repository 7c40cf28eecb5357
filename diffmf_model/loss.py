"""The fusion loss (Eqs. 11 to 14). Always computed in fp32, whatever autocast is active."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LossConfig

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity of images (B, 1, H, W) in [0, 1]: 11x11 Gaussian window, sigma 1.5, no padding.

    Raises ValueError when H or W is below 11.
    """
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, found {tuple(a.shape[-2:])}")
    # Sums of shifted slices, not a convolution: TF32 would drown the variances, which are small differences.
    moments = _gaussian_blur(torch.cat([a, b, a * a, b * b, a * b], dim=1))
    mean_a, mean_b, square_a, square_b, product = moments.unbind(1)
    covariance = product - mean_a * mean_b
    variances = square_a - mean_a**2 + square_b - mean_b**2
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return (luminance * (2 * covariance + C2) / (variances + C2)).mean()


def _gaussian_blur(x: Tensor) -> Tensor:
    offsets = torch.arange(WINDOW) - WINDOW // 2
    weights = torch.softmax(-(offsets**2) / (2 * SIGMA**2), dim=0).tolist()
    for dim in (-2, -1):
        length = x.shape[dim] - WINDOW + 1
        x = sum(weight * x.narrow(dim, start, length) for start, weight in enumerate(weights))
    return x


def sobel_magnitude(x: Tensor) -> Tensor:
    """|Gx| + |Gy| of the 3x3 Sobel operator with replicated borders, (B, 1, H, W)."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return (rows[..., 2:] - rows[..., :-2]).abs() + (columns[..., 2:, :] - columns[..., :-2, :]).abs()


class FusionLoss(nn.Module):
    """forward(fused, ir, vi), all (B, 1, H, W) in [0, 1] -> dict of scalars: total and its unweighted parts.

    ssim: Eq. 11. texture: Eq. 12, mean | |Sobel fused| - max(|Sobel ir|, |Sobel vi|) |. intensity: Eq. 13 with the
    element-wise maximum, mean | fused - max(ir, vi) |. total: Eq. 14.
    """

    def __init__(self, config: LossConfig | None = None):
        super().__init__()
        self.config = config or LossConfig()

    def forward(self, fused: Tensor, ir: Tensor, vi: Tensor) -> dict[str, Tensor]:
        weights = self.config
        with torch.autocast(fused.device.type, enabled=False):
            fused, ir, vi = fused.float(), ir.float(), vi.float()
            structure = weights.ssim_infrared * (1 - ssim(fused, ir)) + weights.ssim_visible * (1 - ssim(fused, vi))
            texture = F.l1_loss(sobel_magnitude(fused), torch.maximum(sobel_magnitude(ir), sobel_magnitude(vi)))
            intensity = F.l1_loss(fused, torch.maximum(ir, vi))
            total = weights.ssim * structure + weights.texture * texture + weights.intensity * intensity
        return {"total": total, "ssim": structure, "texture": texture, "intensity": intensity}
