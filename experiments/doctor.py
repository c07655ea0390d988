"""`iontwin doctor`: whether this installation computes what it should, and where it keeps what it compiled."""

import dataclasses
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from calibration.parameters import value_of, with_parameters
from experiments.provenance import versions
from twin.dynamics import StaticGrid
from twin.loop import run as run_loop
from twin.loop import sine_input
from twin.memory import MovingAverage
from twin.memristor import ClosedForm, IonMemristor, planned

# Largest relative error of a derivative. The finite difference below is good to some 1e-9.
_GRADIENT_TOLERANCE = 1e-6
# At 13 sigma the closed form is exact to rounding, and the grid is asked for this.
_GRID_ERROR = 1e-8
# Parameters whose derivative is checked, and the step of its finite difference.
_STEPS = {"rabi_scale_1": 1e-3, "detuning_1_hz": 20.0, "window_cycles": 1e-2}


def run() -> dict[str, Any]:
    """Check devices, precision, derivatives, the closed form, and the compile cache.

    Returns:
        {"status", "devices", "precision", "versions", "compile_cache", "gradients", "closed_form", "run"}; each check
        has an "ok", and the status names those that failed.
    """
    result: dict[str, Any] = {
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "precision": _precision(),
        "versions": versions(),
        "compile_cache": _compile_cache(),
        "gradients": _gradients(),
        **_solver(),
    }
    checks = {name: value for name, value in result.items() if isinstance(value, dict) and "ok" in value}
    checks |= {f"gradients.{name}": value for name, value in result["gradients"].items()}
    failed = [name for name, value in checks.items() if not value["ok"]]
    return {"status": f"failed: {', '.join(failed)}" if failed else "done", **result}


def _precision() -> dict[str, Any]:
    """64-bit numbers, as asked for and as found: 1 + 1e-12 must differ from 1."""
    kept = float((jnp.asarray(1.0) + 1e-12) - 1.0)
    return {"float": str(jnp.result_type(float)), "ok": abs(kept - 1e-12) < 1e-15}


def _compile_cache() -> dict[str, Any]:
    """Where JAX keeps compiled programs, and whether it can."""
    folder = jax.config.jax_compilation_cache_dir
    if not jax.config.jax_enable_compilation_cache or folder is None:
        return {"folder": "none: every process compiles anew", "ok": True}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            entries = sum(not entry.is_dir() for entry in os.scandir(folder))
    except OSError as error:
        return {"folder": f"{folder} cannot be written ({error.strerror})", "ok": False}
    return {"folder": folder, "entries": entries, "ok": True}


def _gradients() -> dict[str, dict[str, Any]]:
    """Derivatives of the outputs through the whole Lindblad loop, against central differences of fourth order."""
    device = IonMemristor(
        memory=MovingAverage(2.6),
        source="model",
        method=StaticGrid(1e-11),
        detuning_1_hz=900.0,
        laser_linewidth_hz=100.0,
    )
    box = {"rabi_scale_1": (0.9, 1.1), "detuning_1_hz": (800.0, 1000.0)}
    device = planned(device, box)
    x_set = sine_input(periods=2, cycles_per_period=5)

    @eqx.filter_jit
    def derivatives(values: dict[str, jax.Array]):
        return jax.value_and_grad(lambda v: jnp.sum(run_loop(with_parameters(device, v), x_set).y[5:] ** 2))(values)

    here = {name: jnp.asarray(value_of(device, name)) for name in _STEPS}
    _, slopes = derivatives(here)
    found = {}
    for name, step in _STEPS.items():
        value = lambda k: float(derivatives({**here, name: here[name] + k * step})[0])  # noqa: B023 called at once
        reference = (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * step)
        error = abs(float(slopes[name]) - reference) / abs(reference)
        found[name] = {
            "gradient": float(slopes[name]),
            "finite_difference": reference,
            "relative_error": error,
            "ok": error < _GRADIENT_TOLERANCE,
        }
    return found


def _solver() -> dict[str, dict[str, Any]]:
    """The static grid against the closed form, at 13 sigma without decay and noise, and the seconds it takes.

    The second run has other values of the parameters, which must not compile again.
    """
    settings: dict[str, Any] = {"separation_s": 13 * 20e-6, "lead_s": 180e-6, "tail_s": 180e-6, "lifetime_s": math.inf}
    device = IonMemristor(memory=MovingAverage(10.0), source="model", method=StaticGrid(_GRID_ERROR), **settings)
    device = planned(device, {"rabi_scale_1": (0.9, 1.1)})
    x_set = sine_input(periods=3, cycles_per_period=40)
    seconds, errors = [], []
    for scale in (1.0, 0.97):
        one = with_parameters(device, {"rabi_scale_1": jnp.asarray(scale)})
        began = time.perf_counter()
        y = jax.block_until_ready(run_loop(one, x_set).y)
        seconds.append(time.perf_counter() - began)
        exact = run_loop(dataclasses.replace(one, method=ClosedForm()), x_set).y
        errors.append(float(jnp.max(jnp.abs(y - exact))))
    error = max(errors)
    return {
        "closed_form": {"largest_error": error, "asked_for": _GRID_ERROR, "ok": error <= _GRID_ERROR},
        "run": {"first_s": seconds[0], "second_s": seconds[1], "ok": seconds[1] < seconds[0]},
    }
