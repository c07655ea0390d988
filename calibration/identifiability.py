"""What the data do not determine, in words: groups of parameters that can move together, why, and what would help.

The covariance is searched for groups of poorly known parameters that are tied to one another; one that is alone is
grouped with whatever is tied to it. The long axis of a group is the combination that the data leave open. It is called
structural where no number of shots would help (the cells do not move along it, here and elsewhere in the box), and
practical where more data of the same kind would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from calibration.parameters import FreeParameters, nominal_width, unit_of
from calibration.problem import Problem, informed
from calibration.uncertainty import Z95, Estimate, correlation, covariance

# A parameter is open when its 95 % interval spans more than this share of its box; two are tied beyond a correlation.
_OPEN, _TIED = 0.25, 0.85
# A direction that would still be open with this many times the data is structural.
_MORE_DATA = 1e4
_ELSEWHERE = 3


@dataclass(frozen=True)
class Degeneracy:
    """A group of parameters that the data cannot tell apart.

    Attributes:
        names: the parameters, the most affected first.
        direction: change of each, in its own unit, along the open combination, for one unit of the first.
        span: 95 % interval along it, in prior boxes.
        structural: whether more data of the same kind would not help.
        sentence: what it means and what to do.
    """

    names: tuple[str, ...]
    direction: dict[str, float]
    span: float
    structural: bool
    sentence: str


def degeneracies(
    problem: Problem, values: Float[np.ndarray, " parameters"], information: Float[np.ndarray, "n n"]
) -> list[Degeneracy]:
    """Groups of parameters that the data leave open, worst first.

    Args:
        problem: the question. values: the optimum.
        information: Fisher information there.
    """
    free = problem.free
    width = np.asarray(free.width)
    cov = _scaled(information, width)
    matrix, spans = correlation(cov), 2 * Z95 * np.sqrt(np.diag(cov))
    found = []
    elsewhere: list[np.ndarray] | None = None
    for group in _groups(spans > _OPEN, np.abs(matrix) > _TIED):
        lengths, axes = np.linalg.eigh(cov[np.ix_(group, group)])
        axis = axes[:, -1]
        # Members are those that vary along the axis more than anywhere else.
        along = np.abs(axis) * np.sqrt(lengths[-1] / np.diag(cov)[group])
        members = [k for k in np.argsort(-np.abs(axis)) if along[k] > _TIED]
        if len(members) < 2:
            continue
        span = 2 * Z95 * float(np.sqrt(lengths[-1]))
        structural = bool(span / np.sqrt(_MORE_DATA) > _OPEN)
        if structural:
            # No number of shots helps only if the same parameters stay open at other values too.
            elsewhere = _informations(problem) if elsewhere is None else elsewhere
            own = np.ix_(group, group)
            longest = [np.linalg.eigvalsh(_scaled(f, width)[own])[-1] for f in elsewhere]
            structural = all(2 * Z95 * np.sqrt(length / _MORE_DATA) > _OPEN for length in longest)
        names = tuple(free.names[group[k]] for k in members)
        steps = {n: float(axis[k] * width[group[k]]) for n, k in zip(names, members, strict=True)}
        direction = {n: step / steps[names[0]] for n, step in steps.items()}
        relative = {
            n: float(step / values[free.names.index(n)]) for n, step in steps.items() if values[free.names.index(n)]
        }
        sentence = _sentence(names, direction, relative, span, structural)
        found.append(Degeneracy(names, direction, span, structural, sentence))
    return sorted(found, key=lambda one: -one.span)


def _scaled(information: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Covariance in units of the boxes."""
    return covariance(information * np.outer(width, width), np.ones(len(width)))


def _informations(problem: Problem) -> list[np.ndarray]:
    points = problem.free.draw(jax.random.key(0), _ELSEWHERE)
    return [np.asarray(informed(problem, jnp.asarray(point)).information) for point in points]


def _groups(is_open: np.ndarray, tied: np.ndarray) -> list[np.ndarray]:
    """Connected sets of open parameters; one that is alone is joined by what it is tied to."""
    left, groups = set(np.flatnonzero(is_open).tolist()), []
    while left:
        group, edge = set(), {left.pop()}
        while edge:
            group |= edge
            edge = {k for k in left if any(tied[k, j] for j in edge)}
            left -= edge
        groups.append(np.flatnonzero(tied[group.pop()]) if len(group) == 1 else np.array(sorted(group)))
    return groups


