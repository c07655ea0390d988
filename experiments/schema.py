"""The configuration as classes: a table is a class, a key is a field with its unit, range and default."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from calibration.columns import COLUMNS, MappingError, sources_from
from experiments.messages import Allowed, Refusal, allowed_range, unknown_key


def _number(default: Any, low: int | float, high: int | float, unit: str, text: str, **more: Any) -> Any:
    return Field(default, ge=low, le=high, description=text, json_schema_extra={"unit": unit}, **more)


class Table(BaseModel):
    """What all tables share: exact types, no unknown keys, finite numbers, no changes after validation."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


_TUNING = 1e7  # Hz; far beyond it neither line is addressed
_TIME = (1e-8, 0.01)  # s; pulse widths from a few optical-modulator rise times to a fraction of the D3/2 lifetime


class Device(Table):
    """The memristor as the laboratory set it up; defaults are the 171Yb+ device of the demo."""

    platform: Literal["ion", "photonic"] = Field("ion", description="trapped ion or integrated photonics")
    scheme: Literal["lambda", "v", "ladder"] = Field("lambda", description="level scheme: which of v, s, m lies where")
    engine: Literal["auto", "closed_form", "lindblad"] = Field(
        "auto", description="closed form, integrated Lindblad equation, or the closed form only where `error` allows it"
    )
    error: float = _number(1e-8, 1e-12, 1e-3, "", "largest error of a population that the engine may make")
    sigma_1_s: float = _number(20e-6, *_TIME, "s", "width (standard deviation of the Rabi envelope) of pulse 1")
    sigma_2_s: float = _number(20e-6, *_TIME, "s", "width (standard deviation of the Rabi envelope) of pulse 2")
    separation_s: float = _number(120e-6, 0.0, 0.1, "s", "from the centre of pulse 1 to the centre of pulse 2")
    lead_s: float = _number(100e-6, 0.0, 0.1, "s", "from preparation to the centre of pulse 1")
    tail_s: float = _number(100e-6, 0.0, 0.1, "s", "from the centre of the last pulse to the start of read-out")
    lifetime_s: float = _number(52.7e-3, 1e-9, 1e12, "s", "lifetime of the decaying level (D3/2)")
    branching: float = _number(0.4, 0.0, 1.0, "", "fraction of its decays to S1/2 F=0; the rest goes to F=1")
    m_lifetime_s: float = _number(
        math.inf,
        1e-9,
        math.inf,
        "s",
        "lifetime of m, the top level of the ladder scheme; inf in the other schemes",
        allow_inf_nan=True,
    )
    rabi_scale_1: float = _number(1.0, 0.0, 10.0, "", "actual over nominal Rabi frequency of pulse 1")
    rabi_scale_2: float = _number(1.0, 0.0, 10.0, "", "actual over nominal Rabi frequency of pulse 2")
    detuning_1_hz: float = _number(0.0, -_TUNING, _TUNING, "Hz", "laser 1 minus line 1")
    detuning_2_hz: float = _number(0.0, -_TUNING, _TUNING, "Hz", "laser 2 minus line 2")
    laser_linewidth_hz: float | None = _number(
        None, 0.0, 1e6, "Hz", "FWHM linewidth of one source for both lines (0 unless two sources are given)"
    )
    laser_linewidth_1_hz: float | None = _number(None, 0.0, 1e6, "Hz", "FWHM linewidth of laser 1, with two sources")
    laser_linewidth_2_hz: float | None = _number(None, 0.0, 1e6, "Hz", "FWHM linewidth of laser 2, with two sources")
    n_bar: float = _number(0.0, 0.0, 1e4, "", "mean phonon number when pulse 1 begins")
    heating_rate_per_s: float = _number(0.0, 0.0, 1e7, "1/s", "phonons gained per second")
    eta_1: float = _number(0.0, 0.0, 1.0, "", "Lamb-Dicke parameter of pulse 1")
    eta_2: float = _number(0.0, 0.0, 1.0, "", "Lamb-Dicke parameter of pulse 2")
    readout_error_bright: float = _number(0.0, 0.0, 0.5, "", "probability that a bright ion is read dark")
    readout_error_dark: float = _number(0.0, 0.0, 0.5, "", "probability that a dark ion is read bright")
    loss: float = _number(0.0, 0.0, 1.0, "", "fraction of photons lost (photonic platform only)")

    @model_validator(mode="before")
    @classmethod
    def _one_source_unless_two_are_given(cls, given: Any) -> Any:
        two = ("laser_linewidth_1_hz", "laser_linewidth_2_hz")
        if isinstance(given, dict) and not any(key in given for key in two):
            return {"laser_linewidth_hz": 0.0, **given}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> "Device":
        two = (self.laser_linewidth_1_hz, self.laser_linewidth_2_hz)
        if two != (None, None):
            if self.laser_linewidth_hz is not None:
                raise Refusal("laser_linewidth_hz", "is given beside laser_linewidth_1_hz or laser_linewidth_2_hz; "
                              "keep the one key for a shared source or the two keys for two sources")  # fmt: skip
            if None in two:
                missing = f"laser_linewidth_{two.index(None) + 1}_hz"
                raise Refusal(missing, "is missing; two sources need both linewidths, one source laser_linewidth_hz")
        photonic = ("platform", "engine", "error", "readout_error_bright", "readout_error_dark", "loss")
        elsewhere = set(Device.model_fields) - set(photonic) if self.platform == "photonic" else {"loss"}
        default = Device.model_construct(laser_linewidth_hz=0.0)
        for key in Device.model_fields:
            if key in elsewhere and getattr(self, key) != getattr(default, key):
                raise Refusal(key, f"has no meaning for platform = '{self.platform}'; remove it")
        if self.scheme != "ladder" and self.m_lifetime_s != math.inf:
            reason = f"is {self.m_lifetime_s:g}, but only the top level of scheme = 'ladder' decays from m; remove it"
            raise Refusal("m_lifetime_s", reason)
        return self


