"""The one interface of every family: Process, and what goes in and out of it.

Conventions, for the whole library:

- t = 0 is text, t = 1 is noise, and a reverse step goes from t to s < t.
- Likelihoods are in nats inside; bits per character only at the edge (evaluation/measures.py).
- Shapes: B batch, L length, V vocabulary (end-of-text included), S states of a position, D width, W reals a position,
  N asked positions (the true entries of a bool mask [B L], in row-major order).
- Randomness is an argument (noise.py), never a global.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from textdiffusion.mathematics.grids import Grid
from textdiffusion.mathematics.noise import Noise
from textdiffusion.networks.candidates import Slots

if TYPE_CHECKING:
    from textdiffusion.diffusion.drafts import Mixture

Network = Callable[..., Tensor]
Reshape = Callable[[Tensor], Tensor]  # of log-probabilities [N V], by temperature and top-p
Kind = Literal["exact", "upper", "none"]
# What a step makes of times. times: they are noise levels. counts: they say how many positions are still hidden. left:
# even ones, which tell the step how many calls are left; it decides how much each does. each: one position a call.
Pace = Literal["times", "counts", "left", "each"]
# Evidence, log q(noisy position | v) for each v up to a constant, [B L V], to the log-law [B L V] of each token given
# the evidence at all *other* positions (the leave-one-out posterior).
Context = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Discrete:
    """A position holds one of ``size`` symbols."""

    size: int


@dataclass(frozen=True)
class Gaussian:
    """A position holds ``width`` reals."""

    width: int


class Memory(Protocol):
    """What a family carries from one reverse step to the next; opaque to all others but for choosing rows."""

    def select(self, rows: Tensor) -> Self: ...


@dataclass(frozen=True)
class State:
    """A batch of noisy texts.

    x: symbols int64 [B L] or reals [B L W]; t: noise level float64 [B]; given: positions fixed by the user, bool [B L],
    or None; memory: the family's own.
    """

    x: Tensor
    t: Tensor
    given: Tensor | None = None
    memory: Any = None

    def select(self, rows: Tensor) -> State:
        """Some rows (int64 indices)."""
        memory = None if self.memory is None else self.memory.select(rows)
        return State(self.x[rows], self.t[rows], None if self.given is None else self.given[rows], memory)


@dataclass(frozen=True)
class Prediction:
    """What a network call says.

    log_p: log p(x_0 | x_t) in token space, normalised; [B L V], or [N V] for the N asked positions.
    native: what the family itself works with (ratios, bit means, velocities), if other than log_p.
    memory: the state's memory after this call.
    """

    log_p: Tensor
    native: Any = None
    memory: Any = None


@dataclass(frozen=True)
class Nll:
    """Nats per sequence, each term [B], and what they are.

    kind: "exact" (a negative log-likelihood), "upper" (a proven upper bound on it, in expectation over the noise) or
    "none" (neither; never to be printed as a likelihood). sampler: whose likelihood it is. calls: network calls of
    that sampler; None is the limit of many.
    """

    diffusion: Tensor
    prior: Tensor
    reconstruction: Tensor
    kind: Kind
    sampler: str
    calls: int | None = None

    @property
    def total(self) -> Tensor:
        return self.diffusion + self.prior + self.reconstruction


@dataclass(frozen=True)
class Categorical:
    """Law of a discrete step: symbols at ``positions`` (bool [B L], M of them) are drawn independently from log_p
    [M S'], S' <= S; all others stay as they are."""

    positions: Tensor
    log_p: Tensor


@dataclass(frozen=True)
class Normal:
    """Law of a step among reals: those at ``positions`` (bool [B L], M of them) are drawn independently with mean
    [M W] and standard deviation [M 1], 0 for a step without chance; all others stay as they are."""

    positions: Tensor
    mean: Tensor
    deviation: Tensor


class Step(ABC):
    """One reverse step of a family: what to ask the network, and the law that follows.

    A step draws nothing but the positions it asks about: sampling/reverse.py draws symbols and reals, for every
    family. So the law of a whole run can be enumerated on a small world (verification/).
    """

    note: ClassVar[str]  # one line for the user
    # True: the step is the noise's chain reversed, each position on its own: sum over v of p(v | x_t) q(x_s | x_t, v).
    reverses: ClassVar[bool] = False
    # True: the law of a position follows from one prediction, the one there; so positions can be worked out a few at a
    # time from one network call, where all at once would fill the memory.
    apart: ClassVar[bool] = False
    # True: which positions are written follows from the state, and what is written stays; so a text comes about in one
    # way only, and its likelihood is exact (deterministic_order.py).
    deterministic: ClassVar[bool] = False
    pace: ClassVar[Pace] = "times"

    @abstractmethod
    def ask(self, state: State, s: Tensor, noise: Noise) -> Tensor:
        """Positions whose prediction this step needs, bool [B L]. Rows with none are not evaluated at all."""

    @abstractmethod
    def asks(self, state: State, s: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Every outcome of ``ask`` for a state of one row, with its probability."""

    @abstractmethod
    def law(
        self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape
    ) -> Categorical | Normal | Mixture:
        """The law of the state at times s [B]; ``prediction`` is for the N asked positions. Where a position holds
        reals, a Categorical is that of tokens, and ends the run (``Process.embed``).

        Symbols follow ``reshape`` of what they are predicted from; positions are chosen by the model's own law, which
        temperature 0 or a small top-p would leave without an order.
        """


class Process(ABC):
    """A family of language models: a forward process, a loss, a bound and reverse steps around one network.

    Args:
        network: any callable giving context outputs; the one place where a test puts an oracle.
        config: the family's own ``Config``.
        vocabulary: V.
    """

    Config: ClassVar[type]
    summary: ClassVar[str]  # one line for `textdiffusion families`
    paper: ClassVar[str]  # where it comes from
    bounded: ClassVar[bool]  # True: no text longer than the training window
    infills: ClassVar[bool]  # False: fixed positions must form a prefix
    remembers: ClassVar[bool] = False  # True: predictions depend on what came before, carried in State.memory
    steps: Mapping[str, Step]  # by name; the first is the default
    space: Discrete | Gaussian
    grid: Grid = Grid()  # where the calls of a run stand; ``on`` makes it another

    def __init__(self, network: Network, config: Any, vocabulary: int, *, start: int = 0):
        self.network, self.config, self.vocabulary = network, config, vocabulary
        self.start = start  # the end-of-text token: what a text starts after

    @classmethod
    def small(cls) -> Any:
        """A config that shows all there is to the family on texts of three tokens: what verification takes."""
        return cls.Config()

    @classmethod
    @abstractmethod
    def network_fields(cls, config: Any, vocabulary: int) -> dict[str, Any]:
        """Fields of the network's config that the family decides (inputs, outputs, attention, time)."""

    def over(self, network: Network) -> Self:
        """The same process around another network."""
        other = copy.copy(self)
        other.network = network
        if "steps" in vars(self):
            # Steps that ask their process see the new network: codes and clocks are learnt too.
            other.steps = {name: copy.copy(step) for name, step in self.steps.items()}
            for step in other.steps.values():
                if getattr(step, "process", None) is self:
                    step.process = other  # type: ignore[attr-defined]
        return other

    def on(self, grid: Grid) -> Self:
        """The same process, its calls on another grid."""
        other = self.over(self.network)
        other.grid = grid
        return other

    def by(self, sampler: str) -> Self:
        """The same process as a sampler runs it; another one where the sampler decides what is remembered."""
        return self

    # -- forward --------------------------------------------------------------------------------------------------
    @abstractmethod
    def q_sample(self, x_0: Tensor, t: Tensor, noise: Noise) -> State:
        """Noise texts x_0 [B L] to times t [B]."""

    @abstractmethod
    def prior_sample(self, rows: int, length: int, noise: Noise) -> State:
        """States at t = 1."""

    # -- learning -------------------------------------------------------------------------------------------------
    @abstractmethod
    def predict(self, state: State, positions: Tensor | None = None, condition: Tensor | None = None) -> Prediction:
        """One network call; for all positions, or for the asked ones (bool [B L])."""

    @abstractmethod
    def loss(self, x_0: Tensor, noise: Noise, condition: Tensor | None = None) -> Tensor:
        """What training minimises, nats per token, [B]."""

    @abstractmethod
    def nll(self, x_0: Tensor, noise: Noise, calls: int | None = None) -> Nll:
        """Likelihood of x_0 [B L] or a one-draw estimate of its bound; of the sampler of exactly ``calls`` calls, or in
        the limit of many."""

    @abstractmethod
    def ideal(self, context: Context) -> Network:
        """The outputs of a network that knows the law of the data: what tests put in the network's place."""

    # -- reverse --------------------------------------------------------------------------------------------------
    @abstractmethod
    def plan(self, free: Tensor, calls: int, sampler: str) -> Sequence[float]:
        """Decreasing times 1 = t_0 > ... > t_T = 0, on the process's grid, of a run of about ``calls`` network calls
        for a text whose ``free`` positions, bool [L], are to be written."""

    def time_of(self, changed: float) -> float | None:
        """The time at which a share ``changed`` of the tokens has become another token; None for a family whose noise
        never does that, and which therefore cannot find what is wrong in a text.

        Raises:
            UserError: there is no such time.
        """
        return None

    @abstractmethod
    def template(self, tokens: Tensor, given: Tensor, noise: Noise) -> State:
        """A state at t = 1 in which the ``given`` positions of tokens [B L] are fixed."""

    @abstractmethod
    def decode(self, state: State) -> Tensor:
        """Tokens int64 [B L]; -1 where nothing is written yet."""

    def embed(self, symbols: Tensor) -> Tensor:
        """What a position holds whose symbol has been drawn: itself, or the reals that stand for it, [... W]."""
        return symbols


@runtime_checkable
class HasKernel(Protocol):
    """A discrete process whose noise acts on each position on its own, in continuous time.

    Its bound is KL(q(x_1 | x_0) || prior) + integral over t of E rate; verification enumerates it.
    """

    def kernel(self, s: float, t: float) -> Tensor:
        """q(x_t = j | x_s = i), float64 [S S]; text symbols are the first V."""
        ...

    def prior_law(self) -> Tensor:
        """Law of a position of ``prior_sample``, float64 [S]."""
        ...

    def rate(self, x_0: Tensor, state: State) -> Tensor:
        """Nats per unit of time [B]: the bound's integrand at the states' times."""
        ...


@runtime_checkable
class HasSignal(Protocol):
    """A process whose noise is Gaussian, on each position on its own: z = alpha code(v) + sigma eps.

    Its bound is KL(q(z_1 | x_0) || standard normal) + integral over t of E rate + E reconstruction at t = 0.
    """

    def signal(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) at time t."""
        ...

    def codes(self) -> Tensor:
        """The reals that stand for each token, [V W]."""
        ...

    def rate(self, x_0: Tensor, state: State) -> Tensor:
        """Nats per unit of time [B]: the bound's integrand at the states' times."""
        ...

    def reconstruction(self, x_0: Tensor, state: State) -> Tensor:
        """-log p(x_0 | z_0), nats [B], for states at t = 0."""
        ...


@runtime_checkable
class HasCurve(Protocol):
    """A process whose bounds, for any number of calls, are sums over one curve measured once (absorbing.py)."""

    def curve_point(self, x_0: Tensor, hidden: Tensor, noise: Noise) -> Tensor:
        """Mean nats of a hidden token [B] when ``hidden`` [B] random positions of x_0 are hidden."""
        ...

    def curve_weights(
        self, length: int, calls: int | None, sampler: str | None = None
    ) -> tuple[np.ndarray, int | None]:
        """Weights float64 [length + 1], bound = sum over n of weights[n] * curve(n), and the calls that it is of.

        Raises:
            UserError: no bound is known for this sampler.
        """
        ...


@runtime_checkable
class HasCounts(Protocol):
    """A process whose samplers reveal exact numbers of positions, for which there are optimal ones (grids.py)."""

    def together(self, length: int) -> int:
        """How many positions share their calls: all of a text, or a block."""
        ...

    def curve_point(self, x_0: Tensor, hidden: Tensor, noise: Noise) -> Tensor:
        """Mean nats of a hidden token [B], ``hidden`` [B] random ones of those that share their calls being so."""
        ...


@runtime_checkable
class HasPatterns(Protocol):
    """A process whose bounds are weighted sums of what tokens cost when some positions are hidden; verification
    enumerates them where there is no curve."""

    def patterns(
        self, length: int, calls: int | None, sampler: str | None = None
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        """(weight, hidden, scored), the last two bool [length]: bound(x) is the sum over all of them of the weight
        times -log p of x's scored tokens, given x with the hidden positions hidden. ``calls`` None: of the most calls.

        Raises:
            UserError: no bound is known for this sampler.
        """
        ...


@runtime_checkable
class HasOrders(Protocol):
    """A process that remembers, whose bound is a mean over the orders in which positions are revealed; verification
    enumerates them.

    Of such a process by other samplers, which does not remember, this says nothing.
    """

    def orders(self, length: int, calls: int, sampler: str) -> Iterator[tuple[float, Sequence[Tensor]]]:
        """(chance, positions revealed call by call, each bool [length]): bound(x) is the mean over them of the sum of
        -log p of x's tokens, each call remembering those before it."""
        ...


@runtime_checkable
class HasCandidates(Protocol):
    """A process whose positions hold several weighted symbols; in which order means nothing."""

    def first(self, x: Tensor) -> Slots:
        """Slots of noisy texts int64 [B L] before any network call."""
        ...

    def best(self, x: Tensor, logits: Tensor) -> Slots:
        """Slots of x [B L] whose open positions hold what outputs [N V] there make likeliest."""
        ...

    def answer(self, x: Tensor, slots: Slots, positions: Tensor | None, condition: Tensor | None = None) -> Tensor:
        """One network call: outputs for all positions, or for the asked ones (bool [B L])."""
        ...


def as_network(outputs: Callable[[Tensor, Tensor | None], Tensor]) -> Network:
    """A network from a function of symbols and times alone; answers for the asked positions."""

    def network(x: Tensor, t: Tensor | None = None, *, positions: Tensor | None = None, **_: object) -> Tensor:
        out = outputs(x, t)
        return out if positions is None else out[positions]

    return network


@torch.no_grad()
def count_parameters(network: Network) -> int:
    """Numbers in a network, 0 for a plain callable."""
    return sum(p.numel() for p in network.parameters()) if isinstance(network, torch.nn.Module) else 0
