"""The fusion loss (Eqs. 11 to 14). Always computed in fp32, whatever autocast is active."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LossConfig

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
BRIGHTNESS = 10.0  # steepness of the choice by intensity: a lead of a tenth of the range decides it to 73 %
ACTIVITY_POWER = 8.0  # of the choice by gradients: a lead of a third decides it to 90 %
ACTIVITY_FLOOR = 0.05  # below it gradients are noise: an eightieth of the largest Sobel magnitude


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity of each of the images (B, 1, H, W) in [0, 1] -> (B,), in double precision.

    11x11 Gaussian window, sigma 1.5, no padding. Raises ValueError when H or W is below 11.
    """
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, found {tuple(a.shape[-2:])}")
    a, b = a.double(), b.double()  # TF32, which a convolution of floats may use, would drown the variances
    moments = _gaussian_blur(torch.cat([a, b, a * a, b * b, a * b], dim=1))
    mean_a, mean_b, square_a, square_b, product = moments.unbind(1)
    covariance = product - mean_a * mean_b
    variances = square_a - mean_a**2 + square_b - mean_b**2
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return (luminance * (2 * covariance + C2) / (variances + C2)).mean((1, 2))


def _gaussian(reach: int, sigma: float, like: Tensor) -> Tensor:
    """Weights (2 reach + 1,) that sum to one."""
    offsets = torch.arange(-reach, reach + 1, device=like.device, dtype=like.dtype)
    return torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)


def _gaussian_blur(x: Tensor, reach: int = WINDOW // 2, sigma: float = SIGMA) -> Tensor:
    """Every channel of (B, C, H, W), without padding: (B, C, H - 2 reach, W - 2 reach)."""
    weights = _gaussian(reach, sigma, x)
    planes = x.reshape(-1, 1, *x.shape[-2:])
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return planes.view(*x.shape[:2], *planes.shape[-2:])


def sobel(x: Tensor) -> Tensor:
    """Gx and Gy of the 3x3 Sobel operator with replicated borders, (B, 1, H, W) -> (B, 2, H, W)."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return torch.cat([rows[..., 2:] - rows[..., :-2], columns[..., 2:, :] - columns[..., :-2, :]], dim=1)


def sobel_magnitude(x: Tensor) -> Tensor:
    """|Gx| + |Gy| of `sobel`, (B, 1, H, W)."""
    return sobel(x).abs().sum(1, keepdim=True)


def salient_target(ir: Tensor, vi: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Intensities (B, 1, H, W) and signed Sobel gradients (B, 2, H, W) of what stands out in either source.

    The maximum lets a bright flat source cover the other's detail, and |gradient| leaves the sign open, so that its
    optimum oscillates. Here the source with the more active surroundings (mean |Sobel| in a Gaussian window, weight w)
    gives the gradients, times `detail`, and, together with the brighter one, the intensity:

        m = sigmoid(BRIGHTNESS (ir - vi) + regions (2 w - 1))
        t = (m ir + (1 - m) vi + shared (ir + vi)) / (1 + shared)
        intensity = level + contrast (t - 1/2), compressed, not clipped, below toe and above 1 - shoulder

    No mean of the image enters: a crop asks for what the whole image asks for at the same place.
    """
    gradient_ir, gradient_vi = sobel(ir), sobel(vi)
    activity = [
        (_window_mean(g.abs().sum(1, keepdim=True), config.window) + ACTIVITY_FLOOR) ** ACTIVITY_POWER
        for g in (gradient_ir, gradient_vi)
    ]
    weight = activity[0] / (activity[0] + activity[1])
    gradient = config.detail * (weight * gradient_ir + (1 - weight) * gradient_vi)
    share = torch.sigmoid(BRIGHTNESS * (ir - vi) + config.regions * (2 * weight - 1))
    chosen = (share * ir + (1 - share) * vi + config.shared * (ir + vi)) / (1 + config.shared)
    return _compressed(config.level + config.contrast * (chosen - 0.5), config), gradient


def _compressed(x: Tensor, config: LossConfig) -> Tensor:
    """The identity on [toe, 1 - shoulder], continued smoothly so that everything lands in [0, 1]."""
    inner = x.clamp(config.toe, 1 - config.shoulder)
    room = torch.where(x < inner, config.toe, config.shoulder)
    return inner + room * torch.tanh((x - inner) / room)


def _window_mean(x: Tensor, sigma: float) -> Tensor:
    """Gaussian mean of (B, 1, H, W), borders replicated; the window ends at three sigma."""
    reach = math.ceil(3 * sigma)
    return _gaussian_blur(F.pad(x, (reach,) * 4, mode="replicate"), reach, sigma)


class FusionLoss(nn.Module):
    """forward(fused, ir, vi), all (B, 1, H, W) in [0, 1] -> dict of scalars: total and its unweighted parts.

    ssim: Eq. 11. texture: Eq. 12, mean | |Sobel fused| - max(|Sobel ir|, |Sobel vi|) |. intensity: Eq. 13 with the
    element-wise maximum, mean | fused - max(ir, vi) |. total: Eq. 14.
    With config.target "salient", texture and intensity compare with `salient_target` instead, the gradients with sign.
    """

    def __init__(self, config: LossConfig | None = None):
        super().__init__()
        self.config = config or LossConfig()

    def forward(self, fused: Tensor, ir: Tensor, vi: Tensor) -> dict[str, Tensor]:
        weights = self.config
        with torch.autocast(fused.device.type, enabled=False):
            fused, ir, vi = fused.float(), ir.float(), vi.float()
            similarity = ssim(torch.cat([fused, fused]), torch.cat([ir, vi])).view(2, -1).mean(1).float()
            structure = weights.ssim_infrared * (1 - similarity[0]) + weights.ssim_visible * (1 - similarity[1])
            if weights.target == "salient":
                with torch.no_grad():
                    goal, gradient = salient_target(ir, vi, weights)
                texture = (sobel(fused) - gradient).abs().sum(1).mean()
            else:
                goal = torch.maximum(ir, vi)
                texture = F.l1_loss(sobel_magnitude(fused), torch.maximum(sobel_magnitude(ir), sobel_magnitude(vi)))
            intensity = F.l1_loss(fused, goal)
            total = weights.ssim * structure + weights.texture * texture + weights.intensity * intensity
        return {"total": total, "ssim": structure, "texture": texture, "intensity": intensity}
