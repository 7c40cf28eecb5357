"""Renders the gallery and fuses it: `python docs/gallery.py [SCENE ...]` (default: all; "sample" is the bundled pair).

Writes docs/gallery/SCENE_{ir,vi}.png, SCENE_fused.png, SCENE_fused-s.png for the small set of weights, and the strip
SCENE.png that README.md and docs/gallery.md show. The bundled pair is not rendered again.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffmf_model.checkpoint import load_model, select_device
from diffmf_model.fuse import SAMPLE, fuse_images
from diffmf_model.images import write_png
from diffmf_model.sample import GALLERY, render

FOLDER = Path(__file__).parent / "gallery"
WEIGHTS = {  # suffix of the picture's name: caption, weights
    "fused": ("fused", "full"),
    "fused-s": ("fused, small", "small"),
}
PANEL, GAP, CAPTION = (320, 240), 6, 18


def main(scenes: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    device = select_device()
    models = {name: load_model(weights, device) for name, (_, weights) in WEIGHTS.items()}
    for scene in scenes:
        if scene == SAMPLE.name:
            ir, vi = SAMPLE.ir, SAMPLE.vi
        else:
            ir, vi = (FOLDER / f"{scene}_{name}.png" for name in ("ir", "vi"))
            for path, picture in zip((ir, vi), render(scene), strict=True):
                Image.fromarray(picture).save(path, optimize=True)
        panels = {"infrared": ir, "visible": vi}
        for name, model in models.items():
            path = panels[WEIGHTS[name][0]] = FOLDER / f"{scene}_{name}.png"
            write_png(path, fuse_images(ir, vi, model, device))
        strip(panels).save(FOLDER / f"{scene}.png", optimize=True)
        print(f"wrote {', '.join(path.name for path in panels.values())} and {scene}.png to {FOLDER}")


def strip(panels: dict[str, Path]) -> Image.Image:
    """The pictures side by side, smaller, each over its caption."""
    width, height = PANEL
    image = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height + CAPTION), "white")
    draw = ImageDraw.Draw(image)
    for i, (caption, path) in enumerate(panels.items()):
        left = i * (width + GAP)
        with Image.open(path) as picture:
            image.paste(picture.convert("RGB").resize(PANEL, Image.Resampling.LANCZOS), (left, 0))
        draw.text((left + width / 2, height + CAPTION / 2), caption, "black", ImageFont.load_default(12), anchor="mm")
    return image.point(lambda level: min(4 * round(level / 4), 255))  # 6 bits a channel halve the file and do not show


if __name__ == "__main__":
    main(sys.argv[1:] or [*GALLERY, SAMPLE.name])
