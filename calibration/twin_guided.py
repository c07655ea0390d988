"""Gauss-Newton on the real device with the slopes of its twin.

The twin predicts the residuals and their Jacobian; what the device measures is the twin plus a correction,

    measured(u) = twin(u) + b + C (u - c),

linear around the present centre c and found by weighted least squares from everything told so far: a measurement counts
by its shot noise and by its distance, beyond which a correction need not be linear. So repeated points average, steps
teach C as Broyden's updates do, and the twin's slopes hold until data say otherwise. Before it stops, the search
measures the device's own slopes around the optimum: from then on the twin need not be right.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import least_squares

from calibration.closed_loop import AbstractSearch, Round, box_of, start_share
from calibration.control import COMMANDS, apply_commands
from calibration.parameters import anchored
from calibration.targets import disobedience
from twin.dynamics import StaticGrid
from twin.memristor import ClosedForm, IonMemristor
from twin.planning import forward_mode, planned

Model = Callable[[Float[Array, " parameters"]], Float[Array, " residuals"]]
# Curvature of the correction across the box, in units of the twin's slopes.
_CURVATURE = 0.3
# Probes as shares of the box: large where noise would drown the difference, small where it would not.
_PROBES = (1e-3, 0.15)
_RADIUS_LEAST, _EXACT = 1e-4, 1e-10


def _of_share(model: Model, low, high, share):
    return model(low + (high - low) * share)


_residuals = jax.jit(_of_share, static_argnums=0)
_jacobian = jax.jit(jax.jacfwd(_of_share, argnums=3), static_argnums=0)


class _Plan(NamedTuple):
    """Points to measure, the optimum they belong to, and what is expected of it, as sums of squares."""

    shares: np.ndarray
    optimum: np.ndarray
    before: float
    expected: float
    noise: float
    probing: bool


class TwinGuided(AbstractSearch):
    """Trust-region Gauss-Newton steps from measured residuals and the twin's corrected Jacobian.

    Args:
        boxes: {name: (low, high)}.
        model: the twin's residuals of a vector of values in the order of the boxes; differentiable by `jax.jacfwd`.
        start: where it begins; the middle by default.
        radius: first trust radius, as a share of the box.
        slope_doubt: how wrong the twin's slopes may be, as a share of their size.
        patience: rounds in a row, around the optimum, whose expected gain is below the noise before it is done.
    """

    def __init__(self, boxes, model: Model, *, start=None, radius: float = 0.3, slope_doubt: float = 0.3,
                 patience: int = 2):  # fmt: skip
        self.names, self.low, self.high = box_of(boxes)
        self.history: list[Round] = []
        share = start_share(self.names, self.low, self.high, start)
        self._made = {"radius": radius, "slope_doubt": slope_doubt, "patience": patience, "start": share.tolist()}
        # Searches with one model share its compiled programs.
        self._twin, self._slopes = (functools.partial(program, model, self.low, self.high) for program in
                                    (_residuals, _jacobian))  # fmt: skip
        self._center, self._radius, self._standing = share, radius, 0
        # Everything told: shares, measured minus twin, standard errors.
        self._told = ([], [], [])
        self._plan = _Plan(share[None], share, np.inf, np.inf, 0.0, False)

    @property
    def best(self) -> Float[np.ndarray, " parameters"]:
        """Optimum of the corrected twin."""
        return self.low + (self.high - self.low) * self._plan.optimum

    @property
    def done(self) -> str:
        """Says the expected gain and the noise, both as sums of squares."""
        if self._standing < self._made["patience"]:
            return ""
        gain = max(self._plan.before - self._plan.expected, 0.0)
        return (
            f"the expected gain, {gain:.2g}, is below what noise feigns, {self._plan.noise:.2g}, or the step is small"
        )

    @property
    def settings(self) -> dict[str, Any]:
        return self._made

    def _shares(self) -> Float[np.ndarray, "points parameters"]:
        return self._plan.shares

    def _learn(self, told: Round) -> None:
        shares = (told.points - self.low) / (self.high - self.low)
        for share, measured, errors in zip(shares, told.measured, told.standard_errors, strict=True):
            for column, value in zip(
                self._told, (share, measured - np.asarray(self._twin(share)), errors), strict=True
            ):
                column.append(value)
        self._move(told)
        self._plan = self._planned()

    def _move(self, told: Round) -> None:
        """The centre goes where the step led, unless it was worse; the radius follows what a step was worth."""
        plan, value = self._plan, told.values[0]
        errors, residuals = told.standard_errors[0], told.measured[0]
        spread = np.sqrt(np.sum(4 * (residuals * errors) ** 2 + 2 * errors**4))
        if np.isfinite(plan.before):
            gained, expected = plan.before - value, plan.before - plan.expected
            if gained < 0.25 * expected - spread:
                self._radius = max(self._radius / 2, _RADIUS_LEAST)
            elif gained > 0.75 * expected:
                self._radius = min(2 * self._radius, 1.0)
            if gained < -2 * spread - _EXACT * abs(plan.before):
                return
        self._center = plan.optimum

    def _planned(self) -> _Plan:
        offset, slopes, variance = self._correction()
        center = self._center
        residuals = lambda u: np.asarray(self._twin(u)) + offset + slopes @ (u - center)
        jacobian = lambda u: np.asarray(self._slopes(u)) + slopes
        low, high = np.maximum(center - self._radius, 0.0), np.minimum(center + self._radius, 1.0)
        inner = np.clip(center, low + 1e-9, high - 1e-9)
        found = least_squares(residuals, inner, jac=cast(Any, jacobian), bounds=(low, high), xtol=1e-9, ftol=1e-11)
        optimum, before, expected = found.x, float(np.sum(residuals(center) ** 2)), float(2 * found.cost)
        # A fit of pure noise would gain its projection on the slopes.
        directions, _ = np.linalg.qr(jacobian(optimum))
        noise = float(np.sum(directions**2 * variance[:, None]))
        stands = before - expected <= noise or np.max(np.abs(optimum - center)) < _PROBES[0]
        self._standing = self._standing + 1 if stands and self._plan.probing else 0
        # Repeating the optimum alone would average its residuals, but leave the slopes to the twin.
        shares = self._probes(optimum) if stands else optimum[None]
        return _Plan(shares, optimum, before, expected, noise, stands)

    def _correction(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(b, C, variance of b), residual by residual, around the centre."""
        shares, off, errors = (np.array(column) for column in self._told)
        size = np.sqrt(np.mean(np.asarray(self._slopes(self._center)) ** 2)) + _EXACT
        away = shares - self._center
        bent = _CURVATURE * size * np.sum(away**2, axis=1)
        weights = 1 / (errors**2 + bent[:, None] ** 2 + (_EXACT * size) ** 2)
        design = np.concatenate([np.ones((len(away), 1)), away], axis=1)
        prior = np.diag([0.0] + [1 / (self._made["slope_doubt"] * size) ** 2] * away.shape[1])
        precision = np.einsum("nm,nj,nk->mjk", weights, design, design) + prior
        covariance = np.linalg.inv(precision)
        found = np.einsum("mjk,nm,nk,nm->mj", covariance, weights, design, off)
        return found[:, 0], found[:, 1:], covariance[:, 0, 0]

    def _probe_size(self) -> float:
        error = np.sqrt(np.mean(np.array(self._told[2]) ** 2))
        size = np.sqrt(np.mean(np.asarray(self._slopes(self._center)) ** 2)) + _EXACT
        return float(np.clip(np.sqrt(error / (_CURVATURE * size)), *_PROBES))

    def _probes(self, optimum: np.ndarray) -> np.ndarray:
        """The optimum, and one point along each axis: on this side and on that in turn, where the bounds leave room."""
        step = self._probe_size() * (-1) ** len(self.history)
        ahead = np.where((optimum + step >= 0) & (optimum + step <= 1), step, -step)
        return np.concatenate([optimum[None], optimum + np.diag(ahead)])


