"""`iontwin reproduce`: published numbers, exact laws and earlier numbers of ours, computed again by this twin.

What could be read of the ion papers (Entropy 25, 1134 (2023); JETP Lett. 119, 352 (2024); the 2026 paper on separated
pulses) is their abstracts. Their pulse parameters and their definition of the relative standard deviation are not known
here. Ours is RSD(y) = rms(y - y_closed)/mean(y_closed) over a grid of areas, and no figure of theirs is claimed.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from scipy.optimize import minimize

from experiments import crossed_pair, report, reproduce_reservoirs
from experiments.provenance import Stopwatch, provenance
from experiments.records import RunFolder
from experiments.reproduced import Origin, Reproduced, Row, check_name, extrapolated, row
from twin import hysteresis
from twin.closed_form import separated_populations, simultaneous_populations
from twin.crossed import CrossedPair
from twin.dynamics import Adaptive, StaticGrid, evolve
from twin.levels import LAMBDA, LevelSystem, Scheme, V
from twin.loop import run as run_loop
from twin.loop import sine_input
from twin.memory import MovingAverage
from twin.memristor import PhotonicMemristor
from twin.pulses import Gaussian

_SIGMA_S = 20e-6  # the ratios reproduced here do not depend on it
_AREAS = np.linspace(0.1, math.pi - 0.05, 15)

# Separation in sigma, RSD(y) in % by an earlier integration of ours, and half a unit of its last digit.
_RSD = (
    (8.0, 5e-7, 5e-8),
    (7.0, 2.5e-5, 5e-7),
    (6.0, 0.0008, 5e-5),
    (5.0, 0.0142, 5e-5),
    (4.5, 0.0518, 5e-5),
    (4.0, 0.169, 5e-4),
    (3.0, 1.32, 5e-3),
    (2.0, 7.0, 0.05),
    (1.0, 27.0, 0.5),
    (0.0, 74.0, 0.5),
)
_PUBLISHED_RSD = 0.03  # %
_CROSSING = (4.66, 4.68, 4.70, 4.72, 4.74, 4.76)  # sigma; bracket of the crossing of 0.03 %

# P_v, P_s, P_m after simultaneous pulses of area pi each, from v.
_TWO_PI_PULSES = (0.0388681487, 0.3165638355, 0.6445680158)

# T/T_osc, loop area, form factor.
_LOOPS = (
    (0.05, 0.06117935, 0.144359),
    (0.1, 0.11936438, 0.275799),
    (0.2, 0.21593219, 0.473834),
    (0.25, 0.25, 0.535095),
    (0.371010, 0.28455421, 0.582388),
    (0.5, 0.25, 0.505863),
    (0.75, 1 / 12, 0.183998),
    (1.0, 0.0, 0.0),
    (1.5, 1 / 12, 0.201344),
)
# Cycles a period for which each of these windows is a whole number of cycles (0.371010 to 2e-6), here and at multiples:
# then the errors are a power series in 1/K.
_CYCLES = 2380
# Cycles a period; window in cycles, area, form factor (None: not given) of the discrete loop.
_DISCRETE = (40, ((10, 0.2680153507, 0.56275702), (15, 0.2919843430, None), (20, 0.2484610426, None)))


def run(name: str) -> dict[str, Any]:
    """Compute a set of numbers again.

    Args:
        name: one of `experiments.reproduced.NAMES`, or "all".

    Returns:
        What ``result.json`` holds: "status"; "rows" {"name", "quantity", "origin", "relation", "expected", "obtained",
        "tolerance", "verdict"}, as `experiments.reproduced.row` makes them, with absolute tolerances; "notes".

    Raises:
        ValueError: an unknown name.
    """
    result = _told(_computed(name))
    for note in result["notes"]:
        print(note, file=sys.stderr)
    return result


def run_into(name: str, out: RunFolder) -> dict[str, Any]:
    """The same, leaving ``result.json``, ``arrays.nc``, the figures, the report and the log in a run folder."""
    clock = Stopwatch()
    out.log(f"reproduce {name}")
    found = _computed(name)
    result = {"kind": "reproduce", **_told(found), "names": list(found), "seconds": clock.stop(), **provenance()}
    arrays = {}
    for known, one_found in found.items():
        for label, values in one_found.arrays.items():
            # A name in NetCDF has no hyphen; axes of equal length are not the same axis.
            variable = f"{known.replace('-', '_')}__{label}"
            arrays[variable] = (tuple(f"{variable}_{k}" for k in range(np.ndim(values))), values)
    if arrays:
        out.write_arrays(xr.Dataset(arrays))
    out.write_result(result)
    report.write(out)
    out.log(result["status"])
    for note in result["notes"]:
        out.log(f"  {note}")
    return result


def _computed(name: str) -> dict[str, Reproduced]:
    check_name(name)
    return {known: compute() for known, compute in COMPUTED.items() if name in (known, "all")}


def _told(found: Mapping[str, Reproduced]) -> dict[str, Any]:
    """Status, rows and notes of what was computed, each with its name."""
    rows = [one for known, one_found in found.items() for one in _named(known, one_found)]
    failed = sum(str(one["verdict"]).startswith("fail") for one in rows)
    status = f"failed: {failed} of {len(rows)} numbers are outside their tolerance" if failed else "done"
    notes = [f"{known}: {note}" for known, one_found in found.items() for note in one_found.notes]
    return {"status": status, "rows": rows, "notes": notes}


def _named(name: str, found: Reproduced) -> list[Row]:
    return [{"name": name, **one} for one in found.rows]


def _integrated(
    scheme: Scheme, theta_1: np.ndarray, theta_2: np.ndarray, separation_s: Any, method: Any = StaticGrid(1e-12)
) -> np.ndarray:
    """Populations (levels, ...) after two Gaussian pulses of equal width, integrated with 9 sigma on each side."""
    resonant = np.zeros((len(scheme.levels), *np.shape(theta_1)))
    system = LevelSystem(scheme.levels, (("v", "s"), ("s", "m")), resonant)
    pulses = (
        Gaussian.from_area(theta_1, center_s=0.0, sigma_s=_SIGMA_S),
        Gaussian.from_area(theta_2, center_s=separation_s, sigma_s=_SIGMA_S),
    )
    solution = evolve(
        system,
        pulses,
        start=scheme.start,
        window_s=(-9 * _SIGMA_S, separation_s + 9 * _SIGMA_S),
        method=method,
    )
    return np.asarray(solution.populations[0])


def _separated() -> Reproduced:
    note = (
        "The papers state agreement below 0.03 %; their definition of the relative standard deviation was not "
        "readable. Here RSD(y) = rms(y - y_closed)/mean(y_closed) over 15 x 15 areas in [0.1, pi - 0.05] rad."
    )
    ratios = np.array([13.0, *(ratio for ratio, _, _ in _RSD), *_CROSSING])
    theta_1, theta_2, separation_s = np.meshgrid(_AREAS, _AREAS, ratios * _SIGMA_S, indexing="ij")
    exact = np.asarray(_integrated(LAMBDA, theta_1, theta_2, separation_s)[1])
    closed = np.asarray(separated_populations(theta_1, theta_2)[1])
    rsd = 100 * np.sqrt(np.mean((exact - closed) ** 2, axis=(0, 1))) / np.mean(closed, axis=(0, 1))
    rows = [
        row(f"RSD(y) at {ratio:g} sigma, %", expected, obtained, tolerance, origin="derived here")
        for (ratio, expected, tolerance), obtained in zip(_RSD, rsd[1:], strict=False)
    ]
    near = rsd[-len(_CROSSING) :]
    crossing = np.interp(-math.log(_PUBLISHED_RSD), -np.log(near), _CROSSING)
    rows.append(row("separation at which RSD(y) is 0.03 %, sigma", 4.71, crossing, 0.0471, origin="derived here"))
    reference = np.asarray(
        _integrated(LAMBDA, theta_1[::7, ::7, 0], theta_2[::7, ::7, 0], 13 * _SIGMA_S, method=Adaptive())
    )
    apart = np.max(np.abs(reference[1] - closed[::7, ::7, 0]))
    rows.append(row("largest |y - y_closed| at 13 sigma, adaptive solver", 0.0, apart, 1e-10, origin="exact"))
    rows.append(row("RSD(y) at 13 sigma, %", _PUBLISHED_RSD, rsd[0], origin="published", relation="<"))
    order = np.argsort(ratios)
    return Reproduced(rows, {"separation_sigma": ratios[order], "rsd_percent": rsd[order],
                             "given_separation_sigma": np.array([ratio for ratio, _, _ in _RSD]),
                             "given_rsd_percent": np.array([value for _, value, _ in _RSD])}, (note,))  # fmt: skip


def _simultaneous() -> Reproduced:
    # The square of areas, and two pi pulses as the last lane.
    theta_1, theta_2 = (np.append(areas, math.pi) for areas in np.meshgrid(_AREAS, _AREAS))
    rows, solved = [], {}
    for scheme, start in ((LAMBDA, "v"), (V, "s")):
        solved[start] = _integrated(scheme, theta_1, theta_2, 0.0)[:3]
        apart = np.max(np.abs(solved[start] - np.stack(simultaneous_populations(theta_1, theta_2, start))))
        rows.append(row(f"start {start}: largest |P - P_exact|, 15 x 15 areas", 0.0, apart, 1e-10, origin="exact"))
    for label, expected, value in zip(("P_v", "P_s", "P_m"), _TWO_PI_PULSES, solved["v"][:, -1], strict=True):
        rows.append(row(f"start v: {label} after areas pi, pi", expected, value, 1e-8, origin="exact"))
    square = (len(_AREAS), len(_AREAS))
    return Reproduced(rows, {"theta_1": theta_1[:-1].reshape(square), "theta_2": theta_2[:-1].reshape(square),
                             "p_s_from_v": solved["v"][1, :-1].reshape(square),
                             "p_s_from_s": solved["s"][1, :-1].reshape(square)})  # fmt: skip


def _photonic_loop() -> Reproduced:
    rows = []
    windows = np.round(np.array([window for window, _, _ in _LOOPS]) * _CYCLES)
    found = np.array([_photonic_metrics(_CYCLES * m, windows * m) for m in (1, 2, 4)])
    for (window, area, form), areas, forms in zip(_LOOPS, found[:, 0].T, found[:, 1].T, strict=True):
        label = f"at T/T_osc = {window:g}"
        rows.append(row(f"loop area {label}", area, extrapolated(areas), 1e-8, origin="exact"))
        rows.append(row(f"form factor {label}", form, extrapolated(forms), 1e-6, origin="derived here"))
    cycles, given = _DISCRETE
    areas, forms = _photonic_metrics(cycles, np.array([n_w for n_w, _, _ in given], float))
    for (n_w, area, form), found_area, found_form in zip(given, areas, forms, strict=True):
        label = f"{cycles} cycles a period, window {n_w}"
        rows.append(row(f"loop area, {label}", area, found_area, 1e-8, origin="exact"))
        if form is not None:
            rows.append(row(f"form factor, {label}", form, found_form, 1e-8, origin="derived here"))
    rows += _transfer_rows() + _extremes()
    drawn = np.array([0.1, 0.25, 0.371010, 0.5, 0.75, 1.0])
    x, y = _photonic_period(200, 200 * drawn)
    closed = lambda a: np.concatenate([a, a[:1]]).T
    return Reproduced(rows, {"window": drawn, "x": closed(x), "y": closed(y),
                             "area_window": np.array([window for window, _, _ in _LOOPS]),
                             "area": np.array([area for _, area, _ in _LOOPS]),
                             "form_factor": np.array([form for _, _, form in _LOOPS])})  # fmt: skip


def _transfer_rows() -> list[Row]:
    """The transfer as it starts from a history of 1/2, and long after."""
    rows = []
    window = 0.37
    starting = lambda t: 0.5 - math.sin(2 * math.pi * t) / (4 * math.pi * window)
    for t, expected, tolerance in ((0.1, starting(0.1), 1e-8), (0.3, starting(0.3), 1e-8), (5.0, 0.343217621, 1e-8)):
        values = []
        for m in (1, 2, 4):
            cycles = 1000 * m
            x = sine_input(periods=math.ceil(t), cycles_per_period=cycles)
            device = PhotonicMemristor(memory=MovingAverage(window * cycles), source="model")
            values.append(run_loop(device, x).r[round(t * cycles)])
        found = extrapolated(np.array(values))
        rows.append(row(f"R at t = {t:g} T_osc for T/T_osc = {window:g}", expected, found, tolerance, origin="exact"))
    return rows


def _extremes() -> list[Row]:
    """Largest area and form factor of the single memristor; the slope of the area; the perimeter of a line."""
    angle = jnp.arange(4000) * (2 * jnp.pi / 4000)

    def loop(window):
        alone = CrossedPair(window).points(angle)  # Phi = 0: each remembers what is its own input too
        return alone["x_a"], alone["y_a"]

    area, form = (lambda t: hysteresis.signed_area(*loop(t))), (lambda t: hysteresis.form_factor(*loop(t)))
    rows = []
    # The area has a closed form, (pi/8) sin^2 phi/phi, whose maximum is at tan phi = 2 phi; the form factor has none.
    largest_of: tuple[tuple[str, Callable, float, float, Origin], ...] = (
        ("area", area, 0.3710096482, 0.2845542132, "exact"),
        ("form factor", form, 0.35346, 0.583662, "derived here"),
    )
    for label, metric, place, largest, origin in largest_of:
        slope = jax.jit(jax.value_and_grad(lambda v, metric=metric: -metric(v[0])))
        best = minimize(lambda v, slope=slope: [np.asarray(a) for a in slope(v)], [0.4], jac=True, tol=1e-12)
        rows.append(row(f"largest loop {label}", largest, -best.fun, 1e-6, origin=origin))
        rows.append(row(f"T/T_osc of the largest loop {label}", place, best.x[0], 6e-6, origin=origin))
    slope_there = jax.grad(area)(0.25)
    rows.append(row("dA/dT at T_osc/4, times T_osc", math.pi / 2 - 1, slope_there, 1e-5, origin="exact"))
    rows.append(row("perimeter at T = T_osc", math.sqrt(5), hysteresis.perimeter(*loop(1.0)), 1e-6, origin="exact"))
    return rows


def _photonic_period(cycles_per_period: int, window_cycles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the ideal memristor over one period of its steady state, shape (cycles, windows)."""
    device = PhotonicMemristor(memory=MovingAverage(window_cycles), source="model")
    periods = 1 + math.ceil(np.max(window_cycles) / cycles_per_period)
    x_set = sine_input(periods=periods, cycles_per_period=cycles_per_period)
    loop = run_loop(device, jnp.broadcast_to(x_set[:, None], (x_set.size, window_cycles.size)))
    last = slice((periods - 1) * cycles_per_period, periods * cycles_per_period)
    return np.asarray(loop.x[last]), np.asarray(loop.y[last])


def _photonic_metrics(cycles_per_period: int, window_cycles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas and form factors of the ideal memristor's loop in its steady state, one for each window."""
    metrics = jax.jit(jax.vmap(lambda x, y: (hysteresis.signed_area(x, y), hysteresis.form_factor(x, y)), in_axes=1))
    areas, forms = metrics(*_photonic_period(cycles_per_period, window_cycles))
    return np.asarray(areas), np.asarray(forms)


COMPUTED: dict[str, Callable[[], Reproduced]] = {
    "separated-pulses": _separated,
    "simultaneous-pulses": _simultaneous,
    "photonic-loop": _photonic_loop,
    "crossed-pair": crossed_pair.compute,
    "merlin-narma": reproduce_reservoirs.merlin_narma,
    "x4": reproduce_reservoirs.fourth_power,
}
"""How each name is computed; `experiments.reproduce_plots` has the figure of each."""
