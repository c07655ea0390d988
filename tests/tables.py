"""Settings of synthetic loops, and the closed-form ion that plays them: small, and shared by the calibration tests."""

import dataclasses

import numpy as np

from calibration.data import LoopTable
from twin.memory import MovingAverage
from twin.memristor import ClosedForm, IonMemristor

SCALES = {"rabi_scale_1": (0.7, 1.3), "rabi_scale_2": (0.7, 1.3)}
LINES = {"detuning_1_hz": (-5e3, 5e3), "detuning_2_hz": (-5e3, 5e3), "laser_linewidth_hz": (0.0, 2e3)}
READOUT = {"readout_error_bright": (0.0, 0.05), "readout_error_dark": (0.0, 0.05)}
DEMO = SCALES | LINES | READOUT
"""What the demo frees, in its order."""
TRUTH = {
    "rabi_scale_1": 1.06,
    "rabi_scale_2": 0.95,
    "readout_error_bright": 0.012,
    "readout_error_dark": 0.02,
}


def settings(windows=(5.0,), *, cycles: int = 41, period: int = 20, shots: int = 400, **columns) -> LoopTable:
    """One loop a window, each a sin^2 input; counts are zeros to be replaced. `columns` replace what is here."""
    k = np.tile(np.arange(cycles), len(windows))
    rows = len(k)
    table = {
        "loop": np.repeat([chr(ord("A") + i) for i in range(len(windows))], cycles),
        "cycle": k,
        "x_set": np.sin(np.pi * k / period) ** 2,
        "window_cycles": np.repeat(np.asarray(windows, float), cycles),
        "detuning_1_set_hz": np.zeros(rows),
        "detuning_2_set_hz": np.zeros(rows),
        "shots": np.full(rows, shots),
        "n_x": np.zeros(rows),
        "n_y": np.zeros(rows),
    }
    return LoopTable(**(table | columns))


def pieces(table: LoopTable, rows) -> LoopTable:
    """Some rows of a table."""
    columns = {name: values[rows] for name, values in table.columns.items()}
    return LoopTable(**columns, name=table.name)


def ion(**parameters) -> IonMemristor:
    """The demo's ion; closed form unless a method is named."""
    return IonMemristor(**({"memory": MovingAverage(10.0), "method": ClosedForm()} | parameters))


def changed(table: LoopTable, **columns) -> LoopTable:
    """The table with other columns, hashed anew."""
    return dataclasses.replace(table, sha256="", **columns)
