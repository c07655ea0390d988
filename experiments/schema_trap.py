"""What configurations say about the trap, the chain, the motion of its ions and the beams that reach neighbours."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from experiments.messages import Refusal
from experiments.schema_device import PARAMETERS, Table, from_list, number

_YB171_U = 170.936
_KEYS = {
    "linear": ("rf_voltage_v", "rf_hz", "r0_m", "dc_voltage_v", "z0_m", "kappa"),
    "surface": ("rf_voltage_v", "rf_hz", "center_width_m", "left_width_m", "right_width_m", "axial_hz"),
    "harmonic": ("secular_hz",),
}
_MORE = {
    "linear": ("asymmetry_voltage_v",),
    "surface": ("gap_m", "static_asymmetry"),
    "harmonic": ("rf_hz",),
}
_ALWAYS = ("kind", "stray_field_v_per_m", "field_noise_v2_per_m2_hz")

Triple = Annotated[tuple[float, float, float], BeforeValidator(from_list)]


def _direction(triple: tuple[float, float, float]) -> tuple[float, float, float]:
    largest = max(map(abs, triple))
    if not largest > 0:
        raise Refusal("", "is [0, 0, 0], which has no direction; give x, y, z")
    return triple[0] / largest, triple[1] / largest, triple[2] / largest


Direction = Annotated[Triple, AfterValidator(_direction)]


class Trap(Table):
    """The Paul trap: rods, a surface trap with five wires, or measured frequencies."""

    kind: Literal["linear", "surface", "harmonic"] = Field(
        description="rods (linear), electrodes in a plane (surface), or secular frequencies as measured (harmonic)"
    )
    rf_voltage_v: float | None = number(None, 0.0, 1e5, "V", "amplitude of the rf (linear, surface)")
    rf_hz: float | None = number(None, 1e3, 1e10, "Hz", "frequency of the rf")
    r0_m: float | None = number(None, 1e-7, 1.0, "m", "from the axis to the rods (linear)")
    dc_voltage_v: float | None = number(None, -1e6, 1e6, "V", "on the end caps (linear)")
    z0_m: float | None = number(None, 1e-7, 1.0, "m", "from the centre to the end caps (linear)")
    kappa: float | None = number(None, 0.0, 1.0, "", "geometric factor of the end caps (linear)")
    asymmetry_voltage_v: float | None = number(None, -1e6, 1e6, "V", "static, on one pair of rods: splits x from y")
    center_width_m: float | None = number(None, 1e-7, 1.0, "m", "width of the electrode between the rf ones (surface)")
    left_width_m: float | None = number(None, 1e-7, 1.0, "m", "width of the rf electrode at negative x (surface)")
    right_width_m: float | None = number(None, 1e-7, 1.0, "m", "width of the rf electrode at positive x (surface)")
    gap_m: float | None = number(None, 0.0, 1.0, "m", "gap between electrodes; their edges lie at its centre (surface)")
    axial_hz: float | None = number(None, 1.0, 1e9, "Hz", "secular frequency along the axis (surface)")
    static_asymmetry: float | None = number(None, -1e3, 1e3, "", "share of the static field that splits x from y")
    secular_hz: Triple | None = Field(None, description="secular frequencies along x, y and z, Hz (harmonic)")
    stray_field_v_per_m: Triple = Field(
        (0.0, 0.0, 0.0), description="static field that pushes ions off the rf null, along x, y, z, V/m"
    )
    field_noise_v2_per_m2_hz: float = number(
        0.0, 0.0, 1.0, "(V/m)^2/Hz",
        "density of electric-field noise (single-sided), in place of device.heating_rate_per_s"
    )  # fmt: skip

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Trap":
        for key in _KEYS[self.kind]:
            if getattr(self, key) is None:
                raise Refusal(key, f"is missing, which kind = '{self.kind}' needs; add it")
        allowed = {*_KEYS[self.kind], *_MORE[self.kind], *_ALWAYS}
        for key in Trap.model_fields:
            if key not in allowed and getattr(self, key) is not None:
                raise Refusal(key, f"has no meaning for kind = '{self.kind}'; remove it")
        if self.secular_hz is not None and min(self.secular_hz) <= 0:
            raise Refusal("secular_hz", f"is {list(self.secular_hz)}, but must be three positive frequencies, Hz")
        if any(self.stray_field_v_per_m) and self.rf_hz is None:
            raise Refusal("rf_hz", "is missing, which stray_field_v_per_m needs for its micromotion; add it")
        return self


_PER_ION = {name: PARAMETERS[name] for name in (
    "rabi_scale_1", "rabi_scale_2", "detuning_1_hz", "detuning_2_hz", "laser_linewidth_hz", "readout_error_bright",
    "readout_error_dark", "window_cycles",
)}  # fmt: skip


class Chain(Table):
    """The ions in the trap, from low z to high z."""

    ions: int = number(1, 1, 300, "", "number of ions")
    memristor: int | None = number(None, 1, 300, "", "which ion is the memristor, counted from 1 (default: the middle)")
    memristors: Literal["one", "all"] = Field(
        "one", description="one ion is the memristor, or all of them, played at the same time: a register"
    )
    masses_u: tuple[float, ...] | None = Field(
        None, description="masses of the ions, u, from low z to high z (default: all 171Yb+)"
    )
    quartic_v_per_m4: float = number(0.0, -1e20, 1e20, "V/m^4", "c4 of the axial potential c4 z^4")
    each: dict[str, tuple[float, ...]] = Field(
        {},
        description="parameters of the device that differ from ion to ion of a register, name = [one number an ion]",
        json_schema_extra={"propertyNames": {"enum": list(_PER_ION)}},
    )

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = dict(given)
        given["masses_u"] = from_list(given.get("masses_u"))
        if isinstance(given.get("each"), dict):
            given["each"] = {name: from_list(values) for name, values in given["each"].items()}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> "Chain":
        if self.memristor is not None and self.memristor > self.ions:
            raise Refusal("memristor", f"is {self.memristor}, but the chain has {self.ions} ions")
        if self.memristors == "all" and self.memristor is not None:
            raise Refusal("memristor", "is given, but memristors = 'all' makes every ion one; remove either")
        if self.masses_u is not None and (len(self.masses_u) != self.ions or min(self.masses_u) <= 0):
            raise Refusal("masses_u", f"must be {self.ions} positive masses, one an ion, but is {list(self.masses_u)}")
        if self.masses_u is not None:
            place = (self.ions - 1) // 2 if self.memristor is None else self.memristor - 1
            for k in range(self.ions) if self.memristors == "all" else (place,):
                if abs(self.masses_u[k] - _YB171_U) > 0.1:
                    raise Refusal("masses_u", f"makes the memristor, ion {k + 1}, one of {self.masses_u[k]:g} u, but "
                                  f"the lines are those of 171Yb+ ({_YB171_U} u)")  # fmt: skip
        if self.each and self.memristors == "one":
            raise Refusal("each", "needs memristors = 'all'; give the one memristor's numbers in [device]")
        for name, values in self.each.items():
            if name not in _PER_ION:
                raise Refusal(f"each.{name}", f"is not a parameter that ions may differ in: {', '.join(_PER_ION)}")
            if len(values) != self.ions:
                raise Refusal(f"each.{name}", f"has {len(values)} numbers, but the chain has {self.ions} ions")
            allowed = _PER_ION[name]
            if min(values) < allowed.low or max(values) > allowed.high:
                raise Refusal(f"each.{name}", f"must lie between {allowed}, but is {list(values)}")
        return self


class Motion(Table):
    """What the beams see of the motion; phonon numbers and heating are those of [device], of the lowest axial mode."""

    beam_1: Direction = Field((0.0, 0.0, 1.0), description="direction of beam 1, [x, y, z], of any length")
    beam_2: Direction | None = Field(None, description="direction of beam 2 (default: that of beam 1)")
    wavelength_1_m: float = number(435.517611e-9, 1e-7, 1e-4, "m", "wavelength of beam 1")
    wavelength_2_m: float = number(435.517611e-9, 1e-7, 1e-4, "m", "wavelength of beam 2")
    coherent: float = number(0.0, 0.0, 1e3, "", "mean phonon number of a displacement of the lowest axial mode")


class Crosstalk(Table):
    """Light that reaches the neighbours of an ion of a register."""

    beam_waist_1_m: float | None = number(None, 1e-7, 1e-2, "m", "1/e^2 intensity radius of beam 1 at the ions")
    beam_waist_2_m: float | None = number(None, 1e-7, 1e-2, "m", "1/e^2 intensity radius of beam 2 at the ions")
    neighbour_1: float = number(0.0, 0.0, 0.5, "", "field of beam 1 at the two nearest neighbours, as measured")
    neighbour_2: float = number(0.0, 0.0, 0.5, "", "field of beam 2 at the two nearest neighbours, as measured")
    phase_rad: float = number(0.0, -10.0, 10.0, "rad", "phase of a neighbour's light against that of the own beam")
    pointing_m: tuple[float, ...] | None = Field(
        None, description="how far each beam misses its ion along the chain, m, one number an ion"
    )

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, given: Any) -> Any:
        return {**given, "pointing_m": from_list(given.get("pointing_m"))} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _consistent(self) -> "Crosstalk":
        for k in (1, 2):
            if getattr(self, f"beam_waist_{k}_m") is not None and getattr(self, f"neighbour_{k}") > 0:
                raise Refusal(f"neighbour_{k}", f"is given beside beam_waist_{k}_m, which tells it too; remove either")
        if self.pointing_m is not None and None in (self.beam_waist_1_m, self.beam_waist_2_m):
            raise Refusal("pointing_m", "needs beam_waist_1_m and beam_waist_2_m; add them")
        return self
