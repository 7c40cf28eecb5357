"""mamba_ssm's scan for networks that import it, where it is not installed or has no GPU."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from .selective_scan import selective_scan

INTERFACE = "mamba_ssm.ops.selective_scan_interface"


def stand_in_for_mamba_ssm() -> None:
    """Lets `from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref` give
    `selective_scan`, in this process. To be called before the network's own code is imported.

    Nothing else of mamba_ssm is there, neither `Mamba` nor `mamba_inner_fn`.

    Raises:
        RuntimeError: the real mamba_ssm has been imported already.
    """
    if "mamba_ssm" in sys.modules:
        if getattr(sys.modules.get(INTERFACE), "selective_scan_fn", None) is selective_scan:
            return
        raise RuntimeError("mamba_ssm: imported already, expected the call before that")
    parts, parent = INTERFACE.split("."), None
    for i, part in enumerate(parts):
        name = ".".join(parts[: i + 1])
        module = sys.modules[name] = ModuleType(name, f"{part}: diffmf_ops in its place")
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        if parent is not None:
            setattr(parent, part, module)
        parent = module
    parent.selective_scan_fn = parent.selective_scan_ref = selective_scan
