"""The metrics: published values, definitions on small cases, and an independent SciPy evaluation."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from diffmf_model.images import decode
from diffmf_model.metrics import METRICS, MIN_SIZE, PROTOCOLS, edge_preservation, evaluate_pair, mutual_information


def levels(rng, height=60, width=70, channels=1) -> torch.Tensor:
    smooth = ndimage.gaussian_filter(rng.random((channels, height, width)), (0, 2, 2))
    smooth = (smooth - smooth.min()) / np.ptp(smooth) * rng.integers(150, 230) + rng.integers(0, 25)
    return torch.from_numpy(smooth.round().astype(np.uint8))


@pytest.mark.parametrize("method", ["seafusion", "u2fusion"])
def test_published_images_score_as_the_reference_says(data, method):
    published = data / "reference_metrics" / f"{method}.json"
    if not published.is_file():
        pytest.skip(f"no {published}")
    reference = json.loads(published.read_text())["per_image"]
    for name in sorted(reference)[3::11]:  # all 84 were run once: worst 1.9e-4 (SSIM), otherwise 1.5e-6
        paths = (data / "tno_fused" / method, data / "tno" / "ir", data / "tno" / "vi")
        images = [torch.from_numpy(decode(path / f"{name}.png").copy()).permute(2, 0, 1) for path in paths]
        scores = evaluate_pair(*images)
        assert scores == pytest.approx({metric: reference[name][metric] for metric in METRICS}, rel=1e-3), name


def test_simple_statistics_against_numpy(rng):
    fused, ir, vi = (levels(rng) for _ in range(3))
    scores = evaluate_pair(fused, ir, vi)
    f, a, b = (image[0].numpy().astype(np.float64) for image in (fused, ir, vi))
    counts = np.bincount(fused.numpy().ravel(), minlength=256)
    gy, gx = np.gradient(f)
    expected = {
        "EN": stats.entropy(counts, base=2),
        "SD": f.std(),
        "SF": math.sqrt((np.diff(f, axis=0) ** 2).mean() + (np.diff(f, axis=1) ** 2).mean()),
        "AG": np.sqrt((gx**2 + gy**2) / 2).mean(),
        "SCD": np.corrcoef((f - b).ravel(), a.ravel())[0, 1] + np.corrcoef((f - a).ravel(), b.ravel())[0, 1],
    }
    for source in (a, b):
        joint = np.histogram2d(f.ravel(), source.ravel(), bins=256, range=[[0, 256], [0, 256]])[0]
        information = sum(stats.entropy(joint.sum(axis=i)) for i in (0, 1)) - stats.entropy(joint.ravel())
        expected["MI"] = expected.get("MI", 0) + information
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-12), name  # measured 7e-15


def test_a_source_fused_into_itself_is_perfectly_preserved(rng):
    image, other = levels(rng), levels(rng)
    alike = evaluate_pair(image, image, image)
    assert alike["VIF"] == pytest.approx(2, rel=1e-9)  # measured 1.1e-11, from the definition's epsilon
    assert alike["SSIM"] == pytest.approx(2, rel=1e-12)
    # The strength's sigmoid is at its limit (equal strengths score their value, far above 1), the angle's is at 1.
    assert alike["Qabf"] == pytest.approx(0.9994 * 0.9879 / (1 + math.exp(-22 * 0.2)), rel=1e-9)
    mixed = evaluate_pair(image, image, other)
    assert all(mixed[name] < alike[name] for name in ("VIF", "SSIM", "Qabf", "MI"))
    assert mutual_information(image, image) == pytest.approx(evaluate_pair(image, image, image)["EN"] * math.log(2))


def test_edge_preservation_is_a_share_weighted_by_the_sources(rng):
    strong, flat = levels(rng)[0].double(), torch.full((60, 70), 90.0, dtype=torch.float64)
    # zero padding gives even the flat image edges along its border: look at it without
    inner = [F[5:-5, 5:-5] for F in (strong, flat)]
    kept, lost = edge_preservation(inner[0], *inner), edge_preservation(inner[1], *inner)
    assert 0 <= lost < 0.5 < kept < 1


def test_vifb_of_grey_images_differs_only_where_stated(rng):
    fused, ir, vi = (levels(rng) for _ in range(3))
    cddfuse, vifb = (evaluate_pair(fused, ir, vi, protocol) for protocol in PROTOCOLS)
    for name in ("EN", "SD", "VIF", "SCD"):
        assert vifb[name] == cddfuse[name]
    assert vifb["AG"] == pytest.approx(cddfuse["AG"] * 60 * 70 / (59 * 69), rel=1e-12)
    f = fused[0].numpy().astype(np.float64)
    frequency = math.sqrt(((np.diff(f, axis=0) ** 2).sum() + (np.diff(f, axis=1) ** 2).sum()) / f.size)
    assert vifb["SF"] == pytest.approx(frequency, rel=1e-12)
    assert vifb["Qabf"] == pytest.approx(cddfuse["Qabf"], rel=1e-9)  # measured 3e-16


def test_vifb_averages_over_the_channels(rng):
    fused, ir, vi = levels(rng, channels=3), levels(rng), levels(rng, channels=3)
    scores = evaluate_pair(fused, ir, vi, "vifb")
    single = [evaluate_pair(fused[c : c + 1], ir, vi[c : c + 1], "vifb") for c in range(3)]
    for name in ("EN", "SD", "AG", "MI", "Qabf", "SSIM"):
        assert scores[name] == pytest.approx(np.mean([each[name] for each in single]), rel=1e-12), name
    wide = np.concatenate(list(fused.numpy().astype(np.float64)), axis=1)
    frequency = math.sqrt(((np.diff(wide, axis=0) ** 2).sum() + (np.diff(wide, axis=1) ** 2).sum()) / wide.size)
    assert scores["SF"] == pytest.approx(frequency, rel=1e-12)


def test_vifb_ssim_against_scipy(rng):
    fused, ir, vi = (levels(rng) for _ in range(3))
    f, *sources = (image[0].numpy().astype(np.float64) for image in (fused, ir, vi))

    def mean(image):  # 11 x 11 Gaussian, whole windows
        return ndimage.gaussian_filter(image, 1.5, radius=5)[5:-5, 5:-5]

    total = 0.0
    for s in sources:
        ms, mf = mean(s), mean(f)
        vs, vf, cov = mean(s * s) - ms**2, mean(f * f) - mf**2, mean(s * f) - ms * mf
        c1, c2 = 6.5025, 58.5225
        total += ((2 * ms * mf + c1) * (2 * cov + c2) / ((ms**2 + mf**2 + c1) * (vs + vf + c2))).mean()
    assert evaluate_pair(fused, ir, vi, "vifb")["SSIM"] == pytest.approx(total, rel=1e-9)  # measured 1e-15


def test_colour_is_scored_as_rounded_luma(rng):
    fused, ir, vi = levels(rng, channels=3), levels(rng), levels(rng, channels=3)
    fused[:, 0, 0] = torch.tensor([0, 0, 250])  # 28.5: the even level
    weights = np.array([299, 587, 114])
    luma = [np.rint(np.einsum("c,chw->hw", weights, x.numpy()) / 1000) for x in (fused, vi)]
    grey = [torch.from_numpy(y).to(torch.uint8)[None] for y in luma]
    assert grey[0][0, 0, 0] == 28
    assert evaluate_pair(fused, ir, vi) == evaluate_pair(grey[0], ir, grey[1])


def test_stretch_uses_the_whole_range(rng):
    fused, ir, vi = (levels(rng) for _ in range(3))
    low, high = fused.min(), fused.max()
    stretched = ((fused.double() - low) / (high - low) * 255).round().to(torch.uint8)
    assert evaluate_pair(fused, ir, vi, stretch=True) == evaluate_pair(stretched, ir, vi)
    assert evaluate_pair(fused, ir, vi, stretch=True)["SD"] > evaluate_pair(fused, ir, vi)["SD"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_constant_images_do_not_raise(rng, protocol):
    constant = torch.full((1, MIN_SIZE, MIN_SIZE), 80, dtype=torch.uint8)
    scores = evaluate_pair(constant, levels(rng, MIN_SIZE, MIN_SIZE), constant, protocol)
    assert scores["EN"] == scores["SD"] == scores["SF"] == scores["AG"] == scores["MI"] == 0
    assert scores["VIF"] == pytest.approx(1, abs=1e-6)  # nothing of the first source, nothing lost of the second
    assert math.isnan(scores["SCD"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_gpu_gives_the_cpu_s_numbers(rng, protocol):
    images = [levels(rng, 123, 161, 3) for _ in range(3)]
    images[0][:, :30] = 90  # a flat part, where the definitions branch
    assert evaluate_pair(*(image.cuda() for image in images), protocol) == pytest.approx(
        evaluate_pair(*images, protocol), rel=1e-9
    )


def test_bad_input(rng):
    image = levels(rng)
    for message, images in (
        (r"ir: expected uint8 .*float32", (image, image / 255, image)),
        (r"vi: expected uint8 .*\(60, 70\)", (image, image, image[0])),
        (r"fused: expected uint8 .*\(2, 60, 70\)", (image.expand(2, -1, -1), image, image)),
        (r"vi: expected the fused image's size \(60, 70\)", (image, image, image[:, 1:])),
        (r"at least 41 x 41", [image[:, :40]] * 3),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_pair(*images)
    with pytest.raises(ValueError, match="protocol: expected one of cddfuse, vifb, found 'matlab'"):
        evaluate_pair(image, image, image, "matlab")
