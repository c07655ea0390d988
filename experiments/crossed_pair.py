"""`iontwin reproduce crossed-pair`: two memristors that remember each other's inputs.

Baldazzi et al. (arXiv:2602.14736) report form factors up to about 0.95; only their abstract was readable. That R_A is
the mean of x_B and the reverse is an assumption, which reproduces their number.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from experiments.reproduced import Reproduced, extrapolated, row
from twin import hysteresis
from twin.crossed import CrossedPair
from twin.graph import Graph
from twin.memory import MovingAverage
from twin.network import Network, play
from twin.photonic import PhotonicMemristor

# T/T_osc, Phi, form factor of the inter loop by an earlier computation of ours, half a unit of its last digit.
_FORMS = (
    (0.491, -1.56, 0.95158, 5e-6),
    (0.5, -math.pi / 2, 0.95152, 5e-6),
    (0.25, -math.pi / 2, 0.88715, 5e-6),
    (0.01, -math.pi / 2, 0.66940, 5e-6),
)
_CYCLES = 1000  # a period; every window above is a whole number of them
_POINTS = 4000  # of a polygon of the closed form
_SELF_CROSSING = (0.4, 0.3)  # a pair whose inter loop crosses itself


def compute() -> Reproduced:
    """Rows and loops of crossed pairs, played as networks."""
    note = (
        "The paper states form factors up to about 0.95; its wiring and its T and Phi were not readable. Here R_A is "
        "the moving average of x_B, R_B that of x_A, and B leads by Phi."
    )
    pairs = [(window, phase) for window, phase, _, _ in _FORMS] + [(0.5, math.pi / 2), _SELF_CROSSING]
    played = [_played(pairs, _CYCLES * m) for m in (1, 2, 4)]
    rows = []
    found = np.array([[_metrics(*loop) for loop in zip(x_b, y_a, strict=True)] for _, x_b, y_a in played])
    intra = np.array([[_metrics(*loop)[0] for loop in zip(x_a, y_a, strict=True)] for x_a, _, y_a in played])
    for k, (window, phase, form, tolerance) in enumerate(_FORMS):
        label = f"T/T_osc = {window:g}, Phi = {phase:.4g}"
        found_form = extrapolated(found[:, k, 1])
        rows.append(row(f"form factor of y_A over x_B, {label}", form, found_form, tolerance, origin="derived here"))
    for k, (window, phase) in enumerate(pairs):
        label, pair = f"T/T_osc = {window:g}, Phi = {phase:.4g}", CrossedPair(window, phase)
        for which, area, values in (("x_B", pair.inter_area, found[:, k, 0]), ("x_A", pair.intra_area, intra[:, k])):
            limit = extrapolated(values)
            rows.append(row(f"area of y_A over {which}, {label}", float(area), limit, 1e-8, origin="exact"))
    _, x_b, y_a = played[0]
    pair = CrossedPair(*_SELF_CROSSING, _CYCLES)
    crossing = _crossing(x_b[-1], y_a[-1], float(pair.crossing_x))
    label = "x_B where the loop of T/T_osc = 0.4, Phi = 0.3 crosses itself"
    rows.append(row(label, float(pair.crossing_x), crossing, 1e-5, origin="exact"))
    window, phase, largest = _largest()
    rows.append(row("largest form factor of y_A over x_B", 0.9516, largest, 1e-3, origin="derived here"))
    rows.append(row("T/T_osc of the largest form factor", 0.491, window, 5e-4, origin="derived here"))
    rows.append(row("Phi of the largest form factor (rad)", -1.560, phase, 5e-4, origin="derived here"))
    rows.append(row("largest form factor, to the two digits published", 0.95, largest, 5e-3, origin="published"))
    x_a, x_b, y_a = (np.concatenate([a, a[:, :1]], axis=1) for a in played[0])
    forms = _map()
    return Reproduced(rows, {"window": np.array(pairs)[:, 0], "phase_rad": np.array(pairs)[:, 1], "x_a": x_a,
                             "x_b": x_b, "y_a": y_a, **forms}, (note,))  # fmt: skip


def _played(pairs, cycles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x_A, x_B, y_A of each pair over its last period, shape (pairs, cycles); all pairs are one network."""
    n = 2 * len(pairs)
    a, b = np.arange(0, n, 2), np.arange(1, n, 2)
    windows = np.repeat([round(window * cycles) for window, _ in pairs], 2).astype(float)
    device = PhotonicMemristor(memory=MovingAverage(windows), source="model")
    both = Graph.from_edges(n, np.concatenate([a, b]), np.concatenate([b, a]), kind="memory")
    phases = np.zeros(n)
    phases[1::2] = [phase for _, phase in pairs]
    u = 2 * math.pi * np.arange(2 * cycles) / cycles
    trace = play(Network((device,), both), (1 - np.cos(u[:, None] + phases)) / 2, keep=("x", "y"))
    x, y = (np.asarray(values)[cycles:].T for values in (trace.x, trace.y))
    return x[a], x[b], y[a]


@jax.jit
def _jitted_metrics(x, y):
    return hysteresis.signed_area(x, y), hysteresis.form_factor(x, y)


def _metrics(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    area, form = _jitted_metrics(jnp.asarray(x), jnp.asarray(y))
    return float(area), float(form)


def _crossing(x: np.ndarray, y: np.ndarray, near: float) -> float:
    """Where the branches of a played loop cross, by the sign of its width."""
    grid = np.linspace(near - 0.02, near + 0.02, 9)
    width = np.asarray(hysteresis.branch_width(jnp.asarray(x), jnp.asarray(y), grid))
    k = int(np.flatnonzero(np.diff(np.sign(width)))[0])
    return float(grid[k] - width[k] * (grid[k + 1] - grid[k]) / (width[k + 1] - width[k]))


def _form(v):
    found = CrossedPair(v[0], v[1]).points(jnp.arange(_POINTS) * (2 * jnp.pi / _POINTS))
    return hysteresis.form_factor(found["x_b"], found["y_a"])


def _largest() -> tuple[float, float, float]:
    """T/T_osc, Phi and the form factor at the maximum, by gradients through the closed form."""
    slope = jax.jit(jax.value_and_grad(lambda v: -_form(v)))
    best = minimize(lambda v: [np.asarray(a) for a in slope(v)], [0.4, -1.4], jac=True, tol=1e-12)
    return float(best.x[0]), float(best.x[1]), -float(best.fun)


def _map() -> dict[str, np.ndarray]:
    """Form factors over windows and phases."""
    windows, phases = np.linspace(0.02, 1.5, 75), np.linspace(-math.pi, math.pi, 81)
    forms = jax.jit(jax.vmap(_form))(jnp.asarray(np.stack(np.meshgrid(windows, phases), axis=-1).reshape(-1, 2)))
    return {"map_window": windows, "map_phase_rad": phases,
            "map_form_factor": np.asarray(forms).reshape(phases.size, windows.size)}  # fmt: skip
