"""Pulse samples in files: what is written is read, programs parse and play what was meant, wrong files are refused."""

import subprocess
import sys
import types

import numpy as np
import openpulse
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.waveform_artiq import from_artiq, ram_words, to_artiq
from experiments.waveform_files import KINDS, Samples, WaveformError, read, write
from experiments.waveform_openpulse import from_openqasm, to_openqasm
from experiments.waveform_tables import from_csv, from_netcdf, to_csv, to_netcdf

FULL = (2 * np.pi * 5e4, 2 * np.pi * 8e4)
SUFFIX = {"csv": ".csv", "netcdf": ".nc", "openqasm": ".qasm", "artiq": ".py"}


def samples(count=40, **changes):
    """A Gaussian cut off on one side on the first line, a chirped and negative one on the second."""
    t = np.linspace(-2.5, 1.7, count)[:, None]
    wave = np.array(FULL) * np.exp(-(t**2)) * np.concatenate([np.ones_like(t), -np.exp(1j * t**2)], axis=1)
    given = {
        "real_rad_s": wave.real, "imag_rad_s": wave.imag, "sample_s": 2e-7, "start_s": 1.2e-6,
        "channels": ("line_1", "line_2"), "full_scale_rad_s": FULL, "carrier_hz": (80e6, 110.5e6),
        "attributes": {"author": 'A "quoted", name;\n}', "loop": 3, "power": 0.25},
    }  # fmt: skip
    return Samples(**given | changes)


def assert_same(found, wanted, *, rtol=0.0, but=()):
    for name in set(vars(wanted)) - set(but):
        if name in ("real_rad_s", "imag_rad_s"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=rtol, atol=rtol * max(FULL))
        else:
            assert getattr(found, name) == getattr(wanted, name), name


@pytest.mark.parametrize("changes", [{}, {"carrier_hz": None, "bits": 12, "attributes": {}}, {"start_s": 0.0}])
@pytest.mark.parametrize("kind", ["csv", "netcdf", "openqasm"])
def test_what_is_written_is_read(tmp_path, kind, changes):
    path, wanted = tmp_path / f"pulse{SUFFIX[kind]}", samples(**changes)
    write(path, wanted, kind)
    assert_same(read(path), wanted, rtol=1e-15 if kind == "openqasm" else 0.0)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["csv", "netcdf", "openqasm"])
def test_one_sample_is_enough(tmp_path, kind):
    wanted = samples().real_rad_s[20:21]
    wanted = samples(real_rad_s=wanted, imag_rad_s=0 * wanted)
    write(tmp_path / f"pulse{SUFFIX[kind]}", wanted)
    assert_same(read(tmp_path / f"pulse{SUFFIX[kind]}"), wanted, rtol=1e-15)


def test_artiq_says_what_it_quantized(tmp_path):
    wanted = samples()
    write(tmp_path / "pulse.py", wanted)
    found = read(tmp_path / "pulse.py")
    assert_same(found, wanted, but=("bits", "real_rad_s", "imag_rad_s"))
    assert found.bits == 14
    off = np.abs((found.real_rad_s + 1j * found.imag_rad_s - wanted.real_rad_s - 1j * wanted.imag_rad_s) / FULL)
    assert 0 < off.max() < np.hypot(0.5 / 16383, np.pi / 65536) * 1.000001
    write(tmp_path / "again.py", found)
    assert (tmp_path / "again.py").read_bytes() == (tmp_path / "pulse.py").read_bytes()


numbers = st.floats(-1e12, 1e12, allow_nan=False)


