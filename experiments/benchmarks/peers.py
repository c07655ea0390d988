"""Other codes on the devices of `problems`: dynamiqs, Qiskit Dynamics, QuTiP, and plain vmapped Diffrax.

Each gets microseconds, so that no default of its step size control meets tiny numbers, is compiled once for the whole
batch, and returns populations at the save times, shape (devices, saves, 3). Install them with `pip install '.[bench]'`.
"""

import importlib
from collections.abc import Callable
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.problems import BRANCHING, LIFETIME_S, WINDOW_S, Devices, as_twin, save_times
from twin import magnus
from twin.batching import broadcast_batch
from twin.master_equation import lindblad_components

_UNIT_S = 1e-6
_WINDOW = tuple(t / _UNIT_S for t in WINDOW_S)


def _ket_bra(a: int, b: int) -> np.ndarray:
    matrix = np.zeros((3, 3), complex)
    matrix[a, b] = 1
    return matrix


# Levels v, s, m. The two halves of the drive, and the jumps without their rates.
_DRIVES = np.stack([0.5 * (_ket_bra(a, b) + _ket_bra(b, a)) for a, b in ((1, 0), (2, 1))])
_JUMPS = np.stack([_ket_bra(0, 1), _ket_bra(2, 1), _ket_bra(1, 1)])


def matrices(d: Devices) -> dict[str, np.ndarray]:
    """Numbers of each device in microseconds: energies (n, 3), rates (n, 3), pulses (n, 2) each."""
    two_pi = 2 * np.pi * _UNIT_S
    zero = np.zeros_like(d.detuning_1_hz)
    energies = np.stack([zero, -two_pi * d.detuning_1_hz, two_pi * (d.detuning_2_hz - d.detuning_1_hz)], -1)
    decay = np.full_like(zero, _UNIT_S / LIFETIME_S)
    # One source for both lines shifts s by one unit and m by none: |s><s| with twice pi times the linewidth.
    rates = np.stack([decay * BRANCHING, decay * (1 - BRANCHING), two_pi * d.linewidth_hz], -1)
    sigma = np.stack([d.sigma_1_s, d.sigma_2_s], -1) / _UNIT_S
    peak = np.stack([d.area_1_rad, d.area_2_rad], -1) / (np.sqrt(2 * np.pi) * sigma)
    center = np.stack([zero, d.separation_s / _UNIT_S], -1)
    return {"energies": energies, "rates": rates, "sigma": sigma, "peak": peak, "center": center}


def _envelope(numbers, t):
    return numbers["peak"] * jnp.exp(-0.5 * ((t - numbers["center"]) / numbers["sigma"]) ** 2)


def _jump_operators(numbers):
    return jnp.sqrt(numbers["rates"])[..., None, None] * jnp.asarray(_JUMPS)


def plain_diffrax(d: Devices, tolerance: float) -> Callable[[], jax.Array]:
    """Adaptive Dopri8, complex 3 x 3 density matrix, one `vmap`: what a first attempt looks like."""

    def slope(t, rho, numbers):
        h = jnp.diag(numbers["energies"]) + jnp.tensordot(_envelope(numbers, t), jnp.asarray(_DRIVES), 1)
        out = -1j * (h @ rho - rho @ h)
        for jump in _jump_operators(numbers):
            square = jump.conj().T @ jump
            out = out + jump @ rho @ jump.conj().T - 0.5 * (square @ rho + rho @ square)
        return out

    # Diffrax warns of complex numbers; two real halves are what it supports.
    def halves(t, y, numbers):
        out = slope(t, y[0] + 1j * y[1], numbers)
        return jnp.stack([out.real, out.imag])

    def solve(numbers):
        start = jnp.zeros((2, 3, 3)).at[0, 0, 0].set(1.0)
        ys = diffrax.diffeqsolve(
            diffrax.ODETerm(halves),
            diffrax.Dopri8(),
            _WINDOW[0],
            _WINDOW[1],
            None,
            start,
            args=numbers,
            saveat=diffrax.SaveAt(ts=jnp.asarray(save_times() / _UNIT_S)),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=16384,
        ).ys
        return jnp.diagonal(ys[:, 0], axis1=-2, axis2=-1)

    batch, numbers = jax.jit(jax.vmap(solve)), jax.tree.map(jnp.asarray, matrices(d))
    return lambda: batch(numbers)


