"""Read-outs of reservoirs: exact ridge regression on what was measured, and how good its predictions are.

    minimize  sum_k |t_k - W^T f_k - b|^2 + ridge |W|^2

The bias b is not regularized: features and targets are centred, W is solved for, b follows from the means. The solution
is exact, so nothing is trained step by step, and gradients go through it to whatever made the features.
"""

import itertools
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve, solve_triangular
from jaxtyping import Array, Float

from twin.batching import check_not_negative, is_traced

RELATIVE_RIDGES = tuple(10.0**k for k in range(-14, 0))
"""Ridges to choose from, over the largest squared singular value of the features."""

# Singular values below this share of the largest one are rounding.
_RANK = 1e-13


class LinearReadout(eqx.Module):
    """A linear read-out: prediction = features @ weights + bias.

    Args:
        weights: shape (features, *outputs). bias: shape (*outputs,). Both with a leading axis where they are many.
    """

    weights: Float[Array, "..."]
    bias: Float[Array, "..."]

    def __call__(self, features: Float[Array, "*steps features"]) -> Float[Array, "..."]:
        """Predictions, shape (*steps, *outputs)."""
        return jnp.tensordot(features, self.weights, axes=1) + self.bias


class Split(NamedTuple):
    """Consecutive parts of a record, in steps: washed out, for solving, for choosing between models, for the test."""

    washout: int
    train: int
    validation: int
    test: int

    @property
    def parts(self) -> tuple[slice, slice, slice]:
        """Train, validation and test part as slices of the steps."""
        first, second, third, end = itertools.accumulate(self)
        return slice(first, second), slice(second, third), slice(third, end)

    def check(self, steps: int) -> None:
        """Refuses a record that is shorter than the parts, parts without a step, and parts of steps.

        Raises:
            ValueError: see above; an empty validation part is allowed.
        """
        for name, length in self._asdict().items():
            if not isinstance(length, numbers.Integral):
                raise ValueError(f"`{name}` of a split must be a whole number of steps, but is {length!r}.")
        if min(self) < 0 or self.train < 1 or self.test < 1:
            raise ValueError(f"parts of a record need at least one step for train and test, but are {tuple(self)}.")
        if sum(self) > steps:
            raise ValueError(
                f"the parts {tuple(self)} take {sum(self)} steps, but the record has {steps}: shorten a part."
            )


def check_finite(features: Float[Array | np.ndarray, "steps features"], washout: int, hint: str) -> None:
    """Refuses features that are not finite after the first `washout` steps, where they are known (not traced).

    Args:
        hint: what the caller can do about it; ends the sentence of the error.

    Raises:
        ValueError: see above; the first step and its column are named.
    """
    if is_traced(features):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(features)[washout:]))
    if len(bad) > 0:
        raise ValueError(
            f"features must be finite after the washout, but that of column {bad[0, 1]} is not in step "
            f"{bad[0, 0] + washout}: {hint}."
        )


def check_targets(targets: Float[Array | np.ndarray, "steps *outputs"], steps: int, split: Split, judged: str) -> None:
    """Refuses targets that do not fit a record or, where they are known, cannot be learned or judged by.

    Args:
        steps: of the record. split: its parts, which fit it.
        judged: the parts whose errors are normalized by the variance of their targets: "validation", "test", or both.

    Raises:
        ValueError: another number of steps; a value of the train or a judged part that is not finite; a judged part
            without variance.
    """
    if np.ndim(targets) < 1 or np.shape(targets)[0] != steps:
        raise ValueError(f"targets must have one row for each of {steps} steps, but have shape {np.shape(targets)}.")
    if is_traced(targets):
        return
    known = np.asarray(targets).reshape(steps, -1)
    for name, part in zip(split._fields[1:], split.parts, strict=True):
        if name != "train" and name not in judged.split():
            continue
        bad = np.argwhere(~np.isfinite(known[part]))
        if len(bad) > 0:
            raise ValueError(
                f"targets must be finite, but that of step {bad[0, 0] + part.start}, in the {name} part, is "
                f"{known[part][tuple(bad[0])]}: mend it, or choose other parts."
            )
        if name != "train" and np.all(known[part] == known[part][0]):
            raise ValueError(
                f"targets must vary in the {name} part, by whose variance its error is counted, but are all "
                f"{known[part][0].tolist()}: choose other parts."
            )


