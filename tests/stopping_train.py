"""The command line, that stops or is killed after a given step, as tests/test_parallel.py says by the environment.

STOP_AT=step          SIGTERM to this process, which saves and ends
KILL_AT=step          SIGKILL to the process of rank KILL_RANK, once: what it leaves behind is a file `killed`
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from textdiffusion.commands.cli import main
from textdiffusion.training import fit

learn = fit.Learner.learn
rank = os.environ.get("RANK", "0")


def watched(self, *arguments, **more):
    loss = learn(self, *arguments, **more)
    if str(self.step) == os.environ.get("STOP_AT"):
        os.kill(os.getpid(), signal.SIGTERM)
    if str(self.step) == os.environ.get("KILL_AT") and rank == os.environ["KILL_RANK"]:
        mark = Path(sys.argv[sys.argv.index("--out") + 1]) / "killed"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return loss


fit.Learner.learn = watched

if __name__ == "__main__":
    raise SystemExit(main())