@st.composite
def random_samples(draw, part=numbers):
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    real, imag = (
        np.array(draw(st.lists(part, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))).reshape(shape)
        for _ in range(2)
    )
    return Samples(
        real_rad_s=real, imag_rad_s=imag, sample_s=draw(st.floats(1e-10, 1e-3)), start_s=draw(st.floats(-1.0, 1.0)),
        channels=tuple(f"line_{k}" for k in range(shape[1])),
        full_scale_rad_s=tuple(draw(st.floats(1e-3, 1e9)) for _ in range(shape[1])),
        attributes=draw(st.dictionaries(st.text(max_size=5), st.one_of(st.text(max_size=9), numbers), max_size=3)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(random_samples())
def test_random_samples_survive_csv(wanted):
    assert_same(from_csv(to_csv(wanted)), wanted)


@settings(max_examples=15, deadline=None)
@given(random_samples())
def test_random_samples_survive_netcdf(wanted):
    assert_same(from_netcdf(to_netcdf(wanted)), wanted)


def decoded(word, polar):
    """Amplitude and phase (turns) of a RAM word by the bits of the data sheet, its Table 12."""
    bits = format(word % 2**32, "032b")  # bit 31 first
    if polar:
        return int(bits[16:30], 2) / 16383, int(bits[:16], 2) / 65536
    return int(bits[:14], 2) / 16383, 0.0


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-np.pi, np.pi)), min_size=1, max_size=20))
def test_ram_words_hold_amplitude_and_phase_to_half_a_step(polars):
    amplitudes, phases = np.array(polars).T
    for polar in (True, False):
        words = ram_words(amplitudes * np.exp(1j * phases * polar), polar=polar)
        assert words.dtype == np.int32
        found, turns = np.array([decoded(int(word), polar) for word in words]).T
        assert np.abs(found - amplitudes).max() <= 0.5 / 16383 + 1e-12
        if polar:
            off = np.where(found > 0, turns - phases / (2 * np.pi), 0)
            assert np.abs(off - np.rint(off)).max() <= 0.5 / 65536 + 1e-12


def test_a_negative_amplitude_is_half_a_turn():
    wave = np.array([[0.0, 0.5, 1.0]]).T
    text = lambda real: to_artiq(samples(count=3, real_rad_s=real * FULL, imag_rad_s=0 * real * FULL)).decode()
    both = text(np.concatenate([wave, -wave], axis=1))
    assert "POLAR = [False, True]" in both
    assert decoded(from_literal(both)[1][2], True) == (1.0, 0.5)
    assert decoded(from_literal(both)[0][2], False) == (1.0, 0.0)
    assert ram_words(np.array([-1e-9]), polar=True) == 0  # and nothing has no phase


def from_literal(text):
    start = text.index("WORDS = [") + len("WORDS = ")
    return eval(text[start : text.index("\n]\n", start) + 2])


class Chip:
    """An AD9910 as far as its RAM goes: staged settings take effect at an I/O update."""

    def __init__(self, card):
        self.cpld, self.ram, self.staged, self.sw = card, {}, {}, types.SimpleNamespace(on=self.on, off=self.off)
        self.profile, self.active, self.switch = {}, {}, []
        card.chips.append(self)

    def init(self): ...
    def on(self):
        self.switch.append((self.cpld.clock.now, True))

    def off(self):
        self.switch.append((self.cpld.clock.now, False))

    def set_cfr1(self, ram_enable=0, ram_destination=0, phase_autoclear=0):
        self.staged = {"enable": ram_enable, "destination": ram_destination, "clear": phase_autoclear}

    def set_profile_ram(self, start, end, step, profile, mode):
        assert profile == 7 and mode == 1 and 0 <= start < end < 1024 and 1 <= step < 2**16
        self.profile = {"start": start, "end": end, "step": step}

    def write_ram(self, data):
        assert not self.active.get("enable") and all(-(2**31) <= word < 2**31 for word in data)
        for k, word in enumerate(data):  # from the end address down, as ARTIQ's test of the hardware has it
            self.ram[self.profile["end"] - k] = word

    def frequency_to_ftw(self, hertz):
        return round(hertz / 1e9 * 2**32)

    def set_ftw(self, ftw):
        self.ftw = ftw

    def set_pow(self, turns):
        assert turns == 0


class Card:
    def __init__(self, clock):
        self.clock, self.chips, self.played = clock, [], []
        self.io_update = types.SimpleNamespace(pulse_mu=self.update)

    def init(self): ...
    def update(self, duration):
        for chip in self.chips:
            chip.active = chip.staged
            if chip.active.get("enable"):
                self.played.append((self.clock.now, chip))
        self.clock.now += duration


