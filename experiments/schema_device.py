"""What configurations say about the device, its memory and its data, and what all tables of one share."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from calibration.columns import COLUMNS, MappingError, sources_from
from experiments.messages import Allowed, Refusal, allowed_range, unknown_key


def number(default: Any, low: int | float, high: int | float, unit: str, text: str, **more: Any) -> Any:
    """A number with its range and unit."""
    return Field(default, ge=low, le=high, description=text, json_schema_extra={"unit": unit}, **more)


class Table(BaseModel):
    """What all tables share: exact types, no unknown keys, finite numbers, no changes after validation."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


TUNING = 1e7  # Hz; far beyond it neither line is addressed
_TIME = (1e-8, 0.01)  # s; pulse widths from a few optical-modulator rise times to a fraction of the D3/2 lifetime


PHOTONIC = (
    *("phase_scale_1", "phase_scale_2", "phase_offset_1_rad", "phase_offset_2_rad"),
    *("visibility_1", "visibility_2", "phase_noise_1_rad", "phase_noise_2_rad"),
    *("loss_input", "loss", "efficiency", "dark_counts"),
)
"""Parameters of the photonic platform."""
_OF_BOTH = ("platform", "engine", "error", "window_cycles", "overdispersion", "outlier_share")


def foreign(name: str, platform: str) -> str:
    """Why a key of [device] or a free parameter is not one of this platform; empty when it is."""
    if name in _OF_BOTH or (name in PHOTONIC) == (platform == "photonic"):
        return ""
    reason = f"has no meaning for platform = '{platform}'"
    if platform == "photonic" and name.startswith("readout_error"):
        return f"{reason}, whose detectors have efficiency and dark_counts; give these"
    return f"{reason}; remove it"


class Device(Table):
    """The memristor as the laboratory set it up; defaults are the 171Yb+ device of the demo."""

    platform: Literal["ion", "photonic"] = Field("ion", description="trapped ion or integrated photonics")
    scheme: Literal["lambda", "v", "ladder"] = Field("lambda", description="level scheme: which of v, s, m lies where")
    engine: Literal["auto", "closed_form", "lindblad"] = Field(
        "auto", description="closed form, integrated Lindblad equation, or the closed form only where `error` allows it"
    )
    error: float = number(1e-8, 1e-12, 1e-3, "", "largest error of a population that the engine may make")
    sigma_1_s: float = number(20e-6, *_TIME, "s", "width (standard deviation of the Rabi envelope) of pulse 1")
    sigma_2_s: float = number(20e-6, *_TIME, "s", "width (standard deviation of the Rabi envelope) of pulse 2")
    separation_s: float = number(120e-6, 0.0, 0.1, "s", "from the centre of pulse 1 to the centre of pulse 2")
    lead_s: float = number(100e-6, 0.0, 0.1, "s", "from preparation to the centre of pulse 1")
    tail_s: float = number(100e-6, 0.0, 0.1, "s", "from the centre of the last pulse to the start of read-out")
    lifetime_s: float = number(52.7e-3, 1e-9, 1e12, "s", "lifetime of the decaying level (D3/2)")
    branching: float = number(0.4, 0.0, 1.0, "", "fraction of its decays to S1/2 F=0; the rest goes to F=1")
    m_lifetime_s: float = number(
        math.inf,
        1e-9,
        math.inf,
        "s",
        "lifetime of m, the top level of the ladder scheme; inf in the other schemes",
        allow_inf_nan=True,
    )
    rabi_scale_1: float = number(1.0, 0.0, 10.0, "", "actual over nominal Rabi frequency of pulse 1")
    rabi_scale_2: float = number(1.0, 0.0, 10.0, "", "actual over nominal Rabi frequency of pulse 2")
    detuning_1_hz: float = number(0.0, -TUNING, TUNING, "Hz", "laser 1 minus line 1")
    detuning_2_hz: float = number(0.0, -TUNING, TUNING, "Hz", "laser 2 minus line 2")
    laser_linewidth_hz: float | None = number(
        None, 0.0, 1e6, "Hz", "FWHM linewidth of one source for both lines (0 unless two sources are given)"
    )
    laser_linewidth_1_hz: float | None = number(None, 0.0, 1e6, "Hz", "FWHM linewidth of laser 1, with two sources")
    laser_linewidth_2_hz: float | None = number(None, 0.0, 1e6, "Hz", "FWHM linewidth of laser 2, with two sources")
    n_bar: float = number(0.0, 0.0, 1e4, "", "mean phonon number when pulse 1 begins")
    heating_rate_per_s: float = number(0.0, 0.0, 1e7, "1/s", "phonons gained per second")
    eta_1: float = number(0.0, 0.0, 1.0, "", "Lamb-Dicke parameter of pulse 1")
    eta_2: float = number(0.0, 0.0, 1.0, "", "Lamb-Dicke parameter of pulse 2")
    stark_1_hz: float = number(0.0, -TUNING, TUNING, "Hz", "light shift of line 1 at the peak of a full pulse 1")
    stark_2_hz: float = number(0.0, -TUNING, TUNING, "Hz", "light shift of line 2 at the peak of a full pulse 2")
    amplitude_noise_1: float = number(0.0, 0.0, 0.3, "", "relative std of Rabi frequency 1 from shot to shot")
    amplitude_noise_2: float = number(0.0, 0.0, 0.3, "", "relative std of Rabi frequency 2 from shot to shot")
    amplitude_correlation: float = number(0.0, -1.0, 1.0, "", "correlation of both: 1 for one laser")
    detuning_noise_1_hz: float = number(0.0, 0.0, 1e5, "Hz", "std of detuning 1 from shot to shot")
    detuning_noise_2_hz: float = number(0.0, 0.0, 1e5, "Hz", "std of detuning 2 from shot to shot")
    detuning_correlation: float = number(0.0, -1.0, 1.0, "", "correlation of both: 1 for one laser")
    readout_error_bright: float = number(0.0, 0.0, 0.5, "", "probability that a bright ion is read dark")
    readout_error_dark: float = number(0.0, 0.0, 0.5, "", "probability that a dark ion is read bright")
    phase_scale_1: float = number(1.0, 0.0, 10.0, "", "actual over nominal phase of stage 1 (photonic, as all below)")
    phase_scale_2: float = number(1.0, 0.0, 10.0, "", "actual over nominal phase of stage 2")
    phase_offset_1_rad: float = number(0.0, -math.pi, math.pi, "rad", "added to the phase of stage 1")
    phase_offset_2_rad: float = number(0.0, -math.pi, math.pi, "rad", "added to the phase of stage 2")
    visibility_1: float = number(1.0, 0.0, 1.0, "", "interference visibility of stage 1")
    visibility_2: float = number(1.0, 0.0, 1.0, "", "interference visibility of stage 2")
    phase_noise_1_rad: float = number(0.0, 0.0, math.pi, "rad", "std of the phase of stage 1 from shot to shot")
    phase_noise_2_rad: float = number(0.0, 0.0, math.pi, "rad", "std of the phase of stage 2 from shot to shot")
    loss_input: float = number(0.0, 0.0, 1.0, "", "fraction of photons lost between the stages")
    loss: float = number(0.0, 0.0, 1.0, "", "fraction of photons lost between stage 2 and the output detector")
    efficiency: float = number(1.0, 0.0, 1.0, "", "probability that a photon makes the detector click")
    dark_counts: float = number(0.0, 0.0, 0.5, "", "probability of a click without a photon, per shot")

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
        default = Device.model_construct(laser_linewidth_hz=0.0)
        for key in Device.model_fields:
            if getattr(self, key) != getattr(default, key) and (reason := foreign(key, self.platform)):
                raise Refusal(key, reason)
        if self.scheme != "ladder" and self.m_lifetime_s != math.inf:
            reason = f"is {self.m_lifetime_s:g}, but only the top level of scheme = 'ladder' decays from m; remove it"
            raise Refusal("m_lifetime_s", reason)
        return self


