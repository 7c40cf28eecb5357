"""stand_in_for_mamba_ssm in processes of its own: what it puts into sys.modules stays there."""

import subprocess
import sys

import pytest

IMPORTS = [
    "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref as fn",
    "import mamba_ssm.ops.selective_scan_interface as interface; fn = interface.selective_scan_fn",
    "import mamba_ssm.ops; fn = mamba_ssm.ops.selective_scan_interface.selective_scan_ref",
    "from mamba_ssm.ops import selective_scan_interface as i; fn = i.selective_scan_fn",
    "import importlib.util; assert importlib.util.find_spec('mamba_ssm'); fn = diffmf_ops.selective_scan",
]


def run(*lines):
    return subprocess.run(
        [sys.executable, "-c", "\n".join(["import diffmf_ops", *lines])], capture_output=True, text=True
    )


def test_every_form_of_import():
    lines = [line for form in IMPORTS for line in (form, "assert fn is diffmf_ops.selective_scan")]
    done = run(*["diffmf_ops.stand_in_for_mamba_ssm()"] * 2, *lines)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["Mamba", "mamba_inner_fn"])
def test_nothing_else_is_there(name):
    done = run("diffmf_ops.stand_in_for_mamba_ssm()", f"from mamba_ssm import {name}")
    assert "ImportError" in done.stderr


def test_comes_before_the_real_one():
    done = run("import sys, types; sys.modules['mamba_ssm'] = types.ModuleType('mamba_ssm')",
               "diffmf_ops.stand_in_for_mamba_ssm()")  # fmt: skip
    assert "RuntimeError: mamba_ssm: imported already" in done.stderr