def played_by(text, monkeypatch):
    """What the chips play when the experiment runs: time of the update (ns), and the chips."""
    clock = types.SimpleNamespace(now=1003)
    cards = {"urukul0_cpld": Card(clock)}
    chips = {}

    class Experiment:
        def setattr_device(self, name):
            core = {"reset": lambda: None, "break_realtime": lambda: None, "wait_until_mu": lambda mu: None,
                    "seconds_to_mu": lambda s: int(s // 1e-9), "ref_period": 1e-9}  # fmt: skip
            setattr(self, name, types.SimpleNamespace(**core))

        def get_device(self, name):
            return chips.setdefault(name, Chip(cards["urukul0_cpld"]))

    def advance(to):
        clock.now = to

    modules = {
        "artiq": {}, "artiq.coredevice": {}, "artiq.coredevice.urukul": {"DEFAULT_PROFILE": 7},
        "artiq.coredevice.ad9910": {"RAM_DEST_ASF": 2, "RAM_DEST_POWASF": 3, "RAM_MODE_RAMPUP": 1},
        "artiq.experiment": {
            "EnvExperiment": Experiment, "kernel": lambda method: method, "ms": 1e-3, "us": 1e-6,
            "now_mu": lambda: clock.now, "at_mu": advance, "delay": lambda s: advance(clock.now + round(s * 1e9)),
        },
    }  # fmt: skip
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    space = {}
    exec(compile(text, "pulse.py", "exec"), space)
    experiment = space["PlaySamples"]()
    experiment.build()
    experiment.prepare()
    experiment.run()
    return cards["urukul0_cpld"].played, [chips[name] for name in space["DEVICES"]]


def test_the_artiq_experiment_plays_the_samples(monkeypatch):
    wanted = samples(count=1024)
    played, chips = played_by(to_artiq(wanted), monkeypatch)
    assert [chip for _, chip in played] == chips
    assert len({time for time, _ in played}) == 1 and played[0][0] % 4 == 0
    for k, (chip, polar) in enumerate(zip(chips, (False, True), strict=True)):
        assert chip.active == {"enable": 1, "destination": 3 if polar else 2, "clear": 1}
        assert chip.profile == {"start": 0, "end": 1023, "step": 50}
        assert chip.ftw == round(wanted.carrier_hz[k] / 1e9 * 2**32)
        amplitudes, turns = np.array([decoded(chip.ram[address], polar) for address in range(1024)]).T
        wave = wanted.real_rad_s[:, k] + 1j * wanted.imag_rad_s[:, k]
        assert np.abs(amplitudes - np.abs(wave) / FULL[k]).max() <= 0.5 / 16383 + 1e-12
        seen = amplitudes * np.exp(2j * np.pi * turns)
        assert np.abs(seen - wave / FULL[k]).max() < np.hypot(0.5 / 16383, np.pi / 65536)
        assert chip.switch[-2:] == [(played[0][0], True), (played[0][0] + 1024 * 200, False)]


def test_openqasm_is_what_the_reference_parser_knows():
    text = to_openqasm(samples(count=3)).decode()
    program = openpulse.parse(text)
    kinds = [type(statement).__name__ for statement in program.statements]
    assert kinds == ["CalibrationGrammarDeclaration", "CalibrationStatement"]
    assert program.version == "3.0" and program.statements[0].name == "openpulse"
    body = [type(statement).__name__ for statement in program.statements[1].body]
    tail = ["QuantumBarrier", "DelayInstruction", "ExpressionStatement", "ExpressionStatement"]
    assert body == ["ClassicalDeclaration"] * 6 + tail
    assert "frame line_2_frame = newframe(line_2_port, 110500000.0, 0.0);" in text
    assert "delay[1.2e-06s] line_1_frame, line_2_frame;" in text


def test_frames_turn_and_delay_what_they_play():
    text = to_openqasm(samples(count=3)).decode()
    turned = from_openqasm(text.replace("80000000.0, 0.0)", "80000000.0, 1.5707963267948966)").encode())
    np.testing.assert_allclose(turned.imag_rad_s[:, 0], samples(count=3).real_rad_s[:, 0], rtol=1e-15)
    later = from_openqasm(
        text.replace("delay[1.2e-06s]", "delay[300ns] line_1_frame, line_2_frame;\n delay[2us]").encode()
    )
    assert later.start_s == pytest.approx(2.3e-6, rel=1e-15)
    aligned = from_openqasm(text.replace("  barrier", "  delay[1us] line_1_frame;\n  barrier").encode())
    assert aligned.start_s == pytest.approx(2.2e-6, rel=1e-15)


def edited(text, old, new):
    assert old in text
    return text.replace(old, new, 1)


CSV = "# full_scale_rad_s = [1.0]\ntime_s,a_real_rad_s,a_imag_rad_s\n0.0,0.5,0.0\n1e-6,0.25,0.0\n2e-6,0.0,0.5\n"
CSV_REFUSALS = [
    ("1e-6,", "1.000002e-6,", r"pulse.csv: line 4, column time_s is 1.000002e-06, but samples of 1e-06 s put it"),
    ("0.25", "o.25", "line 4, column a_real_rad_s is 'o.25', which is not a number"),
    ("0.25", "nan", "real_rad_s of a is nan at sample 1"),
    ("0.25,0.0", "0.25", "line 4 has 2 fields where the header has 3"),
    ("a_imag_rad_s", "a_imag_hz", r"line 2 \(header\) is 'time_s,a_real_rad_s,a_imag_hz', but must be time_s"),
    ("# full", "# fuller", "full_scale_rad_s is missing"),
    ("[1.0]", "[1.0, 2.0]", "full_scale_rad_s is .* must be 1 numbers, one a channel"),
    ("[1.0]", "[-1.0]", "full_scale_rad_s of a is -1.0, but must be a finite positive number"),
    ("[1.0]", "[1.0", r"line 1, full_scale_rad_s is '\[1.0', which is not JSON"),
    ("[1.0]", "[1.0]\n# attributes = {\"a\": [1]}", r"attributes has 'a' = \[1\], but takes texts"),
    ("[1.0]", '[1.0]\n# sample_s = "1 us"', "sample_s is '1 us', but must be a finite positive number"),
    ("0.0,0.5,0.0\n1e-6,0.25,0.0\n2e-6,0.0,0.5\n", "", "the file holds no samples"),
    ("1e-6,0.25,0.0\n2e-6,0.0,0.5\n", "", "sample_s is missing, and one row alone does not say it"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), CSV_REFUSALS)
def test_wrong_csv_is_refused(tmp_path, old, new, message):
    (tmp_path / "pulse.csv").write_text(edited(CSV, old, new))
    with pytest.raises(WaveformError, match=message):
        read(tmp_path / "pulse.csv")


def test_a_plain_csv_needs_little():
    found = from_csv(edited(CSV, "2e-6", "2.0000009e-6").encode("utf-8-sig"))
    assert found.channels == ("a",) and found.sample_s == pytest.approx(1e-6) and found.start_s == 0.0


def test_times_far_from_the_trigger_are_as_even_as_floats_are():
    times = 1e3 + np.cumsum(np.full(20, 4e-9))
    rows = "\n".join(f"{float(time)!r},0.0,0.0" for time in times)
    found = from_csv(f"# full_scale_rad_s = [1.0]\ntime_s,a_real_rad_s,a_imag_rad_s\n{rows}\n".encode())
    assert found.sample_s == pytest.approx(4e-9, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.drop_vars("imag_rad_s"), r"lacks the variable imag_rad_s; write it along \(time, channel\)"),
        (
            lambda data: data.assign(real_rad_s=("time", np.zeros(40))),
            r"variable real_rad_s is along \(time\), but must",
        ),
        (lambda data: data.assign_coords(time=data["time"].values ** 2), "entry 0 of time is .*; space the times"),
        (lambda data: data.drop_vars("full_scale_rad_s"), "full_scale_rad_s is missing"),
        (lambda data: data.assign_attrs(attributes="[]"), r"attributes is '\[\]', but must be a JSON object"),
        (
            lambda data: data.assign(real_rad_s=data["real_rad_s"].assign_attrs(units="kHz")),
            "is in 'kHz', but must be in",
        ),
        (lambda data: data.assign_attrs(bits=0), "bits is 0, but must be an integer between 1 and 64"),
    ],
)
def test_wrong_netcdf_is_refused(tmp_path, change, message):
    write(tmp_path / "good.nc", samples())
    with xr.open_dataset(tmp_path / "good.nc", engine="h5netcdf") as data:
        change(data.load()).to_netcdf(tmp_path / "bad.nc", engine="h5netcdf")
    with pytest.raises(WaveformError, match=message):
        read(tmp_path / "bad.nc")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("@iontwin.sample_s 2e-07\n", "", "the cal block lacks the annotation @iontwin.sample_s"),
        ("sample_s 2e-07", "sample_s 200ns", "@iontwin.sample_s is '200ns', which is not JSON"),
        ("  play(line_2", "  play(line_1", "plays line_2_waveform on line_1_frame; play a waveform .* once"),
        (
            "play(line_1_frame, line_1_waveform)",
            "shift_phase(line_1_frame, 1.0)",
            "does not call play with 2 arguments",
        ),
        ("  barrier", "  delay[2ns] line_1_frame;\n // barrier", "the frames start at .* s; start them together"),
        ("delay[1.2e-06s]", "delay[12dt]", "holds a DurationLiteral where a number is needed"),
        ("play(line_2_frame, line_2_waveform);", "qubit q;", "is a QubitDeclaration; keep to ports"),
        ("};", "}];", "this is not OpenQASM 3 with OpenPulse"),
        ("};", "};;;[", "the cal block holds ';;.*, which is no statement of OpenPulse; remove it"),
        (
            "line_2_waveform);",
            "line_2_waveform); ; play(line_1_frame, line_2_waveform);",
            "holds '; play.*, which is no",
        ),
        ("cal {", "cal {;", "the cal block holds ';.*, which is no statement"),
        ("cal {", "cal {}\ncal {", "the program has 2 cal blocks, but needs one"),
        (
            "  play(line_2_frame, line_2_waveform);\n",
            "",
            "full_scale_rad_s is .*, but must be 1 numbers, one a channel",
        ),
    ],
)
def test_wrong_openqasm_is_refused(tmp_path, old, new, message):
    (tmp_path / "pulse.qasm").write_text(edited(to_openqasm(samples(count=3)).decode(), old, new))
    with pytest.raises(WaveformError, match=message):
        read(tmp_path / "pulse.qasm")


