"""`iontwin trap`: from voltages, geometry and beams to what the memristor feels of its trap.

Prints trap, chain, modes and Lamb-Dicke factors; with a folder it leaves ``result.json``, ``arrays.nc`` and the report
with figures.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray as xr

from experiments import report
from experiments.build import device_from
from experiments.provenance import Stopwatch, provenance
from experiments.records import RunFolder
from experiments.schema import Config
from experiments.trapped import apparatus_from, place_of
from twin import mathieu
from twin.apparatus import Apparatus
from twin.chain import Modes, zigzag_ratio
from twin.ion import YB171
from twin.memristor import IonMemristor
from twin.phonons import Motion
from twin.register import Register
from twin.sidebands import sideband_bound
from twin.surface_trap import SurfaceTrap

_SHOWN = 12  # modes in the printed table
_POINTS = 121  # of each side of the drawn pseudopotential


def run(config: Config, out: RunFolder | None) -> dict[str, Any]:
    """What the tables [trap], [chain] and [motion] come to.

    Args:
        config: with a table [trap]; [device] tells pulses, temperature and heating.
        out: a run folder, or None to leave nothing.

    Raises:
        ValueError: a trap that does not hold the ion, or a chain that is not straight.
    """
    clock = Stopwatch()
    device = device_from(config)
    ion = device.ion if isinstance(device, Register) else device
    assert isinstance(ion, IonMemristor) and ion.motion is not None
    apparatus = apparatus_from(config)
    modes = apparatus.chain().modes()
    columns = _columns(apparatus, modes, ion, place_of(config))
    motion = _motion(apparatus, ion, columns)
    held = math.isfinite(motion["more"]["carrier of beam 1, mean"])
    result = {
        "kind": "trap",
        "status": "done" if held else "failed: the thermal average does not serve this occupation; lower it",
        "trap": _trap(apparatus, columns),
        "chain": _chain(apparatus, modes),
        "motion": motion,
        "notes": _notes(ion, apparatus, modes, motion),
        "seconds": clock.stop(),
        **provenance(),
    }
    if out is not None:
        out.write_arrays(_arrays(columns))
        out.write_result(result)
        report.write(out)
    return result


def _floats(values) -> list[float]:
    return [float(v) for v in np.asarray(values)]


def _trap(apparatus: Apparatus, columns: dict[str, np.ndarray]) -> dict[str, Any]:
    trap = apparatus.trap
    with_rf = bool(jnp.all(jnp.isfinite(trap.q)))
    more: dict[str, Any] = {}
    if isinstance(trap, SurfaceTrap):
        x, y = _floats(trap.null_m)
        more |= {
            "rf null: x (um)": x * 1e6,
            "rf null: height (um)": y * 1e6,
            "tilt of the radial axes (degrees)": math.degrees(float(trap.tilt_rad)),
            "efficiency": float(trap.efficiency),
        }
        saddle = np.asarray(trap.saddle_m)
        x_axis = np.linspace(x - 1.2 * y, x + 1.2 * y, _POINTS)
        y_axis = np.linspace(0.3 * y, 1.25 * saddle[1], _POINTS)
        energy = trap.pseudopotential_ev(jnp.asarray(x_axis)[None, :], jnp.asarray(y_axis)[:, None])
        columns |= {"x_m": x_axis, "y_m": y_axis, "pseudopotential_ev": np.asarray(energy), "saddle_m": saddle,
                    "null_m": np.array([x, y])}  # fmt: skip
    if with_rf:
        a = np.linspace(-0.6, 0.9, 301)
        columns |= {"edge_a": a, "edge_low": np.asarray(mathieu.smallest_stable_q(jnp.asarray(a))),
                    "edge_high": np.asarray(mathieu.largest_stable_q(jnp.asarray(a)))}  # fmt: skip
        more["intrinsic micromotion (ratio along x)"] = float(trap.micromotion_ratio[0])
    if bool(jnp.isfinite(trap.depth_ev)):
        more["depth (eV)"] = float(trap.depth_ev)
    if bool(jnp.any(apparatus.stray_field_v_per_m != 0)):
        for pulse in (1, 2):
            field = apparatus.along_axes(apparatus.stray_field_v_per_m)
            seen = trap.excess_micromotion(field, apparatus.wavevector_rad_m(pulse))
            more[f"excess micromotion: index of beam {pulse}"] = float(seen.index)
            more[f"excess micromotion: carrier of beam {pulse} (J0)"] = float(seen.carrier_factor)
        more["displacement by the stray field (nm)"] = float(jnp.linalg.norm(seen.displacement_m)) * 1e9
    return {
        "kind": type(trap).__name__,
        "secular_hz": _floats(trap.secular_hz),
        "a": _floats(trap.a) if with_rf else None,
        "q": _floats(trap.q) if with_rf else None,
        "beta": _floats(trap.beta) if with_rf else None,
        "pseudopotential_hz": _floats(trap.pseudopotential_hz) if with_rf else None,
        "more": more,
    }


def _chain(apparatus: Apparatus, modes: Modes) -> dict[str, Any]:
    n, equilibrium = apparatus.ions, modes.equilibrium
    more: dict[str, Any] = {"ions": n}
    if n > 1:
        x, y, z = _floats(apparatus.trap.secular_hz)
        more |= {
            "smallest spacing (um)": float(equilibrium.spacing_m) * 1e6,
            "length (um)": float(equilibrium.positions_m[-1] - equilibrium.positions_m[0]) * 1e6,
            "residual force (of the Coulomb unit)": float(equilibrium.residual),
        }
        if apparatus.masses_kg is None and float(apparatus.quartic_v_per_m4) == 0:
            more |= {
                "zigzag: weakest radial over axial frequency": min(x, y) / z,
                "zigzag: straight above": float(zigzag_ratio(n)),
            }
    return {"positions_m": _floats(equilibrium.positions_m), "frequencies_hz": _floats(modes.frequencies_hz),
            "more": more}  # fmt: skip


def _columns(apparatus: Apparatus, modes: Modes, ion: IonMemristor, place: int | None) -> dict[str, np.ndarray]:
    count = 3 * apparatus.ions
    eta = [np.asarray(apparatus.lamb_dicke(modes, pulse)) for pulse in (1, 2)]
    memristors = np.arange(apparatus.ions) if place is None else np.array([place])
    largest = np.max([np.max(np.abs(e[memristors]), axis=0) for e in eta], axis=0)
    ratio = np.asarray(modes.frequencies_hz) / float(apparatus.reference_hz(modes))
    n_bar = np.asarray(Motion(np.zeros(count), frequency_ratio=ratio).occupation(ion.n_bar))
    shares = np.asarray(modes.heating_shares())
    # What rounding leaves of modes that a uniform field does not move.
    heating = float(ion.heating_rate_per_s) * np.where(shares > 1e-12, shares, 0.0) / ratio
    return {
        "position_m": np.asarray(modes.equilibrium.positions_m),
        "memristor": np.isin(np.arange(apparatus.ions), memristors),
        "mode": np.arange(count),
        "frequency_hz": np.asarray(modes.frequencies_hz),
        "direction": np.array(list("xyz"))[modes.directions].astype(object),
        "eta_1": eta[0],
        "eta_2": eta[1],
        "eta_felt": largest,
        "n_bar": n_bar,
        "heating_per_s": heating,
    }


def _motion(apparatus: Apparatus, ion: IonMemristor, columns: dict[str, np.ndarray]) -> dict[str, Any]:
    motion = ion.motion
    assert motion is not None
    order = np.argsort(-(columns["eta_felt"] ** 2) * (columns["n_bar"] + 0.5), kind="stable")
    felt = [np.max(np.abs(columns[f"eta_{k}"][columns["memristor"]]), axis=0) for k in (1, 2)]
    shown = [
        {
            "mode": f"{columns['direction'][m]}{m % apparatus.ions + 1}",
            "frequency (MHz)": float(columns["frequency_hz"][m]) / 1e6,
            "n_bar": float(columns["n_bar"][m]),
            "heating (1/s)": float(columns["heating_per_s"][m]),
            "|eta| of beam 1": float(felt[0][m]),
            "of beam 2": float(felt[1][m]),
        }
        for m in order[:_SHOWN]
        if columns["eta_felt"][m] > 1e-9
    ]
    factors = ion.carrier_factors(len(np.shape(motion.eta_1)) - 1)
    mean = [float(np.mean(np.sum(np.asarray(factors[2] * f), axis=0))) for f in factors[:2]]
    reference = float(columns["frequency_hz"][2 * apparatus.ions])
    bounds = _sideband_bounds(apparatus, ion, columns)
    more = {
        "carrier of beam 1, mean": mean[0],
        "carrier of beam 2, mean": mean[1],
        "modes that are felt": len(motion.eta_1),
        "nodes of the average": motion.nodes,
        "error of the average": motion.error,
        "reference mode (MHz)": reference / 1e6,
        "heating of one ion there (1/s)": float(ion.heating_rate_per_s),
        "Doppler limit there (phonons)": YB171.doppler_nbar(reference),
        "off-resonant sidebands, bound for a pi pulse 1": bounds[0],
        "off-resonant sidebands, bound for a pi pulse 2": bounds[1],
    }
    return {"count": len(columns["mode"]), "modes": shown, "more": more}


def _sideband_bounds(apparatus: Apparatus, ion: IonMemristor, columns: dict[str, np.ndarray]) -> list[float]:
    """Sums of the bounds of the modes; NaN where one is outside its range."""
    bounds = []
    for k, sigma in ((1, ion.sigma_1_s), (2, ion.sigma_2_s)):
        eta = np.max(np.abs(columns[f"eta_{k}"][columns["memristor"]]), axis=0)
        total = 0.0
        for m in np.flatnonzero(eta**2 > 1e-12 * np.max(eta) ** 2):
            occupied = float(columns["n_bar"][m])
            if m == 2 * apparatus.ions and apparatus.coherent is not None:
                occupied += float(apparatus.coherent)
            frequency = float(columns["frequency_hz"][m])
            seen = sideband_bound(math.pi, float(sigma), frequency, float(eta[m]), occupied)
            total += float(seen)
        bounds.append(total)
    return bounds


def _notes(ion: IonMemristor, apparatus: Apparatus, modes: Modes, motion: dict[str, Any]) -> list[str]:
    secular = ", ".join(f"{f / 1e6:.4g}" for f in _floats(apparatus.trap.secular_hz))
    notes = [f"One ion oscillates at {secular} MHz along x, y, z; a chain of {apparatus.ions} is straight and stable."]
    sigma, slowest = float(jnp.min(jnp.asarray([ion.sigma_1_s, ion.sigma_2_s]))), float(jnp.min(modes.frequencies_hz))
    if 2 * math.pi * slowest * sigma < 6:
        notes.append("A pulse is not long against the slowest mode's period: sidebands are not off resonance, and the "
                     "average over carriers alone does not hold.")  # fmt: skip
    bounds = [motion["more"][f"off-resonant sidebands, bound for a pi pulse {k}"] for k in (1, 2)]
    if not all(map(math.isfinite, bounds)):
        notes.append("There is no bound on what sidebands do: a mode has eta^2 (2 n + 1) above 0.2, or is much faster "
                     "than the pulse is resolved; solve ion and motion whole (docs/spin_motion.md).")  # fmt: skip
    if apparatus.masses_kg is not None and not bool(jnp.all(jnp.isfinite(apparatus.trap.q))):
        notes.append("Measured frequencies do not tell static from rf fields: for other masses half of the axial "
                     "field's gradient is taken along x.")  # fmt: skip
    return notes


def _arrays(columns: dict[str, np.ndarray]) -> xr.Dataset:
    dims = {"position_m": ("ion",), "memristor": ("ion",), "eta_1": ("ion", "mode"), "eta_2": ("ion", "mode"),
            "pseudopotential_ev": ("y_m", "x_m"), "saddle_m": ("plane",), "null_m": ("plane",)}  # fmt: skip
    edges = dict.fromkeys(("edge_a", "edge_low", "edge_high"), ("edge",))
    coords = {name: columns[name] for name in ("mode", "x_m", "y_m") if name in columns}
    return xr.Dataset(
        {name: ((dims | edges).get(name, ("mode",)), values) for name, values in columns.items() if name not in coords},
        coords=coords,
    )
