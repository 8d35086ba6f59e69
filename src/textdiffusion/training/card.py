"""The model card of a run, written from the run's own figures."""

from __future__ import annotations

import math

from textdiffusion.families import family
from textdiffusion.files import write
from textdiffusion.run import Run
from textdiffusion.text.data import Corpus


def _begun(source: str) -> str:
    return f"\nIts training began with the weights of {source}, whose licence holds for it as well.\n" if source else ""


def write_card(run: Run, best: float, steps: int, seconds: float, corpus: Corpus) -> None:
    """Write README.md into the run directory."""
    config, cls = run.config, family(run.config.family)
    size = " ".join(f"{k} {v}" for k, v in config.network.items())
    labels = f"| labels, by `{config.data.label}` | {', '.join(config.labels[:50])} |\n" if config.labels else ""
    figure = "none yet" if math.isinf(best) else f"{best:.3f} bits per character"
    write(
        run.path / "README.md",
        f"""---
library_name: textdiffusion
tags: [text-diffusion, {config.family}]
pipeline_tag: {"text-generation" if config.family in ("autoregressive", "block") else "fill-mask"}
---
# {run.path.name}

A **{config.family}** language model trained with `textdiffusion`: {cls.summary} ({cls.paper}).

| | |
|---|---|
| trained on | {corpus.name}; {corpus.provenance} |
{labels}| tokenizer | {config.tokenizer}, {config.vocabulary} tokens |
| network | {size} |
| training | {steps:,} steps, {seconds / 60:.1f} minutes, {config.training.precision} |
| best validation figure (a sample of the held-out text) | {figure} |

Use it:

```
textdiffusion sample {run.path}
textdiffusion eval {run.path}
```

```python
import textdiffusion as td

model = td.load("{run.path}")
print(model.sample(n=1)[0])
```
{_begun(config.init_from)}""",
    )
