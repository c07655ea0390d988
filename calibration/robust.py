"""Targets over many devices: what a calibration leaves open, and what drifts from run to run.

Members are devices that differ from the nominal one by known amounts. Their costs are averaged, or the worst counts.
So this is slow noise, constant while a loop is recorded; what changes from shot to shot is averaged in the populations,
and belongs into the device (`n_bar`, linewidths).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import qmc

from calibration.parameters import value_of, with_parameters
from calibration.targets import AbstractTarget, Offsets, Playing
from twin.memristor import IonMemristor
from twin.sampled import SampledIon

# Both lines are of one laser: its power and its frequency move them together.
_RABI, _DETUNING = ("rabi_scale_1", "rabi_scale_2"), ("detuning_1_hz", "detuning_2_hz")


class Robust(AbstractTarget):
    """Mean or worst cost of a target over members.

    Args:
        target: what is wanted of each.
        changes: what is added to each parameter of the nominal device, shape (members,) each.
        worst: whether the worst member counts, in place of the mean.
    """

    target: AbstractTarget
    changes: dict[str, Float[Array, " members"]]
    worst: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        lengths = {np.shape(change) for change in self.changes.values()}
        if len(lengths) != 1 or len(next(iter(lengths))) != 1:
            raise ValueError(f"every parameter needs one change a member, but the shapes are {sorted(lengths)}.")

    @property
    def name(self) -> str:
        """That of the target, with "mean" or "worst" before it."""
        return f"{'worst' if self.worst else 'mean'}_{self.target.name}"

    @property
    def unit(self) -> str:
        """That of the target."""
        return self.target.unit

    @property
    def is_gain(self) -> bool:
        """That of the target."""
        return self.target.is_gain

    @property
    def is_error(self) -> bool:
        """That of the target."""
        return self.target.is_error

    @property
    def members(self) -> int:
        """Number of devices."""
        return len(next(iter(self.changes.values())))

    @property
    def solves(self) -> float:
        return self.members * self.target.solves

    def value(self, device: Playing, offsets: Offsets) -> Float[Array, ""]:
        each = self.each(device, offsets)
        if not self.worst:
            return jnp.mean(each)
        return jnp.min(each) if self.is_gain else jnp.max(each)

    def each(self, device: Playing, offsets: Offsets) -> Float[Array, " members"]:
        """The target's number of each member."""
        return jax.vmap(lambda changes: self.target.value(changed(device, changes), offsets))(self.changes)

    def all_members(self, ion: IonMemristor) -> IonMemristor:
        """All members as one batch: what grids and slices must have room for."""
        return _changed_ion(ion, self.changes)

    def box(self, ion: IonMemristor) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of each parameter among the members, and of the nominal device."""
        found = {}
        for name, change in self.changes.items():
            values = np.append(np.asarray(change), 0.0) + float(value_of(ion, name))
            found[name] = (float(np.min(values)), float(np.max(values)))
        return found


def changed(device: Playing, changes: Mapping[str, Float[Array, "..."]]) -> Playing:
    """The device with changes added to its parameters."""
    if isinstance(device, SampledIon):
        return dataclasses.replace(device, ion=_changed_ion(device.ion, changes))
    return _changed_ion(device, changes)


def _changed_ion(ion: IonMemristor, changes: Mapping[str, Float[Array, "..."]]) -> IonMemristor:
    values = {name: value_of(ion, name) + change for name, change in changes.items()}
    return cast(IonMemristor, with_parameters(ion, values))


def drawn_changes(
    ion: IonMemristor,
    members: int,
    *,
    posterior: Mapping[str, Float[np.ndarray, " members"]] | None = None,
    intensity_std: float = 0.0,
    detuning_std_hz: float = 0.0,
    n_bar: tuple[float, float] | None = None,
    seed: int = 0,
) -> dict[str, Float[Array, " members"]]:
    """Changes drawn from what is not known and, evenly (a scrambled Sobol sequence), from what drifts.

    Args:
        ion: the nominal device.
        members: number of draws.
        posterior: values of calibrated parameters, one draw a member.
        intensity_std: relative standard deviation of the laser power; Rabi frequencies follow its square root.
        detuning_std_hz: standard deviation of the laser frequency, Hz.
        n_bar: lowest and highest mean phonon number, uniform.
        seed: of the sequence.

    Raises:
        ValueError: nothing varies, or the ion was not made for motion.
    """
    if not (posterior or intensity_std > 0 or detuning_std_hz > 0 or n_bar is not None):
        raise ValueError("nothing varies among the members; give a calibration, a noise, or a range of n_bar.")
    if n_bar is not None and not ion.moves:
        raise ValueError("`n_bar` varies among the members, but the device was made without motion; "
                         "give it an n_bar above 0.")  # fmt: skip
    sobol = qmc.Sobol(3, rng=np.random.default_rng(seed))
    uniform = sobol.random_base2(int(np.ceil(np.log2(members))))[:members]
    power, frequency, _ = np.asarray(jax.scipy.special.ndtri(np.clip(uniform, 1e-9, 1 - 1e-9))).T
    total: dict[str, np.ndarray] = {}

    def add(name: str, change: np.ndarray) -> None:
        total[name] = total.get(name, 0.0) + change

    for name, values in (posterior or {}).items():
        add(name, np.asarray(values) - float(value_of(ion, name)))
    if intensity_std > 0:
        # The argument of the root cannot be negative.
        factor = np.sqrt(np.maximum(1 + intensity_std * power, 0.0)) - 1
        for name in _RABI:
            add(name, (float(value_of(ion, name)) + total.get(name, 0.0)) * factor)
    if detuning_std_hz > 0:
        for name in _DETUNING:
            add(name, detuning_std_hz * frequency)
    if n_bar is not None:
        low, high = n_bar
        total["n_bar"] = low + (high - low) * uniform[:, 2] - float(ion.n_bar)  # in place of the posterior's
    return {name: jnp.asarray(change) for name, change in total.items()}


def parameter_draws(
    names: tuple[str, ...], mean: Float[np.ndarray, " n"], covariance: Float[np.ndarray, "n n"], *,
    count: int = 40, seed: int = 0, boxes: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Float[np.ndarray, " draws"]]:  # fmt: skip
    """Values from the Gaussian that a calibration left, values outside boxes are drawn again.

    Raises:
        ValueError: hardly any draw lies in the boxes.
    """
    rng, kept = np.random.default_rng(seed), np.zeros((0, len(names)))
    low, high = np.array([(boxes or {}).get(name, (-math.inf, math.inf)) for name in names]).T
    for _ in range(100):
        values = rng.multivariate_normal(mean, covariance, size=count)
        kept = np.concatenate([kept, values[np.all((values >= low) & (values <= high), axis=1)]])
        if len(kept) >= count:
            return dict(zip(names, kept[:count].T, strict=True))
    raise ValueError(f"only {len(kept)} of {100 * count} draws lie in the boxes; draw from the posterior by sampling.")
