"""Rival explanations of the same loops: other laws of the transfer, fitted to the same cells with the same likelihood.

    full twin            the configured device, with all its free parameters
    closed form          the same memory; pulses resonant and apart, no decay
    other kernel         exponential forgetting in place of the moving average, or the reverse, of equal mean lag
    constant transfer    no memory: r is a number
    instantaneous        no memory: r = r_0 + (r_1 - r_0) x_set
    classical            the linear ion drift of Strukov et al. with the window of Joglekar and Wolf

The last three play pulses as the closed form does, so that only the law of r differs; a recorded `r_set` is what they
do without. Models are compared by AIC, BIC, and the log-likelihood of held-out loops, whose paired differences over
cells give standard errors.

References:
    [1] Strukov, Snider, Stewart and Williams, Nature 453, 80 (2008), equations 5 and 6: linear drift.
    [2] Joglekar and Wolf, Eur. J. Phys. 30, 661 (2009), section 4: F_p(w) = 1 - (2w - 1)^(2p).
    [3] Vehtari, Gelman and Gabry, Stat. Comput. 27, 1413 (2017), equation 24: standard error of a difference.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from calibration import least_squares, predictive
from calibration.data import LoopTable
from calibration.parameters import value_of
from calibration.posing import pose
from calibration.problem import NOISE_PARAMETERS, Problem
from twin.batching import physical
from twin.loop import AbstractMemristor, Responder, Response, Settings
from twin.memory import AbstractMemory, Exponential, MovingAverage
from twin.memristor import ClosedForm, IonMemristor

# Differences below two standard errors, or below this many nats, tell nothing.
_ERRORS, _NATS = 2.0, 2.0
_STARTS, _STEPS = 6, 30
# What the closed form knows of an ion; all else is dropped from its fit.
_OF_CLOSED_FORM = (
    *("rabi_scale_1", "rabi_scale_2", "readout_error_bright", "readout_error_dark", "n_bar", "eta_1", "eta_2"),
    *("sigma_1_s", "sigma_2_s", "window_cycles", *NOISE_PARAMETERS),
)
_SCALE, _TRANSFER = (0.5, 1.5), (0.0, 1.0)


class LinearDrift(AbstractMemory):
    """Transfer of a classical memristor: state w of linear ion drift, r = r_off + (r_on - r_off) w.

        dw/dt = mu (x - x_rest) F(w),   F = 4 w (1 - w)  (Joglekar's window at p = 1),   t in cycles

    solved exactly over each cycle, as logit w grows by 4 mu (x - x_rest): no step can leave [0, 1]. The drive counts
    from a resting input because x is a population and never negative; a voltage would be its difference from it.

    Args:
        mobility_per_cycle: mu, drift at full drive, 1/cycle; negative for the opposite polarity.
        rest: x_rest, the input that moves nothing, in [0, 1].
        start: w before the first cycle, in (0, 1).
        r_off, r_on: transfer at w = 0 and at w = 1, in [0, 1].
    """

    mobility_per_cycle: Float[Array, ""] = physical()
    rest: Float[Array, ""] = physical()
    start: Float[Array, ""] = physical()
    r_off: Float[Array, ""] = physical()
    r_on: Float[Array, ""] = physical()

    def filter(self, x: Float[Array, "cycles *batch"]) -> Float[Array, "cycles *batch"]:
        steps = 4 * self.mobility_per_cycle * (x - self.rest)
        # The current input is excluded, as in every feedback kernel.
        before = jnp.concatenate([jnp.zeros_like(steps[:1]), jnp.cumsum(steps, axis=0)[:-1]])
        return self.read(self.init(x.shape[1:]) + before)

    def init(self, shape: tuple[int, ...] = ()) -> Float[Array, "*batch"]:
        return jnp.full(shape, jnp.log(self.start) - jnp.log1p(-self.start))

    def read(self, state: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        return self.r_off + (self.r_on - self.r_off) * jax.nn.sigmoid(state)

    def update(self, state: Float[Array, "*batch"], x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        return state + 4 * self.mobility_per_cycle * (x - self.rest)


class _SeparatedPulses(AbstractMemristor):
    """What both rivals are: an ion with separated, resonant pulses, read out as the twin is."""

    scheme: str = eqx.field(static=True, default="lambda")
    rabi_scale_1: Float[Array, "..."] = physical(default=1.0)
    readout_error_bright: Float[Array, "..."] = physical(default=0.0)
    readout_error_dark: Float[Array, "..."] = physical(default=0.0)

    def ion(self) -> IonMemristor:
        """The device that plays what the rival's law decided."""
        return IonMemristor(
            memory=MovingAverage(1.0),
            scheme=self.scheme,
            method=ClosedForm(),
            rabi_scale_1=self.rabi_scale_1,
            readout_error_bright=self.readout_error_bright,
            readout_error_dark=self.readout_error_dark,
        )

    def prepared(self, x_set, settings: Settings) -> "_SeparatedPulses":
        del x_set, settings
        return self

    def signal(self, populations) -> Float[Array, "..."]:
        return self.ion().signal(populations)

    def assigned(self, populations) -> Float[Array, "..."]:
        return self.ion().assigned(populations)

    def assigned_next(self, populations) -> Float[Array, "..."]:
        return self.ion().assigned_next(populations)


class Memoryless(_SeparatedPulses):
    """An ion whose second pulse follows the commanded input alone: r = r_at_0 + (r_at_1 - r_at_0) x_set.

    `r_at_1` None leaves r constant. Both ends in [0, 1] keep r there, so nothing is clipped. The transfer that a
    caller gives is ignored; so is the memory.
    """

    memory: AbstractMemory = eqx.field(default_factory=lambda: MovingAverage(1.0))
    source: str = eqx.field(static=True, default="command")
    r_at_0: Float[Array, "..."] = physical(default=0.5)
    r_at_1: Float[Array, "..."] | None = physical(default=None)

    def under(self, settings: Settings) -> Responder:
        respond = self.ion().under(settings)

        def ruled(x_set, r_set, *, alone, of_cycle=None) -> Response:
            del r_set
            slope = 0.0 if self.r_at_1 is None else self.r_at_1 - self.r_at_0
            return respond(x_set, self.r_at_0 + slope * x_set, alone=alone, of_cycle=of_cycle)

        return ruled


class ClassicalMemristor(_SeparatedPulses):
    """y = (1 - r) x with r from `LinearDrift` of the model's input x: the classical device, read out as the ion is."""

    source: str = eqx.field(static=True, default="model")
    mobility_per_cycle: Float[Array, "..."] = physical(default=0.1)
    rest: Float[Array, "..."] = physical(default=0.5)
    start: Float[Array, "..."] = physical(default=0.5)
    r_off: Float[Array, "..."] = physical(default=0.0)
    r_on: Float[Array, "..."] = physical(default=1.0)

    @property
    def memory(self) -> LinearDrift:
        """The drift with this device's parameters."""
        return LinearDrift(self.mobility_per_cycle, self.rest, self.start, self.r_off, self.r_on)

    def under(self, settings: Settings) -> Responder:
        return self.ion().under(settings)


# ------------------------------------------------------------------------------------------------ the field of rivals


class Rival(NamedTuple):
    """A model of the table: its name, its problem, and what it is in a few words."""

    name: str
    problem: Problem
    words: str


FULL, CLOSED, KERNEL = "full twin", "closed form", "other kernel"
CONSTANT, INSTANTANEOUS, CLASSICAL = "constant transfer", "instantaneous transfer", "classical memristor"


def rivals(
    device: AbstractMemristor,
    table: LoopTable,
    boxes: Mapping[str, tuple[float, float]],
    *,
    full: Problem | None = None,
    noise: str = "binomial",
) -> tuple[list[Rival], list[str]]:
    """Every model that can be told from the others by this table, and sentences about those that cannot.

    Args:
        device: the configured ion.
        table: recorded loops.
        boxes: prior box of each free parameter of the fit.
        full: the problem of the full twin, where it is posed already. noise: law of the scatter, the same for all.

    Raises:
        ValueError: a device that is no ion.
    """
    if not isinstance(device, IonMemristor):
        raise ValueError(f"rivals are those of the ion memristor, but the device is a {type(device).__name__}; "
                         "check it without them.")  # fmt: skip
    notes: list[str] = []
    posed = lambda *asked: pose(*asked, noise=noise).problem
    full = posed(device, table, boxes) if full is None else full
    found = [Rival(FULL, full, "the configured device")]
    kept = {name: box for name, box in boxes.items() if name in _OF_CLOSED_FORM} or {"rabi_scale_1": _SCALE}
    closed = dataclasses.replace(device, method=ClosedForm())
    if isinstance(device.method, ClosedForm):
        notes.append("The configured device is the closed form itself, so the two are one.")
    else:
        found.append(Rival(CLOSED, posed(closed, table, kept), "pulses resonant and apart, without decay"))
    if table.r_set is not None:
        notes.append("Exponential and window memory cannot be told apart: the table records `r_set`, so that no model "
                     "of the memory is used; leave that column out to compare them.")  # fmt: skip
    elif not isinstance(device.memory, Exponential | MovingAverage):
        notes.append(f"The memory {type(device.memory).__name__} has no counterpart to compare with.")
    else:
        other, its_table = _other_kernel(device, table)
        kernel = "window memory" if isinstance(other.memory, MovingAverage) else "exponential memory"
        found.append(Rival(KERNEL, posed(other, its_table, boxes), f"{kernel} of equal mean lag"))
    shared = ("rabi_scale_1", "readout_error_bright", "readout_error_dark")
    base = {name: boxes[name] for name in (*shared, *NOISE_PARAMETERS) if name in boxes}
    base = base or {"rabi_scale_1": _SCALE}
    fixed = {name: getattr(device, name) for name in shared}
    ignored = dataclasses.replace(table, r_set=np.full(len(table), 0.5), sha256="")
    driven = dataclasses.replace(table, r_set=None, window_cycles=None, sha256="")
    constant = Memoryless(device.scheme, **fixed)
    linear = dataclasses.replace(constant, r_at_1=0.5)
    classical = ClassicalMemristor(device.scheme, **fixed)
    drift = {"mobility_per_cycle": (-1.0, 1.0), "rest": _TRANSFER, "start": _TRANSFER, "r_off": _TRANSFER,
             "r_on": _TRANSFER}  # fmt: skip
    for name, one, data, extra, words in (
        (CONSTANT, constant, ignored, {"r_at_0": _TRANSFER}, "no memory, r a number"),
        (INSTANTANEOUS, linear, ignored, {"r_at_0": _TRANSFER, "r_at_1": _TRANSFER}, "no memory, r linear in x_set"),
        (CLASSICAL, classical, driven, drift, "linear ion drift with Joglekar's window"),
    ):
        found.append(Rival(name, posed(one, data, base | extra), words))
    return found, notes


def _other_kernel(device: IonMemristor, table: LoopTable) -> tuple[IonMemristor, LoopTable]:
    """The device with the other kernel: tau = (T + 1) / 2 and T = 2 tau - 1 have equal mean lag."""
    forgets = isinstance(device.memory, Exponential)
    other = (lambda tau: np.maximum(2 * tau - 1, 1.0)) if forgets else (lambda window: (window + 1) / 2)
    length = other(np.asarray(value_of(device, "window_cycles")))
    memory = MovingAverage(length) if forgets else Exponential(length)
    if table.window_cycles is not None:
        table = dataclasses.replace(table, window_cycles=other(table.window_cycles), sha256="")
    return dataclasses.replace(device, memory=memory), table


# ------------------------------------------------------------------------------------------------ the comparison


@dataclass(frozen=True)
class Ranked:
    """One model: fit of all data, criteria, and held-out log-likelihood with its paired difference from the best.

    `difference` and its standard error are those of this model minus the best one, nats over all held-out cells.
    """

    name: str
    words: str
    n_free: int
    values: dict[str, float]
    log_likelihood: float
    aic: float
    bic: float
    held_out: float
    difference: float
    error: float

    @property
    def told(self) -> bool:
        """Whether the data tell this model from the best one."""
        return -self.difference > max(_ERRORS * self.error, _NATS)


@dataclass(frozen=True)
class Comparison:
    """Models in order of their held-out log-likelihood, best first, and what the data say about them."""

    ranking: list[Ranked]
    sentences: list[str]


def compare(
    field: list[Rival], table: LoopTable, *, starts: int = _STARTS, seed: int = 0, notes: list[str] | None = None
) -> Comparison:
    """Fits all models, to all data and without each fold, and ranks them.

    Args:
        field: from `rivals`.
        table: the same table.
        starts: of each fit. seed: of the starts.
        notes: sentences to be passed on.
    """
    rows = []
    for rival in field:
        out = predictive.left_out(rival.problem, predictive.folds(rival.problem, table))
        begin = rival.problem.free.draw(jax.random.key(seed), starts)
        values, value, terms, there = (np.asarray(a) for a in _fitted(rival.problem, out, begin))
        rows.append((rival, values, float(value), terms[there]))
    best = max(range(len(rows)), key=lambda k: np.sum(rows[k][3]))
    ranking = []
    for rival, values, value, terms in rows:
        gap, n, k = terms - rows[best][3], rival.problem.n_data, len(rival.problem.names)
        ranking.append(
            Ranked(
                rival.name, rival.words, k, dict(zip(rival.problem.names, values.tolist(), strict=True)), value,
                2 * k - 2 * value, k * float(np.log(n)) - 2 * value, float(np.sum(terms)), float(np.sum(gap)),
                float(np.sqrt(len(gap)) * np.std(gap)),
            )
        )  # fmt: skip
    ranking.sort(key=lambda one: -one.held_out)
    return Comparison(ranking, [*_sentences(ranking), *(notes or [])])


@eqx.filter_jit
def _fitted(problem: Problem, out, starts):
    """Optimum of all data with its log-likelihood; terms of each cell, predicted without its fold."""
    problem = least_squares.forward(problem)

    def optimum(left):
        asked = predictive.masked(problem, ~left)
        found = jax.vmap(lambda u: least_squares.descend_one(asked, u, steps=_STEPS))(starts)
        best = jnp.argmax(jnp.where(jnp.isfinite(found.log_likelihood), found.log_likelihood, -jnp.inf))
        values = found.values[best]
        return values, found.log_likelihood[best], jnp.where(left, predictive.terms(problem, values), 0.0)

    # The fit of all data is one of the same kind, which leaves nothing out.
    every = jnp.concatenate([jnp.zeros_like(out[:1]), out])
    values, value, terms = lax.map(optimum, every)
    there = jnp.concatenate([column.measured for part in problem.parts for column in part.data.observed])
    return values[0], value[0], jnp.sum(terms, axis=0), there


def _sentences(ranking: list[Ranked]) -> list[str]:
    best, rest = ranking[0], ranking[1:]
    told, close = [one for one in rest if one.told], [one for one in rest if not one.told]
    said = []
    for one in close:
        said.append(
            f"The {best.name} and the {one.name} cannot be told apart: held-out loops differ by {-one.difference:.1f} "
            f"± {one.error:.1f} nats."
        )
    for one in told:
        said.append(
            f"The data prefer the {best.name} to the {one.name} ({one.words}) by {-one.difference:.1f} ± "
            f"{one.error:.1f} nats of held-out log-likelihood (AIC {one.aic - best.aic:+.1f}, "
            f"BIC {one.bic - best.bic:+.1f})."
        )
    return said
