"""What imperfections take from a photonic loop, and how well counts give them back: ``docs/photonic.md``.

Areas are of ``run`` beside the closed form; recovery is that of ``experiments/configs/photonic.toml``. Seeds are fixed.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from calibration.data import synthesize
from calibration.fit import fit
from experiments.build import device_from, settings_table
from experiments.config import load_config
from twin.hysteresis import form_factor, pinch_offset, signed_area
from twin.memory import MovingAverage
from twin.memristor import PhotonicMemristor, run, sine_input

PERIOD, WINDOW = 40, 10.0
SPOILED: tuple[tuple[str, dict[str, float]], ...] = (
    ("nothing", {}),
    ("`loss` 0.2", {"loss": 0.2}),
    ("`loss_input` 0.2", {"loss_input": 0.2}),
    ("`visibility_1` 0.9", {"visibility_1": 0.9}),
    ("`visibility_2` 0.9", {"visibility_2": 0.9}),
    ("`phase_noise_1_rad` 0.3", {"phase_noise_1_rad": 0.3}),
    ("`efficiency` 0.5", {"efficiency": 0.5}),
    ("`dark_counts` 0.02", {"dark_counts": 0.02}),
    ("`phase_offset_2_rad` 0.2", {"phase_offset_2_rad": 0.2}),
    ("`phase_scale_2` 1.1", {"phase_scale_2": 1.1}),
)


def _loop(source: str, fields: dict[str, Any]):
    device = PhotonicMemristor(memory=MovingAverage(WINDOW), source=source, **fields)
    return device, run(device, sine_input(periods=3, cycles_per_period=PERIOD))


def area_row(name: str, fields: dict[str, float]) -> str:
    """One imperfection: areas over the ideal one for every source of the memory, with the loop of the last period."""
    last, cells = slice(2 * PERIOD, 3 * PERIOD), []
    perfect = _loop("model", {})[1]
    ideal = float(signed_area(perfect.x[last], perfect.y[last]))
    nominal = not any(key.startswith(("phase_offset", "phase_scale")) for key in fields)
    for source in ("command", "model", "measured"):
        device, loop = _loop(source, fields)
        ratio = float(signed_area(loop.x[last], loop.y[last])) / ideal
        if nominal and abs(ratio - float(device.area_factor())) > 1e-12:
            raise RuntimeError(f"the closed form of {name} with source {source!r} differs from the loop.")
        cells.append(f"{ratio:.4f}")
    cells += [f"{float(form_factor(loop.x[last], loop.y[last])):.4f}",
              f"{float(pinch_offset(loop.x[last], loop.y[last])):.4f}"]  # fmt: skip
    return f"| {name} | {' | '.join(cells)} | {'yes' if nominal else 'no'} |"


def recovery(tables: int) -> tuple[list[str], np.ndarray]:
    """Fits of simulated tables: for each parameter its error and how often the interval holds; chi2/dof of each."""
    config = load_config(Path(__file__).parents[1] / "configs" / "photonic.toml", verb="fit")
    assert config.fit is not None
    real, settings, names = device_from(config), settings_table(config, windows=True), list(config.fit.free)
    truth = np.array([getattr(config.device, name) for name in names])
    start, estimates, chi2 = PhotonicMemristor(MovingAverage(WINDOW), "command"), [], []
    for seed in range(tables):
        table = synthesize(real, settings, jax.random.key(seed))
        found = fit(start, table, config.fit.free, optimizer="levenberg_marquardt", starts=2, seed=seed)
        if not found.converged:
            raise RuntimeError(f"table {seed}: {found.status}")
        estimates.append([(e.value, e.std, *e.ci95) for e in (found.parameters[name] for name in names)])
        chi2.append(found.chi2_per_dof)
    value, std, low, high = np.moveaxis(np.array(estimates), 2, 0)
    held = np.sum((low <= truth) & (truth <= high), axis=0)
    scatter = np.std(value, axis=0)
    rows = [
        f"| `{name}` | {truth[k]:g} | {np.mean(std[:, k]):.2g} | {scatter[k]:.2g} | {held[k]}/{tables} |"
        for k, name in enumerate(names)
    ]
    return rows, np.array(chi2)


def throughput(fields: dict[str, float], devices: int = 4096) -> float:
    """Cycles a second of many devices at once, the best of several runs."""
    x = sine_input(periods=5, cycles_per_period=PERIOD)[:, None]
    device = PhotonicMemristor(memory=MovingAverage(WINDOW), **{"loss": np.linspace(0, 0.5, devices), **fields})
    best = np.inf
    for _ in range(12):
        began = time.perf_counter()
        jax.block_until_ready(run(device, x).y)
        best = min(best, time.perf_counter() - began)
    return devices * len(x) / best


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.photonic", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the tables")
    quick = parser.parse_args().quick
    print("| what is not ideal | memory of commands | of populations | of counts | form factor | pinch | closed form |")
    print("|---|---|---|---|---|---|---|")
    for name, fields in SPOILED:
        print(area_row(name, fields), flush=True)
    rows, chi2 = recovery(4 if quick else 40)
    print("\n| parameter | truth | standard error | scatter of the estimates | interval holds the truth |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\nchi2/dof {np.mean(chi2):.3f} ± {np.std(chi2):.3f}")
    real = {"phase_scale_1": 0.97, "phase_offset_2_rad": 0.1, "visibility_1": 0.9, "phase_noise_2_rad": 0.1}
    print(f"ideal {throughput({}):.2g}, real {throughput(real):.2g} cycles/s")


if __name__ == "__main__":
    main()
