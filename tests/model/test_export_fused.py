"""`diffmf export-fused` on tiny data sets in M3FD's and FMB's layouts."""

import json

import pytest
from PIL import Image

from diffmf_model import export_fused
from diffmf_model.checkpoint import save_model
from diffmf_model.config import ModelConfig
from diffmf_model.errors import UserError
from diffmf_model.fuse import fuse_images
from diffmf_model.images import read_image, to_uint8
from diffmf_model.network import DIFFMF

LABEL = """<annotation><size><width>64</width><height>48</height></size>
<object><name>People</name><bndbox><xmin>16</xmin><ymin>12</ymin><xmax>32</xmax><ymax>36</ymax></bndbox></object>
<object><name>Car</name><bndbox><xmin>48</xmin><ymin>0</ymin><xmax>70</xmax><ymax>24</ymax></bndbox></object>
</annotation>"""


@pytest.fixture
def weights(tmp_path):
    save_model(tmp_path / "w.safetensors", DIFFMF(ModelConfig(d_model=4, d_state=2, stages=1)))
    return tmp_path / "w.safetensors"


@pytest.fixture
def detection(tmp_path, picture):
    root = tmp_path / "M3FD"
    (root / "Annotation").mkdir(parents=True)
    for i in range(10):
        picture(root / "Ir" / f"{i:05}.png")
        picture(root / "Vis" / f"{i:05}.png", mode="RGB")
        (root / "Annotation" / f"{i:05}.xml").write_text(LABEL)
    (root / "readme.txt").write_text("hello")
    return root


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_detection(detection, tmp_path, weights, command):
    arguments = ("export-fused", detection, tmp_path / "out", "--weights", weights, "--device", "cpu")
    status, stdout, stderr = command(*arguments)
    assert status == 0, stderr
    assert "10 pairs fused, 0 were there, of 10" in stdout
    out = files(tmp_path / "out")
    names = [f"{i:05}" for i in range(10)]
    expected = {f"{folder}/{n}.{e}" for n in names for folder, e in (("images", "png"), ("labels", "txt"))}
    expected |= {f"Annotation/{n}.xml" for n in names}
    assert set(out) == expected | {"readme.txt", "data.yaml", "train.txt", "val.txt", "test.txt", "export.json"}
    assert out["Annotation/00003.xml"] == LABEL.encode() and out["readme.txt"] == b"hello"
    fused = fuse_images(detection / "Ir/00004.png", detection / "Vis/00004.png", export_fused.load_model(weights))
    assert (to_uint8(read_image(tmp_path / "out/images/00004.png")) == to_uint8(fused)).all()
    # Car is class 0, People 1; the car's box is cut at the picture's right border.
    assert (
        out["labels/00003.txt"].decode()
        == "1 0.375000 0.500000 0.250000 0.500000\n0 0.875000 0.250000 0.250000 0.500000\n"
    )
    lists = [out[f"{split}.txt"].decode().splitlines() for split in ("train", "val", "test")]
    assert [len(each) for each in lists] == [8, 1, 1]
    assert sorted(line for each in lists for line in each) == [f"./images/{n}.png" for n in names]
    yaml = out["data.yaml"].decode()
    assert f'path: "{tmp_path / "out"}"\ntrain: train.txt\n' in yaml and 'nc: 2\nnames: ["Car", "People"]' in yaml

    (tmp_path / "out/images/00007.png").unlink()
    (tmp_path / "out/images/.0123456789abcdef.tmp").write_bytes(b"")  # what a killed export leaves
    before = (tmp_path / "out/images/00006.png").stat().st_mtime_ns
    status, stdout, _ = command(*arguments)
    assert status == 0 and "1 pairs fused, 9 were there, of 10" in stdout
    assert (tmp_path / "out/images/00006.png").stat().st_mtime_ns == before
    (tmp_path / "out/images/.0123456789abcdef.tmp").unlink()
    assert files(tmp_path / "out") == out


def test_pictures_that_lie_where_fused_ones_go_are_not_taken_for_them(detection, picture, tmp_path, weights, command):
    """YOLO's own copies of the visible pictures, for example."""
    for i in range(10):
        picture(detection / "images" / f"{i:05}.png", mode="RGB")
    picture(detection / "images" / "other.png")
    status, stdout, stderr = command("export-fused", detection, tmp_path / "out", "--weights", weights)
    assert status == 0 and "10 pairs fused, 0 were there, of 10" in stdout, stderr
    fused = fuse_images(detection / "Ir/00004.png", detection / "Vis/00004.png", export_fused.load_model(weights))
    assert (to_uint8(read_image(tmp_path / "out/images/00004.png")) == to_uint8(fused)).all()
    assert (tmp_path / "out/images/other.png").exists()


