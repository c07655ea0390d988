"""Networks as reservoirs: the read-out solved exactly, parameters of the devices trained through it.

A read-out sees what a laboratory measures: counts over shots, or their expectation. Device parameters (windows,
weights of edges, encodings, losses, ...) are trained by Optax on the error of the validation part, with the ridge
read-out solved on the training part inside the loss, so that the gradient goes through the solution and the network.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from calibration._minimize import Stage, minimize
from calibration.ridge import (
    RELATIVE_RIDGES,
    Chosen,
    LinearReadout,
    Split,
    check_finite,
    check_targets,
    chosen_readout,
    nmse,
    ridge_readout,
)
from twin.memory import MovingAverage
from twin.network import Network, play

SEEN = ("x", "y")


class Reservoir(eqx.Module):
    """A network and a linear read-out of what is measured at its nodes.

    Args:
        network: memristors on a graph.
        readout: None before it is trained.
        seen: which of the two runs of a cycle are read out, of ("x", "y"): pulse 1 alone, both pulses. Features are
            ordered by run, then by node.

    Raises:
        ValueError: nothing seen, or something else.
    """

    network: Network
    readout: LinearReadout | None = None
    seen: tuple[str, ...] = eqx.field(static=True, default=("y",))

    def __check_init__(self):
        if not self.seen or not set(self.seen) <= set(SEEN):
            raise ValueError(f"`seen` must name some of {SEEN}, but is {self.seen}.")

    def features(
        self, inputs: Float[Array, "steps channels"], *, shots=None, key: PRNGKeyArray | None = None, form="auto"
    ) -> Float[Array, "steps features"]:
        """What is measured in each step: counts over shots, or the probabilities that they estimate.

        Cycles that are not valid (a command outside [0, 1]) are NaN, and so is every error of a read-out of them.

        Args:
            inputs, shots, key, form: as for `twin.network.play`.
        """
        keep = tuple(f"p_{name}" for name in self.seen)
        trace = play(self.network, inputs, shots=shots, key=key, form=form, keep=(*keep, "valid"))
        if shots is None:
            measured = [getattr(trace, name) for name in keep]
        else:
            measured = [getattr(trace, f"n_{name}") / shots for name in self.seen]
        return jnp.concatenate([jnp.where(trace.valid, m, jnp.nan) for m in measured], axis=1)

    def __call__(
        self, inputs: Float[Array, "steps channels"], *, shots=None, key: PRNGKeyArray | None = None
    ) -> Float[Array, "steps *outputs"]:
        """Predictions of the trained read-out.

        Raises:
            ValueError: no read-out yet.
        """
        if self.readout is None:
            raise ValueError("this reservoir has no read-out yet: train it with `train_readout`.")
        return self.readout(self.features(inputs, shots=shots, key=key))


def train_readout(
    reservoir: Reservoir,
    inputs: Float[Array, "steps channels"],
    targets: Float[Array, "rows *outputs"],
    split: Split,
    *,
    relative_ridges: Sequence[float] = RELATIVE_RIDGES,
    shots=None,
    key: PRNGKeyArray | None = None,
) -> tuple[Reservoir, Chosen]:
    """The reservoir with the best ridge read-out, its ridge chosen on the validation part.

    Args:
        inputs: of all steps, one column a channel. targets: of all steps.
        split: parts of the record. relative_ridges: ridges to choose from, see `calibration.ridge.ridge_path`.
        shots, key: as for `play`: training and test both see counts.

    Returns:
        The reservoir with its read-out, and what was found; `Chosen.test` is the error on the test part.

    Raises:
        ValueError: parts or targets that do not fit the record; targets that are not finite or do not vary in the
            validation or test part, or cycles that are not valid, where known.
    """
    split.check(inputs.shape[0])
    check_targets(targets, inputs.shape[0], split, "validation test" if split.validation > 0 else "test")
    features = reservoir.features(inputs, shots=shots, key=key)
    check_finite(features[: sum(split)], split.washout, "keep the commands in [0, 1] by smaller encodings or edges")
    chosen = chosen_readout(features, targets, split, tuple(relative_ridges))
    return eqx.tree_at(lambda r: r.readout, reservoir, chosen.readout, is_leaf=lambda leaf: leaf is None), chosen


def reservoir_nmse(
    reservoir: Reservoir,
    inputs: Float[Array, "steps channels"],
    targets: Float[Array, "rows *outputs"],
    split: Split,
    ridge,
    *,
    part: str = "validation",
    shots=None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    """Normalized error of a part, with the read-out of this `ridge` solved on the training part.

    Differentiable without shots, and may be mapped over batches of reservoirs:

        >>> many = eqx.filter_vmap(lambda tau: reservoir_nmse(reservoir_of(tau), u, t, split, 1e-6))(taus)

    Raises:
        ValueError: parts or targets that do not fit the record, an unknown or empty part; targets that are not finite
            or do not vary in the part, where known.
    """
    split.check(inputs.shape[0])
    if part not in ("validation", "test") or getattr(split, part) < 1:
        raise ValueError(f"`part` must be 'validation' or 'test' and have steps, but is {part!r} of {tuple(split)}.")
    check_targets(targets, inputs.shape[0], split, part)
    features = reservoir.features(inputs, shots=shots, key=key)
    train, validation, test = split.parts
    judged = validation if part == "validation" else test
    readout = ridge_readout(features[train], targets[train], ridge)
    return nmse(readout(features[judged]), targets[judged])


_judged = eqx.filter_jit(reservoir_nmse)  # one program for all that is trained


class Free(NamedTuple):
    """A parameter to be trained.

    Args:
        where: picks the array out of the network, as for `equinox.tree_at`.
        low, high: bounds of its values, which are never reached.
    """

    where: Callable[[Network], Array]
    low: float
    high: float


class Training(NamedTuple):
    """What training found.

    Attributes:
        reservoir: with trained parameters, and the read-out solved on the training part.
        before, after: normalized errors of the validation part, which was trained on.
        test_before, test_after: of the test part, which was not.
        iterations: taken by the best start. converged: whether it stopped by itself.
    """

    reservoir: Reservoir
    before: float
    after: float
    test_before: float
    test_after: float
    iterations: int
    converged: bool


def train_devices(
    reservoir: Reservoir,
    inputs: Float[Array, "steps channels"],
    targets: Float[Array, "rows *outputs"],
    split: Split,
    free: Mapping[str, Free],
    *,
    ridge: float = 1e-6,
    iterations: int = 60,
    learning_rate: float = 0.1,
    starts: int = 1,
    seed: int = 0,
    on_progress: Callable[[int, Float[np.ndarray, " starts"]], None] | None = None,
) -> Training:
    """Train parameters of the devices and edges on the validation part, with the read-out solved inside the loss.

    Without shots: expectations have gradients, counts have none. Derivatives by a command of exactly 0 or 1 are given
    as 0 for ions (`twin.closed_form.set_area`), and are right for photonic nodes of nominal phases: train encodings of
    ions from commands inside the interval.

    Args:
        inputs, targets, split: as for `train_readout`.
        free: parameters by name.
        ridge: of the read-out, as `ridge_readout` counts it.
        iterations, learning_rate: of Adam, whose rate falls by a cosine to a tenth, on shares of the bounds (logits).
        starts: the first start is the reservoir as it is, others are drawn with `seed` over the bounds.
        on_progress: called now and then with the iterations done and the losses (log10 of the error).

    Raises:
        ValueError: nothing free, a value outside its bounds, parts or targets that do not fit the record, parts that
            are empty, targets that are not finite or do not vary in the validation or test part, or a command outside
            [0, 1] (or a cycle that is not valid) at every start.
    """
    split.check(inputs.shape[0])
    if split.validation < 1:
        raise ValueError("parameters are trained on the validation part, which has no steps: give it some.")
    check_targets(targets, inputs.shape[0], split, "validation test")
    if not free:
        raise ValueError("`free` names no parameter: give at least one `Free(where, low, high)`.")
    begin = []
    for name, (where, low, high) in free.items():
        values = np.ravel(np.asarray(where(reservoir.network), float))
        if not np.all((values > low) & (values < high)):
            bad = values[~((values > low) & (values < high))][0]
            raise ValueError(f"{name!r} must lie between its bounds {low:g} and {high:g}, but is {bad:g}.")
        share = (values - low) / (high - low)
        begin.append(np.log(share / (1 - share)))
    points = np.concatenate(begin)[None]
    drawn = np.random.default_rng(seed).logistic(size=(starts - 1, points.shape[1]))
    room = _with_room(reservoir, tuple(free.values()))
    args = (room, tuple(free.values()), inputs, targets, jnp.asarray(ridge, float), split)
    stage = Stage("adam", iterations, tolerance=1e-9, learning_rate=learning_rate)
    found = minimize(_loss, args, np.concatenate([points, drawn]), stage, on_progress=on_progress)
    if np.all(np.isnan(np.asarray(found.values))):
        raise ValueError(
            "training must start where the error of the reservoir is a number, but it is NaN at every start: keep the "
            "commands in [0, 1] by smaller encodings or edges, or bound what is free more tightly."
        )
    best = int(np.nanargmin(np.asarray(found.values)))
    trained = _with(reservoir, args[1], found.points[best])
    errors = [
        float(_judged(r, inputs, targets, split, args[4], part=part))
        for r in (room, _with(room, args[1], found.points[best]))
        for part in ("validation", "test")
    ]
    train = split.parts[0]
    readout = ridge_readout(trained.features(inputs)[train], targets[train], ridge)
    trained = eqx.tree_at(lambda r: r.readout, trained, readout, is_leaf=lambda leaf: leaf is None)
    return Training(
        trained, errors[0], errors[2], errors[1], errors[3], int(found.iterations[best]), bool(found.converged[best])
    )


@eqx.filter_jit
def _with(reservoir: Reservoir, free: tuple[Free, ...], point: Float[Array, " parameters"]) -> Reservoir:
    """The reservoir with free parameters at a point of logits."""
    network, at = reservoir.network, 0
    for where, low, high in free:
        old = where(network)
        values = low + (high - low) * jax.nn.sigmoid(point[at : at + old.size].reshape(old.shape))
        network, at = eqx.tree_at(where, network, values), at + old.size
    return eqx.tree_at(lambda r: r.network, reservoir, network)


def _with_room(reservoir: Reservoir, free: tuple[Free, ...]) -> Reservoir:
    """The reservoir with buffers that its moving averages need inside a program, where a window is not known.

    A buffer without a `capacity` gets that of its window, or of the longest that it may be trained to.
    """
    network = longest = reservoir.network
    for where, _, high in free:
        longest = eqx.tree_at(where, longest, jnp.full_like(where(longest), high))

    def roomy(memory, most):
        if not isinstance(memory, MovingAverage) or memory.capacity is not None:
            return memory
        return MovingAverage(memory.window_cycles, capacity=most.buffer_cycles)

    network = jax.tree.map(roomy, network, longest, is_leaf=lambda node: isinstance(node, MovingAverage))
    return eqx.tree_at(lambda r: r.network, reservoir, network)


def _loss(point: Float[Array, " parameters"], args: Any, each: Any) -> Float[Array, ""]:
    """Decimal logarithm of the validation error, so that steps are of the same size wherever it stands."""
    del each
    reservoir, free, inputs, targets, ridge, split = args
    return jnp.log10(reservoir_nmse(_with(reservoir, free, point), inputs, targets, split, ridge))
