"""What holding texts to a pattern costs: the CPU time of a sampling step, free and held, on one thread.

    python benchmarks/holding.py [--rows 4] [--calls 4]

The network is the one that `--preset small` trains (masked, 106 tokens), with random weights: its time does not depend
on what it has learnt. CPU time, not wall clock, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import string
import time

import numpy as np
import torch

from textdiffusion.families.masked import Masked, MaskedConfig
from textdiffusion.mathematics.automaton import Automaton, ByteAutomaton
from textdiffusion.mathematics.noise import Noise
from textdiffusion.networks.transformer import Transformer, TransformerConfig
from textdiffusion.sampling.constraints import Hold
from textdiffusion.sampling.reverse import sample
from textdiffusion.text.patterns import expression, made_of

TOKENS = 106
COMMON = """
the of and to in he a that was his it had her with as at on for is you but not be by from him all she said were have
which they who this one would so an them what or when there we no if been out about up me my their more then are
will only could into did some time see how man now know old came over our your where went do than looked men prince
face very thought again two long made before like such any little himself still though eyes asked way
""".split()  # noqa: SIM905
PATTERNS = {
    "contains 'quartz'": lambda: expression(r"[\s\S]*quartz[\s\S]*"),
    "a sentence of 6 to 31 words": lambda: expression(r"([a-z]+ ){5,30}[a-z]+\."),
    "lines of 1 to 40 characters, 8 of them": lambda: expression(r"(.{1,40}\n){8}"),
    f"{len(COMMON)} words alone": lambda: made_of(COMMON),
    f"{len(COMMON)} words alone, and contains 'prince'": lambda: made_of(COMMON) & expression(r"[\s\S]*prince[\s\S]*"),
}


def over_tokens(automaton: ByteAutomaton) -> Automaton:
    """An automaton over the characters that an English book has."""
    symbols = [c for c in string.printable if c not in "\r\t\x0b\x0c"] + list("éàêäôç«»’—")
    return Automaton(automaton, [c.encode() for c in symbols][:TOKENS])


def step_time(process: Masked, length: int, rows: int, calls: int, hold: Hold | None) -> float:
    """Median CPU milliseconds of a step."""
    times = []
    frames = sample(process, Noise.of(0, rows), length, calls, hold=hold)
    next(frames)
    begin = time.process_time()
    for _ in frames:
        times.append(1000 * (time.process_time() - begin))
        begin = time.process_time()
    return statistics.median(times)


def sums_time(automaton: Automaton, length: int, rows: int) -> float:
    """Median CPU milliseconds of the sums and the draw of a step in which every position is open."""
    rng, times = np.random.default_rng(0), []
    log_p = np.log(rng.dirichlet(np.ones(TOKENS), size=rows * length))
    drafted, nothing = np.ones((rows, length), dtype=bool), np.full((rows, length), -1)
    for _ in range(6):
        begin = time.process_time()
        automaton.draw(log_p, drafted, nothing, rng.random((rows, length)))
        times.append(1000 * (time.process_time() - begin))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--calls", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'pattern':<42}{'states':>7}{'edges':>7}{'length':>8}{'free ms':>9}{'held ms':>9}{'sums ms':>9}{'share':>7}"
    )
    for length in (64, 256):
        fields = {**Masked.network_fields(MaskedConfig(), TOKENS), "depth": 6, "width": 384, "heads": 6}
        network = Transformer(TransformerConfig(**fields, window=length)).eval()
        process = Masked(network, MaskedConfig(), TOKENS)
        free = step_time(process, length, args.rows, args.calls, None)
        for name, make in PATTERNS.items():
            automaton = over_tokens(make())
            held = step_time(process, length, args.rows, args.calls, Hold(automaton))
            sums = sums_time(automaton, length, args.rows)
            print(
                f"{name:<42}{len(automaton):>7}{len(automaton.edges.source):>7}{length:>8}{free:>9.1f}{held:>9.1f}"
                f"{sums:>9.1f}{sums / (free + sums):>7.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