def test_a_label_that_changed_is_copied_again(detection, tmp_path, weights, command):
    arguments = ("export-fused", detection, tmp_path / "out", "--weights", weights)
    assert command(*arguments)[0] == 0
    (detection / "readme.txt").write_text("HELLO")
    status, stdout, _ = command(*arguments)
    assert status == 0 and "0 pairs fused, 10 were there" in stdout
    assert (tmp_path / "out/readme.txt").read_text() == "HELLO"


def test_segmentation(tmp_path, picture, weights, command):
    root = tmp_path / "FMB"
    for part, count in (("train", 3), ("test", 1)):
        for i in range(count):
            picture(root / part / "Infrared" / f"{part}{i}.png", mode="RGB")
            picture(root / part / "Visible" / f"{part}{i}.png", mode="RGB")
            picture(root / part / "Label" / f"{part}{i}.png")
    (root / "train/Visible/train2.png").write_bytes(b"")
    arguments = ("export-fused", root, tmp_path / "out", "--weights", weights, "--device", "cpu")
    status, stdout, stderr = command(*arguments)
    assert status == 1 and "train2: " in stderr and "1 of 4 pairs failed" in stderr and "3 pairs fused" in stdout
    picture(root / "train/Visible/train2.png", mode="RGB")
    status, stdout, _ = command(*arguments)
    assert status == 0 and "1 pairs fused, 3 were there, of 4" in stdout
    out, source = files(tmp_path / "out"), files(root)
    kept = {name for name in source if "Infrared" not in name}
    assert set(out) == kept | {"export.json"}
    assert all(out[name] == source[name] for name in kept if "Label" in name)
    with Image.open(tmp_path / "out/test/Visible/test0.png") as image:
        assert image.size == (64, 48) and image.mode == "RGB"


def test_links_are_followed(tmp_path, picture, weights, command, fails):
    root, far = tmp_path / "FMB", tmp_path / "far"
    for kind in ("Infrared", "Visible"):
        picture(far / "train" / kind / "a.png")
    picture(far / "labels" / "a.png")
    root.mkdir()
    (root / "train").symlink_to(far / "train")
    for name in ("Label", "Again"):
        (far / "train" / name).symlink_to(far / "labels")
    (far / "train" / "cycle").symlink_to(root)
    assert "OUT: expected a folder outside" in fails("export-fused", root, far / "labels/out")
    status, stdout, stderr = command("export-fused", root, tmp_path / "out", "--weights", weights)
    assert status == 0 and "1 pairs fused, 0 were there, of 1" in stdout, stderr
    assert set(files(tmp_path / "out")) == {
        "export.json", "train/Visible/a.png", "train/Label/a.png", "train/Again/a.png",
    }  # fmt: skip


def test_bad_input(detection, tmp_path, weights, fails):
    out = tmp_path / "out"
    arguments = ("export-fused", detection, out, "--weights", weights, "--device", "cpu")
    assert "gone: no such folder" in fails("export-fused", tmp_path / "gone", out)
    (tmp_path / "empty").mkdir()
    assert "no infrared and visible folders found; expected ROOT/Ir" in fails("export-fused", tmp_path / "empty", out)
    assert "OUT: expected a folder outside" in fails("export-fused", detection, detection / "fused")
    (detection / "Annotation/00001.xml").write_text(LABEL.replace("<xmin>16", "<xmin>40"))
    assert "00001.xml: not a Pascal VOC label file (box 40, 12, 32, 36: expected xmin <= xmax" in fails(*arguments)
    (detection / "Annotation/00001.xml").write_text("<annotation>")
    assert "00001.xml: not a Pascal VOC label file" in fails(*arguments)
    (detection / "Annotation/00001.xml").unlink()
    assert "no labels for 00001" in fails(*arguments)
    (detection / "Vis/00001.png").unlink()
    assert "1 images have no partner in the other folder: 00001" in fails(*arguments)
    assert not out.exists()
    out.mkdir()
    (detection / "Ir/00001.png").unlink()
    (out / "export.json").write_text(json.dumps({"root": "another"}))
    assert "holds an export of another ROOT" in fails(*arguments)
    with pytest.raises(UserError, match="damaged"):
        (out / "export.json").write_text("{")
        export_fused._check_continues(out / "export.json", {})