def dynamiqs(d: Devices, tolerance: float, solver: str) -> Callable[[], jax.Array]:
    """`mesolve` over a flat batch, vectorized, populations as expectation values, inside one `jit`."""
    dq = importlib.import_module("dynamiqs")
    dq.set_precision("double")
    dq.set_progress_meter(False)
    method = {"Dopri8": dq.method.Dopri8, "Tsit5": dq.method.Tsit5}[solver](rtol=tolerance, atol=tolerance)

    @jax.jit
    def batch(numbers):
        h = dq.constant(jax.vmap(jnp.diag)(numbers["energies"]).astype(complex))
        for k in range(2):
            h = h + dq.modulated(lambda t, k=k: _envelope(numbers, t)[:, k], jnp.asarray(_DRIVES[k]))
        jumps = [_jump_operators(numbers)[:, j] for j in range(len(_JUMPS))]
        result = dq.mesolve(
            h,
            jumps,
            jnp.asarray(_ket_bra(0, 0)),
            jnp.asarray(save_times() / _UNIT_S),
            exp_ops=[jnp.asarray(_ket_bra(j, j)) for j in range(3)],
            method=method,
            save_states=False,
            cartesian_batching=False,
            vectorized=True,
        )
        return jnp.swapaxes(result.expects.real, 1, 2)

    numbers = jax.tree.map(jnp.asarray, matrices(d))
    return lambda: batch(numbers)


def qiskit_dynamics(d: Devices, tolerance: float) -> Callable[[], jax.Array]:
    """`Solver` on JAX arrays with Diffrax's Dopri8, one `vmap` and one `jit`."""
    qd = importlib.import_module("qiskit_dynamics")

    def solve(numbers):
        solver = qd.Solver(
            static_hamiltonian=jnp.diag(numbers["energies"]).astype(complex),
            hamiltonian_operators=jnp.asarray(_DRIVES),
            static_dissipators=_jump_operators(numbers),
            array_library="jax",
            vectorized=True,
            validate=False,
        )
        # A signal without carrier is the envelope itself.
        signals = [qd.Signal(lambda t, k=k: _envelope(numbers, t)[k], 0.0) for k in range(2)]
        result = solver.solve(
            t_span=list(_WINDOW),
            y0=jnp.asarray(_ket_bra(0, 0).ravel()),
            signals=signals,
            t_eval=jnp.asarray(save_times() / _UNIT_S),
            method=diffrax.Dopri8(),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=16384,
        )
        return result.y[:, np.array([0, 4, 8])].real

    batch, numbers = jax.jit(jax.vmap(solve)), jax.tree.map(jnp.asarray, matrices(d))
    return lambda: batch(numbers)


def qutip(d: Devices, tolerance: float) -> Callable[[], np.ndarray]:
    """`mesolve` called for each device, with time-dependent coefficients from Python functions of NumPy scalars."""
    qt = importlib.import_module("qutip")
    numbers = matrices(d)
    operators = [qt.Qobj(m) for m in _DRIVES]
    expectations = [qt.Qobj(_ket_bra(j, j)) for j in range(3)]
    times = save_times() / _UNIT_S

    def one(i):
        energies, rates, sigma, peak, center = (numbers[k][i] for k in ("energies", "rates", "sigma", "peak", "center"))
        pulse = lambda k: lambda t: peak[k] * np.exp(-0.5 * ((t - center[k]) / sigma[k]) ** 2)
        h = qt.QobjEvo([qt.Qobj(np.diag(energies)), *([operators[k], pulse(k)] for k in range(2))])
        jumps = [np.sqrt(rate) * qt.Qobj(jump) for rate, jump in zip(rates, _JUMPS, strict=True)]
        # The step bound keeps it from stepping over a pulse.
        options = {"rtol": tolerance, "atol": tolerance, "max_step": 15.0, "nsteps": 100000, "progress_bar": ""}
        result = qt.mesolve(h, qt.basis(3, 0), times, c_ops=jumps, e_ops=expectations, options=options)
        return np.stack(result.expect, axis=-1)

    return lambda: np.stack([one(i) for i in range(len(d.detuning_1_hz))])


