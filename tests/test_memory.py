"""Peak memory at V = 50,257 and L = 256, against the ceilings that benchmarks/memory.py states."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from textdiffusion.families import names

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_a_training_step_and_sampling_stay_under_their_ceilings():
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout, result.stderr
    found = json.loads(result.stdout)
    assert found["broken"] == [] and result.returncode == 0, found
    assert set(found["megabytes"]) == set(names())  # a new family says what it needs
