"""`diffmf features`: the views of the paper's Fig. 8 as colour-mapped pictures."""

import argparse
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from .checkpoint import add_device_argument, add_weights_argument, load_model, select_device
from .data import check_same_size
from .errors import UserError
from .extraction import difference
from .images import luma, make_folder, read_image, write_png
from .network import DIFFMF


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ir", metavar="IR", help="infrared image")
    parser.add_argument("vi", metavar="VI", help="visible image")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures")
    add_weights_argument(parser)
    add_device_argument(parser)
    parser.add_argument("--colormap", default="viridis", help="matplotlib colour map (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    colormap = _colormap(args.colormap)
    device = select_device(args.device)
    folder = make_folder(args.output)
    ir, vi = read_image(args.ir), read_image(args.vi)
    check_same_size(args.ir, args.vi, ir.shape[1:], vi.shape[1:])
    model = load_model(args.weights, device)
    for name, view in feature_views(model, luma(ir)[None].to(device), luma(vi)[None].to(device)).items():
        colours = torch.from_numpy(colormap(_normalized(view).cpu().numpy())[..., :3])
        write_png(folder / f"{name}.png", colours.permute(2, 0, 1))
        print(f"{folder / name}.png")
    return 0


@torch.no_grad()
def feature_views(model: DIFFMF, ir: Tensor, vi: Tensor) -> dict[str, Tensor]:
    """Channel means (H, W) of the first image's features, by name, in the order in which they arise.

    difference_1 ...: Diff of each extraction stage; channel_exchange_infrared, channel_exchange_visible: |F^c|;
    spatial_exchange: |fused features|. Modules that the model's configuration leaves out have no view.
    ir, vi: as for the model, (B, 1, H, W).
    """
    views: dict[str, Tensor] = {}

    def keep_difference(name: str, module, inputs, output) -> None:
        views[name] = difference(output[1])[0].mean(-1)

    def keep_exchange(module, inputs, output) -> None:
        for modality, features in zip(("infrared", "visible"), output, strict=True):
            views[f"channel_exchange_{modality}"] = features[0].abs().mean(-1)

    def keep_fused(module, inputs, output) -> None:
        views["spatial_exchange"] = output[0].abs().mean(-1)

    with ExitStack() as hooks:
        for number, stage in enumerate(model.extraction, start=1):
            hooks.enter_context(stage.register_forward_hook(partial(keep_difference, f"difference_{number}")))
        if model.config.channel_exchange != "off":
            hooks.enter_context(model.channel_exchange.register_forward_hook(keep_exchange))
        if model.spatial_exchange is not None:
            hooks.enter_context(model.spatial_exchange.register_forward_hook(keep_fused))
        model(ir, vi)
    return views


def _normalized(view: Tensor) -> Tensor:
    """Stretched to [0, 1]; a constant view becomes 0."""
    low, high = view.min(), view.max()
    return (view - low) / (high - low).clamp(min=torch.finfo(view.dtype).tiny)


def _colormap(name: str):
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise UserError(f"features needs matplotlib, which is missing ({error})") from error
    if name not in colormaps:
        raise UserError(f"--colormap: expected a matplotlib colour map such as viridis, found {name!r}")
    return colormaps[name]
