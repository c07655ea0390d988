"""Pulse samples as an ARTIQ experiment that plays them from the RAM of AD9910 channels of one Urukul card.

RAM: 1024 words of 32 bits; a word is held for a multiple of 4 ns (four periods of the 1 GHz system clock), counted in
16 bits. Amplitude words hold 14 bits at 31:18; polar words the phase, 16 bits at 31:16, and the amplitude, 14 bits at
15:2. The lowest bits are ignored. A channel gets amplitude words where its samples are real and none is negative; else
polar ones, a negative sample then being half a turn. Full scale is the largest code, 16383, as in the driver.

The driver's `write_ram` fills a profile from its end address down while playback goes up: the file lists its words in
the order of time and the experiment reverses them. They are signed, as ARTIQ's 32-bit integers are.

References:
    AD9910 data sheet, Analog Devices, "RAM Control" (step rate, Table 12: destinations, Table 13: modes).
    ARTIQ, artiq/coredevice/ad9910.py (`set_profile_ram`, `write_ram`, `amplitude_to_ram`, `turns_amplitude_to_ram`,
    `set_cfr1`) and artiq/test/coredevice/test_ad9910.py (`ram_read_overlapping`: the order of addresses).
"""

import ast
import math
from typing import Any

import numpy as np

from experiments.waveform_samples import Samples, WaveformError

RAM_WORDS = 1024
STEP_NS = 4
BITS = 14
_FORMAT = "AD9910 RAM, version 1"
_AMPLITUDE, _PHASE = 2**BITS - 1, 2**16
_CARD = 4  # channels that one I/O update starts
_HIGHEST_HZ = 400e6  # of the output at a 1 GHz clock, data sheet
_CONSTANTS = {
    "FORMAT": str, "CHANNELS": list, "CARRIER_HZ": list, "FULL_SCALE_RAD_S": list, "START_S": float, "STEP": int,
    "POLAR": list, "ATTRIBUTES": dict, "WORDS": list,
}  # fmt: skip

_EXPERIMENT = '''

class PlaySamples(EnvExperiment):
    """Loads the RAM of every channel and plays all of them once, from one I/O update on."""

    def build(self):
        self.setattr_device("core")
        self.dds = [self.get_device(name) for name in DEVICES]
        self.cpld = self.dds[0].cpld
        if any(dds.cpld is not self.cpld for dds in self.dds):
            raise ValueError("DEVICES must be channels of one Urukul card, which one I/O update starts together.")

    def prepare(self):
        # `write_ram` fills the profile from its end address down, playback goes up.
        self.words = [words[::-1] for words in WORDS]
        self.carriers = CARRIER_HZ
        self.destinations = [RAM_DEST_POWASF if polar else RAM_DEST_ASF for polar in POLAR]
        self.last, self.step = len(WORDS[0]) - 1, STEP
        half = self.core.ref_period / 2  # `seconds_to_mu` rounds down
        self.start_mu = self.core.seconds_to_mu(START_S + half)
        self.length_mu = self.core.seconds_to_mu(len(WORDS[0]) * STEP * 4e-9 + half)

    @kernel
    def run(self):
        self.core.reset()
        self.cpld.init()
        for i in range(len(self.dds)):
            self.load(i)
        for i in range(len(self.dds)):
            # Takes effect at the next I/O update, which also clears the phase accumulators.
            self.dds[i].set_cfr1(ram_enable=1, ram_destination=self.destinations[i], phase_autoclear=1)
        self.play()

    @kernel
    def load(self, i):
        dds = self.dds[i]
        self.core.break_realtime()
        dds.init()
        dds.sw.off()
        dds.set_cfr1(ram_enable=0)
        self.cpld.io_update.pulse_mu(8)
        # The profile that the card selects from `init` on; as a single tone it is lost.
        dds.set_profile_ram(start=0, end=self.last, step=self.step, profile=DEFAULT_PROFILE, mode=RAM_MODE_RAMPUP)
        self.cpld.io_update.pulse_mu(8)
        delay(10*ms)
        dds.write_ram(self.words[i])
        dds.set_ftw(dds.frequency_to_ftw(self.carriers[i]))
        dds.set_pow(0)
        delay(10*ms)

    @kernel
    def play(self):
        delay(10*us)
        at_mu((now_mu() & ~7) + self.start_mu)  # the coarse clock of the core device, on the grid of SYNC_CLK
        begin_mu = now_mu()
        for i in range(len(self.dds)):
            self.dds[i].sw.on()
        self.cpld.io_update.pulse_mu(8)
        at_mu(begin_mu + self.length_mu)
        for i in range(len(self.dds)):  # the last word would play on
            self.dds[i].sw.off()
        self.core.wait_until_mu(now_mu())
'''


