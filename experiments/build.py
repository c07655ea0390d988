"""From the configuration to the device: the one place where tables become modules of the twin."""

import math
from typing import Any

import numpy as np

from calibration.data import LoopTable
from calibration.hardware import Hardware
from experiments.schema import Config
from experiments.schema_device import PHOTONIC
from experiments.trapped import moving_in_trap, register_from
from twin.loop import AbstractMemristor, sine_input
from twin.memory import AbstractMemory, Exponential, MovingAverage
from twin.memristor import Automatic, ClosedForm, IonMemristor, Lindblad, PhotonicMemristor
from twin.motion import nodes_for
from twin.slow_noise import SlowNoise

PHONON_NODES = 8  # least number of quadrature nodes of the thermal average
_MARGIN = 1.1  # on areas, for neighbours' light and drawn devices
_OUTERMOST = 6.0  # standard deviations that a quadrature over slow noise may reach
_TURNS = 6.0  # areas of sampled pulses, composite ones among them, in units of pi

# Keys of [device] that are fields of the ion's device under the same name.
_ION_FIELDS = (
    *(
        "scheme",
        "sigma_1_s",
        "sigma_2_s",
        "separation_s",
        "lead_s",
        "tail_s",
        "lifetime_s",
        "branching",
        "m_lifetime_s",
    ),
    *(
        "rabi_scale_1",
        "rabi_scale_2",
        "detuning_1_hz",
        "detuning_2_hz",
        "n_bar",
        "heating_rate_per_s",
        "eta_1",
        "eta_2",
    ),
    *("readout_error_bright", "readout_error_dark"),
)
_SLOW_NOISE = (
    *("amplitude_noise_1", "amplitude_noise_2", "amplitude_correlation"),
    *("detuning_noise_1_hz", "detuning_noise_2_hz", "detuning_correlation"),
)
_LINEWIDTHS = ("laser_linewidth_hz", "laser_linewidth_1_hz", "laser_linewidth_2_hz")


def memory_from(config: Config, window_cycles: float | np.ndarray | None = None) -> AbstractMemory:
    """The feedback kernel of a configuration.

    Args:
        config: its table [memory] is read.
        window_cycles: length of the window in cycles, or decay time of the exponential, in place of the configured one.
    """
    window = config.memory.window_cycles if window_cycles is None else window_cycles
    return Exponential(window) if config.memory.kernel == "exponential" else MovingAverage(window)


def settings_table(config: Config, *, windows: bool) -> LoopTable:
    """The loops of [[simulate.loops]] as a table in which nothing was counted.

    Args:
        config: the tables [simulate] and [memory] are read.
        windows: whether each row tells the window of its loop; without it the memory of a device decides.
    """
    assert config.simulate is not None
    columns: dict[str, list[np.ndarray]] = {}
    for loop in config.loops:
        x = np.asarray(
            sine_input(periods=loop.periods, cycles_per_period=loop.cycles_per_period, delay_cycles=loop.delay_cycles)
        )
        every = lambda value, x=x: np.full(len(x), value)
        own = {
            "loop": every(loop.label), "cycle": np.arange(len(x)), "x_set": x, "shots": every(max(loop.shots, 1)),
            "detuning_1_set_hz": every(loop.detuning_1_set_hz), "detuning_2_set_hz": every(loop.detuning_2_set_hz),
            "n_x": every(0.0), "n_y": every(0.0),
        }  # fmt: skip
        if windows:
            length = loop.window_cycles if loop.window_cycles is not None else config.memory.window_cycles
            own["window_cycles"] = every(float(length))
        for name, values in own.items():
            columns.setdefault(name, []).append(values)
    given: Any = {name: np.concatenate(values) for name, values in columns.items()}
    return LoopTable(**given, name="design")


def hardware_from(config: Config) -> Hardware:
    """The generator and the modulator of a table [hardware]."""
    table = config.hardware
    assert table is not None
    largest_rad_s = [2 * math.pi * rabi_hz for rabi_hz in table.largest_rabi_hz]
    slew = [2 * full / table.full_swing_s if table.full_swing_s > 0 else math.inf for full in largest_rad_s]
    return Hardware(
        sample_s=table.sample_s,
        largest_rad_s=largest_rad_s,
        slew_rad_s2=slew,
        bandwidth_hz=table.bandwidth_hz,
        attenuation_db=table.attenuation_db,
        real_only=table.phase == "fixed",
        bits=table.bits,
        rise_s=table.rise_s,
        mixing_real=None if table.mixing is None else np.array(table.mixing),
    )


