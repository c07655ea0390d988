"""Free parameters by name: prior boxes, bijectors to unbounded coordinates, and their place in a device.

Bounds live outside the model. A value in its box is `low + (high - low) sigmoid(u)` with u unbounded, so nothing is
ever clipped and every value has a gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.stats import qmc

from twin.loop import AbstractMemristor
from twin.memory import AbstractMemory, Exponential, MovingAverage
from twin.memristor import IonMemristor
from twin.register import Register
from twin.slow_noise import SlowNoise

UNITS = {"_hz": "Hz", "_s": "s", "_cycles": "cycles", "_per_s": "1/s", "_rad": "rad"}


def unit_of(name: str) -> str:
    """The unit that a parameter's name carries; "" for a plain number. ``NAME@PART`` has that of NAME."""
    name = name.partition("@")[0]
    return next((unit for suffix, unit in sorted(UNITS.items(), key=lambda s: -len(s[0])) if name.endswith(suffix)), "")


class FreeParameters(eqx.Module):
    """Names and prior boxes of the parameters a search may change.

    Args:
        names: fields of the device, or `window_cycles` of its memory.
        low, high: the box, shape (parameters,).
    """

    names: tuple[str, ...] = eqx.field(static=True)
    low: Float[Array, " parameters"]
    high: Float[Array, " parameters"]

    @classmethod
    def from_boxes(cls, boxes: Mapping[str, tuple[float, float]]) -> "FreeParameters":
        """From {name: (low, high)}.

        Raises:
            ValueError: no names, or a box that is empty or not finite.
        """
        if not boxes:
            raise ValueError("at least one parameter must be free; name it with its box: {'rabi_scale_1': (0.7, 1.3)}.")
        for name, (low, high) in boxes.items():
            if not (np.isfinite(low) and np.isfinite(high) and low < high):
                raise ValueError(f"the box of `{name}` must be finite with low below high, but is [{low}, {high}].")
        low, high = (jnp.array([box[k] for box in boxes.values()], float) for k in (0, 1))
        return cls(tuple(boxes), low, high)

    @property
    def boxes(self) -> dict[str, tuple[float, float]]:
        """{name: (low, high)}."""
        return {name: (float(a), float(b)) for name, a, b in zip(self.names, self.low, self.high, strict=True)}

    @property
    def width(self) -> Float[Array, " parameters"]:
        """Width of each box."""
        return self.high - self.low

    @property
    def middle(self) -> Float[Array, " parameters"]:
        """Middle of each box."""
        return 0.5 * (self.low + self.high)

    def bounded(self, u: Float[Array, "*starts parameters"]) -> Float[Array, "*starts parameters"]:
        """Values in the box from unbounded coordinates."""
        value = self.low + self.width * jax.nn.sigmoid(u)
        # The sum can round to just above the upper bound, where a probability would be refused.
        return jnp.where(value > self.high, self.high, value)

    def unbounded(self, values: Float[Array, "*starts parameters"]) -> Float[Array, "*starts parameters"]:
        """Unbounded coordinates of values strictly inside the box."""
        share = (values - self.low) / self.width
        return jnp.log(share) - jnp.log1p(-share)

    def folded(self, phi: Float[Array, "*starts parameters"]) -> Float[Array, "*starts parameters"]:
        """Values low + width sin^2(phi): the coordinates of least squares, in which an edge is not infinitely far."""
        return self.low + self.width * jnp.sin(phi) ** 2

    def unfolded(self, values: Float[Array, "*starts parameters"]) -> Float[Array, "*starts parameters"]:
        """A phi in [0, pi/2] for values in the box, its edges included."""
        return jnp.arcsin(jnp.sqrt(jnp.clip((values - self.low) / self.width, 0.0, 1.0)))

    def from_normal(self, z: Float[Array, "*draws parameters"]) -> Float[Array, "*draws parameters"]:
        """Values in the box that are uniform when z is standard normal: the coordinates of samplers.

        At the edges of the box the density of z falls off like a Gaussian, that of `unbounded` only exponentially.
        """
        return self.low + self.width * jax.scipy.special.ndtr(z)

    def to_normal(self, values: Float[Array, "*draws parameters"]) -> Float[Array, "*draws parameters"]:
        """Inverse of `from_normal`, strictly inside the box."""
        return jax.scipy.special.ndtri((values - self.low) / self.width)

    def draw(self, key: PRNGKeyArray, starts: int) -> Float[Array, "starts parameters"]:
        """Uniform random values in the box: draws from the prior."""
        return self.low + self.width * jax.random.uniform(key, (starts, len(self.names)))

    def spread(self, seed: int, starts: int) -> Float[Array, "starts parameters"]:
        """Values spread evenly over the box: a scrambled Sobol sequence."""
        sequence = qmc.Sobol(len(self.names), rng=np.random.default_rng(seed))
        return self.low + self.width * jnp.asarray(sequence.random(2 ** math.ceil(math.log2(starts)))[:starts])

    def apply(self, device, values: Float[Array, " parameters"]):
        """The device with these values in place."""
        return with_parameters(device, {name: values[k] for k, name in enumerate(self.names)})