def to_artiq(samples: Samples) -> bytes:
    """Text of the experiment; `DEVICES` in it are to be set to the channels of the laboratory.

    Raises:
        WaveformError: the RAM, its clock or the converter cannot hold the samples.
    """
    count = len(samples.real_rad_s)
    if not 2 <= count <= RAM_WORDS:
        raise WaveformError(
            f"there are {count} samples, but the RAM of an AD9910 plays 2 to {RAM_WORDS}; resample them."
        )
    if len(samples.channels) > _CARD:
        raise WaveformError(f"there are {len(samples.channels)} channels, but a Urukul card has {_CARD}; split them.")
    if samples.carrier_hz is None:
        raise WaveformError("carrier_hz is None, but an AD9910 needs the frequency of each channel; give it.")
    for channel, carrier in zip(samples.channels, samples.carrier_hz, strict=True):
        if not 0 < carrier <= _HIGHEST_HZ:
            limit = f"between 0 and {_HIGHEST_HZ:g} Hz on an AD9910"
            raise WaveformError(f"carrier_hz of {channel} is {carrier:g}, but must be {limit}; give that of its tone.")
    step = _steps(samples.sample_s, "sample_s")
    if not 1 <= step < 2**16:
        most = STEP_NS * (2**16 - 1)
        raise WaveformError(f"sample_s is {samples.sample_s:g}, but an AD9910 holds words {STEP_NS} to {most} ns.")
    if samples.start_s < 0:
        raise WaveformError(f"start_s is {samples.start_s:g}, but no delay is negative; start at 0 or later.")
    _steps(samples.start_s, "start_s")
    values = samples.scaled()
    polar = [bool((wave.imag != 0).any() or (wave.real < 0).any()) for wave in values.T]
    constants = {
        "CHANNELS": list(samples.channels), "CARRIER_HZ": list(samples.carrier_hz),
        "FULL_SCALE_RAD_S": list(samples.full_scale_rad_s), "START_S": samples.start_s, "STEP": step, "POLAR": polar,
        "ATTRIBUTES": dict(samples.attributes),
    }  # fmt: skip
    lines = [
        '"""Pulse samples for AD9910 channels of one Urukul card, played from their RAM. Set DEVICES."""', "",
        "from artiq.coredevice.ad9910 import RAM_DEST_ASF, RAM_DEST_POWASF, RAM_MODE_RAMPUP",
        "from artiq.coredevice.urukul import DEFAULT_PROFILE",
        "from artiq.experiment import EnvExperiment, at_mu, delay, kernel, ms, now_mu, us", "",
        f"FORMAT = {_FORMAT!r}",
        f"DEVICES = {[f'urukul0_ch{k}' for k in range(len(samples.channels))]!r}  # of the device database",
        *(f"{name} = {value!r}" for name, value in constants.items()),
        "# In the order of time, each held for STEP times 4 ns.",
        "WORDS = [",
    ]  # fmt: skip
    for channel, wave, turns in zip(samples.channels, values.T, polar, strict=True):
        words = ram_words(wave, polar=turns).tolist()
        lines.append(f"    [  # {channel}: {'phase at 31:16, amplitude at 15:2' if turns else 'amplitude at 31:18'}")
        lines += ["        " + ", ".join(map(str, words[k : k + 8])) + "," for k in range(0, count, 8)]
        lines.append("    ],")
    return ("\n".join([*lines, "]"]) + "\n" + _EXPERIMENT).encode()