def test_without_the_parser_openqasm_says_so(tmp_path, monkeypatch):
    write(tmp_path / "pulse.qasm", samples(count=3))
    monkeypatch.setitem(sys.modules, "openpulse.parser", None)
    with pytest.raises(WaveformError, match=r"pulse.qasm: reading OpenQASM needs the package openpulse; run pip"):
        read(tmp_path / "pulse.qasm")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("STEP = 50", "STEP = 25 + 25", "STEP is not a literal"),
        ("STEP = 50", "STEP = int('50')", "STEP is not a literal"),
        ("STEP = 50", "STEP = 50.0", "STEP is a float, but must be a int"),
        ("POLAR = [False", "POLAR = [0", "POLAR is .*, but must say True or False"),
        ("START_S = ", "BEGIN = ", "the file lacks START_S"),
        ("version 1", "version 9", "FORMAT is 'AD9910 RAM, version 9', but this reads"),
        ("WORDS = [", "WORDS = [[1, 2], ", "differ in length"),
        ("[  # line_1: amplitude at 31:18\n", "[ 2**40,\n", "WORDS is not a literal"),
        ("[  # line_1: amplitude at 31:18\n", "[ 1099511627776,\n", "WORDS must be lists of one length"),
        ("class", "class class", "this is not Python"),
    ],
)
def test_wrong_artiq_is_refused_and_never_run(tmp_path, old, new, message):
    (tmp_path / "pulse.py").write_text("raise SystemExit\n" + edited(to_artiq(samples()).decode(), old, new))
    with pytest.raises(WaveformError, match=message):
        read(tmp_path / "pulse.py")


