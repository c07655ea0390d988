"""Tables of pulse optimization: what is wanted, and what the generator and the modulator allow."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from experiments.messages import Refusal
from experiments.schema_device import COMMANDS, Box, Table, number, within

_SEED = 2**63 - 1
_RABI = 1e8  # Hz; far above what addresses a single line


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

    @model_validator(mode="after")
    def _sensible(self) -> "Hardware":
        for k, value in enumerate(self.largest_rabi_hz):
            if not 0 < value <= _RABI:
                raise Refusal(f"largest_rabi_hz.{k}", f"is {value:g}, but must lie above 0 and be at most {_RABI:g}")
        if self.bandwidth_hz is not None and self.bandwidth_hz >= 0.5 / self.sample_s:
            raise Refusal("bandwidth_hz", f"is {self.bandwidth_hz:g}, but must lie below half the sample clock, "
                          f"{0.5 / self.sample_s:g}")  # fmt: skip
        return self


class Shape(Table):
    """Sampled pulses in place of Gaussians; needs a table [hardware]."""

    samples: int = number(60, 3, 10_000, "", "samples of each pulse")
    delay_samples: int = number(60, 0, 10_000, "", "from the beginning of pulse 1 to that of pulse 2")
    oversampling: int = number(1, 1, 64, "", "slices a sample; take more with rise_s")


class Optimize(Table):
    """Pulse commands that make the device do what was commanded, or that open the loop."""

    target: Literal["obedience", "area", "form_factor"] = Field(
        "obedience",
        description="least rms of y - (1 - r_set) x_set over the square, or largest loop area or form factor",
    )
    bounds: Annotated[dict[str, Box], within(COMMANDS)] = Field(
        {},
        description="at least one command to change as name = [low, high]; amplitudes are relative to the nominal one; "
        "none with [optimize.shape]",
        json_schema_extra={"propertyNames": {"enum": list(COMMANDS)}},
    )
    shape: Shape | None = Field(None, description="samples are free, in place of the commands of Gaussian pulses")
    iterations: int = number(200, 1, 100_000, "", "most iterations of the optimizer")
    seed: int = number(0, 0, _SEED, "", "seed of the starts")
    cycles_per_period: int = number(40, 4, 100_000, "", "cycles in one period of the input (loop targets)")
    window_cycles: float | None = number(None, 1.0, 1e6, "cycles", "memory window (default: that of [memory])")

    @model_validator(mode="after")
    def _something_to_change(self) -> "Optimize":
        if not self.bounds and self.shape is None:
            raise Refusal("bounds", "names no command; give at least one as name = [low, high], or a table "
                          "[optimize.shape]")  # fmt: skip
        if self.bounds and self.shape is not None:
            raise Refusal("bounds", "belongs to Gaussian pulses, but [optimize.shape] makes every sample free; "
                          "remove one of the two")  # fmt: skip
        return self
