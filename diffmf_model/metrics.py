"""Fusion metrics under the two protocols that published tables follow. Higher is better for all of them.

`cddfuse`, CDDFuse's evaluator (the default): every picture as 8-bit grey, colour ones as their rounded Y.
`vifb`, the VIFB toolbox: channel by channel, averaged, except SF, which runs over the channels laid side by side; AG is
divided by (H - 1)(W - 1), MI stretches its inputs, SSIM has a Gaussian window and
the range 255. VIF and SCD, which the toolbox lacks, are
as in `cddfuse`.

Everything is computed in float64 on the device of the images.
"""

import math

import torch
import torch.nn.functional as F

METRICS = ("EN", "SD", "SF", "MI", "VIF", "AG", "SCD", "Qabf", "SSIM")
PROTOCOLS = ("cddfuse", "vifb")
MIN_SIZE = 41  # below it VIF's fourth scale has no whole window


def check_size(height: int, width: int) -> None:
    """Raises ValueError for an image that is too small for the metrics."""
    if min(height, width) < MIN_SIZE:
        raise ValueError(f"metrics need at least {MIN_SIZE} x {MIN_SIZE} pixels, found {(height, width)}")


def evaluate_pair(
    fused: torch.Tensor, ir: torch.Tensor, vi: torch.Tensor, protocol: str = "cddfuse", stretch: bool = False
) -> dict[str, float]:
    """All METRICS of one fused image: uint8 tensors (C, H, W), C = 1 or 3, on one device, H and W at least MIN_SIZE.

    stretch: stretch the fused image to 0 … 255 first, as several published test scripts do (it inflates SD).
    A metric that is undefined, SCD of a constant image for instance, is nan.
    Raises ValueError for another protocol, dtype or shape.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, found {protocol!r}")
    for name, image in (("fused", fused), ("ir", ir), ("vi", vi)):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"{name}: expected uint8 (1 or 3, H, W), found {image.dtype} {tuple(image.shape)}")
        if image.shape[1:] != fused.shape[1:]:
            raise ValueError(
                f"{name}: expected the fused image's size {tuple(fused.shape[1:])}, found {image.shape[1:]}"
            )
    check_size(*fused.shape[1:])
    fused, ir, vi = (image.to(torch.float64) for image in (fused, ir, vi))
    if stretch:
        fused = _stretch(fused)
    grey = tuple(_grey(image) for image in (fused, ir, vi))
    scores = _cddfuse(*grey) if protocol == "cddfuse" else _vifb(fused, ir, vi)
    scores["VIF"] = visual_information_fidelity(*grey)
    scores["SCD"] = sum_of_correlations_of_differences(*grey)
    values = torch.stack([scores[name] for name in METRICS]).tolist()  # one transfer from the device
    return dict(zip(METRICS, values, strict=True))


def _cddfuse(fused: torch.Tensor, ir: torch.Tensor, vi: torch.Tensor) -> dict[str, torch.Tensor]:
    gx, gy = torch.gradient(fused, dim=(1, 0))
    return {
        "EN": entropy(fused),
        "SD": fused.std(correction=0),
        "SF": (fused.diff(dim=1).square().mean() + fused.diff(dim=0).square().mean()).sqrt(),
        "AG": ((gx.square() + gy.square()) / 2).sqrt().mean(),
        "MI": mutual_information(fused, ir) + mutual_information(fused, vi),
        "Qabf": edge_preservation(fused, ir, vi),
        # scikit-image's defaults, and the range of 2 that it took for float images: the numbers in circulation.
        "SSIM": sum(structural_similarity(fused, s, [1 / 7] * 7, data_range=2, unbiased=True) for s in (ir, vi)),
    }


def _vifb(fused: torch.Tensor, ir: torch.Tensor, vi: torch.Tensor) -> dict[str, torch.Tensor]:
    # Sources follow the fused image: their channels one by one beside a colour one, their Y beside a grey one.
    ir, vi = (_grey(s)[None] if len(fused) == 1 else s.expand(3, -1, -1) for s in (ir, vi))
    channels = []
    for f, a, b in zip(fused, ir, vi, strict=True):
        gx, gy = torch.gradient(f, dim=(1, 0))
        channels.append(
            {
                "EN": entropy(f),
                "SD": f.std(correction=0),
                "AG": ((gx.square() + gy.square()) / 2).sqrt().sum() / ((f.shape[0] - 1) * (f.shape[1] - 1)),
                "MI": sum(mutual_information(_stretch(f), _stretch(source)) for source in (a, b)),
                # The toolbox scales by 255 twice, which matters only where two gradients are equal and tiny.
                "Qabf": edge_preservation(255 * f, 255 * a, 255 * b),
                "SSIM": sum(
                    structural_similarity(f, source, _gaussian(11, 1.5), data_range=255, unbiased=False)
                    for source in (a, b)
                ),
            }
        )
    scores = {name: torch.stack([channel[name] for channel in channels]).mean() for name in channels[0]}
    wide = fused.transpose(0, 1).flatten(1)
    scores["SF"] = ((wide.diff(dim=1).square().sum() + wide.diff(dim=0).square().sum()) / wide.numel()).sqrt()
    return scores


def _grey(image: torch.Tensor) -> torch.Tensor:
    """(C, H, W) in 0 … 255 -> its Y, rounded, (H, W)."""
    if image.shape[0] == 1:
        return image[0]
    # In whole numbers: a level halfway between two is then halfway on every device.
    return ((299 * image[0] + 587 * image[1] + 114 * image[2]) / 1000).round()


def _stretch(image: torch.Tensor) -> torch.Tensor:
    """Min-max stretch to the levels 0 … 255; a constant image becomes 0."""
    low, high = image.aminmax()
    return torch.zeros_like(image) if low == high else ((image - low) / (high - low) * 255).round()


def _entropy_nats(levels: torch.Tensor) -> torch.Tensor:
    p = torch.bincount(levels.flatten()).to(torch.float64) / levels.numel()
    return torch.special.entr(p).sum()


def entropy(image: torch.Tensor) -> torch.Tensor:
    """EN: entropy of the 256-bin histogram, in bits."""
    return _entropy_nats(image.long()) / math.log(2)


def mutual_information(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mutual information of the levels of two images, in nats."""
    a, b = a.long(), b.long()
    return _entropy_nats(a) + _entropy_nats(b) - _entropy_nats(256 * a + b)