class _MagnusSolver(diffrax.AbstractSolver):
    """The Magnus step of `twin.magnus` behind Diffrax's interface; time counts steps."""

    advance: Callable
    edges: jax.Array

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 4

    def init(self, terms, t0, t1, y0, args):
        return None

    def func(self, terms, t0, y0, args):
        return y0

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        i = jnp.round(t0).astype(int)
        y1 = self.advance(y0, self.edges[i], self.edges[i + 1] - self.edges[i])
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful


def bare_scan(advance, edges, start):
    """Populations after each step from `lax.scan`, as `twin.magnus.walk` does it."""
    rows = (edges[:-1], jnp.diff(edges))
    return magnus.walk(lambda y, row: advance(y, *row), start, rows, np.arange(len(edges) - 1))[:, :3]


def diffrax_loop(advance, edges, start):
    """The same from `diffeqsolve`."""
    ys = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: y),
        _MagnusSolver(advance, edges),
        0.0,
        float(len(edges) - 1),
        1.0,
        tuple(start),
        saveat=diffrax.SaveAt(steps=True),
        stepsize_controller=diffrax.ConstantStepSize(),
        max_steps=len(edges) - 1,
    ).ys
    return jnp.stack(ys, axis=1)[:, :3]


def magnus_steps(d: Devices, loop: Callable) -> Callable[[], jax.Array]:
    """The twin's own Magnus steps between the save times in a `loop`, one of the two above."""
    shape = d.detuning_1_hz.shape

    @jax.jit
    def batch(problem):
        system, pulses = broadcast_batch(problem, shape)
        drives = lambda time: [pulse.drive(time.t_s, time.within_s) for pulse in pulses]
        slopes = partial(lindblad_components, rotating=True)
        advance = lambda y, start_s, length_s: magnus.step(
            slopes, system, drives, y, jnp.broadcast_to(start_s, shape), jnp.broadcast_to(length_s, shape)
        )
        return loop(advance, jnp.asarray(save_times()), jnp.zeros((9, *shape)).at[0].set(1.0))

    problem = as_twin(d)
    return lambda: batch(problem)


def dynamiqs_tsit5(d: Devices, tolerance: float) -> Callable[[], jax.Array]:
    """`dynamiqs` with its default method."""
    return dynamiqs(d, tolerance, "Tsit5")


def dynamiqs_gradient(d: Devices, tolerance: float) -> tuple[Callable[[], jax.Array], Callable[[], jax.Array]]:
    """A loss of the final populations of all devices, and the same with its gradient by all pulse parameters."""
    dq = importlib.import_module("dynamiqs")
    dq.set_precision("double")
    dq.set_progress_meter(False)
    fixed = jax.tree.map(jnp.asarray, matrices(d))

    def loss(scales):
        # Seven numbers, as the likelihood has: they scale energies, rates and pulses.
        numbers = fixed | {
            "energies": fixed["energies"] * scales[:3],
            "rates": fixed["rates"] * jnp.stack([scales[3], scales[3], scales[4]]),
            "peak": fixed["peak"] * scales[5:],
        }
        h = dq.constant(jax.vmap(jnp.diag)(numbers["energies"]).astype(complex))
        for k in range(2):
            h = h + dq.modulated(lambda t, k=k: _envelope(numbers, t)[:, k], jnp.asarray(_DRIVES[k]))
        result = dq.mesolve(
            h,
            [_jump_operators(numbers)[:, j] for j in range(len(_JUMPS))],
            jnp.asarray(_ket_bra(0, 0)),
            jnp.asarray(_WINDOW),
            exp_ops=[jnp.asarray(_ket_bra(1, 1))],
            method=dq.method.Tsit5(rtol=tolerance, atol=tolerance),
            gradient=dq.gradient.BackwardCheckpointed(),
            save_states=False,
            cartesian_batching=False,
            vectorized=True,
        )
        return jnp.sum(result.expects.real[..., -1] ** 2)

    value, both, at = jax.jit(loss), jax.jit(jax.value_and_grad(loss)), jnp.ones(7)
    return lambda: value(at), lambda: both(at)