def test_reading_artiq_never_executes():
    assert from_artiq(b"raise SystemExit\n" + to_artiq(samples())).bits == 14


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "artiq",
            {"sample_s": 2.02e-7},
            "sample_s is 2.02e-07, but must be a multiple of 4 ns, .*; take 200 ns",
        ),
        ("artiq", {"sample_s": 1e-9}, "sample_s is 1e-09, but must be a multiple of 4 ns, .*; take 4 ns"),
        ("artiq", {"sample_s": 4e-4}, "sample_s is 0.0004, but an AD9910 holds words 4 to 262140 ns"),
        ("artiq", {"count": 1025}, "there are 1025 samples, but the RAM of an AD9910 plays 2 to 1024"),
        ("artiq", {"count": 1}, "there are 1 samples, but the RAM"),
        ("artiq", {"carrier_hz": None}, "carrier_hz is None, but an AD9910 needs"),
        ("artiq", {"carrier_hz": (80e6, 6.4e9)}, "carrier_hz of line_2 is 6.4e.09, but must be between 0 and 4e.08 Hz"),
        ("artiq", {"start_s": -1e-6}, "start_s is -1e-06, but no delay is negative"),
        ("artiq", {"full_scale_rad_s": (1e5, FULL[1])}, "of line_1 is .* beyond full scale at 100000 rad/s; lower"),
        ("openqasm", {"start_s": -1e-6}, "start_s is -1e-06, but no delay is negative"),
        ("openqasm", {"full_scale_rad_s": (FULL[0], 1e5)}, "of line_2 is .* beyond full scale at 100000 rad/s"),
    ],
)
def test_what_a_program_cannot_play_is_refused_and_nothing_written(tmp_path, kind, changes, message):
    path = tmp_path / f"pulse{SUFFIX[kind]}"
    with pytest.raises(WaveformError, match=f"{path.name}: .*{message}"):
        write(path, samples(**changes))
    assert not list(tmp_path.iterdir())


