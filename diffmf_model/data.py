"""Infrared-visible pairs on disk, whole or as random training crops.

A data set is `root/{ir,vi}/NAME.ext`, or M3FD's `root/{Ir,Vis}`, or any spelling in `FOLDERS`; pictures are matched by
name without extension. `root/splits/{train,val,test}.txt`, one name a line, are used where they are present.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import UserError
from .images import EXTENSIONS, list_images, luma, read_image

FOLDERS = {"infrared": ("ir", "infrared", "inf", "thermal"), "visible": ("vi", "vis", "visible", "rgb")}
HOLD_OUT = 10  # one pair in this many validates where a data set has no splits folder


class Pair(NamedTuple):
    name: str
    ir: Path
    vi: Path


def match_folders(ir_folder: Path, vi_folder: Path) -> tuple[list[Pair], list[str]]:
    """The pairs with matching names, sorted, and the names that only one folder has. UserError when none match."""
    ir, vi = list_images(ir_folder), list_images(vi_folder)
    pairs = [Pair(name, ir[name], vi[name]) for name in sorted(ir.keys() & vi.keys())]
    unmatched = sorted(ir.keys() ^ vi.keys())
    if not pairs:
        raise UserError(
            f"no names match between {ir_folder} ({listed(sorted(ir))}) and {vi_folder} ({listed(sorted(vi))})"
        )
    return pairs, unmatched


def find_pairs(root: str | Path) -> list[Pair]:
    """All pairs of a data set, sorted by name. Raises UserError for a missing folder or any unmatched name."""
    root = Path(root)
    folders = [_subfolder(root, modality) for modality in FOLDERS]
    pairs, unmatched = match_folders(*folders)
    if unmatched:
        raise UserError(f"{root}: {len(unmatched)} images have no partner in the other folder: {listed(unmatched)}")
    return pairs


def read_names(path: str | Path) -> list[str]:
    """The names in a text file, one a line, blank lines skipped; an image extension is dropped. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of names ({error})") from error
    names = [Path(line.strip()) for line in lines if line.strip()]
    if not names:
        raise UserError(f"{path}: holds no names")
    names = [name.stem if name.suffix.lower() in EXTENSIONS else name.name for name in names]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(f"{path}: holds {listed(twice)} more than once")
    return names