def pulse_model(
    device: IonMemristor,
    boxes: Mapping[str, tuple[float, float]],
    x_set: Float[np.ndarray, " commands"],
    r_set: Float[np.ndarray, " commands"],
) -> Model:
    """Residuals y - (1 - r_set) x_set of Gaussian pulses as functions of pulse commands, for `TwinGuided`.

    Args:
        device: the twin. boxes: bounds of commands, names in `control.COMMANDS`.
        x_set, r_set: what is commanded.

    Raises:
        ValueError: an unknown command.
    """
    for name in boxes:
        if name not in COMMANDS:
            raise ValueError(f"`{name}` is no pulse command; choose among {', '.join(COMMANDS)}.")
    x, r = jnp.asarray(x_set, float), jnp.asarray(r_set, float)
    ready = laid_for(device, boxes)

    def model(values: Float[Array, " parameters"]) -> Float[Array, " residuals"]:
        changed, offsets = apply_commands(ready, dict(zip(boxes, values, strict=True)))
        return disobedience(changed, x, r, offsets)

    return model


def laid_for(device: IonMemristor, boxes: Mapping[str, tuple[float, float]]) -> IonMemristor:
    """The device on a static grid that serves all pulse commands in the boxes."""
    device = cast(IonMemristor, anchored(device))
    if isinstance(device.method, ClosedForm):
        return device
    offset_hz = max(
        (abs(edge) for name, box in boxes.items() if name.startswith("detuning") for edge in box), default=0.0
    )
    actual = {}
    for name, (low, high) in boxes.items():
        if not name.startswith("detuning"):
            # A commanded width scales the actual one.
            ratio = 1.0
            if name.startswith("sigma"):
                ratio = float(getattr(device, name) / getattr(device, f"nominal_{name}"))
            actual[name] = (low * ratio, high * ratio)
    plain = dataclasses.replace(device, nominal_sigma_1_s=None, nominal_sigma_2_s=None, method=StaticGrid(), steps=None)
    plain = planned(plain, actual, detuning_set_hz=offset_hz)
    own = {"method": plain.method, "steps": plain.steps, "slow_noise": plain.slow_noise}
    return forward_mode(dataclasses.replace(device, **own))
