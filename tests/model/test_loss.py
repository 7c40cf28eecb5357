"""The loss against torchmetrics, SciPy and the formulas."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchmetrics.functional.image import structural_similarity_index_measure

from diffmf_model.config import LossConfig
from diffmf_model.loss import FusionLoss, sobel_magnitude, ssim


def images(count, *shape):
    """Smooth random images with fine texture, so that variances are neither huge nor zero."""
    coarse = torch.rand(count, shape[0], 1, 5, 5)
    smooth = torch.stack([torch.nn.functional.interpolate(c, shape[1:], mode="bicubic") for c in coarse])
    return (0.8 * smooth + 0.2 * torch.rand(count, shape[0], 1, *shape[1:])).clamp(0, 1)


@pytest.mark.parametrize("size", [(11, 11), (11, 30), (37, 24)])
def test_ssim_is_torchmetrics_s(size):
    a, b = images(2, 3, *size)
    _, similarity = structural_similarity_index_measure(a, b, sigma=1.5, data_range=1.0, return_full_image=True)
    expected = similarity[..., 5:-5, 5:-5].mean()  # the rest saw torchmetrics' reflected border
    assert abs(ssim(a, b) - expected) < 1e-5  # measured 2e-7
    assert abs(ssim(a, a) - 1) < 1e-6


def test_sobel_is_scipy_s():
    (image,) = images(1, 2, 9, 7)
    expected = [
        np.abs(ndimage.sobel(i, 0, mode="nearest")) + np.abs(ndimage.sobel(i, 1, mode="nearest"))
        for i in image[:, 0].double().numpy()
    ]
    np.testing.assert_allclose(sobel_magnitude(image)[:, 0], np.stack(expected), atol=1e-5)  # measured 4e-7


def test_parts_and_total():
    fused, ir, vi = images(3, 2, 20, 17)
    config = LossConfig(ssim=3.0, texture=5.0, intensity=7.0, ssim_infrared=0.2, ssim_visible=0.9)
    parts = FusionLoss(config)(fused, ir, vi)
    expected = {
        "ssim": 0.2 * (1 - ssim(fused, ir)) + 0.9 * (1 - ssim(fused, vi)),
        "texture": (sobel_magnitude(fused) - torch.maximum(sobel_magnitude(ir), sobel_magnitude(vi))).abs().mean(),
        "intensity": (fused - torch.where(ir > vi, ir, vi)).abs().mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value)
    total = 3 * expected["ssim"] + 5 * expected["texture"] + 7 * expected["intensity"]
    torch.testing.assert_close(parts["total"], total)


def test_defaults_are_swinfusion_s_and_a_perfect_fusion_costs_nothing():
    config = LossConfig()
    assert (config.ssim, config.texture, config.intensity) == (10, 20, 20)
    assert config.ssim_infrared == config.ssim_visible == 0.5
    (image,) = images(1, 2, 16, 16)
    assert FusionLoss()(image, image, image)["total"] < 1e-4


def test_gradient_is_that_of_finite_differences():
    fused, ir, vi = images(3, 1, 13, 12)
    direction = torch.randn_like(fused)
    fused.requires_grad_()
    FusionLoss()(fused, ir, vi)["total"].backward()
    with torch.no_grad():
        ahead, behind = (FusionLoss()(fused + s * 1e-3 * direction, ir, vi)["total"] for s in (1, -1))
    slope = (ahead - behind) / 2e-3
    assert abs(slope - (fused.grad * direction).sum()) < 0.05 * fused.grad.norm() * direction.norm()


def test_autocast_computes_in_fp32():
    fused, ir, vi = images(3, 2, 16, 15)
    fused = fused.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        parts = FusionLoss()(fused, ir, vi)
    expected = FusionLoss()(fused.float(), ir, vi)
    for name, value in parts.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name])


def test_images_below_the_window_are_refused():
    with pytest.raises(ValueError, match=r"at least 11x11 pixels, found \(10, 20\)"):
        ssim(torch.rand(1, 1, 10, 20), torch.rand(1, 1, 10, 20))