class Memory(Table):
    """The feedback that turns past inputs into the next transfer."""

    kernel: Literal["moving_average", "exponential"] = Field("moving_average", description="weights of past inputs")
    window_cycles: float = number(
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


Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,40}$")]


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
    name: Label = Field("loops", description="name of that table, where others stand beside it")
    more: dict[Label, str] = Field(
        {}, description="further loop tables of the same device, name = 'path', with the same columns"
    )
    scans: dict[Label, str] = Field(
        {}, description="auxiliary scans of the same device, name = 'path' of a CSV file; see docs/scans.md"
    )

    def mapping(self) -> dict[str, Any]:
        """The columns as `calibration.data.read_table` takes them."""
        return {name: column.model_dump(exclude_none=True) for name, column in self.columns.items()}

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
    *("stark_1_hz", "stark_2_hz"),
    *("amplitude_noise_1", "amplitude_noise_2", "detuning_noise_1_hz", "detuning_noise_2_hz"),
    *PHOTONIC,
)
PARAMETERS: dict[str, Allowed] = {
    **{name: allowed_range(Device.model_fields[name]) for name in _FREE_DEVICE},
    "window_cycles": allowed_range(Memory.model_fields["window_cycles"]),
}
"""Parameters of either platform that a fit may free and a sweep may vary, with their ranges."""

FREE: dict[str, Allowed] = {
    **PARAMETERS,
    "crosstalk_1": Allowed(0.0, 0.5, ""),
    "crosstalk_2": Allowed(0.0, 0.5, ""),
    "overdispersion": Allowed(0.0, 0.5, ""),
    "outlier_share": Allowed(0.0, 0.5, ""),
}
"""What a fit may free: parameters of the device, of a register, and of the noise."""

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


def from_list(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


def ordered(pair: tuple[float, float]) -> tuple[float, float]:
    """The pair, low below high."""
    if not pair[0] < pair[1]:
        raise Refusal("", f"is [{pair[0]:g}, {pair[1]:g}], but must be [low, high] with low below high")
    return pair


def within(names: Mapping[str, Allowed]) -> AfterValidator:
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
    points: int | None = number(None, 1, 100_000, "", "points of this axis of a grid (default: `points` of the sweep)")

    @model_validator(mode="before")
    @classmethod
    def _from_pair(cls, given: Any) -> Any:
        return {"low": given[0], "high": given[1]} if isinstance(given, list) and len(given) == 2 else given

    @model_validator(mode="after")
    def _low_below_high(self) -> "Axis":
        ordered((self.low, self.high))
        return self


Box = Annotated[tuple[float, float], BeforeValidator(from_list), AfterValidator(ordered)]


def named(names: Mapping[str, Allowed], text: str) -> Any:
    """A table whose keys are some of `names`."""
    return Field(min_length=1, description=text, json_schema_extra={"propertyNames": {"enum": list(names)}})
