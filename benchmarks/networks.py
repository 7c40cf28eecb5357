"""Times other people's networks with their own SS2D layer and with ours (`replace_ss2d`).

Their repositories have to be importable (VMamba's by its classification/models), and what they import: timm, for
VMamba its own kernels and fvcore, for the others mamba_ssm, for MambaIR basicsr. Random weights.
infer: the network alone, in inference mode. train: forward and backward, without a loss and an optimizer. Both in turn,
in one process; eager, and as a CUDA graph, whose time is the GPU's alone. fp32 is what PyTorch does by default:
convolutions, VMamba's projections among them, use TF32, matrix products, our projections, do not.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path

import torch
from torch import nn

from diffmf_model.bench_model import autocast
from diffmf_model.cuda_graph import captured
from diffmf_model.peers import relative_error
from diffmf_model.timing import alternate, peak_extra_mib, write_results
from diffmf_ops import replace_ss2d

PRECISIONS, MODES = ("fp32", "bf16"), ("eager", "graph")


@dataclass(frozen=True)
class Network:
    title: str
    module: str
    name: str  # of its class in the module, whose layer is SS2D
    settings: dict
    infer: tuple[int, ...]
    train: tuple[int, ...]  # as in the repository's own settings for training; half of VMamba's batch


VMAMBA_TINY = {"dims": 96, "depths": [2, 2, 8, 2], "drop_path_rate": 0.2, "ssm_d_state": 1, "ssm_ratio": 1.0}
VMAMBA_TINY |= {"ssm_conv_bias": False, "forward_type": "v05_noz", "norm_layer": "ln2d"}
VMAMBA_TINY |= {"downsample_version": "v3", "patchembed_version": "v2"}
LIGHT = {"embed_dim": 60, "d_state": 10, "depths": [6] * 4, "mlp_ratio": 1.2, "upsampler": "pixelshuffledirect"}
CLASSIC = {"embed_dim": 180, "d_state": 16, "depths": [6] * 6, "mlp_ratio": 2.0, "upsampler": "pixelshuffle"}
VM_UNET = {"num_classes": 1, "depths": [2, 2, 2, 2], "depths_decoder": [2, 2, 2, 1], "drop_path_rate": 0.2}
MAMBAIR = ("basicsr.archs.mambair_arch", "MambaIR")
PICTURE = (1, 3, 256, 256)
NETWORKS = {
    "vmamba-tiny": Network("VMamba-T (s1l8)", "vmamba", "VSSM", VMAMBA_TINY, (64, 3, 224, 224), (64, 3, 224, 224)),
    "mambair-light": Network("MambaIR, light, ×2", *MAMBAIR, LIGHT, PICTURE, (16, 3, 64, 64)),
    "mambair": Network("MambaIR, ×2", *MAMBAIR, CLASSIC, PICTURE, (4, 3, 64, 64)),
    "vm-unet": Network("VM-UNet", "models.vmunet.vmamba", "VSSM", VM_UNET, PICTURE, (32, 3, 256, 256)),
}


def infer(network: nn.Module, pictures: torch.Tensor, precision: str) -> Callable[[], torch.Tensor]:
    @torch.inference_mode()
    def call():
        with autocast(pictures.device, precision):
            return network(pictures)

    return call


def train(network: nn.Module, pictures: torch.Tensor, precision: str) -> Callable[[], None]:
    def call():
        with autocast(pictures.device, precision):
            loss = network(pictures).float().square().mean()
        network.zero_grad(set_to_none=True)
        loss.backward()

    return call


def measure(name: str, repeats: int) -> list[dict]:
    """A row for every task, precision and mode."""
    spec = NETWORKS[name]
    module = import_module(spec.module)
    torch.manual_seed(0)
    theirs = getattr(module, spec.name)(**spec.settings).cuda()
    ours = copy.deepcopy(theirs)
    layers = replace_ss2d(ours, module.SS2D)
    rows = []
    for task, shape, make in (("infer", spec.infer, infer), ("train", spec.train, train)):
        pictures = torch.rand(shape, device="cuda")
        for precision, mode in product(PRECISIONS, MODES):
            calls = {
                which: make(network.train(task == "train"), pictures, precision)
                for which, network in (("theirs", theirs), ("ours", ours))
            }
            row = {"network": name, "title": spec.title, "layers": layers, "task": task, "precision": precision}
            row |= {"mode": mode, "shape": "×".join(map(str, shape))}
            if mode == "graph":
                calls = {which: captured(call) for which, call in calls.items()}
            else:
                row["peak_mib"] = {which: peak_extra_mib(call) for which, call in calls.items()}
                if task == "infer":
                    row["difference"] = relative_error(calls["ours"](), calls["theirs"]())
            row["ms"] = times = alternate(calls, "cuda", repeats=repeats, seconds=10)
            rows.append(row)
            ratio = times["theirs"]["median"] / times["ours"]["median"]
            print(f"{spec.title:20}{task:6}{row['shape']:>12} {precision} {mode:6}", end="", flush=True)
            print(f"{times['ours']['median']:8.2f} ms, theirs {ratio:.2f} times as long", flush=True)
            del calls
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", metavar="DIR", help="for networks_cuda.json"
    )
    args = parser.parse_args()
    if unknown := set(args.network) - set(NETWORKS):
        parser.error(f"NETWORK: expected {', '.join(NETWORKS)}, found {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.network or NETWORKS:
        rows += measure(name, args.repeats)
        write_results("networks_cuda", "cuda", args.output, rows=rows)


if __name__ == "__main__":
    main()
