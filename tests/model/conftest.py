"""Fixtures of the model's tests: random pictures on disk, the shared data sets, a stand-in for the network."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def rng(report_seed) -> np.random.Generator:
    """NumPy's counterpart of torch's generator, which tests/conftest.py seeds afresh for every run."""
    return np.random.default_rng(torch.initial_seed())


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with tno, roadscene and reference_metrics; tests that need it are skipped without it."""
    folder = Path(os.environ.get("DIFFMF_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / "tno").is_dir():
        pytest.skip(f"no data sets at {folder}; set DIFFMF_DATA")
    return folder


@pytest.fixture
def picture(rng):
    """picture(path, size=(w, h), mode) writes a smooth random picture and returns its samples."""

    def write(path: Path, size: tuple[int, int] = (64, 48), mode: str = "L") -> np.ndarray:
        path.parent.mkdir(parents=True, exist_ok=True)
        channels = len(mode)
        coarse = rng.integers(0, 256, (8, 8, channels), dtype=np.uint8)
        planes = [Image.fromarray(coarse[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(channels)]
        image = planes[0] if channels == 1 else Image.merge(mode, planes)
        image.save(path)
        return np.asarray(image)

    return write


@pytest.fixture
def pairs(tmp_path, picture):
    """pairs(names, root) writes a grey infrared and a coloured visible PNG for each name and returns the root."""

    def write(names, root: Path = tmp_path / "set", size: tuple[int, int] = (64, 48)) -> Path:
        for name in names:
            picture(root / "ir" / f"{name}.png", size)
            picture(root / "vi" / f"{name}.png", size, "RGB")
        return root

    return write


class Average(torch.nn.Module):
    """Stands in for the network: the mean of the two images."""

    def forward(self, ir: torch.Tensor, vi: torch.Tensor) -> torch.Tensor:
        assert ir.shape == vi.shape and ir.ndim == 4 and ir.shape[1] == 1
        return (ir + vi) / 2


@pytest.fixture
def average(monkeypatch) -> torch.nn.Module:
    """The stand-in, also put where the commands load their weights."""
    model = Average().eval()
    for module in ("fuse", "evaluate"):
        monkeypatch.setattr(f"diffmf_model.{module}.load_model", lambda path, device: model)
    return model


@pytest.fixture
def command(capsys):
    """command(*arguments) runs the command line and returns (exit status, stdout, stderr)."""
    from diffmf_model.cli import main

    def run(*arguments) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse
            status = exit_.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def fails(command):
    """fails(*arguments) expects exit status 2 and one line on stderr, which it returns."""

    def run(*arguments) -> str:
        status, _, stderr = command(*arguments)
        assert status == 2, stderr
        lines = [line for line in stderr.splitlines() if line and "image/s]" not in line]  # without a progress bar
        assert len(lines) == 1 and lines[0].startswith("diffmf: error: "), stderr
        return lines[0]

    return run