_OF_REGISTER = {f.name for f in dataclasses.fields(Register)} - {"ion", "count"}


def check_parameters(device: AbstractMemristor, names: Iterable[str]) -> None:
    """Refuses names that are no parameters of a device.

    Raises:
        ValueError: see above.
    """
    if isinstance(device, Register):
        return check_parameters(device.ion, [name for name in names if name not in _OF_REGISTER])
    modules = {"memory", "method", "motion", "slow_noise"}
    known = {f.name for f in dataclasses.fields(device) if not f.metadata.get("static", False)} - modules
    known |= {"window_cycles"} | (set(SlowNoise.parameters()) if isinstance(device, IonMemristor) else set())
    for name in names:
        if name not in known:
            raise ValueError(f"`{name}` is no parameter of {type(device).__name__}.")


def with_parameters(device: AbstractMemristor, values: Mapping[str, Float[Array, "..."]]) -> AbstractMemristor:
    """A device with named parameters replaced; `window_cycles` is its memory's window, others its slow noise's.

    What a register does not have itself belongs to its ions.

    Raises:
        ValueError: a name that is no parameter of the device, or a window of a memory that has none.
    """
    check_parameters(device, values)
    if isinstance(device, Register):
        of_register = {name: value for name, value in values.items() if name in _OF_REGISTER}
        of_ions = {name: value for name, value in values.items() if name not in of_register}
        return dataclasses.replace(device, **of_register, ion=with_parameters(device.ion, of_ions))
    fields: dict[str, Any] = {name: value for name, value in values.items() if name != "window_cycles"}
    noise = {name: fields.pop(name) for name in SlowNoise.parameters() if name in fields}
    if "window_cycles" in values:
        fields["memory"] = with_window(device.memory, values["window_cycles"])
    if noise:
        assert isinstance(device, IonMemristor)
        old = SlowNoise() if device.slow_noise is None else device.slow_noise
        fields["slow_noise"] = dataclasses.replace(old, **noise)
    return dataclasses.replace(device, **fields)


def value_of(device: AbstractMemristor, name: str) -> Float[Array, "..."]:
    """Current value of a named parameter; of a register, its own or its ions'."""
    if isinstance(device, Register) and name not in _OF_REGISTER:
        return value_of(device.ion, name)
    if name == "window_cycles":
        name = "tau_cycles" if isinstance(device.memory, Exponential) else name
        return getattr(device.memory, name)
    if name in SlowNoise.parameters() and isinstance(device, IonMemristor):
        return getattr(SlowNoise() if device.slow_noise is None else device.slow_noise, name)
    value = getattr(device, name)
    # A light shift that is left out is one of zero.
    return jnp.zeros(()) if value is None and name in ("stark_1_hz", "stark_2_hz") else value


def with_window(memory: AbstractMemory, window_cycles) -> AbstractMemory:
    """The same kernel with another length."""
    if isinstance(memory, Exponential):
        return Exponential(window_cycles)
    if isinstance(memory, MovingAverage):
        return MovingAverage(window_cycles, capacity=memory.capacity)
    raise ValueError(f"the memory {type(memory).__name__} has no window; use MovingAverage or Exponential.")


def with_ion(device: AbstractMemristor, change: Callable[[Any], Any]) -> AbstractMemristor:
    """The device changed, or of a register its ions: for what concerns the dynamics of one ion."""
    if isinstance(device, Register):
        return dataclasses.replace(device, ion=change(device.ion))
    return change(device)


def method_of(device: AbstractMemristor) -> Any:
    """The method by which a device, or each ion of a register, is solved; None where nothing is."""
    return getattr(device.ion if isinstance(device, Register) else device, "method", None)


def nominal_width(device: AbstractMemristor, pulse: int) -> Any:
    """The width that the controller believes pulse 1 or 2 to have, s; None for the actual one."""
    return getattr(device.ion if isinstance(device, Register) else device, f"nominal_sigma_{pulse}_s", None)


def anchored(device: AbstractMemristor) -> AbstractMemristor:
    """The device whose controller keeps believing in today's widths when a search changes the actual ones."""
    if isinstance(device, Register):
        return with_ion(device, anchored)
    if not isinstance(device, IonMemristor):
        return device
    keep = {}
    for k in (1, 2):
        if getattr(device, f"nominal_sigma_{k}_s") is None:
            keep[f"nominal_sigma_{k}_s"] = getattr(device, f"sigma_{k}_s")
    return dataclasses.replace(device, **keep)
