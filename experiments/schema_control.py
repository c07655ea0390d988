"""Tables of pulse optimization: what is wanted, and what the generator and the modulator allow."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from experiments.messages import Refusal, unknown_key
from experiments.schema_device import COMMANDS, Box, Table, number, within

_SEED = 2**63 - 1
_RABI = 1e8  # Hz; far above what addresses a single line
TARGETS = ("obedience", "area", "form_factor", "saturation", "curve", "transfer", "leakage", "retention")
# What further terms a sum may have: every target, and what pulses cost.
TERMS = (*TARGETS, "energy", "roughness", "duration")


class Hardware(Table):
    """Generator and modulator of both channels."""

    sample_s: float = number(1e-6, 1e-9, 1e-3, "s", "period of the sample clock")
    largest_rabi_hz: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        [50e3, 50e3], description="Rabi frequency of each line at full scale of its converter, Hz",
        json_schema_extra={"unit": "Hz"},
    )  # fmt: skip
    full_swing_s: float = number(
        0.0, 0.0, 1e-3, "s", "shortest time for a swing from minus to plus full scale: the slew limit; 0 for none"
    )
    bandwidth_hz: float | None = number(None, 1.0, 1e9, "Hz", "where the stop band begins (default: no limit)")
    attenuation_db: float = number(60.0, 1.0, 200.0, "dB", "depth of the stop band")
    carrier_hz: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="frequencies at which the modulators are driven, Hz; needed for ARTIQ",
        json_schema_extra={"unit": "Hz"},
    )  # fmt: skip
    phase: Literal["fixed", "free"] = Field("fixed", description="whether the phase may change within a pulse")
    bits: int | None = number(14, 2, 32, "", "bits of the converter")
    rise_s: float = number(0.0, 0.0, 1e-3, "s", "10-90 % rise time of the acousto-optic modulator")
    mixing: Annotated[list[list[float]], Field(min_length=2, max_length=2)] | None = Field(
        None, description="share of each channel (column) in the drive of each line (row): crosstalk, such as "
        "[[1.0, 0.02], [0.01, 1.0]] (default: none)",
    )  # fmt: skip

    @model_validator(mode="after")
    def _sensible(self) -> "Hardware":
        for k, value in enumerate(self.largest_rabi_hz):
            if not 0 < value <= _RABI:
                raise Refusal(f"largest_rabi_hz.{k}", f"is {value:g}, but must lie above 0 and be at most {_RABI:g}")
        for k, row in enumerate(self.mixing or ()):
            if len(row) != 2 or not all(abs(share) <= 2 for share in row):
                raise Refusal(f"mixing.{k}", f"is {row}, but must be two shares between -2 and 2")
        if self.bandwidth_hz is not None and self.bandwidth_hz >= 0.5 / self.sample_s:
            raise Refusal("bandwidth_hz", f"is {self.bandwidth_hz:g}, but must lie below half the sample clock, "
                          f"{0.5 / self.sample_s:g}")  # fmt: skip
        return self


class Shape(Table):
    """Sampled pulses in place of Gaussians; needs a table [hardware]."""

    samples: int = number(60, 3, 10_000, "", "samples of each pulse")
    delay_samples: int = number(60, 0, 10_000, "", "from the beginning of pulse 1 to that of pulse 2")
    oversampling: int = number(1, 1, 64, "", "slices a sample; take more with rise_s")
    family: Literal["samples", "splines", "fourier", "drag"] = Field(
        "samples",
        description="what is free: every sample (GRAPE), cubic B-splines, a random Fourier series added to the start "
        "(CRAB), or spline envelopes with a quadrature along their slope and a phase along their square (DRAG)",
    )
    numbers: int = number(12, 4, 1000, "", "free numbers of each channel and part, but for samples")
    start: str = Field(
        "gaussian", min_length=1,
        description="pulses where the search begins: gaussian, a composite pulse (bb1, sk1, corpse), or a file of "
        "samples (.csv, .nc, .qasm, .py), which iterations = 0 only solves",
    )  # fmt: skip


class Robust(Table):
    """The target over many devices: what the calibration leaves open, and what drifts from run to run."""

    members: int = number(16, 2, 1024, "", "devices that are drawn")
    posterior: bool = Field(True, description="whether they differ by the errors of the calibration given with --from")
    intensity_std: float = number(0.0, 0.0, 0.5, "", "relative standard deviation of the power of the laser")
    detuning_std_hz: float = number(0.0, 0.0, 1e6, "Hz", "standard deviation of the frequency of the laser")
    n_bar: Box | None = Field(None, description="[low, high] of the mean phonon number (default: as the device)")
    worst: bool = Field(False, description="whether the worst device counts, in place of the mean")
    recalibrate: int = number(
        0, 0, 1024, "", "devices for which the search is repeated as if they were known: what is lost by not knowing"
    )

    @model_validator(mode="after")
    def _varies(self) -> "Robust":
        if not (self.posterior or self.intensity_std or self.detuning_std_hz or self.n_bar):
            raise Refusal("members", "do not differ; set posterior, intensity_std, detuning_std_hz or n_bar")
        if self.recalibrate > self.members:
            raise Refusal("recalibrate", f"is {self.recalibrate}, but there are {self.members} members")
        return self


class CommandMap(Table):
    """The map from commands to pulse areas that inverts what the device does wrong, as a table for the controller."""

    points: int = number(11, 3, 101, "", "commands a side of the square")
    draws: int = number(32, 0, 1024, "", "devices drawn from the errors of the calibration, for the bands")


def _terms(weights: dict[str, float]) -> dict[str, float]:
    for name in weights:
        if name not in TERMS:
            raise Refusal(name, unknown_key(name, weights[name], list(TERMS)))
    return weights


class Optimize(Table):
    """Pulse commands that make the device do what was commanded, or that open the loop."""

    target: Literal[TARGETS] = Field(  # ty: ignore[invalid-type-form]
        "obedience",
        description="obedience: least rms of y - (1 - r_set) x_set; area, form_factor, saturation (largest output): "
        "of the loop; curve: least rms distance of the loop from a given one; transfer: infidelity of a level's "
        "population; leakage: population outside the levels in use; retention: change of y while it is held",
    )
    inputs: Literal["square", "loop"] = Field(
        "square", description="commands over which obedience counts: the square, or those of a loop of the device"
    )
    curve: str | None = Field(None, min_length=1, description="CSV file with columns x and y, one row a cycle")
    level: str = Field("m", min_length=1, description="level of the transfer")
    x_set: float = number(1.0, 0.0, 1.0, "", "commanded input of the transfer")
    r_set: float = number(1.0, 0.0, 1.0, "", "commanded transfer of the transfer")
    hold_s: float = number(1e-3, 1e-9, 100.0, "s", "how long retention holds")
    weights: Annotated[dict[str, Annotated[float, Field(gt=0, le=1e30)]], AfterValidator(_terms)] = Field(
        {},
        description="further terms as name = weight per unit of the term; the target itself has weight one; gains "
        "count with a minus. Units: energy rad^2/s, roughness rad/s^2, duration s, all others 1",
        json_schema_extra={"propertyNames": {"enum": list(TERMS)}},
    )
    bounds: Annotated[dict[str, Box], within(COMMANDS)] = Field(
        {},
        description="at least one command to change as name = [low, high]; amplitudes are relative to the nominal one; "
        "none with [optimize.shape], or for a command map alone",
        json_schema_extra={"propertyNames": {"enum": list(COMMANDS)}},
    )
    shape: Shape | None = Field(None, description="samples are free, in place of the commands of Gaussian pulses")
    robust: Robust | None = Field(None, description="the target over many devices")
    command_map: CommandMap | None = Field(None, description="a map from commands to areas, beside the pulses")
    iterations: int = number(200, 0, 100_000, "", "most iterations of the optimizer")
    enough: float | None = Field(None, description="the search stops when the target's number is this good")
    seed: int = number(0, 0, _SEED, "", "seed of the starts")
    cycles_per_period: int = number(40, 4, 100_000, "", "cycles in one period of the input (loop targets)")
    window_cycles: float | None = number(None, 1.0, 1e6, "cycles", "memory window (default: that of [memory])")

    @model_validator(mode="after")
    def _something_to_change(self) -> "Optimize":
        if not self.bounds and self.shape is None and self.command_map is None:
            raise Refusal("bounds", "names no command; give at least one as name = [low, high], or a table "
                          "[optimize.shape] or [optimize.command_map]")  # fmt: skip
        if self.bounds and self.shape is not None:
            raise Refusal("bounds", "belongs to Gaussian pulses, but [optimize.shape] makes every sample free; "
                          "remove one of the two")  # fmt: skip
        if (self.curve is None) == ("curve" in (self.target, *self.weights)):
            raise Refusal("curve", "and the target 'curve' belong together; give both or none")
        if self.target in self.weights:
            raise Refusal(f"weights.{self.target}", "is the target itself, which has weight one; remove it")
        if not self.bounds and self.shape is None and (self.weights or self.robust):
            raise Refusal("weights" if self.weights else "robust", "belongs to pulses that are searched, but there is "
                          "a command map alone; remove it, or add bounds or [optimize.shape]")  # fmt: skip
        if self.shape is None and self.robust and self.robust.recalibrate:
            raise Refusal("robust.recalibrate", "repeats a search of samples; set it to 0, or add [optimize.shape]")
        if self.shape is None and self.iterations == 0:
            raise Refusal("iterations", "is 0, which only solves samples; give more, or a table [optimize.shape]")
        if self.shape is None and self.enough is not None:
            raise Refusal("enough", "stops a search of samples; remove it, or add a table [optimize.shape]")
        return self
