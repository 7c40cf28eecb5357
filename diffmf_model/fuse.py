"""`diffmf fuse`: one pair, two folders, or the pair that the package carries."""

import argparse
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from .checkpoint import ASSETS, add_device_argument, add_weights_argument, load_model, select_device
from .data import Pair, check_same_size, listed, match_folders
from .errors import UserError
from .images import is_colour, luma, make_folder, read_image, rgb_to_ycbcr, write_png, ycbcr_to_rgb

SAMPLE = Pair("sample", ASSETS / "sample_ir.png", ASSETS / "sample_vi.png")
THREADS = min(16, os.cpu_count() or 1)  # that read and write pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ir", nargs="?", metavar="IR", help="infrared image or folder (default: the bundled pair)")
    parser.add_argument("vi", nargs="?", metavar="VI", help="visible image or folder, its names matching IR's")
    parser.add_argument("--output", metavar="OUT", help="PNG file or folder to write (default: fused.png or fused/)")
    add_weights_argument(parser)
    add_device_argument(parser)
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 is faster on a GPU and changes pixels by up to 4 of 255 (default: %(default)s)",
    )
    parser.add_argument("--grey", action="store_true", help="write grey images also where the visible one has colour")


def run(args: argparse.Namespace) -> int:
    device = select_device(args.device)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return _fuse(args, device)


def _fuse(args: argparse.Namespace, device: torch.device) -> int:
    if args.ir is None:
        return _fuse_file(SAMPLE, args, device)
    if args.vi is None:
        raise UserError(f"VI: expected the visible image or folder that belongs to {args.ir}, found nothing")
    ir, vi = Path(args.ir), Path(args.vi)
    for path in (ir, vi):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    if ir.is_dir() != vi.is_dir():
        folder, file = (ir, vi) if ir.is_dir() else (vi, ir)
        raise UserError(f"expected two files or two folders, found the folder {folder} and the file {file}")
    if ir.is_dir():
        return _fuse_folders(ir, vi, args, device)
    return _fuse_file(Pair(vi.stem, ir, vi), args, device)


def fuse_images(
    ir: str | Path | torch.Tensor,
    vi: str | Path | torch.Tensor,
    model: torch.nn.Module | None = None,
    device: str | torch.device = "cpu",
    grey: bool = False,
) -> torch.Tensor:
    """Fuses one pair: paths, or float tensors (C, H, W) in [0, 1] with C = 1 … 4 as `images.read_image` gives them.

    model: a network on `device`, in eval mode; None takes the weights that the package carries.
    Returns (C, H, W) float32 in [0, 1] on the CPU: the fused Y, under the visible image's Cb and Cr where it has colour
    (unless `grey`; greyer where RGB has no such colour of that Y), with the visible image's alpha where it has one.
    Raises UserError for unreadable files, tensors that are no such images, sizes that differ, a device that is absent,
    too little memory and weights that give NaN.
    """
    device = select_device(str(device))
    model = load_model(None, device) if model is None else model
    ir, vi = _read_pair(ir, vi)
    return _finished(fuse_luma(model, luma(ir), luma(vi), device).cpu(), vi, grey)


def fuse_all(work: list[tuple[Pair, Path]], model: torch.nn.Module, device: str | torch.device, grey: bool) -> int:
    """Fuses each pair into its PNG file, with a progress bar; says which fail, and returns how many.

    Threads read the next pictures and write the last ones meanwhile: a GPU needs a tenth of the time that these take.
    """
    failed = 0
    # The pool's threads compute alone, not with a team each. PyTorch gives a thread its number of workers at the first
    # question, the latest that any thread has set: ours must ask before.
    torch.get_num_threads()
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = _fuse_each(pool, work, model, device, grey)
        for pair, error in tqdm(results, total=len(work), desc="fusing", unit="pair"):
            if error is not None:
                failed += 1
                tqdm.write(f"diffmf: {pair.name}: {error}", file=sys.stderr)
    return failed


def _fuse_each(pool, work, model, device, grey) -> Iterator[tuple[Pair, UserError | None]]:
    reading = ((pair, path, pool.submit(_read_pair, pair.ir, pair.vi)) for pair, path in work)
    writing: deque[tuple[Pair, Future]] = deque()
    for pair, path, images in _ahead(reading):
        try:
            ir, vi = images.result()
            y = fuse_luma(model, luma(ir), luma(vi), device).cpu()
        except UserError as error:
            yield pair, error
            continue
        writing.append((pair, pool.submit(_write_fused, path, y, vi, grey)))
        while len(writing) > THREADS or (writing and writing[0][1].done()):
            yield _written(*writing.popleft())
    for each in writing:
        yield _written(*each)


