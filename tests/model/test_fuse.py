"""`diffmf fuse` and fuse_images, with a stand-in for the network."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffmf_model.errors import UserError
from diffmf_model.fuse import SAMPLE, fuse_images
from diffmf_model.images import luma, read_image, rgb_to_ycbcr, to_uint8


def levels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image).astype(int)


def test_pair_of_files_in_colour(tmp_path, pairs, average, command):
    root = pairs(["a"])
    output = tmp_path / "new" / "out.png"
    status, stdout, _ = command("fuse", root / "ir/a.png", root / "vi/a.png", "--output", output)
    assert status == 0 and str(output) in stdout
    fused, vi, ir = (read_image(path) for path in (output, root / "vi/a.png", root / "ir/a.png"))
    assert fused.shape == (3, 48, 64)
    # The picture's Y is the stand-in's output, also where RGB cannot show the visible's Cb and Cr of that Y.
    expected = torch.cat(((ir + luma(vi)) / 2, rgb_to_ycbcr(vi)[1:]))
    assert (to_uint8(luma(fused)).int() - to_uint8(expected[:1]).int()).abs().max() <= 1
    shown = (fused > 0).all(dim=0) & (fused < 1).all(dim=0)
    assert shown.float().mean() > 0.05
    assert (rgb_to_ycbcr(fused) - expected)[:, shown].abs().max() < 0.005  # measured 0.0039: rounding to 8 bits


def test_grey_flag_and_grey_visible(tmp_path, pairs, picture, average, command):
    root = pairs(["a"])
    command("fuse", root / "ir/a.png", root / "vi/a.png", "--output", tmp_path / "g.png", "--grey")
    expected = to_uint8((read_image(root / "ir/a.png") + luma(read_image(root / "vi/a.png"))) / 2)
    assert np.array_equal(levels(tmp_path / "g.png"), expected[0].numpy())
    # A visible image without colour gives a grey picture, also when it is stored as RGB.
    grey = picture(tmp_path / "grey.png")
    Image.fromarray(grey).convert("RGB").save(tmp_path / "rgb.png")
    for name in ("grey", "rgb"):
        assert command("fuse", root / "ir/a.png", tmp_path / f"{name}.png", "--output", tmp_path / "o.png")[0] == 0
        assert levels(tmp_path / "o.png").shape == (48, 64)


def test_alpha_of_the_visible_image_is_kept(tmp_path, picture, average, command):
    alpha = picture(tmp_path / "vi.png", mode="RGBA")[..., 3]
    picture(tmp_path / "ir.png", mode="LA")
    for flags, channels in (((), 4), (("--grey",), 2)):
        assert command("fuse", tmp_path / "ir.png", tmp_path / "vi.png", "--output", tmp_path / "o.png", *flags)[0] == 0
        fused = levels(tmp_path / "o.png")
        assert fused.shape == (48, 64, channels) and np.array_equal(fused[..., -1], alpha)


def test_16_bit_infrared(tmp_path, rng, picture, average, command):
    ir = rng.integers(0, 65536, (48, 64), dtype=np.uint16)
    Image.fromarray(ir).save(tmp_path / "ir.png")
    vi = picture(tmp_path / "vi.png")
    assert command("fuse", tmp_path / "ir.png", tmp_path / "vi.png", "--output", tmp_path / "o.png")[0] == 0
    expected = (ir / 65535 + vi / 255) / 2 * 255
    assert np.abs(levels(tmp_path / "o.png") - expected).max() < 0.501  # rounding to 8 bits


def test_bf16_gives_nearly_the_same_picture(tmp_path, command):
    for modality, source in (("ir", SAMPLE.ir), ("vi", SAMPLE.vi)):
        with Image.open(source) as image:
            image.crop((200, 150, 264, 198)).save(tmp_path / f"{modality}.png")
    for precision in ("fp32", "bf16"):
        more = ("--weights", "small", "--precision", precision, "--output", tmp_path / f"{precision}.png", "--grey")
        assert command("fuse", tmp_path / "ir.png", tmp_path / "vi.png", *more)[0] == 0
    difference = np.abs(levels(tmp_path / "fp32.png") - levels(tmp_path / "bf16.png"))
    assert 0 < difference.max() <= 6  # measured 2


def test_without_arguments_the_bundled_pair(tmp_path, average, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, stdout, _ = command("fuse")
    assert status == 0 and str(tmp_path / "fused.png") in stdout
    assert levels("fused.png").shape == (360, 480, 3)


def test_the_bundled_pair_is_small_and_shows_a_target_only_in_infrared():
    ir, vi = read_image(SAMPLE.ir), read_image(SAMPLE.vi)
    assert ir.shape == (1, 360, 480) and vi.shape == (3, 360, 480)
    assert all(path.stat().st_size < 400_000 for path in SAMPLE[1:])
    person = np.s_[0, 180:245, 432:448]
    assert ir[person].mean() > 0.6 and luma(vi)[person].mean() < 0.15


def test_folders_by_name(tmp_path, pairs, picture, average, command):
    root = pairs(["a", "b", "c"])
    (root / "vi/b.png").rename(root / "vi/lonely.png")
    output = tmp_path / "out"
    status, stdout, stderr = command("fuse", root / "ir", root / "vi", "--output", output)
    assert status == 0 and "fused 2 of 2 pairs" in stdout
    assert "no partner for 2 images: b, lonely" in stderr
    assert sorted(path.name for path in output.iterdir()) == ["a.png", "c.png"]


def test_folders_carry_on_past_bad_pairs(tmp_path, pairs, picture, average, command):
    root = pairs(["a", "b", "c", "d"])
    (root / "ir/a.png").write_bytes(b"not a picture")
    picture(root / "vi/c.png", (10, 10), "RGB")
    status, stdout, stderr = command("fuse", root / "ir", root / "vi", "--output", tmp_path / "out")
    assert status == 1
    assert "fused 2 of 4 pairs" in stdout and "diffmf: 2 of 4 pairs failed" in stderr
    messages = [line for line in stderr.splitlines() if line.startswith("diffmf: ") and ".png" in line]
    assert len(messages) == 2
    assert "a.png: cannot be read" in messages[0] and "c.png is 10x10" in messages[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.png", "d.png"]


def test_folders_of_more_pairs_than_threads(tmp_path, pairs, average, command, monkeypatch):
    monkeypatch.setattr("diffmf_model.fuse.THREADS", 2)
    names = list("abcdefg")
    root, out = pairs(names), tmp_path / "out"
    (root / "vi/b.png").write_bytes(b"not a picture")
    (out / "d.png").mkdir(parents=True)
    threads = torch.get_num_threads()
    status, stdout, stderr = command("fuse", root / "ir", root / "vi", "--output", out)
    assert status == 1 and "fused 5 of 7 pairs" in stdout
    assert "diffmf: b: " in stderr and "diffmf: d: " in stderr and "2 of 7 pairs failed" in stderr
    for name in set(names) - {"b", "d"}:
        alone = fuse_images(root / f"ir/{name}.png", root / f"vi/{name}.png", average)
        assert torch.equal(to_uint8(read_image(out / f"{name}.png")), to_uint8(alone))
    assert torch.get_num_threads() == threads  # the threads that read and write have one each


def test_bad_pairs_and_arguments(tmp_path, pairs, picture, average, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = pairs(["a"])
    ir, vi = root / "ir/a.png", root / "vi/a.png"
    picture(tmp_path / "small.png", (20, 10))
    (tmp_path / "broken.png").write_bytes(vi.read_bytes()[:200])
    assert "gone.png: no such file" in fails("fuse", tmp_path / "gone.png", vi)
    assert "expected the visible image" in fails("fuse", ir)
    assert "cannot be read as an image" in fails("fuse", ir, tmp_path / "broken.png")
    assert "64x48" in (message := fails("fuse", ir, tmp_path / "small.png")) and "20x10" in message
    assert "two files or two folders" in fails("fuse", root / "ir", vi)
    assert "expected a .png file" in fails("fuse", ir, vi, "--output", "out.jpg")
    assert "is one of the sources" in fails("fuse", ir, vi, "--output", vi)
    assert "is one of the source folders" in fails("fuse", root / "ir", root / "vi", "--output", root / "vi")
    (tmp_path / "empty").mkdir()
    assert "no image files" in fails("fuse", tmp_path / "empty", root / "vi")
    (tmp_path / "others").mkdir()
    picture(tmp_path / "others" / "b.png")
    assert "no names match" in fails("fuse", root / "ir", tmp_path / "others")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["broken.png", "empty", "others", "set", "small.png"]  # nothing half-written


def test_unwritable_output_is_found_before_the_work(tmp_path, pairs, fails, monkeypatch):
    def unexpected(path, device):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("diffmf_model.fuse.load_model", unexpected)
    root = pairs(["a"])
    (tmp_path / "file").touch()
    for sources in ((root / "ir/a.png", root / "vi/a.png"), (root / "ir", root / "vi")):
        assert "cannot write" in fails("fuse", *sources, "--output", tmp_path / "file" / "x.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent(pairs, fails, average):
    root = pairs(["a"])
    assert "cuda" in fails("fuse", root / "ir/a.png", root / "vi/a.png", "--device", "cuda")


def test_weights_that_give_nan(pairs, average, monkeypatch):
    root = pairs(["a"])
    monkeypatch.setattr(average, "forward", lambda ir, vi: ir / 0 - ir / 0)
    with pytest.raises(UserError, match="NaN or Inf"):
        fuse_images(root / "ir/a.png", root / "vi/a.png", average)


def test_a_picture_too_large_for_the_memory_is_named(pairs):
    def network(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: ...")

    root = pairs(["a"])
    with pytest.raises(UserError, match="cpu has too little memory for a pair of 64x48 pixels"):
        fuse_images(root / "ir/a.png", root / "vi/a.png", network)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((1, 8, 8)), "ir: a ndarray, expected"),
        (torch.zeros(8, 8), r"ir: torch.float32 of shape \(8, 8\), expected"),
        (torch.zeros(5, 8, 8), r"ir: torch.float32 of shape \(5, 8, 8\), expected"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), "ir: torch.uint8 of shape"),
        (torch.full((1, 8, 8), 255.0), "ir: values from 255 to 255, expected"),
    ],
)
def test_tensors_that_are_no_images(average, image, message):
    with pytest.raises(UserError, match=message):
        fuse_images(image, torch.zeros(1, 8, 8), average)


def test_fuse_images_takes_tensors_and_paths(pairs, average):
    root = pairs(["a"])
    ir, vi = root / "ir/a.png", root / "vi/a.png"
    assert torch.equal(fuse_images(str(ir), vi, average), fuse_images(read_image(ir), read_image(vi), average))
    with pytest.raises(UserError, match="vi is 63x48"):
        fuse_images(read_image(ir), read_image(vi)[..., 1:], average)


@pytest.mark.parametrize("name", ["tno/{}/01.png", "roadscene/{}/FLIR_00006.jpg"])
def test_real_pairs(data, average, name):
    fused = fuse_images(data / name.format("ir"), data / name.format("vi"), average)
    assert fused.shape[0] == (3 if "roadscene" in name else 1) and fused.min() >= 0 and fused.max() <= 1
