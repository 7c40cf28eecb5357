"""The command line itself, and `diffmf info`."""

import ctypes
import subprocess
import sys
import types

import pytest

from diffmf_model import cli, info
from diffmf_model.errors import UserError


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_help_lists_the_commands_without_importing_torch():
    script = "import sys, diffmf_model.cli as c\ntry: c.main(['--help'])\nfinally: print('torch' in sys.modules)"
    result = python("-c", script)
    assert result.returncode == 0 and result.stdout.rstrip().endswith("False")
    listed = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("    ")}
    assert set(cli.COMMANDS) <= listed


def test_module_entry_point():
    result = python("-m", "diffmf_model", "fuse", "nowhere.png", "nowhere.png", "--device", "cpu")
    assert result.returncode == 2
    assert result.stderr == "diffmf: error: nowhere.png: no such file or folder\n"


def test_a_reader_that_stops_early_is_no_error():
    script = f"{sys.executable} -u -m diffmf_model info 2> errors.txt | true"
    result = subprocess.run(
        ["bash", "-c", f"cd $(mktemp -d) && {script}; cat errors.txt"], capture_output=True, text=True
    )
    assert result.stdout == ""


def test_names_that_are_not_text_are_printed():
    script = (
        "import sys, types; from diffmf_model import cli\n"
        "run = lambda args: print(b'a\\xff'.decode(errors='surrogateescape')) or 0\n"
        "cli.import_module = lambda *_: types.SimpleNamespace(add_arguments=lambda parser: None, run=run)\n"
        "sys.exit(cli.main(['fuse']))"
    )
    result = python("-c", script)
    assert (result.returncode, result.stdout) == (0, "a\\udcff\n"), result.stderr


def test_version(command):
    status, stdout, _ = command("--version")
    assert status == 0 and stdout.startswith("diffmf ")


def test_settings_may_stand_around_options(command, monkeypatch):
    monkeypatch.setattr("diffmf_model.train.run", lambda args: print(args.config, args.overrides) or 0)
    status, stdout, _ = command("train", "--data", "x", "a.b=1", "--config", "paper", "c.d=2", "e.f=3")
    assert status == 0 and stdout == "paper ['a.b=1', 'c.d=2', 'e.f=3']\n"
    status, _, stderr = command("train", "--data", "x", "a.b=1", "--nothing", "--config", "paper", "c.d=2")
    assert status == 2 and "unrecognized arguments: --nothing" in stderr


@pytest.mark.parametrize("arguments", [(), ("paint",), ("fuse", "--colour"), ("evaluate",)])
def test_wrong_usage(command, arguments):
    status, _, stderr = command(*arguments)
    assert status == 2 and "usage: diffmf" in stderr


@pytest.mark.parametrize(
    "name",
    ["fuse", "train", "evaluate", "info", "flops", "features", "ablate", "experiments", "export-fused", "bench-model"],
)
def test_every_command_has_help(command, name):
    status, stdout, _ = command(name, "--help")
    assert status == 0 and f"usage: diffmf {name}" in stdout


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (UserError("two\nlines"), 2, "diffmf: error: two lines\n"),
        (KeyboardInterrupt(), 130, "diffmf: interrupted\n"),
    ],
)
def test_exit_status(command, monkeypatch, raised, status, message):
    def run(args):
        raise raised

    module = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(cli, "import_module", lambda name, package: module)
    assert command("fuse") == (status, "", message)


def test_bugs_are_not_hidden(command, monkeypatch):
    def run(args):
        raise ValueError("a bug")

    module = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(cli, "import_module", lambda name, package: module)
    with pytest.raises(ValueError, match="a bug"):
        command("fuse")


def test_info(command):
    status, stdout, _ = command("info")
    assert status == 0
    fields = [line.split("  ")[0] for line in stdout.splitlines()]
    assert {"diffmf", "Python", "PyTorch", "NumPy", "kernels", "weights"} <= set(fields)
    assert any(field.startswith("GPU") for field in fields)


def test_info_shows_why_the_kernels_are_missing(command, monkeypatch):
    from diffmf_ops import backend

    monkeypatch.setattr(backend, "import_error", ImportError("libcudart.so.13: cannot open shared object file"))
    assert "failed to load: ImportError: libcudart.so.13: cannot open" in command("info")[1]


def test_info_without_weights_or_driver(command, monkeypatch, tmp_path):
    monkeypatch.setitem(info.checkpoint.BUNDLED, "full", tmp_path / "gone.safetensors")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    status, stdout, _ = command("info")
    assert status == 0 and "gone.safetensors: cannot be read" in stdout and "nvidia-ml-py is missing" in stdout


def test_freed_memory_is_kept():
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("not glibc")
    program = (
        "from resource import RUSAGE_SELF, getrusage\n"
        "from diffmf_model.memory import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "import torch\n"
        "faults = []\n"
        "for _ in range(8):\n"
        "    torch.ones(1 << 24)\n"
        "    faults.append(getrusage(RUSAGE_SELF).ru_minflt)\n"
        "print(faults[-1] - faults[0])\n"
    )
    result = python("-c", program)
    assert int(result.stdout) < 20000  # measured 2720; seven times 64 MiB are 114688 pages of 4 KiB