def _ahead(items: Iterator) -> Iterator:
    """The same items, each drawn THREADS items before it is given: the futures among them run meanwhile."""
    drawn = deque(islice(items, THREADS))
    while drawn:
        item = drawn.popleft()
        drawn.extend(islice(items, 1))
        yield item


def _read_pair(ir: str | Path | torch.Tensor, vi: str | Path | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    names = [str(image) if isinstance(image, str | Path) else name for name, image in (("ir", ir), ("vi", vi))]
    ir, vi = (
        read_image(image) if isinstance(image, str | Path) else _checked(name, image)
        for name, image in (("ir", ir), ("vi", vi))
    )
    check_same_size(*names, ir.shape[1:], vi.shape[1:])
    return ir, vi


def _checked(name: str, image: torch.Tensor) -> torch.Tensor:
    """The image; UserError unless it is as `read_image` gives them."""
    expected = "expected a path or a float tensor (C, H, W) in [0, 1], C = 1 … 4"
    if not isinstance(image, torch.Tensor):
        raise UserError(f"{name}: a {type(image).__name__}, {expected}")
    if not image.is_floating_point() or image.dim() != 3 or not 1 <= len(image) <= 4:
        raise UserError(f"{name}: {image.dtype} of shape {tuple(image.shape)}, {expected}")
    if image.numel() > 0 and not (image.min() >= 0 and image.max() <= 1):
        raise UserError(f"{name}: values from {image.min():g} to {image.max():g}, {expected}")
    return image


def _write_fused(path: Path, y: torch.Tensor, vi: torch.Tensor, grey: bool) -> None:
    write_png(path, _finished(y, vi, grey))


def _written(pair: Pair, written: Future) -> tuple[Pair, UserError | None]:
    try:
        written.result()
    except UserError as error:
        return pair, error
    return pair, None


def _finished(y: torch.Tensor, vi: torch.Tensor, grey: bool) -> torch.Tensor:
    """A fused Y with the visible image's colours and alpha, where it has them."""
    fused = y if grey or not is_colour(vi) else recolour(y, vi)
    alpha = vi[-1:] if vi.shape[0] in (2, 4) else vi[:0]
    return torch.cat((fused, alpha))


@torch.inference_mode()
def fuse_luma(
    model: torch.nn.Module, ir: torch.Tensor, vi_y: torch.Tensor, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """The network's fused Y of one pair, all (1, H, W) in [0, 1]. Raises UserError as `fuse_images` does."""
    try:
        y = model(ir[None].to(device), vi_y[None].to(device))[0].float()
    except (RuntimeError, MemoryError) as error:  # on the CPU PyTorch has no class for it
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        raise UserError(f"{device} has too little memory for a pair of {ir.shape[2]}x{ir.shape[1]} pixels") from error
    if not y.isfinite().all():
        raise UserError("the network gives NaN or Inf for this pair; are the weights good?")
    return y.clamp(0, 1)


def recolour(y: torch.Tensor, vi: torch.Tensor) -> torch.Tensor:
    """RGB (3, H, W) of a fused Y (1, H, W), which it keeps, under the Cb and Cr of a visible image (3 or 4, H, W)."""
    return ycbcr_to_rgb(torch.cat((y, rgb_to_ycbcr(vi[:3])[1:])))


def _fuse_file(pair: Pair, args: argparse.Namespace, device: torch.device) -> int:
    output = Path(args.output or "fused.png")
    if output.is_dir():
        output = output / f"{pair.name}.png"
    elif output.suffix.lower() != ".png":
        raise UserError(f"--output: expected a .png file or an existing folder, found {output}")
    if any(output.exists() and output.samefile(source) for source in pair[1:] if source.exists()):
        raise UserError(f"--output: {output} is one of the sources")
    make_folder(output.parent)
    write_png(output, fuse_images(pair.ir, pair.vi, load_model(args.weights, device), device, args.grey))
    print(f"fused {pair.ir} and {pair.vi} into {output.resolve()}")
    return 0


def _fuse_folders(ir: Path, vi: Path, args: argparse.Namespace, device: torch.device) -> int:
    pairs, unmatched = match_folders(ir, vi)
    output = Path(args.output or "fused")
    if output.exists() and any(output.samefile(folder) for folder in (ir, vi)):
        raise UserError(f"--output: {output} is one of the source folders")
    make_folder(output)
    if unmatched:
        print(f"diffmf: no partner for {len(unmatched)} images: {listed(unmatched)}", file=sys.stderr)
    model = load_model(args.weights, device)
    work = [(pair, output / f"{pair.name}.png") for pair in pairs]
    failed = fuse_all(work, model, device, args.grey)
    print(f"fused {len(pairs) - failed} of {len(pairs)} pairs into {output.resolve()}")
    if failed:
        print(f"diffmf: {failed} of {len(pairs)} pairs failed", file=sys.stderr)
    return 1 if failed else 0