class PairDataset(Dataset):
    """Whole pairs. Item: dict(name str, ir (1, H, W), vi_y (1, H, W)), float32 in [0, 1]; sizes differ between items.

    names: which pairs and in which order; None takes all, sorted.
    split: "train", "val" or "test" instead of names. Without a splits folder every HOLD_OUT-th pair is "val" and the
        rest is "train".
    cache_bytes: decoded planes are kept up to this size, in each process.
    Raises UserError for folders, names or splits that are not there, and, on access, for unreadable pictures and
    pairs of different sizes.
    """

    def __init__(
        self,
        root: str | Path,
        names: list[str] | None = None,
        *,
        split: str | None = None,
        cache_bytes: int = 1 << 30,
    ):
        self.root = Path(root)
        pairs = {pair.name: pair for pair in find_pairs(self.root)}
        if split is not None:
            if names is not None:
                raise ValueError("give names or split, not both")
            names = self._split_names(split, list(pairs))
        if names is not None:
            missing = [name for name in names if name not in pairs]
            if missing:
                raise UserError(f"{self.root}: no pair named {listed(missing)}")
        self.pairs = [pairs[name] for name in (pairs if names is None else names)]
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._cache_room = cache_bytes

    def _split_names(self, split: str, names: list[str]) -> list[str]:
        if (self.root / "splits").is_dir():
            return read_names(self.root / "splits" / f"{split}.txt")
        chosen = {"train": [n for i, n in enumerate(names) if i % HOLD_OUT], "val": names[::HOLD_OUT]}.get(split)
        if not chosen:
            raise UserError(f"{self.root}: no {split} split among {len(names)} pairs without {self.root}/splits")
        return chosen

    @property
    def names(self) -> list[str]:
        return [pair.name for pair in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def planes(self, index: int) -> tuple[Tensor, Tensor]:
        """The infrared image and Y of the visible one, each (1, H, W); not to be written to."""
        if index in self._cache:
            return self._cache[index]
        paths = self.pairs[index][1:]
        ir, vi = (luma(read_image(path)) for path in paths)
        check_same_size(*paths, ir.shape[1:], vi.shape[1:])
        if ir.nbytes + vi.nbytes <= self._cache_room:
            self._cache_room -= ir.nbytes + vi.nbytes
            self._cache[index] = ir, vi
        return ir, vi

    def __getitem__(self, index: int) -> dict:
        ir, vi = self.planes(index)
        return {"name": self.pairs[index].name, "ir": ir.clone(), "vi_y": vi.clone()}


class RandomCrops(Dataset):
    """Training crops of a PairDataset: the same window and the same flips for both images.

    Item: dict(name, ir (1, size, size), vi_y (1, size, size)), float32 in [0, 1]. Images smaller than the crop are
    padded by reflection. With jitter, each image x of a pair becomes c x + b, c drawn from [1 - jitter, 1] and b from
    [0, 1 - c], for the two independently: duller, darker or brighter, never clipped; then both are darkened by one
    factor from [1 - jitter, 1], as at night. The crop is a pure function of (seed, epoch, index), so it depends neither
    on the number of worker processes nor on what was drawn before: a resumed run sees what the uninterrupted one would
    have seen.
    """

    def __init__(self, pairs: PairDataset, size: int, seed: int = 0, jitter: float = 0.0):
        self.pairs, self.size, self.seed, self.jitter = pairs, size, seed, jitter
        # In shared memory, so that persistent DataLoader workers see set_epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's crops; call it before iterating, as for DistributedSampler."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        random = np.random.default_rng((self.seed, int(self._epoch), index))
        planes = self.pairs.planes(index)
        height, width = planes[0].shape[1:]
        top, left = (int(random.integers(max(extent - self.size, 0) + 1)) for extent in (height, width))
        steps = [int(step) for step in random.choice((1, -1), 2)]
        item = {"name": self.pairs.pairs[index].name}
        for key, plane in zip(("ir", "vi_y"), planes, strict=True):
            crop = plane.numpy()[0, top : top + self.size, left : left + self.size]
            lack = [self.size - extent for extent in crop.shape]
            crop = np.pad(crop, [(n // 2, n - n // 2) for n in lack], mode="reflect") if any(lack) else crop
            item[key] = torch.from_numpy(crop[:: steps[0], :: steps[1]].copy())[None]
        if self.jitter:
            for key in ("ir", "vi_y"):
                contrast = 1 - self.jitter * random.random()
                item[key] = contrast * item[key] + (1 - contrast) * random.random()
            exposure = 1 - self.jitter * random.random()
            for key in ("ir", "vi_y"):
                item[key] *= exposure
        return item


def check_same_size(ir: object, vi: object, ir_size: tuple[int, ...], vi_size: tuple[int, ...]) -> None:
    """Raises UserError, naming the images, unless their (H, W) are equal."""
    if tuple(ir_size) != tuple(vi_size):
        found = f"{ir} is {ir_size[1]}x{ir_size[0]}, {vi} is {vi_size[1]}x{vi_size[0]}"
        raise UserError(f"the images of a pair must have one size: {found}")


def _subfolder(root: Path, modality: str) -> Path:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    found = sorted(p for p in root.iterdir() if p.is_dir() and p.name.lower() in FOLDERS[modality])
    if len(found) != 1:
        what = f"several {modality} folders ({listed([p.name for p in found])})" if found else f"no {modality} folder"
        raise UserError(f"{root}: {what}; expected one named {' or '.join(FOLDERS[modality])}, in any case")
    return found[0]


def listed(names: list[str], limit: int = 8) -> str:
    """The names joined by commas, the rest of a long list as a count."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
