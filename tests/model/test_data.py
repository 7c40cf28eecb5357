"""Pairs on disk and random training crops."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffmf_model.data import PairDataset, RandomCrops, match_folders, read_names
from diffmf_model.errors import UserError


def test_items_are_matched_sorted_and_converted(pairs):
    root = pairs(["b", "a", "c"])
    dataset = PairDataset(root)
    assert dataset.names == ["a", "b", "c"] and len(dataset) == 3
    item = dataset[1]
    assert item["name"] == "b"
    assert item["ir"].shape == item["vi_y"].shape == (1, 48, 64) and item["ir"].dtype == torch.float32
    with Image.open(root / "vi" / "b.png") as vi:
        y = torch.from_numpy(np.array(vi.convert("L"))) / 255
    assert (item["vi_y"][0] - y).abs().max() < 0.6 / 255  # Pillow rounds to whole levels
    assert PairDataset(root, names=["c", "a"]).names == ["c", "a"]


@pytest.mark.parametrize("folders", [("Ir", "Vis"), ("IR", "VI"), ("Infrared", "Visible"), ("thermal", "rgb")])
def test_folder_names_of_other_data_sets(tmp_path, pairs, folders):
    root = pairs(["a"])
    for old, new in zip(("ir", "vi"), folders, strict=True):
        (root / old).rename(root / new)
    assert PairDataset(root)[0]["ir"].shape == (1, 48, 64)


def test_extensions_may_differ(tmp_path, picture):
    picture(tmp_path / "ir" / "a.png")
    picture(tmp_path / "vi" / "a.bmp")
    assert PairDataset(tmp_path).names == ["a"]


def test_splits(pairs):
    root = pairs([f"{i:02}" for i in range(21)])
    assert PairDataset(root, split="val").names == ["00", "10", "20"]
    assert len(PairDataset(root, split="train")) == 18
    with pytest.raises(UserError, match="no test split"):
        PairDataset(root, split="test")
    (root / "splits").mkdir()
    (root / "splits" / "train.txt").write_text("05\n\n03\n")
    assert PairDataset(root, split="train").names == ["05", "03"]
    with pytest.raises(UserError, match=r"val\.txt: cannot be read"):
        PairDataset(root, split="val")
    (root / "splits" / "val.txt").write_text("05\n77\n")
    with pytest.raises(UserError, match="no pair named 77"):
        PairDataset(root, split="val")


def test_bad_data_sets(tmp_path, pairs, picture):
    with pytest.raises(UserError, match="gone: no such folder"):
        PairDataset(tmp_path / "gone")
    with pytest.raises(UserError, match="no infrared folder"):
        PairDataset(tmp_path)
    root = pairs(["a", "b"])
    (root / "VI").mkdir()
    with pytest.raises(UserError, match="several visible folders"):
        PairDataset(root)
    (root / "VI").rmdir()
    picture(root / "ir" / "lonely.png")
    with pytest.raises(UserError, match="no partner in the other folder: lonely"):
        PairDataset(root)
    (root / "ir" / "lonely.png").unlink()
    picture(root / "ir" / "a.png", (50, 40))
    with pytest.raises(UserError, match=r"ir/a\.png is 50x40, .*vi/a\.png is 64x48"):
        PairDataset(root)[0]
    for name in ("a", "b"):
        (root / "ir" / f"{name}.png").rename(root / "ir" / f"other_{name}.png")
    with pytest.raises(UserError, match="no names match"):
        PairDataset(root)
    for file in (root / "ir").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="ir: no image files found"):
        PairDataset(root)


def test_match_folders_lists_the_unmatched(pairs, picture):
    root = pairs(["a", "b"])
    picture(root / "vi" / "only.png")
    found, unmatched = match_folders(root / "ir", root / "vi")
    assert [pair.name for pair in found] == ["a", "b"] and unmatched == ["only"]


def test_read_names(tmp_path):
    (tmp_path / "n.txt").write_text("a.png\nv1.2\n  c \r\n\n")
    assert read_names(tmp_path / "n.txt") == ["a", "v1.2", "c"]
    (tmp_path / "n.txt").write_text("a\n", encoding="utf-8-sig")
    assert read_names(tmp_path / "n.txt") == ["a"]
    (tmp_path / "n.txt").write_text("a\nb.png\nb\n")
    with pytest.raises(UserError, match="holds b more than once"):
        read_names(tmp_path / "n.txt")
    (tmp_path / "n.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no names"):
        read_names(tmp_path / "n.txt")
    (tmp_path / "n.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_names(tmp_path / "n.txt")


def test_crops_are_aligned_windows_of_the_pair(tmp_path):
    # The infrared holds each pixel's row, the visible its column, so that a crop tells where it comes from.
    for folder, samples in zip(("ir", "vi"), np.mgrid[:48, :64].astype(np.uint8), strict=True):
        (tmp_path / folder).mkdir()
        Image.fromarray(samples).save(tmp_path / folder / "a.png")
    crops = RandomCrops(PairDataset(tmp_path), 16)
    corners, flips = set(), set()
    for epoch in range(200):
        crops.set_epoch(epoch)
        item = crops[0]
        rows, columns = ((255 * item[key][0]).round().int() for key in ("ir", "vi_y"))
        assert torch.equal(rows, rows[:, :1].expand(16, 16)) and torch.equal(columns, columns[:1].expand(16, 16))
        row_step, column_step = rows[:, 0].diff(), columns[0].diff()
        assert row_step.abs().eq(1).all() and row_step.unique().numel() == 1
        assert column_step.abs().eq(1).all() and column_step.unique().numel() == 1
        corners.add((rows.min().item(), columns.min().item()))
        flips.add((row_step[0].item(), column_step[0].item()))
    assert len(flips) == 4
    assert all(0 <= r <= 32 and 0 <= c <= 48 for r, c in corners)
    # Of the 33 x 49 windows, the same ones at every run (seed 0): 186 corners, 33 rows, 48 columns.
    assert len(corners) > 150 and len({r for r, _ in corners}) > 25 and len({c for _, c in corners}) > 38


def test_crops_depend_on_seed_epoch_and_index_alone(pairs):
    dataset = PairDataset(pairs([str(i) for i in range(5)]))

    def epoch(crops, number, workers=0, persistent=None):
        crops.set_epoch(number)
        loader = persistent or DataLoader(crops, batch_size=2, num_workers=workers)
        return [torch.cat((batch["ir"], batch["vi_y"])) for batch in loader]

    crops = RandomCrops(dataset, 24, seed=3)
    first, second = epoch(crops, 0), epoch(crops, 1)
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    again = RandomCrops(dataset, 24, seed=3)
    loader = DataLoader(again, batch_size=2, num_workers=2, persistent_workers=True)
    for number, expected in ((1, second), (0, first)):  # workers stay alive and must see the epoch change
        assert all(torch.equal(a, b) for a, b in zip(epoch(again, number, persistent=loader), expected, strict=True))
    other = epoch(RandomCrops(dataset, 24, seed=4), 0)
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("size", [(64, 48), (20, 100), (3, 5), (1, 1)])
def test_small_images_are_padded_by_reflection(tmp_path, pairs, size):
    crops = RandomCrops(PairDataset(pairs(["a"], tmp_path / "s", size)), 80)
    item, whole = crops[0], crops.pairs[0]
    assert item["ir"].shape == item["vi_y"].shape == (1, 80, 80)
    assert set(item["ir"].unique().tolist()) <= set(whole["ir"].unique().tolist())


def test_cache_is_bounded_and_does_not_change_items(pairs):
    root = pairs(["a", "b", "c"])
    nbytes = 64 * 48 * 2 * 4
    cached, uncached = PairDataset(root, cache_bytes=2 * nbytes), PairDataset(root, cache_bytes=0)
    for _ in range(2):
        assert all(torch.equal(cached[i]["vi_y"], uncached[i]["vi_y"]) for i in range(3))
    assert len(cached._cache) == 2 and not uncached._cache


def test_shared_data_sets_load(data):
    tno = PairDataset(data / "tno", names=read_names(data / "tno" / "tno25.txt"))
    assert len(tno) == 25 and tno[0]["ir"].shape == tno[0]["vi_y"].shape and 0 < tno[0]["ir"].mean() < 1
    roadscene = {split: PairDataset(data / "roadscene", split=split) for split in ("train", "val", "test")}
    assert [len(each) for each in roadscene.values()] == [156, 15, 50]
    assert not set(roadscene["train"].names) & set(roadscene["test"].names)
    assert RandomCrops(roadscene["train"], 256)[7]["vi_y"].shape == (1, 256, 256)


def test_jitter_dulls_each_source_on_its_own_darkens_both_and_never_clips(pairs):
    dataset = PairDataset(pairs(["a"]))
    plain, jittered = RandomCrops(dataset, 24, seed=3), RandomCrops(dataset, 24, seed=3, jitter=0.6)
    contrasts, own = [], []
    for epoch in range(40):
        plain.set_epoch(epoch)
        jittered.set_epoch(epoch)
        # y = e (c x + b): the exposure e is the same for both, c and b each source's own.
        found = []
        for key in ("ir", "vi_y"):
            x, y = plain[0][key].double(), jittered[0][key].double()
            contrast = ((y - y.mean()) * (x - x.mean())).sum() / (x - x.mean()).square().sum()
            offset = (y - contrast * x).mean()
            torch.testing.assert_close(y, contrast * x + offset, atol=1e-6, rtol=0)  # the same window and flips
            assert offset >= -1e-4
            found.append((contrast.item(), offset.item()))
        # Some exposure in [0.4, 1] leaves c in [0.4, 1] and b in [0, 1 - c] for both: white stays below it.
        least, most = max(0.4, *(c + b for c, b in found)), min(1.0, *(c / 0.4 for c, _ in found))
        assert least <= most + 1e-3
        contrasts.append([c for c, _ in found])
        own.append(np.log(found[0][0] / found[1][0]))  # the exposure cancels
    contrasts = np.array(contrasts)
    assert np.ptp(contrasts) > 0.4 and contrasts.min() < 0.4 - 0.05  # darker than either could be on its own
    assert np.ptp(own) > 0.8 and np.corrcoef(contrasts.T)[0, 1] > 0.2  # their own, under one exposure
