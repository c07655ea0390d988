"""What a reproduction is: its name, rows of numbers with their origins and verdicts, and the arrays of its figure."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

NAMES = ("separated-pulses", "simultaneous-pulses", "photonic-loop", "crossed-pair", "merlin-narma", "x4")
"""What can be reproduced."""

Row = dict[str, Any]
Origin = Literal["published", "exact", "derived here"]
"""Where an expected number is from: a paper or published code states it; a law in closed form gives it; an earlier
computation of this project found it."""


class Reproduced(NamedTuple):
    """What one name gives.

    Attributes:
        rows: see `row`.
        arrays: by name, whatever `experiments.reproduce_plots` draws for it.
        notes: sentences that belong to the numbers wherever they are shown: what was not readable or is defined here.
    """

    rows: list[Row]
    arrays: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()


def check_name(name: str) -> None:
    """Refuses what is neither a name nor "all".

    Raises:
        ValueError: see above.
    """
    if name in (*NAMES, "all"):
        return
    close = difflib.get_close_matches(name.lower(), (*NAMES, "all"), n=1)
    meant = f"; did you mean {close[0]}?" if close else "."
    raise ValueError(
        f"there is nothing to reproduce under the name {name!r}; known names are {', '.join(NAMES)}, all{meant}"
    )


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