def test_more_channels_than_a_card_has_are_refused():
    wave = np.zeros((4, 5))
    ones = (1.0,) * 5
    many = Samples(
        real_rad_s=wave, imag_rad_s=wave, sample_s=4e-9, channels=tuple("abcde"), full_scale_rad_s=ones, carrier_hz=ones
    )
    with pytest.raises(WaveformError, match="there are 5 channels, but a Urukul card has 4; split them"):
        to_artiq(many)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"real_rad_s": np.zeros(3)}, r"real_rad_s is float64 with shape \(3,\), but .* shape \(samples, 2\)"),
        ({"real_rad_s": np.zeros((3, 2)) * 1j}, "real_rad_s is complex128 .*, but must be real numbers"),
        ({"imag_rad_s": np.zeros((3, 2))}, "real_rad_s and imag_rad_s have the shapes"),
        ({"imag_rad_s": np.full((40, 2), np.inf)}, "imag_rad_s of line_1 is inf at sample 0; give finite numbers"),
        ({"channels": ("line_1", "line_1")}, "channels is .*, but must be a tuple of names, all different"),
        ({"channels": ("line 1", "line_2")}, "channels has the name 'line 1'; use letters"),
        ({"sample_s": 0.0}, "sample_s is 0.0, but must be a finite positive number"),
        ({"start_s": np.nan}, "start_s is nan, but must be a finite number"),
        ({"carrier_hz": (80e6,)}, "carrier_hz is .*, but must be 2 numbers, one a channel"),
        ({"bits": 14.0}, "bits is 14.0, but must be an integer"),
        ({"attributes": {"a": None}}, "attributes has 'a' = None, but takes texts and finite numbers"),
    ],
)
def test_wrong_samples_are_refused(changes, message):
    with pytest.raises(WaveformError, match=message):
        samples(**changes)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_numbers_are_numbers(kind, tmp_path):
    given = {"shots": np.int64(400), "power": np.float64(0.1), "name": np.str_("x")}
    path = tmp_path / f"pulse{SUFFIX[kind]}"
    write(path, samples(sample_s=np.float64(2e-7), full_scale_rad_s=np.array(FULL), attributes=given))
    assert read(path).attributes == {"shots": 400, "power": 0.1, "name": "x"}


def test_suffix_and_kind_agree(tmp_path):
    assert set(KINDS) == set(SUFFIX)
    with pytest.raises(WaveformError, match=r"the suffix '.txt' is not that of a waveform file; end in one of .csv"):
        write(tmp_path / "pulse.txt", samples())
    with pytest.raises(WaveformError, match=r"kind is artiq, but the suffix is that of csv; end in .py"):
        write(tmp_path / "pulse.csv", samples(), "artiq")
    with pytest.raises(WaveformError, match="kind is 'wav', but must be one of csv, netcdf"):
        write(tmp_path / "pulse.csv", samples(), "wav")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["missing.csv", "missing.nc", "missing.qasm", "missing.py"])
def test_files_that_cannot_be_read_or_written_are_named(tmp_path, name):
    with pytest.raises(WaveformError, match=f"{name}: cannot be read .*; name an existing waveform file"):
        read(tmp_path / name)
    with pytest.raises(WaveformError, match=f"{name}: cannot be written"):
        write(tmp_path / "nowhere" / name, samples())
    (tmp_path / name).write_bytes(b"\xff\x00\x89 garbage")
    with pytest.raises(WaveformError, match=name):
        read(tmp_path / name)


def test_samples_need_no_jax():
    code = "import sys, experiments.waveform_files; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
