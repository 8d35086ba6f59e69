from __future__ import annotations

import os
import sys

# Before torch is imported: the tests compare runs bit for bit, which is promised on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# pytest-xdist runs a process a core; threads of theirs, or of the commands they start, would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests keep their token cache to themselves."""
    os.environ["TEXTDIFFUSION_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
