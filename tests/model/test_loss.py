"""The loss against torchmetrics, SciPy and the formulas."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchmetrics.functional.image import structural_similarity_index_measure

from diffmf_model.config import LossConfig
from diffmf_model.loss import FusionLoss, salient_target, sobel, sobel_magnitude, ssim


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
    assert abs(ssim(a, b).mean() - expected) < 1e-5  # measured 2e-7
    assert abs(ssim(a, a).mean() - 1) < 1e-6


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
        "ssim": (0.2 * (1 - ssim(fused, ir)) + 0.9 * (1 - ssim(fused, vi))).mean().float(),
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


SALIENT = LossConfig(
    target="salient", contrast=1.3, level=0.45, toe=0.1, shoulder=0.15, detail=1.4, shared=0.1, regions=1.5, window=2.0
)


def test_salient_target_is_its_formula():
    ir, vi = images(2, 2, 24, 31)
    goal, gradient = salient_target(ir, vi, SALIENT)
    for index in range(2):
        a, b = (image[index, 0].double().numpy() for image in (ir, vi))
        edges = [[ndimage.sobel(x, axis, mode="nearest") for axis in (1, 0)] for x in (a, b)]
        activity = [ndimage.gaussian_filter(np.abs(e).sum(0), 2.0, mode="nearest", truncate=3.0) + 0.05 for e in edges]
        weight = activity[0] ** 8 / (activity[0] ** 8 + activity[1] ** 8)
        expected = 1.4 * (weight * np.array(edges[0]) + (1 - weight) * np.array(edges[1]))
        np.testing.assert_allclose(gradient[index], expected, atol=1e-4)
        share = 1 / (1 + np.exp(-10 * (a - b) - 1.5 * (2 * weight - 1)))
        chosen = (share * a + (1 - share) * b + 0.1 * (a + b)) / 1.1
        expected = 0.45 + 1.3 * (chosen - 0.5)
        inside = (expected > 0.1) & (expected < 0.85)
        assert inside.mean() > 0.5
        np.testing.assert_allclose(goal[index, 0].numpy()[inside], expected[inside], atol=1e-4)
    assert goal.min() > 0 and goal.max() < 1


def test_salient_target_of_one_image_twice_is_that_image():
    image = 0.1 + 0.8 * images(1, 2, 16, 19)[0]
    goal, gradient = salient_target(image, image, LossConfig(target="salient"))
    inside = (image > 0.08) & (image < 0.92)
    torch.testing.assert_close(goal[inside], image[inside], atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient, sobel(image))


def test_salient_target_compresses_in_order():
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 16, 64)
    goal, _ = salient_target(ramp, ramp, LossConfig(target="salient", contrast=1.5))
    assert goal.min() >= 0 and goal.max() <= 1 and (goal.diff() >= 0).all()
    assert (goal[..., 24:40].diff() > 1.4 / 63).all()
    soft, _ = salient_target(ramp, ramp, LossConfig(target="salient", contrast=1.5, shoulder=0.3))
    assert torch.equal(soft[..., :40], goal[..., :40]) and (soft[..., 48:] < goal[..., 48:]).all()
    assert soft.max() < 1 and (soft.diff() >= 0).all()
    lifted, _ = salient_target(ramp, ramp, LossConfig(target="salient", contrast=1.5, toe=0.3))
    assert torch.equal(lifted[..., 24:], goal[..., 24:]) and (lifted[..., 2:16] > goal[..., 2:16]).all()


def test_salient_target_keeps_what_only_one_source_shows():
    """A dark spot of one and a bright spot of the other, on the same grey."""
    ir, vi = torch.full((2, 1, 1, 48, 48), 0.5).unbind()
    ir[..., 10:14, 10:14], vi[..., 30:34, 30:34] = 0.9, 0.15
    goal, _ = salient_target(ir, vi, LossConfig(target="salient", regions=8.0))
    assert goal[0, 0, 12, 12] > 0.85 and goal[0, 0, 32, 32] < 0.2
    assert (goal[0, 0, 20:22, :] - 0.5).abs().max() < 0.02


def test_salient_loss_s_parts():
    fused, ir, vi = images(3, 2, 20, 17)
    parts = FusionLoss(SALIENT)(fused, ir, vi)
    goal, gradient = salient_target(ir, vi, SALIENT)
    torch.testing.assert_close(parts["intensity"], (fused - goal).abs().mean())
    torch.testing.assert_close(parts["texture"], (sobel(fused) - gradient).abs().mean() * 2)  # both directions added
    total = 10 * parts["ssim"] + 20 * parts["texture"] + 20 * parts["intensity"]
    torch.testing.assert_close(parts["total"], total)
    assert (FusionLoss(SALIENT)(fused, ir, vi)["ssim"] - FusionLoss()(fused, ir, vi)["ssim"]).abs() < 1e-6