def ram_words(values: np.ndarray, *, polar: bool) -> np.ndarray:
    """RAM words of samples.

    Args:
        values: complex samples in units of full scale, shape (samples,).
        polar: phase and amplitude; else the amplitude alone.

    Returns:
        Signed 32-bit words, shape (samples,).
    """
    # Rounding of the input may leave a hair more than full scale.
    amplitudes = np.minimum(np.rint(np.abs(values) * _AMPLITUDE), _AMPLITUDE).astype(np.int64)
    if not polar:
        return (amplitudes << 18).astype(np.uint32).view(np.int32)
    turns = np.where(amplitudes == 0, 0.0, np.angle(values) / (2 * math.pi))  # nothing has no phase
    phases = np.rint(turns * _PHASE).astype(np.int64) % _PHASE
    return ((phases << 16) | (amplitudes << 2)).astype(np.uint32).view(np.int32)


def from_artiq(data: bytes) -> Samples:
    """The samples of such a file, as quantized in its words; the file is parsed, never executed.

    Raises:
        WaveformError: it is no such file.
    """
    constants = _constants(data)
    if constants["FORMAT"] != _FORMAT:
        raise WaveformError(f"FORMAT is {constants['FORMAT']!r:.60}, but this reads {_FORMAT!r}; write the file again.")
    channels, polar, words = constants["CHANNELS"], constants["POLAR"], constants["WORDS"]
    if not len(channels) == len(polar) == len(words) == len(constants["FULL_SCALE_RAD_S"]):
        raise WaveformError("CHANNELS, POLAR, WORDS and FULL_SCALE_RAD_S differ in length; give one entry a channel.")
    if len({len(column) if isinstance(column, list) else -1 for column in words}) != 1:
        raise WaveformError("WORDS must be lists of one length, a channel each; write the file again.")
    if any(type(turns) is not bool for turns in polar):
        raise WaveformError(f"POLAR is {polar!r:.60}, but must say True or False for each channel.")
    for channel, column in zip(channels, words, strict=True):
        for k, word in enumerate(column if isinstance(column, list) else [column]):
            if type(word) is not int or not -(2**31) <= word < 2**31:
                raise WaveformError(f"word {k} of {channel} is {word!r:.60}, but must be a signed 32-bit integer.")
    raw = np.array(words, dtype=np.int64).T % 2**32  # shape (samples, channels)
    turns = np.where(polar, (raw >> 16) / _PHASE, 0.0)
    amplitudes = np.where(polar, (raw >> 2) & _AMPLITUDE, raw >> 18) / _AMPLITUDE
    relative = Samples(
        real_rad_s=amplitudes * np.cos(2 * math.pi * turns),
        imag_rad_s=amplitudes * np.sin(2 * math.pi * turns),
        sample_s=constants["STEP"] * STEP_NS / 1e9,
        start_s=constants["START_S"],
        channels=tuple(channels),
        full_scale_rad_s=constants["FULL_SCALE_RAD_S"],
        bits=BITS,
        carrier_hz=constants["CARRIER_HZ"],
        attributes=constants["ATTRIBUTES"],
    )
    return relative.amplified(np.array(relative.full_scale_rad_s))


def _steps(value_s: float, name: str) -> int:
    """A time in units of 4 ns."""
    steps = value_s * 1e9 / STEP_NS
    if abs(steps - round(steps)) > 1e-6:
        near = max(round(steps), 1) * STEP_NS
        raise WaveformError(
            f"{name} is {value_s:g}, but must be a multiple of {STEP_NS} ns, the step of an AD9910 at 1 GHz; "
            f"take {near} ns."
        )
    return round(steps)


def _constants(data: bytes) -> dict[str, Any]:
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError) as error:
        where = f"line {error.lineno}" if isinstance(error, SyntaxError) else "a null character"
        raise WaveformError(f"this is not Python ({where}); write the file again.") from None
    constants = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in _CONSTANTS:
            name = node.targets[0].id
            try:
                constants[name] = ast.literal_eval(node.value)
            except (ValueError, TypeError, MemoryError, RecursionError):
                raise WaveformError(f"line {node.lineno}: {name} is not a literal; write its value out.") from None
            if type(constants[name]) is not _CONSTANTS[name]:
                found, needed = type(constants[name]).__name__, _CONSTANTS[name].__name__
                raise WaveformError(f"line {node.lineno}: {name} is a {found}, but must be a {needed}.")
    for name in _CONSTANTS:
        if name not in constants:
            raise WaveformError(f"the file lacks {name}; it must be an experiment that this module wrote.")
    return constants
