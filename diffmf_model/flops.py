"""`diffmf flops`: the cost of every module, beside the paper's Table VII.

Convention, as VMamba counts with fvcore: one multiply-add of a convolution or linear layer (the Δ projection included)
is 1; a scan path of length L is 9·L·D·N + L·D (`diffmf_ops.flops`); norms, activations, gates and resampling are not
counted.

The paper leaves the VSS block's form, the number of extraction stages and the convolutions' widths open. Four stages,
VSS blocks with the multiplicative branch and without an MLP, and 3x3 convolutions of C channels throughout (two in each
stem, one in each stage, one before the decoder's last) give 393.877 G against its 393.871 G.

For the table's other row every VSS block, and the channel exchange's SSM, becomes a Restormer block (attention, then a
gated feed-forward network of ratio 2.66), its attention counted as the paper states it, 4·B·(HW)²·D.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import diffmf_ops.flops  # noqa: F401  lets the counter count the operators
from diffmf_ops.modules import SS2D, VSSBlock

from .config import ModelConfig, add_config_argument, load_config
from .errors import UserError
from .network import DIFFMF

PAPER_SSM, PAPER_TRANSFORMER = 393.871e9, 336852.764e9  # Table VII, input (1, 1, 512, 512), C = 32
EXPANSION = 2.66  # of Restormer's gated feed-forward network


@dataclass(frozen=True)
class Cost:
    """Operations of one module and everything inside it."""

    linear: float
    convolution: float
    scan: float

    @property
    def total(self) -> float:
        return self.linear + self.convolution + self.scan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    add_config_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as model.stages=2")


def run(args: argparse.Namespace) -> int:
    for name in ("height", "width"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: expected at least 1, found {getattr(args, name)}")
    config = load_config(args.config, args.overrides).model
    costs, transformer = count(config, args.height, args.width)
    modules = [name for name in costs if name and (name.count(".") == (name.startswith(("extraction", "spatial"))))]
    print(f"input (1, 1, {args.height}, {args.width}), C = {config.d_model}, N = {config.d_state}; G operations:")
    print("multiply-adds count 1, a scan path 9*L*D*N + L*D (VMamba's convention); norms and activations are left out")
    print(f"{'module':26}{'linear':>10}{'conv':>10}{'scan':>10}{'total':>10}")
    for name in [*modules, ""]:
        cost = costs[name]
        numbers = (cost.linear, cost.convolution, cost.scan, cost.total)
        print(f"{name or 'DIFF-MF using SSM':26}" + "".join(f"{value / 1e9:10.3f}" for value in numbers))
    print(f"{'the same, transformer':26}{transformer / 1e9:40.3f}")
    print("choices that the paper leaves open (see --config and key=value):")
    widths = f"C channels ({config.decoder_ratio:g}*C in the decoder)"
    print(f"  {config.stages} extraction stages, 3x3 convolutions of {widths}, VSS blocks", end=" ")
    print(f"{'with' if config.gated else 'without'} the multiplicative branch, MLP ratio {config.mlp_ratio:g}")
    print("  transformer: Restormer blocks for all VSS blocks, attention counted as 4*B*(HW)^2*D")
    for name, total, paper in (("SSM", costs[""].total, PAPER_SSM), ("transformer", transformer, PAPER_TRANSFORMER)):
        print(f"paper, {name} at 512x512: {paper / 1e9:.3f} G; this / paper = {total / paper:.4f}")
    return 0


def count(config: ModelConfig, height: int, width: int) -> tuple[dict[str, Cost], float]:
    """Cost by module name ("" is the whole network) for one image pair, and the total of the transformer variant."""
    # Shapes only, nothing is computed. (Fake rather than meta tensors: autocast knows their device.)
    shapes = FakeTensorMode()
    with shapes:
        model = DIFFMF(config).eval()
        image = torch.empty(1, 1, height, width)
    deltas: dict[str, float] = {}
    replaced: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, SS2D):
            module.register_forward_pre_hook(_delta_hook(name, deltas))
        if isinstance(module, VSSBlock) or name == "channel_exchange.ssd":
            module.register_forward_pre_hook(_restormer_hook(name, replaced))
    with torch.no_grad(), shapes, FlopCounterMode(display=False) as counter:
        model(image, image)
    counted = counter.get_flop_counts()
    costs = {}
    for name, _ in model.named_modules():
        operations = counted.get(f"{DIFFMF.__name__}.{name}" if name else "Global", {})
        # The counter's numbers are 2 per multiply-add, and the operator's include the Δ projection.
        delta = sum(value for inner, value in deltas.items() if not name or f"{inner}.".startswith(f"{name}."))
        scan = operations.pop(torch.ops.diffmf.ss2d, 0) - 2 * delta
        convolution = sum(flops for op, flops in operations.items() if "conv" in str(op)) / 2
        linear = sum(operations.values()) / 2 - convolution + delta
        costs[name] = Cost(linear, convolution, scan)
    transformer = costs[""].total - sum(costs[name].total for name in replaced) + sum(replaced.values())
    return costs, transformer


def _delta_hook(name: str, deltas: dict[str, float]):
    def hook(module: SS2D, inputs) -> None:
        deltas[name] = inputs[0][..., 0].numel() * 4 * module.d_inner * module.dt_rank

    return hook


def _restormer_hook(name: str, replaced: dict[str, float]):
    def hook(module: nn.Module, inputs) -> None:
        *_, height, width, channels = inputs[0].shape
        pixels = height * width
        sequences = inputs[0].numel() // (pixels * channels)
        hidden = int(EXPANSION * channels)
        attention = 4 * channels**2 + 27 * channels + 4 * pixels * channels
        feed_forward = 3 * channels * hidden + 18 * hidden
        replaced[name] = sequences * pixels * (attention + feed_forward)

    return hook
