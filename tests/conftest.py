"""Fixtures of all tests: the devices at hand, and assertions on errors relative to float64."""

import os

import pytest
import torch
from hypothesis import settings

# Fresh examples on every run, without a time limit per example: the machines are shared.
settings.register_profile("diffmf", deadline=None, max_examples=int(os.environ.get("DIFFMF_EXAMPLES", "40")))
settings.load_profile("diffmf")

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES, scope="session")
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def report_seed(request):
    """Fresh random data in every run; the seed is printed with a failure."""
    seed = int(os.environ.get("DIFFMF_SEED", torch.seed() % 2**31))
    torch.manual_seed(seed)
    print(f"DIFFMF_SEED={seed}")