def device_from(config: Config) -> AbstractMemristor:
    """The memristor of a configuration, with its own memory.

    Args:
        config: the tables [device] and [memory] are read, and those of the trap; [fit] and [sweep] tell whether `n_bar`
            will vary.

    Returns:
        A `PhotonicMemristor`, an `IonMemristor`, or the `Register` of a chain all of whose ions are memristors. Of ions
        the method is that of `engine`: "closed_form", the Lindblad equation at `error`, cycle by cycle or as a series
        in the pulse areas, whichever costs less; or, for "auto", the closed form where `error` allows it.

    Raises:
        ValueError: a value that the tables allow but the device refuses, a trap that does not hold its ions; one
            sentence.
    """
    table = config.device
    memory, source = memory_from(config), config.memory.source
    if table.platform == "photonic":
        return PhotonicMemristor(memory=memory, source=source, **{name: getattr(table, name) for name in PHOTONIC})
    methods = {
        "auto": lambda: Automatic(table.error),
        "closed_form": ClosedForm,
        "lindblad": lambda: Lindblad(table.error),
    }
    fields: dict[str, Any] = {name: getattr(table, name) for name in _ION_FIELDS}
    fields |= {name: getattr(table, name) or 0.0 for name in _LINEWIDTHS}
    varied = _varied(config)
    # What is zero and stays so is left out, and costs nothing.
    shifts = {name: getattr(table, name) for name in ("stark_1_hz", "stark_2_hz")}
    fields |= {name: value for name, value in shifts.items() if value or name in varied}
    noise = {name: getattr(table, name) for name in _SLOW_NOISE}
    if any(noise[name] or name in varied for name in SlowNoise.parameters()):
        fields["slow_noise"] = SlowNoise(**noise)
    hottest = _hottest(config)
    if config.trap is not None:
        fields |= moving_in_trap(config, hottest)
    else:
        fields["phonon_nodes"] = _phonon_nodes(config, hottest)
    ion = IonMemristor(memory=memory, source=source, method=methods[table.engine](), **fields)
    return register_from(config, ion, hottest) if config.register_of else ion


def _varied(config: Config) -> set[str]:
    """Parameters of the device that a verb will change."""
    return {*(config.fit.free if config.fit else ()), *(config.sweep.parameters if config.sweep else ())}


def _hottest(config: Config) -> float:
    """The largest mean phonon number at preparation that a verb will ask for."""
    boxes = [config.fit.free.get("n_bar") if config.fit else None]
    if config.sweep and (axis := config.sweep.parameters.get("n_bar")):
        boxes.append((axis.low, axis.high))
    if config.optimize and config.optimize.robust and config.optimize.robust.n_bar:
        boxes.append(tuple(config.optimize.robust.n_bar))
    return max([config.device.n_bar, *(box[1] for box in boxes if box)])


def _phonon_nodes(config: Config, hottest: float) -> int:
    """Quadrature nodes of one mode for its largest mean phonon number, heating included."""
    table = config.device
    boxes = _boxes(config)
    most = lambda name: max(getattr(table, name), boxes.get(name, (0.0, 0.0))[1])
    gained = table.heating_rate_per_s * (most("lead_s") + most("separation_s"))
    if hottest + gained == 0:
        return 1
    eta = max(most("eta_1"), most("eta_2"))
    return max(PHONON_NODES, nodes_for(hottest + gained, eta, largest_area(config), table.error))


def largest_area(config: Config) -> float:
    """Largest area of a pulse, rad, that the device of a configuration will play."""
    boxes = _boxes(config)
    most = lambda name: max(getattr(config.device, name, 1.0), boxes.get(name, (0.0, 0.0))[1])
    scales = [most(f"rabi_scale_{k}") * most(f"amplitude_{k}") for k in (1, 2)]
    if config.chain is not None:
        scales += [max(values) for name, values in config.chain.each.items() if name.startswith("rabi_scale")]
    if config.optimize is not None and config.optimize.shape is not None:
        scales = [_TURNS * scale for scale in scales]
    noise = max(most(f"amplitude_noise_{k}") for k in (1, 2))
    return math.pi * max(scales) * (_MARGIN + _OUTERMOST * noise)


def _boxes(config: Config) -> dict[str, tuple[float, float]]:
    """Ranges that the verbs of a configuration will visit."""
    boxes = {**(config.fit.free if config.fit else {}), **(config.optimize.bounds if config.optimize else {})}
    swept = config.sweep.parameters if config.sweep else {}
    return boxes | {name: (axis.low, axis.high) for name, axis in swept.items()}
