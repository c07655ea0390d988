"""What a reproduction is: rows of numbers with their origins and verdicts, and the arrays that its figure shows."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

Row = dict[str, Any]
Origin = Literal["published", "exact", "derived here"]
"""Where an expected number is from: a paper or published code states it; a law in closed form gives it; an earlier
computation of this project found it."""


class Reproduced(NamedTuple):
    """What one name gives.

    Attributes:
        rows: see `row`.
        arrays: by name, whatever `experiments.reproduce_plots` draws for it.
    """

    rows: list[Row]
    arrays: dict[str, np.ndarray]


def row(
    quantity: str,
    expected: float,
    obtained: Any,
    tolerance: float = 0.0,
    *,
    origin: Origin,
    relation: Literal["=", "<"] = "=",
) -> Row:
    """One number beside what is expected.

    Args:
        expected: a value, or with `relation` "<" an upper limit. tolerance: absolute; none beyond a limit.
    """
    met = obtained < expected if relation == "<" else abs(obtained - expected) <= tolerance
    return {
        "quantity": quantity,
        "origin": origin,
        "relation": relation,
        "expected": float(expected),
        "obtained": float(obtained),
        "tolerance": tolerance,
        "verdict": "pass" if met else "fail",
    }


def shown(one: Mapping[str, Any]) -> Row:
    """A row for people: a limit carries its sign, which has no column of its own."""
    limit = {"expected": f"< {one['expected']:.6g}"} if one.get("relation") == "<" else {}
    return {key: value for key, value in {**one, **limit}.items() if key != "relation"}


def extrapolated(values: np.ndarray) -> float:
    """Limit of a power series in 1/K from its values at K, 2K, 4K (Richardson)."""
    for power in range(1, len(values)):
        values = (2**power * values[1:] - values[:-1]) / (2**power - 1)
    return float(values[0])
