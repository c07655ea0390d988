"""Runs one device of a network: chooses its method, solves its series, answers both runs."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from twin.area_series import AreaSeries
from twin.batching import batch_shape, is_traced
from twin.dynamics import StaticGrid
from twin.loop import AbstractMemristor, Settings, within_rounding
from twin.memory import MovingAverage
from twin.memristor import IonMemristor
from twin.node_series import SolvedIon, node_series
from twin.photonic import PhotonicMemristor
from twin.planning import Automatic, Lindblad, chosen
from twin.register import Register


def prepared(device: AbstractMemristor) -> AbstractMemristor:
    """The device with its method laid. Cycles of a network are many, so that a series of the areas always pays."""
    if isinstance(device, SolvedIon | PhotonicMemristor):
        return device  # there is nothing to decide
    memory = device.memory
    # A traced window decides nothing here.
    laid = eqx.tree_at(lambda d: d.unwrapped.memory, device, MovingAverage(1.0))
    if is_traced(laid):
        return device
    ion = laid.unwrapped
    probe = jnp.array([0.0, 1.0]).reshape((2,) + (1,) * len(batch_shape(device)))  # errors are largest at both ends
    if isinstance(ion, IonMemristor):
        method = ion.method
        if isinstance(method, Automatic):
            method = chosen(laid.brightest if isinstance(laid, Register) else ion, probe, Settings())
        if isinstance(method, Lindblad):
            method = AreaSeries(StaticGrid(error=method.error))
        laid = eqx.tree_at(lambda d: d.unwrapped.method, laid, method)
    return eqx.tree_at(lambda d: d.unwrapped.memory, laid.prepared(probe, Settings()), memory)


@eqx.filter_jit
def solved(device: AbstractMemristor) -> AbstractMemristor:
    """The device with its series solved, as `SolvedIon`; itself where series do not stand for it."""
    series = node_series(device, Settings())
    return device if series is None else SolvedIon.of(device, series)


class Player:
    """One device at its work: what all cycles share is done once."""

    def __init__(self, device: AbstractMemristor):
        self.device = device
        # Series that are being differentiated are solved here, others were before.
        self.series = device.series if isinstance(device, SolvedIon) else node_series(device, Settings())
        self.respond = device.under(Settings()) if self.series is None else None

    def play(self, x_set: Array, r: Array | None) -> dict[str, Array]:
        """Pulse 1 alone (`r` None), or both pulses."""
        if self.series is not None:
            *values, valid = self.series.after_first(x_set) if r is None else self.series.after_both(x_set, r)
        else:
            assert self.respond is not None
            response = self.respond(x_set, jnp.zeros_like(x_set) if r is None else r, alone=r is None)
            values = (self.device.signal(response.populations), self.device.assigned(response.populations))
            valid = response.valid
        valid = valid & (x_set >= 0) & (x_set <= 1)
        population, p = (jnp.where(valid, value, jnp.nan) for value in values)
        # Keeps XLA from evaluating the polynomial again in every fusion that reads it.
        population = jax.lax.optimization_barrier(population)
        names = ("x", "p_x") if r is None else ("y", "p_y")
        return {names[0]: population, names[1]: p, "valid": valid}

    def sent(self, run: str, known: dict[str, Array], shots) -> Array:
        """What edges and memories see of the run "x" or "y"."""
        population, p, counts = known[run], known[f"p_{run}"], known.get(f"n_{run}")
        if self.device.source == "model":
            return within_rounding(population)
        # What was commanded is known of inputs only.
        if self.device.source == "command" and run == "x":
            seen = known["x_set"]
        else:
            seen = within_rounding(p) if counts is None else counts / shots
        return jnp.where(jnp.isnan(population), jnp.nan, seen)
