"""Smoothing kernels that make limits hold by construction: nonnegative weights of unit sum, unimodal, of odd length.

Samples of modulus at most A that are convolved with such a kernel h are convex combinations: their modulus stays
within A. Two neighbours of the result differ by at most `A sum |h_k - h_(k-1)| = 2 A max(h)`, because h rises once and
falls once, and the bound is reached by a swing from -A to A. The spectrum of the result is that of the samples times
the transform of h. So the largest weight is the slew limit, and the side lobes are the attenuation.

References:
    J. F. Kaiser, "Nonrecursive digital filter design using the I0-sinh window function", ISCAS (1974).
"""

import functools
import math

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq

# Deepest side lobe of sin(x) / x, and the x at which the main lobe comes down to it.
_SINC_LOBE = 0.21723362821122166
_SINC_LOBE_X = 2.5535658092510065
# Points of the transform per side lobe; between two of them it rises by less than 1 / cos(pi / 32), half a percent.
_POINTS_PER_LOBE = 16
_BETWEEN_POINTS = 0.99


@functools.lru_cache(maxsize=64)
def smoothing_kernel(largest_weight: float, edge_cycles: float, leak: float) -> Float[np.ndarray, " weights"]:
    """A Kaiser window, convolved with the shortest box with which the weights stay within their limit.

    Args:
        largest_weight: no weight exceeds this; infinity where it does not matter, otherwise positive.
        edge_cycles: where the stop band begins, cycles per sample, below 1/2; infinity where there is none.
        leak: largest modulus of the transform in the stop band, between 0 and 1 (the transform at zero).

    Returns:
        The weights, read-only, of odd length and symmetric, so that nothing is shifted in time.
    """
    window = kaiser_window(edge_cycles, leak) if math.isfinite(edge_cycles) else np.ones(1)
    kernel = window
    if np.max(window) > largest_weight:
        # The middle weight falls as the box grows, and a box of width 1 / largest_weight is always wide enough.
        low, high = 1.0, max(1.0, 1 / largest_weight)
        for _ in range(60):
            width = 0.5 * (low + high)
            low, high = (low, width) if _middle(window, box(width)) <= largest_weight else (width, high)
        kernel = np.convolve(window, box(high))
    kernel = kernel / np.sum(kernel)
    kernel.setflags(write=False)
    return kernel


def box(width: float) -> Float[np.ndarray, " weights"]:
    """Mean over `width` samples (a real number, at least 1) around the middle one; its ends are parts of a sample."""
    reach = math.ceil((width - 1) / 2)
    weights = np.ones(2 * reach + 1)
    if reach:
        weights[[0, -1]] = (width - (2 * reach - 1)) / 2
    return weights / width


def kaiser_window(edge_cycles: float, leak: float) -> Float[np.ndarray, " weights"]:
    """The shortest Kaiser window of its shape whose transform stays within `leak` from `edge_cycles` on.

    It is checked point by point, for the formulae are those of continuous windows.
    """
    # The side lobes of a long window are 0.217 beta / sinh(beta) high; those of its samples are a little higher.
    lobe = 0.97 * leak
    excess = lambda beta: math.log(2 * _SINC_LOBE * beta / -math.expm1(-2 * beta)) - beta - math.log(lobe)
    beta = brentq(excess, 1e-6, 1e3) if lobe < 0.99 * _SINC_LOBE else 0.0
    reach = max(0, math.floor((math.hypot(beta, _SINC_LOBE_X) / (math.pi * edge_cycles) - 1) / 2) - 1)
    # Ends: at a fixed frequency the side lobes of a longer window are lower.
    while True:
        weights = np.i0(beta * np.sqrt(1 - (np.arange(-reach, reach + 1) / (reach + 0.5)) ** 2))
        weights = weights / np.sum(weights)
        if largest_beyond(weights, edge_cycles) <= _BETWEEN_POINTS * leak:
            return weights
        reach += 1


def largest_beyond(weights: Float[np.ndarray, " weights"], edge_cycles: float) -> float:
    """Largest modulus of the transform of the weights from `edge_cycles` (cycles per sample) to 1/2."""
    points = _POINTS_PER_LOBE * len(weights)
    grid = np.arange(points // 2 + 1) / points
    beyond = np.abs(np.fft.rfft(weights, points))[grid > edge_cycles]
    edge = np.sum(weights * np.exp(-2j * np.pi * edge_cycles * np.arange(len(weights))))
    return float(np.max(beyond, initial=abs(edge)))


def _middle(a: Float[np.ndarray, " a"], b: Float[np.ndarray, " b"]) -> float:
    """The middle, and largest, weight of the convolution of two symmetric unimodal kernels."""
    reach = (min(len(a), len(b)) - 1) // 2
    inner = [w[(len(w) - 1) // 2 - reach : (len(w) - 1) // 2 + reach + 1] for w in (a, b)]
    return float(inner[0] @ inner[1])
