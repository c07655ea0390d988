"""QuTiP-QOC on a transfer problem: reads it from standard input as JSON, and writes how the search went.

A script of its own, for QuTiP-QOC needs an older NumPy than the package does: run it with an interpreter that has
qutip, qutip-qoc and qutip-jax. Controls are in units of their bound, times in those of the caller.
"""

import json
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import qutip as qt
import qutip_jax  # noqa: F401 - JOPT needs it
import qutip_qoc as qoc
from diffrax import PIDController
from qutip_qoc import objective

# Sines of each control in JOPT, and pairs of sine and cosine in CRAB.
HARMONICS = 5
# The pulses of JOPT are smooth: they are sampled finely enough to be judged.
_STEPS_A_SLICE = 10


class Clock:
    """When each evaluation ended, and what an iteration reached; time begins after the first value and gradient."""

    def __init__(self, seconds: float):
        self.seconds, self.evaluations, self.zero, self.kept, self.last = seconds, 0, None, [], None
        self.made = time.perf_counter()

    def evaluated(self) -> None:
        """Counts; the first one compiles."""
        now = time.perf_counter()
        self.zero = now if self.zero is None else self.zero
        self.evaluations, self.last = self.evaluations + 1, now

    def iterated(self, intermediate_result) -> None:
        """Keeps the numbers that bettered the objective by seven per cent; ends the search when time is up."""
        elapsed = time.perf_counter() - self.zero
        fun = float(intermediate_result.fun)
        if not self.kept or fun < 0.93 * self.kept[-1][1]:
            self.kept.append((elapsed, fun, np.array(intermediate_result.x)))
        if elapsed > self.seconds or fun < 1e-13:
            raise StopIteration


def matrix(parts) -> qt.Qobj:
    """A matrix from its real and imaginary parts."""
    return qt.Qobj(np.asarray(parts[0]) + 1j * np.asarray(parts[1]))


def sines(t, p, duration):
    """A sum of sines in (-1, 1) that is zero at both ends: what JOPT moves."""
    return jnp.tanh(jnp.sum(p * jnp.sin(jnp.pi * jnp.arange(1, HARMONICS + 1) * t / duration)))


def main() -> None:
    """One search."""
    problem = json.load(sys.stdin)
    algorithm, start, duration = problem["algorithm"], np.asarray(problem["start"]), problem["duration"]
    slices, jumps = len(start), [matrix(jump) for jump in problem["jumps"]]
    lift = (lambda h, c=(): qt.liouvillian(h, list(c))) if jumps else (lambda h, c=(): h)
    still, controls = lift(matrix(problem["still"]), jumps), [lift(matrix(c)) for c in problem["controls"]]
    ends = [qt.basis(still.dims[0][0] if not jumps else 3, k) for k in (0, 2)]
    ends = [qt.ket2dm(ket) for ket in ends] if jumps else ends
    clock = Clock(problem["seconds"])
    if algorithm == "JOPT":
        control = jax.jit(lambda t, p: sines(t, p, duration))
        hamiltonian = [still, *([c, control] for c in controls)]
        # The sines that come closest to the starting samples.
        t = (np.arange(slices) + 0.5) / slices
        basis = np.sin(np.pi * np.outer(t, np.arange(1, HARMONICS + 1)))
        guesses = list(np.linalg.lstsq(basis, np.arctanh(start), rcond=None)[0].T)
        bounds = [[(-20.0, 20.0)] * HARMONICS] * 2
    else:
        hamiltonian, guesses, bounds = [still, *controls], list(start.T), [(-1.0, 1.0)] * 2
    method = {"GRAPE": "L-BFGS-B", "JOPT": "L-BFGS-B", "CRAB": "Nelder-Mead"}[algorithm]
    options = {"ftol": 0.0, "gtol": 0.0, "maxcor": 10} if algorithm != "CRAB" else {"xatol": 0.0, "fatol": 0.0}
    count = lambda f: lambda *a: (f(*a), clock.evaluated())[0]
    # A value and its gradient are one evaluation; CRAB has values only.
    counted = "goal_fun" if algorithm == "CRAB" else "grad_fun"
    setattr(objective._MultiObjective, counted, count(getattr(objective._MultiObjective, counted)))
    result = qoc.optimize_pulses(
        [qoc.Objective(ends[0], hamiltonian, ends[1])],
        {f"c{k}": {"guess": guesses[k], "bounds": bounds[k]} for k in range(2)},
        np.linspace(duration / slices, duration, slices),
        algorithm_kwargs={"alg": algorithm, "fid_err_targ": 1e-13, "max_wall_time": 1e9,
                          "max_iter": 10**6, "num_coeffs": HARMONICS, "min_grad": 0.0},
        minimizer_kwargs={"method": method, "options": options | {"maxfun" if method[0] == "L" else "maxfev": 10**6},
                          "callback": clock.iterated},
        integrator_kwargs={"stepsize_controller": PIDController(1e-8, 1e-8)} if algorithm == "JOPT" else None,
    )  # fmt: skip

    def samples(x):
        if algorithm == "JOPT":
            t = (np.arange(slices * _STEPS_A_SLICE) + 0.5) / (slices * _STEPS_A_SLICE) * duration
            return np.stack([[float(sines(at, p, duration)) for at in t] for p in np.split(x, 2)], axis=1)
        return np.asarray(result.qtrl_optimizers[0]._get_ctrl_amps(x.copy()))

    json.dump(
        {
            "setup_s": clock.zero - clock.made,
            "evaluations": clock.evaluations,
            "search_s": clock.last - clock.zero,
            "path": [(elapsed, samples(x).tolist()) for elapsed, _, x in clock.kept],
            "message": result.message,
            "versions": {"qutip-qoc": qoc.__version__, "qutip": qt.__version__, "numpy": np.__version__},
        },
        sys.stdout,
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
