"""The table of a move between platforms: what is moved, and how real devices differ."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from experiments.messages import Refusal, unknown_key
from experiments.schema_device import PARAMETERS, Device, Memory, Table, foreign, from_list, number

_SEED = 2**63 - 1
WHAT = ("device", "command_map", "feedback", "reservoir")
# `window_cycles` belongs to the controller, so it does not vary between devices.
_NAMES = {name: allowed for name, allowed in PARAMETERS.items() if name != "window_cycles"}

# Parameters that do not enter the closed form; `_TIMES` enter it only through heating.
_UNSEEN = (
    *("detuning_1_hz", "detuning_2_hz", "laser_linewidth_hz", "laser_linewidth_1_hz", "laser_linewidth_2_hz"),
    *("detuning_noise_1_hz", "detuning_noise_2_hz", "stark_1_hz", "stark_2_hz", "lifetime_s", "branching", "tail_s"),
)
_TIMES = ("lead_s", "separation_s")
_LONGEST = PARAMETERS["window_cycles"].high


def ignored_by_closed_form(name: str, heated: bool) -> bool:
    """Whether an ion played by the closed form is the same whatever this parameter is."""
    return name in _UNSEEN or (name in _TIMES and not heated)


def _within(given: dict[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if name not in _NAMES:
            raise Refusal(name, unknown_key(name, value, list(_NAMES)))
        low, high = value if isinstance(value, tuple) else (value, value)
        if isinstance(value, tuple) and not low < high:
            raise Refusal(name, f"is [{low:g}, {high:g}], but must be [low, high] with low below high")
        allowed = _NAMES[name]
        if not (math.isfinite(low) and math.isfinite(high) and allowed.low <= low and high <= allowed.high):
            shown = f"[{low:g}, {high:g}]" if isinstance(value, tuple) else f"{value:g}"
            raise Refusal(name, f"is {shown}, but must lie between {allowed}")
    return given


def _no_values(given: Any) -> Any:
    """Refuses plain numbers, where only what differs from device to device belongs."""
    for name, value in given.items() if isinstance(given, dict) else ():
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise Refusal(name, f"is {value:g}, but must be [low, high]; a value belongs into [device]")
    return given


Range = Annotated[tuple[float, float], BeforeValidator(from_list)]
_Ranges = Annotated[dict[str, Range], BeforeValidator(_no_values), AfterValidator(_within)]
_Imperfections = Annotated[dict[str, float | Range], AfterValidator(_within)]


def _imperfections(text: str) -> Any:
    return Field({}, description=text, json_schema_extra={"propertyNames": {"enum": list(_NAMES)}})


class Transfer(Table):
    """A device, or control designed on it, moved to the other platform by the dictionary."""

    to: Literal["photonic", "ion"] = Field(description="platform to move to; [device] is of the other one")
    what: Annotated[list[Literal[WHAT]], Field(min_length=1)] = Field(  # ty: ignore[invalid-type-form]
        list(WHAT), description="device: the dictionary itself; command_map, feedback, reservoir: control, over seeds"
    )
    source: _Ranges = _imperfections(
        "how devices like [device] differ: name = [low, high] is drawn anew for each seed and freed in its calibration"
    )
    target: _Imperfections = _imperfections(
        "the device that is moved to: name = value, or name = [low, high] as in source; all else is ideal, and pulses "
        "and times of an ion are the defaults of [device]"
    )
    shots: int = number(400, 1, 10**9, "", "repetitions of each setting, in calibrations and in what is run")
    seeds: int = number(20, 2, 10_000, "", "pairs of devices")
    periods: int = number(3, 2, 1000, "", "periods of the loop, in calibrations and under the feedback law")
    cycles_per_period: int = number(20, 4, 10_000, "", "cycles in one of them")
    points: int = number(7, 3, 51, "", "commands a side of the square")
    nodes: int = number(10, 1, 200, "", "virtual nodes of the reservoir")
    seed: int = number(0, 0, _SEED, "", "seed of devices and shot noise")

    @model_validator(mode="after")
    def _sensible(self) -> "Transfer":
        if len(set(self.what)) < len(self.what):
            raise Refusal("what", f"is {self.what}, which names something twice; name each once")
        for table, platform in (("source", "ion" if self.to == "photonic" else "photonic"), ("target", self.to)):
            for name in getattr(self, table):
                if reason := foreign(name, platform):
                    raise Refusal(f"{table}.{name}", reason)
                if name == "n_bar":
                    raise Refusal(f"{table}.n_bar", "is no imperfection that a study can play, whose calibrations "
                                  "and emulation are of ions at one temperature; remove it")  # fmt: skip
        own = [name for name in ("laser_linewidth_1_hz", "laser_linewidth_2_hz") if name in self.target]
        if own and "laser_linewidth_hz" in self.target:
            raise Refusal("target.laser_linewidth_hz", f"is given beside {own[0]}; keep the one key for a shared "
                          "source or the two keys for two sources")  # fmt: skip
        return self


def check_movable(wanted: Transfer, device: Device, memory: Memory) -> None:
    """Refuses, before anything is computed, what the dictionary or a study cannot move.

    Raises:
        Refusal: see above.
    """
    if any(what != "device" for what in wanted.what):
        instead = "or set transfer.what = ['device']"
        if device.scheme == "v":
            raise Refusal("device.scheme", "is 'v', which is prepared in s, but control is moved between devices that "
                          f"start in v; choose 'lambda' or 'ladder', {instead}")  # fmt: skip
        most = _LONGEST / 2
        if memory.window_cycles > most:
            raise Refusal("memory.window_cycles", f"is {memory.window_cycles:g}, but calibrations of a study also play "
                          f"twice that, and a window is at most {_LONGEST:g} cycles; choose at most {most:g}, {instead}"
                          )  # fmt: skip
    if wanted.to == "ion" and "device" in wanted.what:
        for name, edge in (("visibility_1", 0.0), ("visibility_2", 0.0), ("loss_input", 1.0), ("loss", 1.0)):
            if getattr(device, name) == edge:
                raise Refusal(f"device.{name}", f"is {edge:g}, for which no ion can stand; move it off this end, or "
                              "leave 'device' out of transfer.what")  # fmt: skip
