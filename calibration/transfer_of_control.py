"""Control designed on one device, moved by the dictionary and run on another; both have shot noise and imperfections.

A study draws pairs of devices, source and target, from boxes, one pair a seed, and calibrates both from simulated
counts. Each kind of control is then designed on one of six things (`DESIGNED_ON`) and run:

    image         the source itself, known exactly, on what the dictionary makes of it: what the dictionary leaves out
    home          the calibrated source, on the source itself
    moved         the calibrated source through `twin.transfer`, on the target
    data sheet    the middle of the target's boxes, on the target
    recalibrated  the target calibrated from counts, on the target
    native        the target itself, known exactly, on the target

**Command map**: angles that give (x, (1 - r) x). Loss: rms of y - (1 - r) x over the square of commands, without shots.
**Feedback law**: kernel and window, the command map, and the correction of counts for readout. Loss: rms of y over the
cycles after one period, against the ideal loop. **Reservoir**: virtual nodes on one device, each with commands and a
window of its own, and a linear read-out of counts, trained on what it is designed on (moved: on the dictionary's image
of the calibrated source; image, home: on the real source). Loss: mean squared error of a second-order map over its
variance, on new counts of the real device.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, PRNGKeyArray
from scipy.stats import qmc

from calibration.angles import (
    angles_for,
    check_read_out,
    check_starts_in_v,
    first_angle,
    population_estimate,
    second_angle,
    signal_of,
)
from calibration.command_map import clenshaw_curtis
from calibration.data import LoopTable
from calibration.least_squares import descend_one, forward
from calibration.likelihood import Experiment, bucketed
from calibration.parameters import FreeParameters, anchored, check_parameters
from calibration.problem import Loops, Part, Problem
from calibration.ridge import nmse, ridge_readout
from twin.closed_form import set_area
from twin.loop import AbstractMemristor
from twin.memory import AbstractMemory, MovingAverage
from twin.memristor import Automatic, ClosedForm, IonMemristor, Lindblad
from twin.photonic import PhotonicMemristor
from twin.planning import emulated, planned
from twin.readout import sample_counts
from twin.transfer import to_ion, to_photonic, with_values

CONTROLS = ("command_map", "feedback", "reservoir")
"""Kinds of control."""
DESIGNED_ON = ("image", "home", "moved", "data sheet", "recalibrated", "native")
"""What control is designed on; where it runs stands above."""
# Angles go beyond full command where a device is too weak: its own pi lies within this factor.
_ROOM, _EMULATION_ERROR = 1.05, 1e-6
# Draws of which the first within the boxes is taken, and the share of them that must be.
_CANDIDATES, _ACCEPTED = 1024, 0.05
_WASH_OUT, _STEPS, _RIDGE = 20, 200, 1e-5
_LM_STEPS, _STARTS = 60, 4


class Side(eqx.Module):
    """One device of a study, with what is not known of it.

    Attributes:
        device: ready for values within the boxes.
        names, low, high: what differs from device to device, uniform in a box; none for a device that is known.
        problem: its calibration; None without names.
        mean, root: of a calibration that was made already: devices are then drawn from its errors, root root^T = C, the
            Gaussian truncated to the boxes; of variance 0 are those it says little about, which are uniform.
    """

    device: AbstractMemristor
    names: tuple[str, ...] = eqx.field(static=True)
    low: Float[Array, " names"]
    high: Float[Array, " names"]
    problem: Problem | None
    mean: Float[Array, " names"] | None = None
    root: Float[Array, "names names"] | None = None

    def at(self, values: Float[Array, " names"]) -> AbstractMemristor:
        """The device with these values."""
        return with_values(self.device, self.names, values)

    def drawn(self, key: PRNGKeyArray) -> Float[Array, " names"]:
        """Values of a real device, within the boxes."""
        if self.root is not None and self.mean is not None:
            key_normal, key_uniform = jax.random.split(key)
            values = self.mean + jax.random.normal(key_normal, (_CANDIDATES, len(self.names))) @ self.root.T
            # What the calibration tells little about may be anywhere; the rest is drawn until it lies in the box.
            free = self.low + (self.high - self.low) * jax.random.uniform(key_uniform, self.low.shape)
            values = jnp.where(jnp.diag(self.root @ self.root.T) == 0, free, values)
            fits = jnp.all((values >= self.low) & (values <= self.high), axis=1)
            return jnp.where(jnp.any(fits), values[jnp.argmax(fits)], jnp.nan)
        return self.low + (self.high - self.low) * jax.random.uniform(key, self.low.shape)

    def calibrated(self, key: PRNGKeyArray, truth: Float[Array, " names"]) -> Float[Array, " names"]:
        """What a calibration finds of a real device, from simulated counts."""
        if self.mean is not None:
            return self.mean
        if self.problem is None:
            return truth
        asked = forward(self.problem).simulated(key, truth)
        # A scale and an offset of one phase have rival optima, which one start may end in.
        starts = 0.5 + 0.8 * (jnp.asarray(qmc.Sobol(len(self.names), scramble=False).random(_STARTS)) - 0.5)
        found = lax.map(
            lambda share: descend_one(asked, self.low + share * (self.high - self.low), steps=_LM_STEPS), starts
        )
        return found.values[jnp.argmax(jnp.nan_to_num(found.log_likelihood, nan=-jnp.inf))]


def side(
    device: AbstractMemristor,
    boxes: Mapping[str, tuple[float, float]],
    table: LoopTable,
    found: tuple[Float[np.ndarray, " names"], Float[np.ndarray, "names names"]] | None = None,
    uniform: Collection[str] = (),
    weakest: float = 1.0,
) -> Side:
    """A device made ready for a study.

    Args:
        device: of known scalar values; an ion starts in v. boxes: (low, high) of what differs from device to device.
        table: settings of the calibration loops; their counts are not looked at.
        found: mean and covariance of a calibration in place of simulated ones, in the order of the boxes.
        uniform: names that this calibration says little about, drawn from all of their boxes.
        weakest: smallest scale of areas or phases of the other devices whose command maps will be played on this one.

    Raises:
        ValueError: an unknown parameter, an empty box, an ion that starts in s, a read-out that tells nothing, dynamics
            that cannot be emulated, a `weakest` that gives nothing, a calibration whose errors hardly fit into the
            boxes.
    """
    if not weakest > 0:
        raise ValueError(f"`weakest` is {weakest:g}, but a scale must be positive for any command to be given; let its "
                         "range begin above 0.")  # fmt: skip
    experiment = Experiment.from_table(table)
    device = anchored(device)
    check_starts_in_v(device)
    check_parameters(device, boxes)
    names = tuple(boxes)
    free = FreeParameters.from_boxes(boxes) if names else None
    check_read_out(device if free is None else with_values(device, names, 0.5 * (free.low + free.high)))
    if isinstance(device, IonMemristor) and not isinstance(device.method, ClosedForm):
        device = _emulated(device, boxes, experiment, weakest)
    if free is None:
        return Side(device, names, jnp.zeros(0), jnp.zeros(0), None)
    data = Loops(bucketed(device, experiment, own_window="window_cycles" in boxes))
    problem = Problem(free, (Part("loops", device, data, len(table), "loops"),))
    prior = (None, None) if found is None else _prior_of(free, found, uniform)
    return Side(device, names, free.low, free.high, problem, *prior)


def _emulated(
    device: IonMemristor, boxes: Mapping[str, tuple[float, float]], experiment: Experiment, weakest: float
) -> IonMemristor:
    """The ion with its dynamics tabulated over the boxes, with room for the commands of any device of the study."""
    error = device.method.error if isinstance(device.method, Lindblad | Automatic) else 1e-8
    device = dataclasses.replace(device, method=Lindblad(error))
    roomy = dict(boxes)
    for name in ("rabi_scale_1", "rabi_scale_2"):
        low, high = roomy.get(name, 2 * (float(getattr(device, name)),))
        roomy[name] = (min(low, 1.0) * (1 - 1e-6), max(high, 1.0) / min(weakest, 1.0) * _ROOM)
    laid = planned(device, roomy, solves=experiment.solves_of_setting)
    return emulated(laid, roomy, experiment.settings, error=max(_EMULATION_ERROR, float(error)))


def _prior_of(
    free: FreeParameters,
    found: tuple[Float[np.ndarray, " names"], Float[np.ndarray, "names names"]],
    uniform: Collection[str],
) -> tuple[Float[Array, " names"], Float[Array, "names names"]]:
    """Mean and root of the errors of a calibration, see `Side`.

    Raises:
        ValueError: errors of which hardly a draw lies within the boxes.
    """
    low, high = np.asarray(free.low), np.asarray(free.high)
    told = np.array([name not in uniform for name in free.names])
    values, vectors = np.linalg.eigh(found[1][np.ix_(told, told)])
    root = np.zeros((len(low), len(low)))
    root[np.ix_(told, told)] = vectors * np.sqrt(np.maximum(values, 0.0))
    mean = np.clip(found[0], low, high)
    trial = (mean + np.random.default_rng(0).normal(size=(4096, len(low))) @ root.T)[:, told]
    share = np.mean(np.all((trial >= low[told]) & (trial <= high[told]), axis=1))
    if share < _ACCEPTED:
        raise ValueError(f"only {share:.2g} of the devices within the errors of the fit lie within its boxes; fit with "
                         "more data, or with wider boxes.")  # fmt: skip
    return jnp.asarray(mean), jnp.asarray(root)


def image(device: AbstractMemristor, like: AbstractMemristor) -> AbstractMemristor:
    """What the dictionary makes of a device for the platform of another; an ion by the closed form.

    An ion that the dictionary makes is played by the closed form: areas and readout are moved, while linewidth, decay
    and noise, which stand for contrast and loss there, are left out, and with them what they shift the scales by. The
    other way round, of an ion that plays by the closed form nothing is moved that this form ignores.
    """
    if isinstance(like, PhotonicMemristor):
        return to_photonic(_as_played(device)) if isinstance(device, IonMemristor) else device
    if isinstance(device, PhotonicMemristor):
        assert isinstance(like, IonMemristor)
        rest = IonMemristor(memory=like.memory, scheme=like.scheme, method=ClosedForm(), branching=1.0)
        whole = dataclasses.replace(
            device, visibility_1=1.0, visibility_2=1.0, phase_noise_1_rad=0.0, phase_noise_2_rad=0.0, loss_input=0.0,
            loss=0.0,
        )  # fmt: skip
        return dataclasses.replace(to_ion(whole, rest), slow_noise=None)
    return device


def _as_played(ion: IonMemristor) -> IonMemristor:
    """The ion without the detunings, linewidths and decay that its method, where it is the closed form, ignores."""
    if not isinstance(ion.method, ClosedForm):
        return ion
    noise = ion.slow_noise
    if noise is not None:
        noise = dataclasses.replace(noise, detuning_noise_1_hz=0.0, detuning_noise_2_hz=0.0)
    return dataclasses.replace(
        ion, detuning_1_hz=0.0, detuning_2_hz=0.0, laser_linewidth_hz=0.0, laser_linewidth_1_hz=0.0,
        laser_linewidth_2_hz=0.0, lifetime_s=math.inf, m_lifetime_s=math.inf, slow_noise=noise,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ tasks


class Task(eqx.Module):
    """What is played.

    Attributes:
        points: commands a side of the square. x: wanted inputs of the loop. memory: of the feedback law.
        shots: repetitions of each setting. period: cycles of one period of x.
        bias, gain, windows: of the reservoir's nodes.
    """

    points: int = eqx.field(static=True)
    x: Float[Array, " cycles"]
    memory: AbstractMemory
    shots: Float[Array, ""]
    period: int = eqx.field(static=True)
    bias: Float[Array, " nodes"]
    gain: Float[Array, " nodes"]
    windows: Float[Array, " nodes"]


def task(memory: AbstractMemory, *, shots: int, periods: int, cycles_per_period: int, nodes: int, points: int) -> Task:
    """A task whose nodes are spread evenly: gains of either sign, windows from 1 to 8 cycles."""
    k = np.arange(periods * cycles_per_period + 1)
    spread = np.linspace(0.0, 1.0, nodes)
    gain = np.where(np.arange(nodes) % 2 == 0, 0.8, -0.8)
    bias = np.where(gain > 0, 0.1 + 0.4 * spread, 0.9 - 0.4 * spread)
    windows = 1 + 7 * np.random.default_rng(0).permutation(spread)
    return Task(
        points, jnp.asarray(np.sin(np.pi * k / cycles_per_period) ** 2), memory, jnp.asarray(float(shots)),
        cycles_per_period, jnp.asarray(bias), jnp.asarray(gain), jnp.asarray(windows),
    )  # fmt: skip


def map_loss(believed: AbstractMemristor, real: AbstractMemristor, points: int) -> Float[Array, ""]:
    """rms of y - (1 - r) x over the square of commands, under the command map of the believed device."""
    x = jnp.sin(jnp.pi * jnp.arange(points) / (2 * (points - 1))) ** 2
    inputs, transfers = jnp.repeat(x, points), jnp.tile(x, points)
    y = signal_of(real, *angles_for(believed, inputs, transfers), alone=False)
    weights = clenshaw_curtis(points)
    return jnp.sqrt(jnp.sum(np.outer(weights, weights).ravel() * (y - (1 - transfers) * inputs) ** 2))


def law_loop(
    believed: AbstractMemristor, real: AbstractMemristor, asked: Task, key: PRNGKeyArray
) -> tuple[Float[Array, " cycles"], Float[Array, " cycles"]]:
    """(r, y) of the feedback law of the believed device, run on the real one; y is the population."""
    zero, angle_1 = jnp.zeros_like(asked.x), first_angle(believed, asked.x)
    p_x = real.assigned_of(signal_of(real, angle_1, zero, alone=True))
    seen = sample_counts(key, p_x, asked.shots) / asked.shots
    r = asked.memory.filter(population_estimate(believed, seen))
    angle_2 = second_angle(believed, angle_1, (1 - r) * asked.x)
    return r, signal_of(real, angle_1, angle_2, alone=False)


def law_loss(believed: AbstractMemristor, real: AbstractMemristor, asked: Task, key: PRNGKeyArray) -> Float[Array, ""]:
    """rms of y against the ideal loop, over the cycles after the first period."""
    _, y = law_loop(believed, real, asked, key)
    wanted = (1 - asked.memory.filter(asked.x)) * asked.x
    return jnp.sqrt(jnp.mean((y - wanted)[asked.period :] ** 2))


def features(device: AbstractMemristor, asked: Task, u: Float[Array, " steps"], key: PRNGKeyArray) -> Array:
    """Shares of shots assigned to s after both pulses, shape (steps, nodes), under plain commands."""
    key_x, key_y = jax.random.split(key)
    x_set = asked.bias + asked.gain * u[:, None]
    shape, zero = x_set.shape, jnp.zeros(x_set.size)
    angle_1 = set_area(x_set).ravel()
    count = lambda key, signal: sample_counts(key, device.assigned_of(signal), asked.shots) / asked.shots
    seen = count(key_x, signal_of(device, angle_1, zero, alone=True)).reshape(shape)
    angle_2 = set_area(MovingAverage(asked.windows).filter(seen)).ravel()
    return count(key_y, signal_of(device, angle_1, angle_2, alone=False)).reshape(shape)


def second_order_map(key: PRNGKeyArray, steps: int) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
    """Inputs u uniform in [0, 0.5] and z of z' = 0.4 z + 0.4 z z_before + 0.6 u^3 + 0.1, from the fixed point of u = 0.

    z at a step depends on the inputs up to that step.
    """
    u = jax.random.uniform(key, (steps,), maxval=0.5)
    rest = (0.6 - jnp.sqrt(0.36 - 0.16)) / 0.8

    def step(state, u_k):
        z, before = state
        new = 0.4 * z + 0.4 * z * before + 0.6 * u_k**3 + 0.1
        return (new, z), new

    return u, lax.scan(step, (rest, rest), u)[1]


def _seen(device: AbstractMemristor, asked: Task, key: PRNGKeyArray) -> tuple[Array, Array]:
    """Features and what they are to tell, after the wash-out."""
    key_u, key_counts = jax.random.split(key)
    u, z = second_order_map(key_u, _WASH_OUT + _STEPS)
    return features(device, asked, u, key_counts)[_WASH_OUT:], z[_WASH_OUT:]


def _missed(training: tuple[Array, Array], test: tuple[Array, Array]) -> Float[Array, ""]:
    """Normalized test error of the read-out that is solved on the training part; each is (features, targets)."""
    readout = ridge_readout(*training, _RIDGE * len(training[1]))
    return nmse(readout(test[0]), test[1])


# ------------------------------------------------------------------------------------------------ the study


class Pairs(NamedTuple):
    """Devices of a study, a seed a row: what they are, and what their calibrations found."""

    source: Float[Array, "seeds source"]
    source_found: Float[Array, "seeds source"]
    target: Float[Array, "seeds target"]
    target_found: Float[Array, "seeds target"]


@eqx.filter_jit
def pairs(source: Side, target: Side, keys: Key[Array, " seeds"]) -> Pairs:
    """Draws a pair of devices for each key, and calibrates both."""

    def one(key):
        keys = jax.random.split(key, 4)
        a, b = source.drawn(keys[0]), target.drawn(keys[1])
        return Pairs(a, source.calibrated(keys[2], a), b, target.calibrated(keys[3], b))

    return lax.map(one, keys)


def losses(
    source: Side, target: Side, drawn: Pairs, asked: Task, control: str, keys: Key[Array, " seeds"]
) -> Float[Array, "seeds designs"]:
    """Loss of one of `CONTROLS`, a seed a row, a column for each of `DESIGNED_ON`; NaN where a device could not play.

    Raises:
        ValueError: an unknown kind of control.
    """
    if control not in CONTROLS:
        raise ValueError(f"`control` must be one of {CONTROLS}, but is {control!r}.")
    middle = jnp.broadcast_to(0.5 * (target.low + target.high), drawn.target.shape)
    known = {"data sheet": middle, "recalibrated": drawn.target_found, "native": drawn.target}
    if control != "reservoir":
        return _obeyed(source, target, drawn, jnp.stack(list(known.values())), asked, control, keys)
    train, test = jnp.swapaxes(jax.vmap(jax.random.split)(keys), 0, 1)
    there = target.device
    at_home = _many(source, drawn.source, None, asked, train)
    on_target = _many(target, drawn.target, None, asked, test)
    # What each read-out is trained on, and what it is tested on.
    played = {
        "image": (at_home, _many(source, drawn.source, there, asked, test)),
        "home": (at_home, _many(source, drawn.source, None, asked, test)),
        "moved": (_many(source, drawn.source_found, there, asked, train), on_target),
        **{name: (_many(target, values, None, asked, train), on_target) for name, values in known.items()},
    }
    return jnp.stack([jax.vmap(_missed)(*played[name]) for name in DESIGNED_ON], axis=1)


@eqx.filter_jit
def _many(side: Side, values: Float[Array, "seeds names"], like: AbstractMemristor | None, asked: Task, keys):
    """What the reservoir sees of devices, or of their images on the platform of another, a seed a row."""

    def one(given):
        device = side.at(given[0])
        return _seen(device if like is None else image(device, like), asked, given[1])

    return lax.map(one, (values, keys))


@eqx.filter_jit
def _obeyed(
    source: Side, target: Side, drawn: Pairs, known: Float[Array, "3 seeds names"], asked: Task, control: str, keys
) -> Float[Array, "seeds designs"]:
    """Losses of command maps or feedback laws; `known` is what may be known of the target without a source."""

    def loss(believed, real, key):
        return (
            map_loss(believed, real, asked.points) if control == "command_map" else law_loss(believed, real, asked, key)
        )

    def one(given):
        (a, a_found, b, _), known, key = given
        at_home, there, believed = source.at(a), target.at(b), source.at(a_found)
        found = [loss(at_home, image(at_home, target.device), key), loss(believed, at_home, key)]
        found.append(loss(image(believed, target.device), there, key))
        return jnp.concatenate([jnp.stack(found), lax.map(lambda values: loss(target.at(values), there, key), known)])

    return lax.map(one, (drawn, jnp.swapaxes(known, 0, 1), keys))
