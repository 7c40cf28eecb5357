"""Reading, colour space and writing of pictures."""

import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from diffmf_model.errors import UserError
from diffmf_model.images import (
    atomic_write,
    is_colour,
    list_images,
    luma,
    make_folder,
    read_image,
    rgb_to_ycbcr,
    to_uint8,
    write_png,
    ycbcr_to_rgb,
)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_png_is_read_and_written_without_loss(tmp_path, picture, mode):
    samples = picture(tmp_path / "a.png", (31, 17), mode)
    image = read_image(tmp_path / "a.png")
    assert image.shape == (len(mode), 17, 31) and image.dtype == torch.float32
    assert torch.equal(to_uint8(image).permute(1, 2, 0).squeeze(-1), torch.tensor(samples))
    write_png(tmp_path / "b.png", image)
    with Image.open(tmp_path / "b.png") as again:
        assert again.mode == mode and np.array_equal(np.asarray(again), samples)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_infrared_uses_the_whole_scale(tmp_path, rng, suffix):
    samples = rng.integers(0, 65536, (9, 13), dtype=np.uint16)
    samples.flat[:2] = 0, 65535
    Image.fromarray(samples).save(tmp_path / f"a{suffix}")
    image = read_image(tmp_path / f"a{suffix}")
    assert torch.equal(image[0], torch.from_numpy(samples.astype(np.float32) / np.float32(65535)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_turned_tiff(tmp_path, rng, dtype):
    samples = rng.integers(0, 256, (50, 64), dtype=dtype)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(np.rot90(samples).copy()).save(tmp_path / "a.tif", exif=exif)
    image = read_image(tmp_path / "a.tif")
    assert torch.equal(to_uint8(image)[0] if dtype == np.uint8 else image[0] * 65535, torch.from_numpy(samples))


def test_tiffs_whose_white_is_0(tmp_path, rng):
    for name, samples in (
        ("8", rng.integers(0, 256, (9, 13), dtype=np.uint8)),
        ("16", rng.integers(0, 65536, (9, 13), dtype=np.uint16)),
        ("float", rng.random((9, 13), dtype=np.float32)),
    ):
        Image.fromarray(samples).save(tmp_path / "a.tif")
        black = read_image(tmp_path / "a.tif")
        patch_tag(tmp_path / "a.tif", 262, 0)
        assert (read_image(tmp_path / "a.tif") - (1 - black)).abs().max() < 1e-6, name  # measured 6e-8


def test_integers_of_other_sizes_are_refused(tmp_path, rng):
    path = tmp_path / "a.tif"
    Image.fromarray(rng.integers(0, 65536, (9, 13), dtype=np.int32)).save(path)
    with pytest.raises(UserError, match=r"a\.tif: expected unsigned 8- or 16-bit integers, found signed 32-bit"):
        read_image(path)
    patch_tag(path, 339, 1)
    with pytest.raises(UserError, match="found unsigned 32-bit"):
        read_image(path)
    samples = Image.fromarray(rng.integers(0, 4096, (9, 13), dtype=np.uint16))
    samples.save(path, tiffinfo={339: 2})
    with pytest.raises(UserError, match="found signed 16-bit"):
        read_image(path)
    samples.save(path)
    patch_tag(path, 258, 12)
    with pytest.raises(UserError, match="found unsigned 12-bit"):
        read_image(path)


def patch_tag(path, tag, value):
    content = path.read_bytes()
    start = content.index(struct.pack("<HHI", tag, 3, 1)) + 8
    path.write_bytes(content[:start] + struct.pack("<H", value) + content[start + 2 :])


def test_float_tiff(tmp_path, rng):
    samples = rng.random((9, 13), dtype=np.float32)
    Image.fromarray(samples).save(tmp_path / "a.tif")
    assert torch.equal(read_image(tmp_path / "a.tif")[0], torch.from_numpy(samples))
    Image.fromarray(samples * 300).save(tmp_path / "b.tif")
    with pytest.raises(UserError, match=r"b\.tif: expected float samples in \[0, 1\]"):
        read_image(tmp_path / "b.tif")


def test_palette_bilevel_and_transparent_palette(tmp_path, picture, rng):
    picture(tmp_path / "rgb.png", mode="RGB")
    with Image.open(tmp_path / "rgb.png") as rgb:
        palette = rgb.quantize(16)
        bilevel = rgb.convert("1")
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "pt.png", transparency=3)
    bilevel.save(tmp_path / "1.png")
    expected = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(to_uint8(read_image(tmp_path / "p.png")), expected)
    transparent = to_uint8(read_image(tmp_path / "pt.png"))
    assert torch.equal(transparent[:3], expected)
    assert torch.equal(transparent[3] == 0, torch.from_numpy(np.array(palette) == 3))
    assert set(read_image(tmp_path / "1.png").unique().tolist()) <= {0.0, 1.0}


def test_ycbcr_is_pillows_and_inverts(rng):
    samples = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    rgb = torch.from_numpy(samples).permute(2, 0, 1) / 255
    ycbcr = rgb_to_ycbcr(rgb)
    pillow = torch.from_numpy(np.array(Image.fromarray(samples).convert("YCbCr"))).permute(2, 0, 1)
    # Pillow works in fixed point and truncates Cb and Cr: measured 1.006 levels over 50 draws.
    assert (255 * ycbcr - pillow).abs().max() < 1.1
    assert (ycbcr_to_rgb(ycbcr) - rgb).abs().max() < 1e-6  # measured 2.4e-7


def test_a_colour_that_rgb_cannot_show_keeps_its_y(rng):
    y, cb, cr = torch.from_numpy(rng.random((3, 40, 50), dtype=np.float32))
    y[0], y[1] = 0, 1
    red, blue = y + 1.402 * (cr - 0.5), y + 1.772 * (cb - 0.5)
    plain = torch.stack((red, (y - 0.299 * red - 0.114 * blue) / 0.587, blue))
    inside = ((plain >= 0) & (plain <= 1)).all(dim=0)
    rgb = ycbcr_to_rgb(torch.stack((y, cb, cr)))
    assert 0.05 < inside.float().mean() < 0.95 and torch.equal(rgb[:, inside], plain[:, inside])
    assert rgb.min() >= 0 and rgb.max() <= 1 and (luma(rgb)[0] - y).abs().max() < 1e-6  # measured 2e-7
    shift, wanted = rgb - y, plain - y
    assert (shift * wanted >= 0).all() and (shift.abs() <= wanted.abs() + 1e-6).all()  # the same hue, less of it


def test_luma_and_colour_of_grey_and_colour(rng):
    grey = torch.from_numpy(rng.random((1, 6, 7), dtype=np.float32))
    assert torch.equal(luma(torch.cat((grey, 1 - grey))), grey)
    assert (luma(grey.expand(3, -1, -1)) - grey).abs().max() < 1e-6  # measured 6e-8
    assert not is_colour(grey.expand(3, -1, -1)) and not is_colour(grey)
    assert is_colour(torch.cat((grey, grey, 1 - grey)))


def test_exif_orientation_is_applied(tmp_path, picture):
    picture(tmp_path / "a.png", (30, 20))
    with Image.open(tmp_path / "a.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (1, 30, 20)


def test_bad_files_give_one_line_naming_the_file(tmp_path, picture):
    picture(tmp_path / "whole.png", (200, 200), "RGB")
    whole = (tmp_path / "whole.png").read_bytes()
    buffer = io.BytesIO()
    Image.open(tmp_path / "whole.png").save(buffer, "JPEG")
    bad = {
        "empty.png": b"",
        "text.png": b"not a picture",
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": buffer.getvalue()[: buffer.tell() // 2],
        "flipped.png": whole[:60] + bytes(b ^ 0xFF for b in whole[60:]),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: cannot be read as an image") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="found a folder"):
        read_image(tmp_path)


def test_nothing_half_written(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]
    with atomic_write(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.bin"]
    with pytest.raises(ValueError, match="NaN"):
        write_png(tmp_path / "nan.png", torch.full((1, 4, 4), torch.nan))
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_longest_names_can_be_written(tmp_path):
    write_png(tmp_path / f"{'a' * 251}.png", torch.zeros(1, 4, 4))
    assert len(os.listdir(tmp_path)) == 1


def test_written_files_have_ordinary_permissions(tmp_path):
    write_png(tmp_path / "a.png", torch.zeros(1, 4, 4))
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_unwritable_places(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to this folder"):
        make_folder(tmp_path / "file" / "sub")
    with pytest.raises(UserError, match=r"a\.png: cannot be written"):
        write_png(tmp_path / "file" / "a.png", torch.zeros(1, 4, 4))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder\.png: cannot be written"):
        write_png(tmp_path / "folder.png", torch.zeros(1, 4, 4))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


def test_list_images(tmp_path, picture):
    for name in ("b.png", "a.JPG", ".hidden.png"):
        picture(tmp_path / name) if name != "a.JPG" else Image.new("L", (4, 4)).save(tmp_path / name, "JPEG")
    (tmp_path / "notes.txt").touch()
    assert list(list_images(tmp_path)) == ["a", "b"]
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="share the name a"):
        list_images(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no image files"):
        list_images(tmp_path / "empty")
    with pytest.raises(UserError, match="gone: no such folder"):
        list_images(tmp_path / "gone")