def ridge_readout(
    features: Float[Array, "steps features"], targets: Float[Array, "rows *outputs"], ridge, *, solver: str = "qr"
) -> LinearReadout:
    """The read-out that minimizes squared error plus `ridge` times squared weights.

    Args:
        features: what is read out in each step. targets: what should be said in each step, one or more outputs.
        ridge: zero or positive, in squared units of the features times steps. May be traced.
        solver: "qr" of the features with root-ridge rows below them: keeps all digits. "gram" forms features' products
            first: a few times faster for long records, and right only where the ridge is above 1e-15 of the largest
            squared singular value.

    Returns:
        A `LinearReadout`. Features that depend on each other with a ridge of zero have no unique one: NaN.

    Raises:
        ValueError: a negative ridge, an unknown solver, or steps that do not agree.
    """
    check_not_negative("ridge", ridge, "squared units of the features")
    if features.shape[0] != targets.shape[0]:
        raise ValueError(f"features have {features.shape[0]} steps, targets {targets.shape[0]}: give them alike.")
    mean_f, mean_t = jnp.mean(features, axis=0), jnp.mean(targets, axis=0)
    f, t = features - mean_f, (targets - mean_t).reshape(targets.shape[0], -1)
    n = f.shape[1]
    if solver == "qr":
        q, r = jnp.linalg.qr(jnp.concatenate([f, jnp.sqrt(ridge) * jnp.eye(n)]))
        size = jnp.abs(jnp.diagonal(r))
        weights = solve_triangular(r, q[: f.shape[0]].T @ t)
        weights = jnp.where(jnp.min(size) > _RANK * jnp.max(size), weights, jnp.nan)
    elif solver == "gram":
        weights = cho_solve(cho_factor(f.T @ f + ridge * jnp.eye(n)), f.T @ t)
    else:
        raise ValueError(f'`solver` must be "qr" or "gram", but is {solver!r}.')
    weights = weights.reshape(n, *targets.shape[1:])
    return LinearReadout(weights, mean_t - jnp.tensordot(mean_f, weights, axes=1))


def ridge_path(
    features: Float[Array, "steps features"],
    targets: Float[Array, "steps *outputs"],
    relative_ridges: Float[Array, " ridges"],
) -> tuple[LinearReadout, Float[Array, " ridges"]]:
    """Read-outs for many ridges from one singular value decomposition; not for gradients.

    Args:
        relative_ridges: ridges over the largest squared singular value of the centred features, so that models with
            features of different size are treated alike.

    Returns:
        Read-outs with a leading axis of ridges, and the ridges as `ridge_readout` counts them.
    """
    mean_f, mean_t = jnp.mean(features, axis=0), jnp.mean(targets, axis=0)
    u, s, v = jnp.linalg.svd(features - mean_f, full_matrices=False)
    t = (targets - mean_t).reshape(targets.shape[0], -1)
    ridges = relative_ridges * s[0] ** 2
    # Directions without signal have no weight, whatever the ridge.
    kept = s > _RANK * s[0]
    filtered = jnp.where(kept, s / jnp.where(kept, s**2 + ridges[:, None], 1.0), 0.0)
    weights = jnp.einsum("ji,kj,jo->kio", v, filtered, u.T @ t)
    weights = weights.reshape(*weights.shape[:2], *targets.shape[1:])
    return LinearReadout(weights, mean_t - jnp.tensordot(weights, mean_f, axes=(1, 0))), ridges


class Chosen(NamedTuple):
    """A read-out whose ridge was chosen on the validation part.

    Attributes:
        readout: solved on train and validation part together.
        ridge: as `ridge_readout` counts it.
        validation, test: mean squared errors over the variance of the targets.
    """

    readout: LinearReadout
    ridge: Float[Array, ""]
    validation: Float[Array, ""]
    test: Float[Array, ""]


@eqx.filter_jit
def chosen_readout(
    features: Float[Array, "steps features"],
    targets: Float[Array, "steps *outputs"],
    split: Split,
    relative_ridges: Sequence[float] = RELATIVE_RIDGES,
) -> Chosen:
    """Ridge from the validation part, read-out from train and validation part, error from the test part.

    The test part decides nothing.

    Args:
        features, targets: of all steps. split: parts of the record, validation not empty.
        relative_ridges: ridges to choose from, see `ridge_path`.

    Raises:
        ValueError: parts that do not fit the record, or an empty validation part.
    """
    split.check(features.shape[0])
    if split.validation < 1:
        raise ValueError("the ridge is chosen on the validation part, which has no steps: give it some.")
    train, validation, test = split.parts
    path, _ = ridge_path(features[train], targets[train], jnp.asarray(relative_ridges))
    errors = jnp.stack(
        [
            nmse(LinearReadout(path.weights[k], path.bias[k])(features[validation]), targets[validation])
            for k in range(len(relative_ridges))
        ]
    )
    best = jnp.nanargmin(errors)
    both = slice(train.start, validation.stop)
    final, ridges = ridge_path(features[both], targets[both], jnp.asarray(relative_ridges)[best][None])
    readout = LinearReadout(final.weights[0], final.bias[0])
    return Chosen(readout, ridges[0], errors[best], nmse(readout(features[test]), targets[test]))


def mse(predicted: Float[Array, "steps *outputs"], targets: Float[Array, "steps *outputs"]) -> Float[Array, ""]:
    """Mean squared error over steps and outputs."""
    return jnp.mean((predicted - targets) ** 2)


def nmse(predicted: Float[Array, "steps *outputs"], targets: Float[Array, "steps *outputs"]) -> Float[Array, ""]:
    """Mean squared error over the variance of the targets: 1 for a read-out that says their mean."""
    return mse(predicted, targets) / jnp.mean((targets - jnp.mean(targets, axis=0)) ** 2)
