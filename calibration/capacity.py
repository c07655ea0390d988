"""What a reservoir remembers: capacities for functions of the inputs before, linear and not.

A reservoir is driven by independent inputs, uniform in [-1, 1]. Its capacity for a target z is the share of z's
variance that the best linear read-out explains,

    C[z] = 1 - min |z - W f - b|^2 / |z - mean z|^2,

in [0, 1]. For targets that are orthonormal over the distribution of inputs, here products of Legendre polynomials of
delayed inputs, capacities add up to at most the number of features, whatever the reservoir (Dambre et al.).

References:
    Dambre, Verstraeten, Schrauwen, Massar, Sci. Rep. 2, 514 (2012). Jaeger, GMD report 152 (2001), for degree 1.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import legendre
from scipy.stats import beta

from calibration.ridge import check_finite

# Directions of the features below this share of the largest one are rounding, which would be read out otherwise.
_RANK = 1e-10

# Degrees of one delayed input each: ((delay, degree), ...).
Term = tuple[tuple[int, int], ...]


class Capacities(NamedTuple):
    """Capacities of one record.

    Attributes:
        terms: the targets. values: their capacities, those below the threshold set to zero, shape (terms,).
        threshold: what `false_positives` of all targets would exceed by chance.
        rank: independent directions of the features, which bounds the sum of all capacities.
    """

    terms: tuple[Term, ...]
    values: Float[np.ndarray, " terms"]
    threshold: float
    rank: int

    def of_degree(self, degree: int) -> float:
        """Sum over the targets of one total degree."""
        return float(sum(v for t, v in zip(self.terms, self.values, strict=True) if total_degree(t) == degree))

    @property
    def total(self) -> float:
        """Sum over all targets: the information processing capacity, as far as the terms reach."""
        return float(np.sum(self.values))


def total_degree(term: Term) -> int:
    """Degree of the product."""
    return sum(degree for _, degree in term)


def terms_up_to(longest_delays: Sequence[int]) -> tuple[Term, ...]:
    """All products of Legendre polynomials, degree by degree.

    Args:
        longest_delays: for total degree 1, 2, ...: products of that degree reach back at most that many steps.
            Delay 0 is the present input.
    """
    found: list[Term] = []
    for degree, longest in enumerate(longest_delays, start=1):
        for parts in _partitions(degree):
            for delays in itertools.permutations(range(longest + 1), len(parts)):
                term = tuple(sorted(zip(delays, parts, strict=True)))
                found.append(term)
    return tuple(dict.fromkeys(found))


def _partitions(total: int, largest: int | None = None) -> Iterator[tuple[int, ...]]:
    largest = total if largest is None else largest
    if total == 0:
        yield ()
    for first in range(min(total, largest), 0, -1):
        for rest in _partitions(total - first, first):
            yield (first, *rest)


def target(inputs: Float[np.ndarray, " steps"], term: Term, washout: int) -> Float[np.ndarray, " rest"]:
    """One target, orthonormal to all others over inputs uniform in [-1, 1], for the steps after `washout`."""
    product = np.ones(len(inputs) - washout)
    for delay, degree in term:
        shifted = inputs[washout - delay : len(inputs) - delay]
        product *= math.sqrt(2 * degree + 1) * legendre.legval(shifted, [0.0] * degree + [1.0])
    return product


def capacities(
    features: Float[Array | np.ndarray, "steps features"],
    inputs: Float[np.ndarray, " steps"],
    terms: Sequence[Term],
    *,
    washout: int,
    false_positives: float = 0.01,
) -> Capacities:
    """Capacities of a record for every target, in the sample, with those that chance explains set to zero.

    A target that has nothing to do with n features takes, by chance, a share of its variance that is distributed as
    Beta(n/2, (T - 1 - n)/2) over T steps (exact for normal features, and the limit of long records). The threshold is
    the share that no more than `false_positives` of all targets together are expected to exceed; capacities above it
    have the mean that chance adds taken off, as an adjusted coefficient of determination has.

    Args:
        features: what is read out in each step.
        inputs: what drove the reservoir, independent and uniform in [-1, 1].
        terms: see `terms_up_to`. washout: steps left out, at least the longest delay.
        false_positives: expected number of targets above the threshold by chance.

    Raises:
        ValueError: a washout shorter than the longest delay, too few steps, or features that are not finite or that
            do not vary.
    """
    longest = max(delay for term in terms for delay, _ in term)
    if washout < longest:
        raise ValueError(f"`washout` must be at least the longest delay, {longest} steps, but is {washout}.")
    rest = np.asarray(features)[washout:]
    steps = len(rest)
    check_finite(features, washout, "keep the commands of the reservoir in [0, 1]")
    u, s, _ = np.linalg.svd(rest - rest.mean(axis=0), full_matrices=False)
    # What is left of constants once their mean is off is rounding of a sum over the steps.
    if s[0] <= steps * np.finfo(float).eps * np.linalg.norm(rest):
        raise ValueError(
            f"features must vary, but all {rest.shape[1]} columns are constant after the washout: drive the reservoir "
            "with the inputs."
        )
    rank = int(np.sum(s > _RANK * s[0]))
    if steps < 2 * rank + 2:
        raise ValueError(f"{steps} steps are too few for {rank} features: give at least {2 * rank + 2}.")
    u = u[:, :rank]
    values = np.empty(len(terms))
    for k, term in enumerate(terms):
        z = target(inputs, term, washout)
        z = z - z.mean()
        values[k] = np.sum((u.T @ z) ** 2) / np.sum(z**2)
    threshold = float(beta.isf(false_positives / len(terms), rank / 2, (steps - 1 - rank) / 2))
    # What chance adds on average is taken off again, or sums over many targets would pass the number of features.
    unbiased = 1 - (1 - values) * (steps - 1) / (steps - 1 - rank)
    return Capacities(tuple(terms), np.where(values > threshold, unbiased, 0.0), threshold, rank)


def memory_capacity(
    features: Float[Array | np.ndarray, "steps features"],
    inputs: Float[np.ndarray, " steps"],
    longest_delay: int,
    *,
    washout: int,
) -> float:
    """Linear memory: the sum of capacities for the inputs 1, 2, ... `longest_delay` steps before."""
    terms = tuple(((delay, 1),) for delay in range(1, longest_delay + 1))
    return capacities(features, inputs, terms, washout=washout).total