class Memory(Table):
    """The feedback that turns past inputs into the next transfer."""

    kernel: Literal["moving_average", "exponential"] = Field("moving_average", description="weights of past inputs")
    window_cycles: float = _number(
        10.0,
        1.0,
        1e6,
        "cycles",
        "length of the window, or decay time of the exponential; the table's column goes first",
    )
    source: Literal["measured", "model", "command"] = Field(
        "measured", description="which input is remembered: n_x/shots, the population, or x_set"
    )


class Column(Table):
    """Where the file holds one column of the loop table; NAME = "its name there" for short."""

    name: str | None = Field(None, min_length=1, description='name in the file, such as "datasets/dark_counts_1"')
    unit: str | None = Field(
        None,
        description="unit of the stored numbers: Hz, mHz, kHz, MHz, GHz for offsets, 1 or % for fractions "
        "(default: the unit that the file states, or ours)",
    )
    constant: int | float | str | None = Field(None, description="value of every row, in place of name")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


def _are_columns(columns: Any) -> Any:
    """The one check of a mapping, as `read_table` makes it, before the classes look at it."""
    try:
        sources_from(columns if isinstance(columns, dict) else None)
    except MappingError as error:
        raise Refusal(error.key, error.reason) from None
    return columns


_Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,40}$")]


