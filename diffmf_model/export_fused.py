"""`diffmf export-fused`: a detection or segmentation data set with fused pictures, ready to train on.

Segmentation (FMB): ROOT/{train,test}/{Infrared,Visible,Label}. OUT has the same folders without Infrared; the fused
pictures, PNG files, take the folder and names of the visible ones, so that what trained on those trains on these.

Detection (M3FD): ROOT/{Ir,Vis,Annotation}, the labels as Pascal VOC's XML. OUT has images/NAME.png, Annotation as it
was, and what YOLO reads: labels/NAME.txt, data.yaml and a split 8 : 1 : 1 (the paper's) in {train,val,test}.txt.

Everything else in ROOT is copied as it is, what it links to too. Pictures that are already there are skipped: they are
written whole or not at all.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .checkpoint import add_device_argument, add_weights_argument, load_model, resolve_weights, select_device
from .data import FOLDERS, Pair, listed, match_folders
from .errors import UserError
from .fuse import fuse_all
from .images import atomic_write, make_folder

RECORD = "export.json"
SPLIT = {"train": 0.8, "val": 0.1, "test": 0.1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", help="data set in M3FD's or FMB's layout")
    parser.add_argument("output", metavar="OUT", help="folder to write; the same command continues an interrupted one")
    add_weights_argument(parser)
    add_device_argument(parser)
    parser.add_argument(
        "--grey", action="store_true", help="write grey pictures also where the visible ones have colour"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the detection split (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    root, output = Path(args.root), Path(args.output)
    device = select_device(args.device)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    folders = list(_folders(root))
    places = find_places(root, folders)
    if {folder.resolve() for folder in folders} & {output.resolve(), *output.resolve().parents}:
        raise UserError(f"OUT: expected a folder outside {root}, found {output}")
    work = [(folder, *match_folders(ir, vi)) for folder, ir, vi in places]
    lonely = [name for _, _, unmatched in work for name in unmatched]
    if lonely:
        raise UserError(f"{root}: {len(lonely)} images have no partner in the other folder: {listed(lonely)}")
    labels = {folder: voc_boxes(folder, pairs) for folder, pairs, _ in work if _annotations(folder)}
    model = load_model(args.weights, device)
    make_folder(output)
    weights = hashlib.sha256(resolve_weights(args.weights).read_bytes()).hexdigest()
    _check_continues(output / RECORD, {"root": str(root.resolve()), "weights": weights, "grey": args.grey})

    targets = []
    for (folder, _, vi), (_, pairs, _) in zip(places, work, strict=True):
        target = output / folder.relative_to(root) / ("images" if folder in labels else vi.name)
        targets += [(pair, target / f"{pair.name}.png") for pair in pairs]
    taken = {path for _, path in targets}
    sources = {source for _, ir, vi in places for source in (ir, vi)}
    for folder in folders:
        if sources & {folder, *folder.parents}:
            continue
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            if output / path.relative_to(root) not in taken:
                _copy(path, output / path.relative_to(root))
    for path in {path.parent for path in taken}:
        path.mkdir(parents=True, exist_ok=True)
    for folder in labels:
        write_yolo(output / folder.relative_to(root), labels[folder], args.seed)
    missing = [(pair, path) for pair, path in targets if not path.exists()]
    failed = fuse_all(missing, model, device, args.grey)
    there = len(targets) - len(missing)
    print(f"{output.resolve()}: {len(missing) - failed} pairs fused, {there} were there, of {len(targets)}")
    if failed:
        print(f"diffmf: {failed} of {len(targets)} pairs failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def find_places(root: Path, folders: list[Path]) -> list[tuple[Path, Path, Path]]:
    """Those of ROOT's folders with an infrared and a visible folder: (folder, infrared, visible) of each.

    Raises UserError when there is none.
    """
    places = []
    for folder in folders:
        inside = {
            kind: [p for p in folder.iterdir() if p.is_dir() and p.name.lower() in FOLDERS[kind]] for kind in FOLDERS
        }
        if all(len(found) == 1 for found in inside.values()):
            places.append((folder, inside["infrared"][0], inside["visible"][0]))
    if not places:
        raise UserError(
            f"{root}: no infrared and visible folders found; expected ROOT/Ir and ROOT/Vis as in M3FD, or "
            "ROOT/train/Infrared and ROOT/train/Visible as in FMB"
        )
    return places


def _folders(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The folder and all below it, linked ones too, but none inside itself: a link to what it lies in is left out."""
    here = folder.resolve()
    if here not in above:
        yield folder
        for each in sorted(p for p in folder.iterdir() if p.is_dir()):
            yield from _folders(each, above | {here})


