"""The rendered scenes: the same every time, both cameras registered, each with something that only one of them sees."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmf_model.fuse import SAMPLE
from diffmf_model.sample import SCENES, render, write_sample

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"
SHOWN = ("night", "smoke", "aerial")


def level(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), np.float32) / 255


def gradient(image: np.ndarray) -> np.ndarray:
    vertical, horizontal = np.gradient(image)
    return np.hypot(vertical, horizontal)


@pytest.mark.parametrize("scene", SCENES)
def test_scenes_render_the_same_every_time(scene):
    first, second, other = (render(scene, seed, size=(60, 45)) for seed in (7, 7, 8))
    assert first[0].shape == (45, 60) and first[1].shape == (45, 60, 3)
    for a, b, c in zip(first, second, other, strict=True):
        assert a.dtype == np.uint8 and np.array_equal(a, b) and not np.array_equal(a, c)


def test_the_bundled_pair_is_what_the_code_renders(tmp_path):
    write_sample(tmp_path)
    for name, path in zip(("ir", "vi"), SAMPLE[1:], strict=True):
        with Image.open(tmp_path / f"sample_{name}.png") as new, Image.open(path) as bundled:
            # Another machine's exp and sin may round a level the other way.
            assert np.abs(np.asarray(new, int) - np.asarray(bundled, int)).max() <= 1


@pytest.mark.parametrize("scene", SHOWN)
def test_gallery_pictures_are_small_and_of_one_size(scene):
    for name in ("ir", "vi", "fused", "fused-s"):
        path = GALLERY / f"{scene}_{name}.png"
        assert path.stat().st_size < 352 * 1024
        assert level(path).shape == (360, 480)


@pytest.mark.parametrize("scene", SCENES)
def test_both_cameras_see_the_same_geometry(scene):
    """The edges of the two pictures agree best where nothing is shifted."""
    ir, vi = render(scene, size=(240, 180))
    ir, vi = gradient(ir / 255.0), gradient(vi.mean(axis=2) / 255.0)

    def agreement(dx: int) -> float:
        inside = np.s_[10:-10, 10:-10]
        return np.corrcoef(ir[inside].ravel(), np.roll(vi, dx, axis=1)[inside].ravel())[0, 1]

    assert max(range(-8, 9), key=agreement) in (-1, 0, 1)


# What only one camera sees: scene, rows, and the columns of the target, of what is left of it and of what is right.
TARGETS = {
    "person in the glare": ("night", slice(166, 212), (236, 244), (226, 232), (250, 256)),
    "person in the smoke": ("smoke", slice(165, 205), (143, 149), (130, 136), (156, 162)),
}


@pytest.mark.parametrize("scene, rows, target, left, right", TARGETS.values(), ids=TARGETS)
def test_people_are_only_in_infrared(scene, rows, target, left, right):
    def contrast(name: str) -> float:
        picture = level(GALLERY / f"{scene}_{name}.png")[rows]
        here, before, after = (picture[:, slice(*columns)].mean() for columns in (target, left, right))
        return here - (before + after) / 2

    assert contrast("ir") > 0.2  # rendered: 0.24 and 0.34
    assert abs(contrast("vi")) < 0.05  # rendered: 0.02 and 0.03
