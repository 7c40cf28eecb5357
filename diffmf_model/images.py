"""Reading pictures into tensors, the YCbCr colour space, and writing PNG files that are whole or absent.

A picture is a float32 tensor (C, H, W) in [0, 1] with C = 1 grey, 2 grey + alpha, 3 RGB or 4 RGB + alpha. Alpha is
never composited: the network sees the colours as they are stored, and the fused picture carries the visible image's
alpha. An infrared image's alpha is ignored.
"""

import os
import secrets
import struct
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from .errors import UserError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
# What Pillow's decoders raise on a damaged file, depending on the format and on where the damage lies.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def decode(path: str | os.PathLike) -> np.ndarray:
    """The stored samples (H, W, C) of a picture: uint8, uint16 (16-bit grey) or float32 in [0, 1] (float TIFF).

    Palettes are resolved, the EXIF orientation is applied, a file of several frames gives its first.
    Raises UserError when the file is missing, is not a picture, is truncated or has samples of unknown scale.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: expected an image file, found a folder")
    try:
        # A file, not its name: by name Pillow maps plain TIFFs into memory, and turns those wrongly (seen in 13.0).
        with open(path, "rb") as file, Image.open(file) as image:
            image.load()
            tags = image.tag_v2 if image.format == "TIFF" else {}
            array = np.asarray(_plain_mode(ImageOps.exif_transpose(image)))
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason})") from error
    wide = array.dtype != np.uint8
    signed, bits = tags.get(SAMPLEFORMAT, (1,))[0] == 2, tags.get(BITSPERSAMPLE, (16,))[0]
    if wide and array.dtype != np.float32 and (signed or bits != 16):
        found = f"{'signed' if signed else 'unsigned'} {bits}-bit"
        raise UserError(f"{path}: expected unsigned 8- or 16-bit integers, found {found}")
    if array.dtype == np.int32:  # some Pillow versions open 16-bit grey PNG files as 32-bit integers
        if array.min() < 0 or array.max() > 65535:
            raise UserError(f"{path}: expected 8- or 16-bit samples, found {array.min()} to {array.max()}")
        array = array.astype(np.uint16)
    elif array.dtype == np.float32 and not (array.min() >= 0 and array.max() <= 1):
        raise UserError(f"{path}: expected float samples in [0, 1], found {array.min():g} to {array.max():g}")
    if wide and tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is 0; Pillow inverts 8-bit samples only
        array = 1 - array if array.dtype == np.float32 else ~array
    return array if array.ndim == 3 else array[..., None]


def _plain_mode(image: Image.Image) -> Image.Image:
    """Converts to a mode whose samples mean grey, grey + alpha, RGB or RGB + alpha."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return image
    grey = image.mode in ("1", "L", "LA", "La")
    return image.convert(("L" if grey else "RGB") + ("A" if image.has_transparency_data else ""))


def to_tensor(samples: np.ndarray) -> torch.Tensor:
    """(H, W, C) samples as `decode` gives them -> (C, H, W) float32 in [0, 1]; full scale is 255 or 65535."""
    scale = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}.get(samples.dtype.newbyteorder("="), 1.0)
    planes = np.ascontiguousarray(samples.transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(planes / np.float32(scale))


def read_image(path: str | os.PathLike) -> torch.Tensor:
    """A picture file as (C, H, W) float32 in [0, 1]. Raises UserError as `decode` does."""
    return to_tensor(decode(path))


def rgb_to_ycbcr(rgb: torch.Tensor) -> torch.Tensor:
    """(..., 3, H, W) RGB in [0, 1] -> full-range BT.601 Y, Cb, Cr in [0, 1] as in JPEG: grey has Cb = Cr = 0.5."""
    red, green, blue = rgb.unbind(-3)
    y = _y(red, green, blue)
    return torch.stack((y, 0.5 + (blue - y) / 1.772, 0.5 + (red - y) / 1.402), dim=-3)


def _y(red: torch.Tensor, green: torch.Tensor, blue: torch.Tensor) -> torch.Tensor:
    return 0.299 * red + 0.587 * green + 0.114 * blue


def ycbcr_to_rgb(ycbcr: torch.Tensor) -> torch.Tensor:
    """The inverse of `rgb_to_ycbcr`. A colour outside [0, 1] moves towards the grey of its Y until it is inside."""
    y, cb, cr = ycbcr.unbind(-3)
    red = y + 1.402 * (cr - 0.5)
    blue = y + 1.772 * (cb - 0.5)
    green = (y - 0.299 * red - 0.114 * blue) / 0.587
    rgb, grey = torch.stack((red, green, blue), dim=-3), y.clamp(0, 1).unsqueeze(-3)
    away = rgb - grey
    room = torch.where(away > 0, 1 - grey, grey)
    share = (room / away.abs().clamp(min=torch.finfo(away.dtype).tiny)).amin(-3, keepdim=True)
    return grey.lerp(rgb, share.clamp(max=1)).clamp(0, 1)


def luma(image: torch.Tensor) -> torch.Tensor:
    """The Y channel (1, H, W) of a picture (C, H, W), C = 1 … 4; alpha is ignored."""
    return image[:1] if image.shape[0] < 3 else _y(*image[:3])[None]


def is_colour(image: torch.Tensor) -> bool:
    """Whether any pixel of the picture (C, H, W) differs between its colour channels."""
    return image.shape[0] >= 3 and bool((image[:3] != image[:1]).any())


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> 0 … 255, rounded to nearest, uint8. NaN would become an arbitrary level, so it raises ValueError."""
    if image.isnan().any():
        raise ValueError("the image holds NaN")
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


@contextmanager
def atomic_write(path: str | os.PathLike):
    """Opens a binary file that takes `path`'s place when the block ends well and vanishes when it raises.

    Raises UserError when the file cannot be created or written.
    """
    path = Path(path)
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")  # a long name would leave no room for more
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # already moved, or never created
            partial.unlink()


def make_folder(folder: str | os.PathLike) -> Path:
    """Creates `folder` where needed and proves that files can be written there, before any work. Raises UserError."""
    folder = Path(folder)
    probe = folder / f".diffmf-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot write to this folder ({error.strerror})") from error
    return folder


def write_png(path: str | os.PathLike, image: torch.Tensor) -> None:
    """Writes a picture (C, H, W) in [0, 1] as an 8-bit PNG, atomically. Raises UserError when it cannot."""
    samples = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
    with atomic_write(path) as file:
        picture.save(file, format="PNG", compress_level=3)  # a third of the time of the usual 6, a tenth more bytes


def list_images(folder: str | os.PathLike) -> dict[str, Path]:
    """The picture files of a folder by stem, sorted. Raises UserError for no folder, no picture, a stem used twice."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    try:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from error
    if not files:
        raise UserError(f"{folder}: no image files found (looked for {' '.join(sorted(EXTENSIONS))})")
    images: dict[str, Path] = {}
    for path in files:
        if path.stem in images:
            raise UserError(f"{folder}: two images share the name {path.stem}: {images[path.stem].name}, {path.name}")
        images[path.stem] = path
    return images