def _annotations(folder: Path) -> Path | None:
    """The folder with Pascal VOC labels, if there is one."""
    found = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.lower() in ("annotation", "annotations"))
    return found[0] if found else None


def voc_boxes(folder: Path, pairs: list[Pair]) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    """By pair: its objects' classes and boxes (centre x, y, width, height, as shares of the picture, clipped to it).

    Raises UserError for a pair without labels and for labels that cannot be read.
    """
    annotations = _annotations(folder)
    missing = [pair.name for pair in pairs if not (annotations / f"{pair.name}.xml").is_file()]
    if missing:
        raise UserError(f"{annotations}: no labels for {listed(missing)}")
    boxes = {}
    for pair in pairs:
        path = annotations / f"{pair.name}.xml"
        try:
            tree = xml.parse(path).getroot()
            size = [float(tree.findtext(f"size/{side}")) for side in ("width", "height")]
            boxes[pair.name] = []
            for each in tree.iter("object"):
                corners = [float(each.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
                if not (corners[0] <= corners[2] and corners[1] <= corners[3]):
                    found = ", ".join(f"{corner:g}" for corner in corners)
                    raise ValueError(f"box {found}: expected xmin <= xmax and ymin <= ymax")
                left, top, right, bottom = (min(max(v / size[i % 2], 0), 1) for i, v in enumerate(corners))
                box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
                boxes[pair.name].append((each.findtext("name").strip(), box))
        except (OSError, xml.ParseError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{path}: not a Pascal VOC label file ({error})") from error
    return boxes


def write_yolo(folder: Path, boxes: dict[str, list[tuple[str, tuple[float, ...]]]], seed: int) -> None:
    """labels/NAME.txt, the split's lists and data.yaml beside `folder`/images."""
    classes = sorted({name for objects in boxes.values() for name, _ in objects})
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    for name, objects in boxes.items():
        lines = [" ".join([str(classes.index(kind)), *(f"{v:.6f}" for v in box)]) for kind, box in objects]
        _write(folder / "labels" / f"{name}.txt", "".join(f"{line}\n" for line in lines))
    names = [sorted(boxes)[i] for i in np.random.default_rng(seed).permutation(len(boxes))]
    start = 0
    for split, share in SPLIT.items():
        end = len(names) if split == "test" else start + round(share * len(names))
        _write(folder / f"{split}.txt", "".join(f"./images/{name}.png\n" for name in sorted(names[start:end])))
        start = end
    lines = [
        f"path: {json.dumps(str(folder.resolve()))}",
        *(f"{split}: {split}.txt" for split in SPLIT),
        f"nc: {len(classes)}",
    ]
    _write(folder / "data.yaml", "\n".join([*lines, f"names: {json.dumps(classes)}"]) + "\n")


def _check_continues(path: Path, record: dict) -> None:
    """Keeps pictures of different weights or sources out of one folder. Raises UserError."""
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error})") from error
        if found != record:
            raise UserError(
                f"{path.parent}: holds an export of another ROOT, other weights or colours; use another OUT"
            )
    _write(path, json.dumps(record, indent=1) + "\n")


def _copy(source: Path, target: Path) -> None:
    wanted = source.stat()
    if target.exists():
        found = target.stat()
        if (found.st_size, found.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file, open(source, "rb") as original:
        shutil.copyfileobj(original, file)
    os.utime(target, ns=(wanted.st_atime_ns, wanted.st_mtime_ns))


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
