"""The command line in a process of its own for every line of input, a list of arguments, without each loading torch.

For each it prints the number of the process, and its exit code once it has ended; what the process itself prints goes
to stderr. A process that is killed here dies as one that was started anew does: it shares no memory with this one.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch

import textdiffusion.training.terminal  # noqa: F401, so that it is loaded
from textdiffusion.commands.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not outlive a fork
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)
            code = 1
            try:
                code = main(json.loads(line))
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
