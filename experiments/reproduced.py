"""What a reproduction is: rows of numbers with their verdicts, and the arrays that its figure shows."""

from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]


class Reproduced(NamedTuple):
    """What one name gives.

    Attributes:
        rows: see `row`.
        arrays: by name, whatever `experiments.reproduce_plots` draws for it.
    """

    rows: list[Row]
    arrays: dict[str, np.ndarray]


def row(quantity: str, expected: float, obtained: Any, tolerance: float) -> Row:
    """One number beside what is expected; the tolerance is absolute."""
    met = abs(obtained - expected) <= tolerance
    return {
        "quantity": quantity,
        "expected": expected,
        "obtained": float(obtained),
        "tolerance": tolerance,
        "verdict": "pass" if met else "fail",
    }


def extrapolated(values: np.ndarray) -> float:
    """Limit of a power series in 1/K from its values at K, 2K, 4K (Richardson)."""
    for power in range(1, len(values)):
        values = (2**power * values[1:] - values[:-1]) / (2**power - 1)
    return float(values[0])
