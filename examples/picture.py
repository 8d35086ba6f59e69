"""Draw docs/denoising.svg, the picture at the head of README.md: one text at several moments of its denoising.

python examples/picture.py RUN docs/denoising.svg
"""

import sys
from io import StringIO

from rich.console import Console
from rich.text import Text

import textdiffusion as td
from textdiffusion.display.watching import painted

model = td.load(sys.argv[1])
frames = list(model.stream(1, calls=16, seed=int(sys.argv[3]) if len(sys.argv) > 3 else 0))
console = Console(record=True, width=100, file=StringIO(), force_terminal=True, color_system="truecolor")
for frame in frames:
    if frame.frame.step % 3 == 0 or frame.frame.step == frame.frame.of:
        now = frame.frame
        line = painted(frame, 0, breaks=False)
        console.print(Text(f"noise {now.t:4.2f}  call {int(now.calls[0]):>2}  ", style="dim") + line, no_wrap=True)
console.save_svg(sys.argv[2], title="textdiffusion sample --watch --calls 16")