class _Reason(NamedTuple):
    """Why some parameters move together, and what would tell them apart; `area` if only along a constant product."""

    names: frozenset[str]
    why: str
    remedy: str
    area: bool = False


_AREA = "enter only as a pulse area"
_HOT = "both scale the Rabi frequency: a hot ion looks like a weaker laser"
_CONTRAST = "both take contrast from the loop"
_REASONS = (
    *(
        _Reason(
            frozenset({f"sigma_{k}_s", f"rabi_scale_{k}"}),
            _AREA,
            "fix one, or add a detuned loop or a frequency scan, whose width is set by the duration alone",
            area=True,
        )
        for k in (1, 2)
    ),
    *(
        _Reason(
            frozenset({f"crosstalk_{k}", f"rabi_scale_{k}"}),
            "make one field where neighbours play the same commands",
            "fix one, or give neighbouring ions different inputs and transfers, or play them one at a time",
        )
        for k in (1, 2)
    ),
    *(
        _Reason(
            frozenset({"n_bar", f"rabi_scale_{k}"}),
            _HOT,
            "fix one, or add a Rabi scan over several rotations, whose contrast falls with `n_bar`",
        )
        for k in (1, 2)
    ),
    *(
        _Reason(
            frozenset({"n_bar", f"eta_{k}"}),
            "enter as eta^2 (n_bar + 1/2)",
            "fix one; the Lamb-Dicke parameter follows from the trap frequency",
        )
        for k in (1, 2)
    ),
    *(
        _Reason(
            frozenset({width, f"readout_error_{which}"}),
            _CONTRAST,
            "fix one, or add a readout histogram, or a Ramsey scan for the linewidth",
        )
        for width in ("laser_linewidth_hz", "laser_linewidth_1_hz", "laser_linewidth_2_hz")
        for which in ("dark", "bright")
    ),
    *(
        _Reason(
            frozenset({"lifetime_s", f"readout_error_{which}"}),
            "both take population from the dark state before it is read",
            "fix the lifetime, which is known from elsewhere, or add a readout histogram",
        )
        for which in ("dark", "bright")
    ),
    *(
        _Reason(
            frozenset(pair),
            "thin the same counts: only a product of what passes is seen",
            "fix one, or take the efficiency from a source of known rate",
        )
        for pair in (("efficiency", "loss_input"), ("efficiency", "loss"), ("loss_input", "loss"))
    ),
    *(
        _Reason(
            frozenset({f"visibility_{k}", f"phase_noise_{k}_rad"}),
            "enter counts only as the contrast V exp(-sigma^2/2)",
            "fix one; a contrast measured faster than the phase moves is the visibility alone",
        )
        for k in (1, 2)
    ),
    *(
        _Reason(
            frozenset({f"phase_scale_{k}", f"phase_offset_{k}_rad"}),
            "both move the phase: over a narrow range of commands one does what the other does",
            "fix one, or let the commands of that stage reach from 0 to 1",
        )
        for k in (1, 2)
    ),
    *(
        _Reason(
            frozenset({"dark_counts", f"visibility_{k}"}),
            "both lift the smallest count rate",
            "fix one, or count clicks with the source blocked",
        )
        for k in (1, 2)
    ),
)


def _sentence(
    names: tuple[str, ...],
    direction: Mapping[str, float],
    relative: Mapping[str, float],
    span: float,
    structural: bool,
) -> str:
    bases = {name.partition("@")[0] for name in names}
    places = dict.fromkeys(name.partition("@")[2] for name in names)
    along = f"along {_combination(names, direction)} the 95 % interval spans {span:.2g} of the prior box"
    slow = "no number of shots would separate them" if structural else "more data of this kind separate them slowly"
    quoted = lambda some: listed([f"`{name}`" for name in some])
    sentences = []
    for reason in _REASONS:
        if not reason.names <= bases:
            continue
        own = [name for base in sorted(reason.names, reverse=True) for name in names if name.partition("@")[0] == base]
        if reason.area:
            # A product that stays is one of a table's, or an ion's, own parameters and those that all share.
            of_places = [[n for n in own if n.partition("@")[2] in ("", place)] for place in places]
            staying = [pair for pair in of_places if len(pair) == 2 and _product_stays([relative.get(n) for n in pair])]
            own = list(dict.fromkeys(name for pair in staying for name in pair))
        if not own:
            continue
        sentences.append(f"{quoted(own)} {reason.why}; {reason.remedy}.")
    if not sentences:
        sentences = [f"These data cannot tell {quoted(names)} apart; fix one of them, or add data that separate them."]
    return " ".join(sentences) + f" ({along[0].upper()}{along[1:]}; {slow}.)"