class Data(Table):
    """The recorded loops."""

    table: str = Field(
        min_length=1, description="path of the loop table (CSV, HDF5, NetCDF or Parquet), relative to this file"
    )
    columns: Annotated[dict[str, Column], BeforeValidator(_are_columns)] = Field(
        {},
        description="where the file holds a column under another name or in another unit: name = 'its name there', or "
        "a table [data.columns.NAME]",
        json_schema_extra={"propertyNames": {"enum": list(COLUMNS)}},
    )
    name: _Label = Field("loops", description="name of that table, where others stand beside it")
    more: dict[_Label, str] = Field(
        {}, description="further loop tables of the same device, name = 'path', with the same columns"
    )
    scans: dict[_Label, str] = Field(
        {}, description="auxiliary scans of the same device, name = 'path' of a CSV file; see docs/scans.md"
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Data":
        if self.name in self.more:
            raise Refusal(f"more.{self.name}", "is the name of data.table already; give each table its own name")
        for name in self.scans:
            if name in (self.name, *self.more):
                raise Refusal(f"scans.{name}", "is the name of a loop table already; give each table its own name")
        return self


_FREE_DEVICE = (
    *("rabi_scale_1", "rabi_scale_2", "detuning_1_hz", "detuning_2_hz"),
    *("laser_linewidth_hz", "laser_linewidth_1_hz", "laser_linewidth_2_hz"),
    *("n_bar", "readout_error_bright", "readout_error_dark", "sigma_1_s", "sigma_2_s", "separation_s"),
    *("eta_1", "eta_2", "lifetime_s", "branching", "lead_s", "tail_s"),
)
PARAMETERS: dict[str, Allowed] = {
    **{name: allowed_range(Device.model_fields[name]) for name in _FREE_DEVICE},
    "window_cycles": allowed_range(Memory.model_fields["window_cycles"]),
}
"""Parameters of the ion memristor that a fit may free and a sweep may vary, with their ranges."""

FREE: dict[str, Allowed] = {**PARAMETERS, "overdispersion": Allowed(0.0, 0.5, "")}
"""What a fit may free: parameters of the device, and of the noise."""

COMMANDS: dict[str, Allowed] = {
    "amplitude_1": Allowed(0.0, 10.0, ""),
    "amplitude_2": Allowed(0.0, 10.0, ""),
    "sigma_1_s": PARAMETERS["sigma_1_s"],
    "sigma_2_s": PARAMETERS["sigma_2_s"],
    "separation_s": PARAMETERS["separation_s"],
    "detuning_1_set_hz": PARAMETERS["detuning_1_hz"],
    "detuning_2_set_hz": PARAMETERS["detuning_2_hz"],
}
"""Pulse commands that an optimization may change; an amplitude is relative to the nominal one."""


def _pair(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] < pair[1]:
        raise Refusal("", f"is [{pair[0]:g}, {pair[1]:g}], but must be [low, high] with low below high")
    return pair


def _within(names: Mapping[str, Allowed]) -> AfterValidator:
    """Each key is one of `names` and its range lies within the allowed one."""

    def check(boxes: dict[str, Any]) -> dict[str, Any]:
        for name, box in boxes.items():
            if name not in names:
                raise Refusal(name, unknown_key(name, box, list(names)))
            allowed = names[name]
            low, high = (box.low, box.high) if isinstance(box, Axis) else box
            if low < allowed.low or high > allowed.high:
                raise Refusal(name, f"is [{low:g}, {high:g}], but must lie between {allowed}")
        return boxes

    return AfterValidator(check)


class Axis(Table):
    """The range of one swept parameter; ``[low, high]`` for short."""

    low: float = Field(description="lower end")
    high: float = Field(description="upper end")
    points: int | None = _number(None, 1, 100_000, "", "points of this axis of a grid (default: `points` of the sweep)")

    @model_validator(mode="before")
    @classmethod
    def _from_pair(cls, given: Any) -> Any:
        return {"low": given[0], "high": given[1]} if isinstance(given, list) and len(given) == 2 else given

    @model_validator(mode="after")
    def _low_below_high(self) -> "Axis":
        _ordered((self.low, self.high))
        return self


_Box = Annotated[tuple[float, float], BeforeValidator(_pair), AfterValidator(_ordered)]


def _named(names: Mapping[str, Allowed], text: str) -> Any:
    return Field(min_length=1, description=text, json_schema_extra={"propertyNames": {"enum": list(names)}})


_SEED = 2**63 - 1
_LARGEST_SWEEP = 10_000_000


class Fit(Table):
    """Calibration: which parameters are free and how the search is made."""

    free: Annotated[dict[str, _Box], _within(FREE)] = _named(
        FREE, "at least one free parameter as name = [low, high], its prior box, from which starts are drawn"
    )
    per_table: list[str] = Field(
        [], description="free parameters of which each loop table has its own, NAME@TABLE in the result"
    )
    noise: Literal["binomial", "beta_binomial", "student_t"] = Field(
        "binomial",
        description="scatter of the data: projection noise (Gaussian for values), probabilities that fluctuate from "
        "row to row (free `overdispersion`), or outliers",
    )
    optimizer: Literal["adam+lbfgs", "levenberg_marquardt"] = Field(
        "adam+lbfgs", description="search: Adam then L-BFGS for any noise, or Levenberg-Marquardt for binomial"
    )
    starts: int = _number(16, 1, 4096, "", "starts of the search")
    sampling: Literal["random", "sobol"] = Field("random", description="starts drawn from the boxes, or spread over")
    seed: int = _number(0, 0, _SEED, "", "seed of the starts")

    @model_validator(mode="after")
    def _consistent(self) -> "Fit":
        for k, name in enumerate(self.per_table):
            if name not in self.free:
                raise Refusal(f"per_table.{k}", f"is '{name}', which is not free; give it a box in fit.free")
        if "overdispersion" in self.free and self.noise != "beta_binomial":
            raise Refusal("free.overdispersion", f"has no meaning for fit.noise = '{self.noise}'; "
                          "choose noise = 'beta_binomial', or remove it")  # fmt: skip
        if self.optimizer == "levenberg_marquardt" and self.noise != "binomial":
            raise Refusal("optimizer", f"is 'levenberg_marquardt', which cannot serve noise = '{self.noise}'; "
                          "choose 'adam+lbfgs'")  # fmt: skip
        return self


class Uncertainty(Table):
    """Intervals beyond the Fisher matrix, made after a fit; what is not asked for is not made."""

    profile: list[str] = Field([], description="parameters whose likelihood is profiled; ['all'] for all")
    posterior: bool = Field(False, description="whether the posterior is sampled (NUTS)")
    chains: int = _number(4, 2, 64, "", "chains of the sampler")
    draws: int = _number(1000, 100, 1_000_000, "", "draws of each chain")
    warmup: int = _number(600, 100, 100_000, "", "steps of each chain that adapt the sampler")
    bootstrap: int = _number(0, 0, 100_000, "", "refits of simulated tables (parametric bootstrap)")
    seed: int = _number(0, 0, _SEED, "", "seed of draws and simulated tables")


class Loop(Table):
    """A loop to run: x_set of cycle k is (1 - cos(2 pi k / cycles_per_period)) / 2."""

    label: Annotated[str, StringConstraints(pattern=r"^[^\s#,\"\x00-\x1f][^,\"\x00-\x1f]*$")] = Field(
        "A", description="label of the loop in the table: text without commas or quotes"
    )
    periods: int = _number(3, 1, 10_000, "", "periods of the input")
    cycles_per_period: int = _number(40, 4, 100_000, "", "cycles in one period of the input")
    window_cycles: float | None = _number(None, 1.0, 1e6, "cycles", "memory window (default: that of [memory])")
    detuning_1_set_hz: float = _number(0.0, -_TUNING, _TUNING, "Hz", "known offset of laser 1, laser minus line")
    detuning_2_set_hz: float = _number(0.0, -_TUNING, _TUNING, "Hz", "known offset of laser 2, laser minus line")
    shots: int = _number(0, 0, 10**9, "", "repetitions of each cycle; 0 gives probabilities without shot noise")


class Simulate(Table):
    """One or more loops of the device."""

    loops: list[Loop] = Field(min_length=1, description="at least one loop, [[simulate.loops]] each")
    seed: int = _number(0, 0, _SEED, "", "seed of the shot noise")

    @model_validator(mode="after")
    def _distinct(self) -> "Simulate":
        labels = [loop.label for loop in self.loops]
        for k, label in enumerate(labels):
            if label in labels[:k]:
                raise Refusal(f"loops.{k}.label", f"is {label!r} again; give each loop its own label")
        return self


class Optimize(Table):
    """Pulse commands that make the device do what was commanded, or that open the loop."""

    target: Literal["obedience", "area", "form_factor"] = Field(
        "obedience",
        description="least rms of y - (1 - r_set) x_set over the square, or largest loop area or form factor",
    )
    bounds: Annotated[dict[str, _Box], _within(COMMANDS)] = _named(
        COMMANDS, "at least one command to change as name = [low, high]; amplitudes are relative to the nominal one"
    )
    iterations: int = _number(200, 1, 100_000, "", "most iterations of the optimizer")
    seed: int = _number(0, 0, _SEED, "", "seed of the starts")
    cycles_per_period: int = _number(40, 4, 100_000, "", "cycles in one period of the input (loop targets)")
    window_cycles: float | None = _number(None, 1.0, 1e6, "cycles", "memory window (default: that of [memory])")


class Sweep(Table):
    """Loops over a grid, or over a random, Sobol or Latin-hypercube set, of named parameters."""

    parameters: Annotated[dict[str, Axis], _within(PARAMETERS)] = _named(
        PARAMETERS, "at least one parameter as name = [low, high] or {low, high, points}, over [device] and the loop"
    )
    design: Literal["grid", "random", "sobol", "latin_hypercube"] = Field(
        "grid", description="full grid, uniformly random points, scrambled Sobol set or Latin hypercube"
    )
    points: int = _number(11, 1, _LARGEST_SWEEP, "", "points of each axis of a grid, or of the whole set")
    seed: int = _number(0, 0, _SEED, "", "seed of the set and of the shot noise")
    memory_mb: float = _number(
        2048.0, 1.0, 1e9, "MB", "memory that one process may take; on a GPU, what a chunk may take of its memory"
    )
    chunk: int | None = _number(
        None, 1, 1_000_000, "", "points computed in one call and stored together (default: what memory_mb allows, "
        "at most 4096 and about a 64th of the sweep)",
    )  # fmt: skip
    loop: Loop = Field(Loop(), description="the loop that is run at every point")

    @model_validator(mode="after")
    def _size(self) -> "Sweep":
        if self.design == "grid":
            total = math.prod(axis.points or self.points for axis in self.parameters.values())
            if total > _LARGEST_SWEEP:
                raise Refusal("points", f"gives a grid of {total} points, but at most {_LARGEST_SWEEP} are allowed")
        for name, axis in self.parameters.items():
            if self.design != "grid" and axis.points is not None:
                raise Refusal(f"parameters.{name}.points", f"belongs to a grid; design = '{self.design}' takes "
                              "sweep.points; remove it")  # fmt: skip
        return self


class Config(Table):
    """The tables of a run."""

    device: Device = Field(default_factory=lambda: Device.model_validate({}), description="the memristor")
    memory: Memory = Field(Memory(), description="the feedback")
    data: Data | None = Field(None, description="the recorded loops")
    fit: Fit | None = Field(None, description="calibration")
    uncertainty: Uncertainty = Field(Uncertainty(), description="intervals beyond the Fisher matrix")
    simulate: Simulate | None = Field(None, description="loops to run")
    optimize: Optimize | None = Field(None, description="pulse design")
    sweep: Sweep | None = Field(None, description="batches")

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        free = {"fit.free": self.fit.free if self.fit else {}, "sweep.parameters": {}}
        if self.sweep:
            free["sweep.parameters"] = self.sweep.parameters
        for path, names in free.items():
            for name in names:
                if reason := self._unusable(name):
                    raise Refusal(f"{path}.{name}", reason)
        if self.data and self.data.scans and self.device.platform == "photonic":
            raise Refusal("data.scans", "are measured on an ion, but device.platform is 'photonic'; remove them")
        for k, name in enumerate(self.uncertainty.profile):
            base, at, part = name.partition("@")
            if self.fit and name != "all" and base not in self.fit.free:
                raise Refusal(f"uncertainty.profile.{k}", f"is '{name}', which is not free; name a key of fit.free")
            loops = [self.data.name, *self.data.more] if self.data else []
            if self.fit and at and (base not in self.fit.per_table or part not in loops or len(loops) < 2):
                reason = (
                    f"is '{name}', but no table has its own {base} under that name; see fit.per_table and data.more"
                )
                raise Refusal(f"uncertainty.profile.{k}", reason)
        if self.optimize is None:
            return self
        if self.device.platform == "photonic":
            raise Refusal("optimize", "designs laser pulses, but device.platform is 'photonic'; choose 'ion'")
        for name, (low, high) in self.optimize.bounds.items():
            start = 1.0 if name.startswith("amplitude") else getattr(self.device, name, 0.0)
            if not low <= start <= high:
                whose = f"device.{name}" if name in Device.model_fields else "the command the search starts from"
                reason = f"is [{low:g}, {high:g}], but {whose} is {start:g}, outside it; move the bounds or the device"
                raise Refusal(f"optimize.bounds.{name}", reason)
        return self

    def _unusable(self, name: str) -> str:
        """Why a parameter has no meaning for this device; empty when it has one."""
        photonic = self.device.platform == "photonic"
        if photonic and name not in (
            "readout_error_bright",
            "readout_error_dark",
            "window_cycles",
            "overdispersion",
        ):
            return "has no meaning for device.platform = 'photonic'; remove it"
        two = self.device.laser_linewidth_hz is None
        if name == "laser_linewidth_hz" and two:
            return "belongs to one source, but [device] has two; name laser_linewidth_1_hz or laser_linewidth_2_hz"
        if name in ("laser_linewidth_1_hz", "laser_linewidth_2_hz") and not two:
            return "belongs to two sources; give both linewidths in [device], or name laser_linewidth_hz"
        return ""

    def seed_of(self, verb: str) -> int:
        """Seed in the table of a verb that has one: "simulate", "fit", "optimize" or "sweep"."""
        return getattr(self, verb).seed

    def to_toml(self) -> str:
        """The resolved configuration; reading it again gives an equal one."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(exclude_none=True))


TABLES: dict[str, type[Table]] = {
    "device": Device,
    "memory": Memory,
    "data": Data,
    "fit": Fit,
    "uncertainty": Uncertainty,
    "simulate": Simulate,
    "optimize": Optimize,
    "sweep": Sweep,
}
"""The tables of a configuration by name."""
