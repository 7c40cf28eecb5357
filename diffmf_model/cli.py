"""The `diffmf` command: a table of subcommands, each a module with `add_arguments(parser)` and `run(args) -> int`."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from .errors import UserError
from .memory import keep_freed_memory

COMMANDS = {
    "fuse": ("fuse", "fuse infrared-visible pairs"),
    "train": ("train", "train the network"),
    "evaluate": ("evaluate", "score fused images, the model's and others', in one table"),
    "ablate": ("ablate", "train and score the paper's ablations, Tables II to VI"),
    "experiments": ("experiments", "tabulate training runs"),
    "export-fused": ("export_fused", "write a detection or segmentation data set with fused pictures"),
    "bench": ("bench", "time the operators"),
    "bench-model": ("bench_model", "time the network, fusing and training"),
    "info": ("info", "show versions, backends and devices"),
    "flops": ("flops", "count operations, beside the paper's Table VII"),
    "features": ("features", "draw the network's feature maps"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns the exit status: 2 for what the user gave wrong, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    parser = argparse.ArgumentParser(prog="diffmf", description="DIFF-MF infrared-visible image fusion")
    parser.add_argument("--version", action="version", version=f"diffmf {package_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {
        name: commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        for name, (_, summary) in COMMANDS.items()
    }
    try:
        keep_freed_memory()
        if argv and argv[0] in COMMANDS:  # importing only this module keeps `diffmf --help` quick
            implementation = import_module(f".{COMMANDS[argv[0]][0]}", __package__)
            implementation.add_arguments(parsers[argv[0]])
            parsers[argv[0]].set_defaults(run=implementation.run)
        args, rest = parser.parse_known_args(argv)
        # argparse takes a list of settings from one place only; here options may stand between them.
        if not hasattr(args, "overrides") or any(word.startswith("-") for word in rest):
            args = parser.parse_args(argv)  # says what is wrong with the rest, if there is one
        else:
            args.overrides += rest
        status = args.run(args)
        sys.stdout.flush()
        return status
    except UserError as error:
        print("diffmf: error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return 141
    except KeyboardInterrupt:
        print("diffmf: interrupted", file=sys.stderr)
        return 130


def package_version() -> str:
    """The installed distribution's version."""
    try:
        return version("diffmf")
    except PackageNotFoundError:
        return "(not installed, run from a checkout)"