def _product_stays(changes: Sequence[float | None]) -> bool:
    """Whether the product of two parameters does not change along a direction of these relative changes."""
    known = [change for change in changes if change is not None]
    return len(known) == 2 and bool(abs(sum(known)) < 0.2 * max(map(abs, known)))


def sentences(
    free: FreeParameters, found: Mapping[str, Estimate], cov: Float[np.ndarray, "n n"], groups: list[Degeneracy]
) -> list[str]:
    """What the data do not determine, and which combinations they cannot tell apart, in words."""
    notes = []
    for verdict, text in (
        ("not identified", "These data do not determine {}: the 95 % interval fills most of the prior box."),
        ("weak", "These data determine {} only weakly: the interval is wide, or reaches the edge of the prior box."),
        ("at bound", "The search was stopped by the prior box at {}: widen the box, or fix the parameter there."),
    ):
        names = [f"`{name}`" for name, e in found.items() if e.verdict == verdict]
        if names:
            notes.append(text.format(listed(names)))
    notes += [group.sentence for group in groups]
    named = [set(group.names) for group in groups]
    matrix = correlation(cov)
    for i in range(len(free.names)):
        for j in range(i):
            if abs(matrix[i, j]) > 0.9 and not any({free.names[i], free.names[j]} <= one for one in named):
                sign = "together" if matrix[i, j] > 0 else "in opposite directions"
                notes.append(
                    f"`{free.names[j]}` and `{free.names[i]}` can move {sign} at little cost "
                    f"(correlation {matrix[i, j]:+.2f})."
                )
    return notes


def listed(names: list[str]) -> str:
    """Names as an enumeration."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _combination(names: tuple[str, ...], direction: Mapping[str, float]) -> str:
    """The direction in the parameters' own units, per unit of its first member."""
    parts = [f"`{names[0]}` + 1 {unit_of(names[0])}".rstrip()]
    parts += [f"`{name}` {direction[name]:+.3g} {unit_of(name)}".rstrip() for name in names[1:]]
    return "(" + ", ".join(parts) + ")"


def areas(
    problem: Problem, values: Float[np.ndarray, " parameters"], information: Float[np.ndarray, "n n"]
) -> dict[str, tuple[float, float]]:
    """Area scales rabi_scale_k sigma_k / nominal of pulses whose width and Rabi scale are both free.

    The combination that loops do determine where they leave its factors open.

    Args:
        problem: the question. values: the optimum.
        information: Fisher information there.

    Returns:
        {name: (value, standard error)}; empty where no pulse has both free.
    """
    names, width, found = list(problem.names), np.asarray(problem.free.width), {}
    for k in (1, 2):
        for part in sorted({name.partition("@")[2] for name in names}):
            pair = [next((n for n in (f"{base}_{k}{end}@{part}", f"{base}_{k}{end}") if n in names), None)
                    for base, end in (("rabi_scale", ""), ("sigma", "_s"))]  # fmt: skip
            if None in pair:
                continue
            scale, sigma = (names.index(str(name)) for name in pair)
            nominal = float(nominal_width(problem.parts[0].device, k) or values[sigma])
            area = values[scale] * values[sigma] / nominal
            # With the area in place of the Rabi scale: the covariance of the pair itself is nearly singular.
            change = np.eye(len(names))
            change[scale, scale], change[scale, sigma] = values[scale] / area, -values[scale] / values[sigma]
            own = width.copy()
            own[scale] = width[scale] * area / values[scale]
            variance = covariance(change.T @ information @ change, own)[scale, scale]
            found[f"area_scale_{k}" + (f"@{part}" if part else "")] = (float(area), float(np.sqrt(variance)))
    return found