def sum_of_correlations_of_differences(fused: torch.Tensor, ir: torch.Tensor, vi: torch.Tensor) -> torch.Tensor:
    """SCD: correlation of each source with what the fused image has beyond the other one, summed."""

    def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()

    return correlation(ir, fused - vi) + correlation(vi, fused - ir)


def _filter_valid(images: torch.Tensor, window: list[float]) -> torch.Tensor:
    """(B, H, W) filtered with window ⊗ window, without padding."""
    # A sum of shifted views: in float64 on the CPU ten times faster than conv2d, which has no fast path there.
    for dim in (1, 2):
        length = images.shape[dim] - len(window) + 1
        total = images.narrow(dim, 0, length) * window[0]
        for shift, weight in enumerate(window[1:], start=1):
            total.add_(images.narrow(dim, shift, length), alpha=weight)
        images = total
    return images


def _gaussian(size: int, sigma: float) -> list[float]:
    weights = [math.exp(-((i - (size - 1) / 2) ** 2) / (2 * sigma * sigma)) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


def visual_information_fidelity(fused: torch.Tensor, ir: torch.Tensor, vi: torch.Tensor) -> torch.Tensor:
    """VIF: pixel-domain, four scales, noise variance 2, of the fused image with each source, summed."""
    noise, eps = 2.0, 1e-10
    images = torch.stack((ir, vi, fused))
    information = torch.zeros(2, 2, dtype=fused.dtype, device=fused.device)  # [source, preserved or whole]
    for scale in range(4):
        size = 2 ** (4 - scale) + 1
        window = _gaussian(size, size / 5)
        if scale:
            images = _filter_valid(images, window)[:, ::2, ::2]
        sources, f = images[:2], images[2:]
        moments = _filter_valid(torch.cat((images, images.square(), sources * f)), window)
        mean_s, mean_f = moments[:2], moments[2:3]
        var_s = (moments[3:5] - mean_s.square()).clamp(min=0)
        var_f = (moments[5:6] - mean_f.square()).clamp(min=0).expand_as(var_s)
        cov = moments[6:8] - mean_s * mean_f
        gain = cov / (var_s + eps)
        rest = var_f - gain * cov
        flat = (var_s < eps) | (var_f < eps)
        rest = torch.where(var_s < eps, var_f, rest)
        rest = torch.where(var_f < eps, 0.0, rest)
        gain = torch.where(flat, 0.0, gain)
        rest = torch.where(gain < 0, var_f, rest).clamp(min=eps)
        gain = gain.clamp(min=0)
        var_s = torch.where(var_s < eps, 0.0, var_s)
        information[:, 0] += torch.log10(1 + gain.square() * var_s / (rest + noise)).sum(dim=(1, 2))
        information[:, 1] += torch.log10(1 + var_s / noise).sum(dim=(1, 2))
    ratio = information[:, 0] / information[:, 1]
    return torch.where(ratio.isnan(), 1.0, ratio).sum()  # a constant source has nothing to lose


def edge_preservation(fused: torch.Tensor, ir: torch.Tensor, vi: torch.Tensor) -> torch.Tensor:
    """Qabf: how well Sobel strength and orientation of the sources survive, weighted by the sources' strength."""

    def edges(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p = F.pad(image, (1, 1, 1, 1))
        across = p[:, 2:] - p[:, :-2]
        down = p[2:] - p[:-2]
        gx = across[:-2] + 2 * across[1:-1] + across[2:]
        gy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
        # The definition takes the angle of gy/gx in (-pi/2, pi/2) with y up, and pi/2 where gx = 0 whatever gy is.
        angle = torch.where(gx == 0, math.pi / 2, torch.atan(-gy / gx))
        return (gx.square() + gy.square()).sqrt(), angle

    strength_f, angle_f = edges(fused)
    preserved = whole = 0.0
    for source in (ir, vi):
        strength, angle = edges(source)
        # Equal strengths score their common value, not 1; so do the published evaluators.
        ratio = torch.minimum(strength, strength_f) / torch.maximum(strength, strength_f)
        ratio = torch.where(strength == strength_f, strength_f, ratio)
        alignment = 1 - (angle - angle_f).abs() / (math.pi / 2)
        quality = 0.9994 / (1 + torch.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + torch.exp(-22 * (alignment - 0.8)))
        preserved = preserved + (quality * strength).sum()
        whole = whole + strength.sum()
    return preserved / whole


def structural_similarity(
    a: torch.Tensor, b: torch.Tensor, window: list[float], data_range: float, unbiased: bool
) -> torch.Tensor:
    """SSIM of two images, mean over whole windows; unbiased takes the sample covariance of the window's pixels."""
    mean_a, mean_b, aa, bb, ab = _filter_valid(torch.stack((a, b, a * a, b * b, a * b)), window)
    n = len(window) ** 2
    correction = n / (n - 1) if unbiased else 1.0
    var_a, var_b, cov = (correction * (x - y) for x, y in ((aa, mean_a**2), (bb, mean_b**2), (ab, mean_a * mean_b)))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()
