"""Pulse samples as a converter plays them: what every waveform file of `experiments.waveform_files` holds."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*", re.ASCII)
_FULL = 1 + 1e-12  # of full scale: rounding may carry a sample that far, and no farther


class WaveformError(ValueError):
    """Pulse samples or their file are refused; the message is one sentence with place, value and remedy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Complex Rabi frequency of each line at full command, Ω = real + i imag, each sample held for `sample_s`.

    Args:
        real_rad_s: real part, shape (samples, channels), rad/s.
        imag_rad_s: imaginary part, same shape.
        sample_s: time that each sample is held, positive.
        start_s: time of the first sample after the trigger.
        channels: names of the lines, letters, digits and underscores, such as ("line_1", "line_2").
        full_scale_rad_s: Rabi frequency at full scale of the converter, one positive number a channel.
        bits: resolution of the amplitudes where they are quantized, or None.
        carrier_hz: carrier frequency of each channel, or None.
        attributes: anything else worth keeping, texts and finite numbers by name.

    Raises:
        WaveformError: shapes that do not fit, or values that are not finite or out of their range.

    Example:
        >>> wave = np.array([[0.0], [1e5]])
        >>> samples = Samples(real_rad_s=wave, imag_rad_s=0 * wave, sample_s=2e-8, channels=("line_1",),
        ...                   full_scale_rad_s=(2e5,))
    """

    real_rad_s: np.ndarray
    imag_rad_s: np.ndarray
    sample_s: float
    start_s: float = 0.0
    channels: tuple[str, ...]
    full_scale_rad_s: tuple[float, ...]
    bits: int | None = None
    carrier_hz: tuple[float, ...] | None = None
    attributes: Mapping[str, str | float] = field(default_factory=dict)

    def __post_init__(self):
        keep = lambda name, value: object.__setattr__(self, name, value)
        channels = tuple(self.channels) if isinstance(self.channels, Sequence) else ()
        for channel in channels:
            if not isinstance(channel, str) or not _NAME.fullmatch(channel):
                remedy = "use letters, digits and underscores, a letter first"
                raise WaveformError(f"channels has the name {channel!r:.60}; {remedy}.")
        if not channels or isinstance(self.channels, str) or len(set(channels)) < len(channels):
            raise WaveformError(f"channels is {self.channels!r:.60}, but must be a tuple of names, all different.")
        keep("channels", channels)
        for name in ("real_rad_s", "imag_rad_s"):
            keep(name, _grid(getattr(self, name), name, channels))
        if self.real_rad_s.shape != self.imag_rad_s.shape:
            shapes = f"{self.real_rad_s.shape} and {self.imag_rad_s.shape}"
            raise WaveformError(f"real_rad_s and imag_rad_s have the shapes {shapes}; give both the same.")
        keep("sample_s", _number(self.sample_s, "sample_s", positive=True))
        keep("start_s", _number(self.start_s, "start_s"))
        keep("full_scale_rad_s", _each(self.full_scale_rad_s, "full_scale_rad_s", channels, positive=True))
        if self.carrier_hz is not None:
            keep("carrier_hz", _each(self.carrier_hz, "carrier_hz", channels))
        if self.bits is not None and (type(self.bits) is not int or not 1 <= self.bits <= 64):
            raise WaveformError(f"bits is {self.bits!r:.60}, but must be an integer between 1 and 64, or None.")
        keep("attributes", _attributes(self.attributes))

    @property
    def times_s(self) -> np.ndarray:
        """Start of each sample, shape (samples,), seconds after the trigger."""
        return self.start_s + np.arange(len(self.real_rad_s)) * self.sample_s

    def scaled(self) -> np.ndarray:
        """Complex samples in units of full scale, shape (samples, channels).

        Raises:
            WaveformError: a sample is beyond full scale.
        """
        values = (self.real_rad_s + 1j * self.imag_rad_s) / np.array(self.full_scale_rad_s)
        if (beyond := np.argwhere(np.abs(values) > _FULL)).size:
            sample, channel = (int(index) for index in beyond[0])
            full = self.full_scale_rad_s[channel]
            raise WaveformError(
                f"sample {sample} of {self.channels[channel]} is {abs(values[sample, channel]) * full:g} rad/s, beyond "
                f"full scale at {full:g} rad/s; lower the pulse or state a larger full_scale_rad_s."
            )
        return values

    def amplified(self, factors: np.ndarray) -> "Samples":
        """The same with each channel multiplied by a factor, shape (channels,); full scale stays as it is."""
        return replace(self, real_rad_s=self.real_rad_s * factors, imag_rad_s=self.imag_rad_s * factors)


def attributes_from(text: Any) -> dict[str, Any]:
    """Attributes of a file, which holds them as a JSON object.

    Raises:
        WaveformError: the text is none.
    """
    try:
        attributes = json.loads(text)
    except (TypeError, ValueError):
        attributes = None
    if not isinstance(attributes, dict):
        raise WaveformError(f"attributes is {text!r:.60}, but must be a JSON object of texts and numbers.")
    return attributes


def check_times(times_s: np.ndarray, start_s: float, sample_s: float, row: Callable[[int], str]) -> None:
    """Refuse times that are not those of samples held for `sample_s` each, to 1e-6 of a sample.

    Args:
        times_s: shape (samples,). start_s, sample_s: what they must be.
        row: called with the index of the first wrong time; says where that stands.

    Raises:
        WaveformError: a time is off.
    """
    wanted = start_s + np.arange(len(times_s)) * sample_s
    # Far from the trigger the floats themselves are coarser than that.
    allowed = np.maximum(1e-6 * abs(sample_s), 4 * np.spacing(np.abs(wanted)))
    if (wrong := np.flatnonzero(~(np.abs(times_s - wanted) <= allowed))).size:
        k = int(wrong[0])
        raise WaveformError(
            f"{row(k)} is {float(times_s[k])!r}, but samples of {sample_s:g} s put it at "
            f"{float(wanted[k])!r}; space the times evenly."
        )


def _grid(values: Any, name: str, channels: tuple[str, ...]) -> np.ndarray:
    given = np.asarray(values)
    if given.dtype.kind not in "iuf" or given.ndim != 2 or given.shape[1] != len(channels) or not given.shape[0]:
        what = f"{given.dtype} with shape {given.shape}"
        raise WaveformError(f"{name} is {what}, but must be real numbers with shape (samples, {len(channels)}).")
    grid = np.array(given, dtype=float)
    if (wrong := np.argwhere(~np.isfinite(grid))).size:
        sample, channel = (int(index) for index in wrong[0])
        value = grid[sample, channel]
        raise WaveformError(f"{name} of {channels[channel]} is {value} at sample {sample}; give finite numbers.")
    grid.flags.writeable = False
    return grid


def _number(value: Any, name: str, *, positive: bool = False) -> float:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or (positive and value <= 0):
        raise WaveformError(f"{name} is {value!r:.60}, but must be a finite {'positive ' * positive}number.")
    return float(value)


def _each(values: Any, name: str, channels: tuple[str, ...], *, positive: bool = False) -> tuple[float, ...]:
    listed = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str)
    if not listed or len(values) != len(channels):
        raise WaveformError(f"{name} is {values!r:.60}, but must be {len(channels)} numbers, one a channel.")
    return tuple(_number(value, f"{name} of {channel}", positive=positive)
                 for value, channel in zip(values, channels, strict=True))  # fmt: skip


def _attributes(given: Any) -> dict[str, str | float]:
    if not isinstance(given, Mapping):
        raise WaveformError(f"attributes is {given!r:.60}, but must be a dict of texts and numbers.")
    attributes: dict[str, str | float] = {}
    for key, value in given.items():
        if isinstance(key, str) and isinstance(value, str):
            attributes[str(key)] = str(value)
        elif isinstance(key, str) and isinstance(value, int | np.integer) and not isinstance(value, bool):
            attributes[str(key)] = int(value)
        elif isinstance(key, str) and isinstance(value, float | np.floating) and math.isfinite(value):
            attributes[str(key)] = float(value)
        else:
            raise WaveformError(f"attributes has {key!r:.60} = {value!r:.60}, but takes texts and finite numbers.")
    return attributes
