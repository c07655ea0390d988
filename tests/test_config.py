"""Configurations: what is read, what is refused and how the refusal reads."""

import json
import math
import re
from pathlib import Path

import pytest
import tables
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from experiments.config import (
    COMMANDS,
    PARAMETERS,
    ConfigError,
    describe,
    json_schema,
    load_config,
    load_table,
    parse_config,
)
from experiments.schema import TABLES, Config

CONFIGS = Path(__file__).parents[1] / "experiments" / "configs"
SHIPPED = [("demo.toml", "fit"), ("demo.toml", "optimize"), ("simulate.toml", "simulate"), ("sweep.toml", "sweep"),
           ("optimize.toml", "optimize"), ("shaped.toml", "optimize"), ("design.toml", "design"),
           ("coverage.toml", "coverage"), ("coverage_at_bound.toml", "coverage")]  # fmt: skip


def refusal(document: dict, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(document, **options)
    message = str(caught.value)
    assert message.startswith("configuration: ")
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("name", "verb"), SHIPPED)
def test_shipped_configurations_resolve_and_survive_being_written(tmp_path, name, verb):
    config = load_config(CONFIGS / name, verb=verb)
    copy = tmp_path / "config.toml"
    copy.write_text(config.to_toml())
    assert load_config(copy, verb=verb) == config
    assert "lifetime_s = 0.0527" in copy.read_text(), "defaults are written too"


def test_the_demo_is_the_promised_fit():
    config = load_config(CONFIGS / "demo.toml", verb="fit")
    assert config.fit is not None
    assert config.fit.starts == 16
    assert config.fit.free == tables.DEMO
    device = config.device
    assert (device.scheme, device.sigma_1_s, device.sigma_2_s, device.separation_s) == ("lambda", 20e-6, 20e-6, 120e-6)
    assert (device.lead_s, device.tail_s, device.lifetime_s, device.branching) == (100e-6, 100e-6, 52.7e-3, 0.4)
    assert config.memory.source == "measured"
    table = load_table(config)
    assert len(table) == 363


def test_an_empty_document_is_the_default_ion_with_one_quiet_laser():
    config = parse_config({})
    assert config.device.laser_linewidth_hz == 0.0
    assert config.device.laser_linewidth_1_hz is None
    assert config.device.m_lifetime_s == math.inf
    assert config.memory.window_cycles == 10.0
    assert config.data is config.fit is config.simulate is config.optimize is config.sweep is None


def test_two_lasers_have_two_linewidths_and_no_shared_one():
    device = parse_config({"device": {"laser_linewidth_1_hz": 10.0, "laser_linewidth_2_hz": 20}}).device
    assert device.laser_linewidth_hz is None
    assert (device.laser_linewidth_1_hz, device.laser_linewidth_2_hz) == (10.0, 20.0)


def test_the_top_of_the_ladder_may_decay():
    assert parse_config({"device": {"scheme": "ladder", "m_lifetime_s": 38e-9}}).device.m_lifetime_s == 38e-9


def test_the_configuration_cannot_be_changed():
    config = parse_config({})
    with pytest.raises(ValidationError, match="frozen"):
        config.device.sigma_1_s = 1.0  # ty: ignore[invalid-assignment]


BOX = {"rabi_scale_1": [0.7, 1.3]}
TO = {"to": "photonic"}
REFUSED = [  # document, parts of the message
    ({"device": {"sigma_1_us": 20}}, ["device.sigma_1_us", "seconds", "sigma_1_s = 2e-05"]),
    ({"device": {"sigma_1_ms": 0.02}}, ["sigma_1_s = 2e-05"]),
    ({"device": {"detuning_1_khz": 3}}, ["device.detuning_1_khz", "Hz", "detuning_1_hz = 3000"]),
    ({"device": {"detuning_1_rad_s": 2 * math.pi}}, ["detuning_1_hz = 1"]),
    ({"device": {"sigma_1_s": "20 us"}}, ["device.sigma_1_s", "'20 us'", "sigma_1_s = 2e-05"]),
    ({"device": {"detuning_2_hz": "3 kHz"}}, ["device.detuning_2_hz", "detuning_2_hz = 3000"]),
    ({"device": {"sigma_1_s": "wide"}}, ["device.sigma_1_s", "text 'wide'", "between 1e-08 and 0.01 s"]),
    ({"device": {"sigma_1_s": 20}}, ["device.sigma_1_s is 20", "between 1e-08 and 0.01 s"]),
    ({"device": {"sigma_1_s": -2e-5}}, ["device.sigma_1_s is -2e-05", "between 1e-08 and 0.01 s"]),
    ({"device": {"sigma_1_s": math.nan}}, ["device.sigma_1_s is nan"]),
    ({"device": {"sigma_1_s": math.inf}}, ["device.sigma_1_s is inf"]),
    ({"device": {"sigma_1_s": True}}, ["device.sigma_1_s is true"]),
    ({"device": {"sigma_1_s": [1e-5]}}, ["device.sigma_1_s is [1e-05]"]),
    ({"device": {"sigma_1_s": 10**400}}, ["device.sigma_1_s is 1000"]),
    ({"device": {"lifetime_s": 0.0}}, ["device.lifetime_s is 0"]),
    ({"device": {"lifetime_s": math.inf}}, ["device.lifetime_s is inf"]),
    ({"device": {"m_lifetime_s": math.nan}}, ["device.m_lifetime_s is nan"]),
    ({"device": {"m_lifetime_s": 1.0}}, ["device.m_lifetime_s is 1", "ladder"]),
    ({"device": {"scheme": "v", "m_lifetime_s": 1.0}}, ["device.m_lifetime_s is 1", "ladder"]),
    ({"device": {"laser_linewidth_hz": -1}}, ["device.laser_linewidth_hz is -1", "between 0 and 1e+06 Hz"]),
    ({"device": {"laser_linewidth_hz": 0, "laser_linewidth_1_hz": 1}}, ["device.laser_linewidth_hz", "beside"]),
    ({"device": {"laser_linewidth_1_hz": 1}}, ["device.laser_linewidth_2_hz is missing"]),
    ({"device": {"readout_error_dark": 0.6}}, ["device.readout_error_dark is 0.6", "between 0 and 0.5"]),
    ({"device": {"branching": 1.1}}, ["device.branching", "between 0 and 1"]),
    ({"device": {"scheme": "Lamda"}}, ["device.scheme is 'Lamda'", "'ladder'", "did you mean 'lambda'?"]),
    ({"device": {"scheme": 3}}, ["device.scheme is 3", "one of 'lambda', 'v', 'ladder'"]),
    ({"device": {"sigma_1": 2e-5}}, ["device.sigma_1 ", "did you mean sigma_1_s?"]),
    ({"device": {"Rabi_scale_1": 1}}, ["did you mean rabi_scale_1?"]),
    ({"device": {"window_cycles": 3}}, ["device.window_cycles", "belongs in [memory]"]),
    ({"device": {"colour": "blue"}}, ["device.colour", "keys are platform"]),
    ({"device": 3}, ["device is 3", "a table"]),
    ({"device": {"loss": 0.1}}, ["device.loss", "platform = 'ion'"]),
    ({"device": {"visibility_2": 0.9}}, ["device.visibility_2", "platform = 'ion'"]),
    ({"device": {"platform": "photonic", "visibility_2": 1.1}}, ["device.visibility_2 is 1.1", "between 0 and 1"]),
    ({"device": {"platform": "photonic", "readout_error_dark": 0.1}},
     ["device.readout_error_dark", "platform = 'photonic'", "efficiency and dark_counts"]),
    ({"device": {"platform": "photonic", "sigma_1_s": 1e-5}}, ["device.sigma_1_s", "platform = 'photonic'"]),
    ({"devise": {}}, ["devise", "did you mean device?"]),
    ({"sigma_1_s": 1e-5}, ["sigma_1_s", "belongs in [device]"]),
    ({"memory": {"window_cycles": 0}}, ["memory.window_cycles is 0", "between 1 and"]),
    ({"memory": {"window_cycles": 0.99}}, ["memory.window_cycles is 0.99"]),
    ({"memory": {"kernel": "moving average"}}, ["did you mean 'moving_average'?"]),
    ({"data": {}}, ["data.table is missing"]),
    ({"data": {"table": 3}}, ["data.table is 3", "a text"]),
    ({"data": {"table": ""}}, ["data.table"]),
    ({"fit": {}}, ["fit.free is missing"]),
    ({"fit": {"free": {}}}, ["fit.free is {}", "at least one"]),
    ({"fit": {"free": []}}, ["fit.free is []", "a table"]),
    ({"fit": {"free": {"rabi_scale_3": [0.7, 1.3]}}}, ["fit.free.rabi_scale_3", "did you mean rabi_scale_"]),
    ({"fit": {"free": {"sigma_1_us": [10, 30]}}}, ["fit.free.sigma_1_us", "sigma_1_s is given in seconds"]),
    ({"fit": {"free": {"heating_rate_per_s": [0, 1]}}}, ["fit.free.heating_rate_per_s is not a key"]),
    ({"fit": {"free": {"rabi_scale_1": [0.7]}}}, ["fit.free.rabi_scale_1 is [0.7]", "a pair [low, high]"]),
    ({"fit": {"free": {"rabi_scale_1": [0.7, 1, 1.3]}}}, ["fit.free.rabi_scale_1", "a pair [low, high]"]),
    ({"fit": {"free": {"rabi_scale_1": []}}}, ["fit.free.rabi_scale_1", "a pair [low, high]"]),
    ({"fit": {"free": {"rabi_scale_1": 1.0}}}, ["fit.free.rabi_scale_1 is 1.0", "a pair [low, high]"]),
    ({"fit": {"free": {"rabi_scale_1": [1.3, 0.7]}}}, ["fit.free.rabi_scale_1 is [1.3, 0.7]", "low below high"]),
    ({"fit": {"free": {"rabi_scale_1": [1, 1]}}}, ["low below high"]),
    ({"fit": {"free": {"rabi_scale_1": [0.7, math.inf]}}}, ["fit.free.rabi_scale_1.1 is inf", "a finite number"]),
    ({"fit": {"free": {"rabi_scale_1": [0.7, math.nan]}}}, ["fit.free.rabi_scale_1.1 is nan", "a finite number"]),
    ({"fit": {"free": {"rabi_scale_1": ["0.7", 1]}}}, ["fit.free.rabi_scale_1.0", "'0.7'", "a number"]),
    ({"fit": {"free": {"sigma_1_s": [10, 30]}}}, ["fit.free.sigma_1_s is [10, 30]", "between 1e-08 and 0.01 s"]),
    ({"fit": {"free": {"window_cycles": [0, 30]}}}, ["fit.free.window_cycles is [0, 30]", "between 1 and"]),
    ({"fit": {"free": {"laser_linewidth_1_hz": [0, 9]}}}, ["fit.free.laser_linewidth_1_hz", "two sources"]),
    ({"fit": {"free": BOX, "starts": 0}}, ["fit.starts is 0", "an integer between 1 and"]),
    ({"fit": {"free": BOX, "starts": 1.5}}, ["fit.starts is 1.5", "an integer between 1 and"]),
    ({"fit": {"free": BOX, "seed": -1}}, ["fit.seed is -1", "an integer between 0 and"]),
    ({"device": {"platform": "photonic"}, "fit": {"free": BOX}}, ["fit.free.rabi_scale_1", "photonic"]),
    ({"device": {"platform": "photonic"}, "fit": {"free": {"readout_error_dark": [0, 0.1]}}},
     ["fit.free.readout_error_dark", "photonic", "efficiency and dark_counts"]),
    ({"fit": {"free": {"efficiency": [0.5, 1]}}}, ["fit.free.efficiency", "platform = 'ion'"]),
    ({"sweep": {"parameters": {"phase_scale_1": [0.5, 1]}}}, ["sweep.parameters.phase_scale_1", "platform = 'ion'"]),
    ({"device": {"laser_linewidth_1_hz": 1, "laser_linewidth_2_hz": 1},
      "fit": {"free": {"laser_linewidth_hz": [0, 9]}}},
     ["fit.free.laser_linewidth_hz", "one source", "two"]),
    ({"fit": {"free": BOX, "per_table": ["n_bar"]}}, ["fit.per_table.0 is 'n_bar'", "not free", "fit.free"]),
    ({"fit": {"free": BOX | {"overdispersion": [0, 0.1]}}},
     ["fit.free.overdispersion", "no meaning for fit.noise = 'binomial'", "noise = 'beta_binomial'"]),
    ({"fit": {"free": BOX | {"overdispersion": [0, 0.1]}, "noise": "student_t"}}, ["fit.noise = 'student_t'"]),
    ({"fit": {"free": BOX, "noise": "student_t", "optimizer": "levenberg_marquardt"}},
     ["fit.optimizer is 'levenberg_marquardt'", "cannot serve noise = 'student_t'", "'adam+lbfgs'"]),
    ({"fit": {"free": BOX, "noise": "students_t"}}, ["fit.noise", "did you mean 'student_t'?"]),
    ({"fit": {"free": BOX}, "uncertainty": {"profile": ["rabi_scale_1", "n_bar"]}},
     ["uncertainty.profile.1 is 'n_bar'", "not free"]),
    ({"fit": {"free": BOX}, "uncertainty": {"profile": ["rabi_scale_1@monday"]}},
     ["uncertainty.profile.0 is 'rabi_scale_1@monday'", "fit.per_table"]),
    ({"uncertainty": {"draws": 10}}, ["uncertainty.draws is 10", "an integer between 100 and"]),
    ({"uncertainty": {"chains": 1}}, ["uncertainty.chains is 1", "an integer between 2 and"]),
    ({"data": {"table": "a.csv", "more": {"loops": "b.csv"}}}, ["data.more.loops", "name of data.table already"]),
    ({"data": {"table": "a.csv", "scans": {"loops": "b.csv"}}}, ["data.scans.loops", "name of a loop table"]),
    ({"data": {"table": "a.csv", "more": {"m": "b.csv"}, "scans": {"m": "c.csv"}}}, ["data.scans.m", "already"]),
    ({"device": {"platform": "photonic"}, "data": {"table": "a.csv", "scans": {"rabi": "b.csv"}}},
     ["data.scans", "measured on an ion", "photonic"]),
    ({"simulate": {"loops": []}}, ["simulate.loops is []", "at least one"]),
    ({"simulate": {"loop": []}}, ["simulate.loop", "did you mean loops?"]),
    ({"simulate": {"loops": [{"shots": -1}]}}, ["simulate.loops.0.shots is -1", "an integer between 0 and"]),
    ({"simulate": {"loops": [{}, {"window_cycles": 0.5}]}}, ["simulate.loops.1.window_cycles is 0.5"]),
    ({"simulate": {"loops": [{"label": "a"}, {"label": "a"}]}}, ["simulate.loops.1.label is 'a' again"]),
    ({"simulate": {"loops": [{"label": "a,b"}]}}, ["simulate.loops.0.label", "'a,b'", "without commas"]),
    ({"simulate": {"loops": [{"label": "#a"}]}}, ["simulate.loops.0.label"]),
    ({"simulate": {"loops": [{"cycle_per_period": 9}]}}, ["did you mean cycles_per_period?"]),
    ({"optimize": {"bounds": {"amplitude": [0, 1]}}}, ["optimize.bounds.amplitude", "did you mean amplitude_"]),
    ({"optimize": {"bounds": {"amplitude_1": [2, 3]}}}, ["optimize.bounds.amplitude_1 is [2, 3]", "is 1, outside"]),
    ({"optimize": {"bounds": {"sigma_1_s": [3e-5, 4e-5]}}}, ["optimize.bounds.sigma_1_s", "device.sigma_1_s is 2e-05"]),
    ({"optimize": {"bounds": {"detuning_1_set_hz": [1, 2]}}}, ["optimize.bounds.detuning_1_set_hz", "is 0, outside"]),
    ({"optimize": {"bounds": {"sigma_1_s": [1e-5, 1]}}}, ["optimize.bounds.sigma_1_s", "between 1e-08 and 0.01 s"]),
    ({"optimize": {}}, ["optimize.bounds", "names no command", "[optimize.shape]"]),
    ({"optimize": {"shape": {}}}, ["hardware is missing", "add a table [hardware]"]),
    ({"optimize": {"shape": {}, "bounds": {"amplitude_1": [0, 2]}}, "hardware": {}},
     ["optimize.bounds", "remove one of the two"]),
    ({"hardware": {"largest_rabi_hz": [1e3, 0]}}, ["hardware.largest_rabi_hz.1 is 0", "above 0"]),
    ({"hardware": {"largest_rabi_hz": [1e3]}}, ["hardware.largest_rabi_hz"]),
    ({"hardware": {"bandwidth_hz": 6e5}}, ["hardware.bandwidth_hz is 600000", "half the sample clock"]),
    ({"device": {"platform": "photonic"}, "optimize": {"bounds": {"amplitude_1": [0, 2]}}}, ["optimize", "photonic"]),
    ({"sweep": {"parameters": {"n_bar": {"low": 0, "points": 3}}}}, ["sweep.parameters.n_bar.high is missing"]),
    ({"sweep": {"parameters": {"n_bar": {"low": 0, "high": 1, "point": 3}}}}, ["did you mean points?"]),
    ({"sweep": {"parameters": {"n_bar": [1, 0]}}}, ["sweep.parameters.n_bar is [1, 0]", "low below high"]),
    ({"sweep": {"parameters": {"n_bar": [-1, 0]}}}, ["sweep.parameters.n_bar is [-1, 0]", "between 0 and 10000"]),
    ({"sweep": {"parameters": {"n_bar": [0]}}}, ["sweep.parameters.n_bar is [0]", "a pair [low, high]"]),
    ({"sweep": {"parameters": {"nbar": [0, 1]}}}, ["did you mean n_bar?"]),
    ({"sweep": {"design": "random", "parameters": {"n_bar": {"low": 0, "high": 1, "points": 2}}}},
     ["sweep.parameters.n_bar.points", "grid"]),
    ({"transfer": TO | {"target": {"loss": math.nan}}},
     ["transfer.target.loss is nan, but must be a finite number or a pair [low, high] of finite numbers."]),
    ({"transfer": TO | {"target": {"loss": True}}},
     ["transfer.target.loss is true, but must be a number or a pair [low, high] of numbers."]),
    ({"transfer": TO | {"target": {"loss": [0.1, math.inf], "efficiency": "x"}}},
     ["transfer.target.loss is [0.1, inf], but must be", "(1 more like this)"]),
    ({"transfer": TO | {"target": {"loss": [0.1]}}}, ["transfer.target.loss is [0.1], but must be"]),
    ({"transfer": TO | {"target": {"lifetime_s": "20 us"}}}, ["transfer.target.lifetime_s", "lifetime_s = 2e-05"]),
    ({"transfer": TO | {"source": {"rabi_scale_1": [math.nan, 1.0]}}},
     ["transfer.source.rabi_scale_1.0 is nan, but must be a finite number."]),
    ({"transfer": TO | {"source": {"rabi_scale_1": [0.9, 1.0, 1.1]}}},
     ["transfer.source.rabi_scale_1 is [0.9, 1.0, 1.1], but must be a pair [low, high] of numbers."]),
    ({"transfer": TO | {"source": {"rabi_scale_1": 1.0}}}, ["transfer.source.rabi_scale_1 is 1", "into [device]"]),
    ({"transfer": TO | {"what": ["devise"]}},
     ["transfer.what.0 is 'devise', but must be one of 'device', 'command_map'", "did you mean 'device'?"]),
    ({"transfer": TO | {"what": []}}, ["transfer.what is [], but must be a list of one or more of 'device', "]),
    ({"transfer": TO | {"what": "device"}}, ["transfer.what is the text 'device'", "a list of", "write ['device']."]),
    ({"uncertainty": {"profile": "all"}}, ["uncertainty.profile is the text 'all', but must be a list of texts"]),
    ({"uncertainty": {"posterior": "yes"}}, ["uncertainty.posterior", "must be true or false"]),
    ({"design": {"target": "n_bar", "amplitudes": []}}, ["design.amplitudes is [], but must be a list of numbers"]),
    ({"design": {"target": "n_bar", "offsets_hz": [[1.0]]}}, ["design.offsets_hz.0 is [1.0]", "a pair of numbers."]),
    ({"hardware": {"largest_rabi_hz": [1e3]}}, ["hardware.largest_rabi_hz is [1000.0]", "a list of 2 numbers"]),
    ({"sweep": {"points": 10**4, "parameters": {"n_bar": [0, 1], "eta_1": [0, 1]}}}, ["sweep.points", "100000000"]),
]  # fmt: skip


@pytest.mark.parametrize(("document", "parts"), REFUSED, ids=[str(document)[:70] for document, _ in REFUSED])
def test_a_bad_configuration_is_refused_with_path_value_and_remedy(document, parts):
    message = refusal(document)
    for part in parts:
        assert part in message


def test_examples_of_the_calibration_guide_are_read(tmp_path):
    guide = (CONFIGS.parents[1] / "docs" / "calibration.md").read_text(encoding="utf-8")
    examples = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    assert len(examples) == 3
    for k, example in enumerate(examples):
        (tmp_path / f"{k}.toml").write_text(example)
        config = load_config(tmp_path / f"{k}.toml", verb="fit")
        assert config.fit is not None


def test_a_profile_may_name_the_parameter_of_one_table():
    document = {
        "data": {"table": "a.csv", "name": "monday", "more": {"tuesday": "b.csv"}},
        "fit": {"free": BOX, "per_table": ["rabi_scale_1"]},
    }
    for profile in (["rabi_scale_1"], ["rabi_scale_1@tuesday"], ["all"]):
        parse_config(document | {"uncertainty": {"profile": profile}})
    assert "rabi_scale_1@friday" in refusal(document | {"uncertainty": {"profile": ["rabi_scale_1@friday"]}})


def test_a_misspelt_key_is_named_before_what_it_leaves_missing():
    message = refusal({"fit": {"fre": BOX}})
    assert "fit.fre is not a key; did you mean free?" in message
    assert "1 more" in message


@pytest.mark.parametrize(("verb", "table"), [("fit", "data"), ("simulate", "simulate"), ("sweep", "sweep")])
def test_a_verb_names_the_table_it_misses(verb, table):
    message = refusal({"fit": {"free": BOX}}, verb=verb)
    assert f"the table [{table}] is missing, which `iontwin {verb}` needs" in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"[device\n", "line 1"),
        (b"[device]\nsigma_1_s = 20 us\n", "line 2"),
        (b"\xff\xfe[device]", "byte 0 is not UTF-8"),
        (b"a = " + b"[" * 5000, "not valid TOML"),
        (b"loop,cycle\nA,0\n", "not valid TOML"),
    ],
)
def test_a_file_that_is_no_toml_is_refused(tmp_path, content, part):
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=part) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_paths_that_are_no_readable_file(tmp_path):
    for path, part in [
        (tmp_path / "absent.toml", "no such file"),
        (tmp_path, "folder"),
        (tmp_path / "null\0", "cannot be read"),
        (tmp_path / ("x" * 5000), "cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=part):
            load_config(path)


def test_replacements_on_the_command_line():
    demo = CONFIGS / "demo.toml"
    sets = [
        "device.sigma_1_s = 15e-6",
        "device.engine=closed_form",
        'memory.source="model"',
        "fit.free.n_bar=[0, 20]",
        "optimize.iterations=7",
    ]
    config = load_config(demo, verb="fit", sets=sets, data="other.csv", seed=5)
    assert config.device.sigma_1_s == 15e-6
    assert config.device.engine == "closed_form"
    assert config.memory.source == "model"
    assert config.fit is not None
    assert config.fit.free["n_bar"] == (0.0, 20.0)
    assert config.fit.seed == 5
    assert config.optimize is not None
    assert (config.optimize.iterations, config.optimize.seed) == (7, 0)
    assert config.data is not None
    assert config.data.table == str(Path("other.csv").resolve())
    config = load_config(CONFIGS / "simulate.toml", sets=["simulate.loops.1.shots=9"])
    assert config.simulate is not None
    assert [loop.shots for loop in config.simulate.loops] == [400, 9, 400]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("device.sigma_1_s", ["--set device.sigma_1_s:", "table.key=value"]),
        ("sigma_1_s=1", ["table.key=value"]),
        ("device..sigma_1_s=1", ["table.key=value"]),
        ("device.sigma_1_s=20us", ["device.sigma_1_s", "'20us'", "sigma_1_s = 2e-05"]),
        ("device.sigma_1_us=20", ["sigma_1_s = 2e-05"]),
        ("device.sigma_1_s=1e-5\n[memory]", ["more than one key"]),
        ("device.sigma_1_s.low=1", ["there is no device.sigma_1_s.low"]),
        ("simulate.loops.7.shots=1", ["there is no simulate.loops.7.shots"]),
        ("fit.free.rabi_scale_1=[0.7", ["fit.free.rabi_scale_1", "'[0.7'", "a pair [low, high]"]),
    ],
)
def test_bad_replacements_are_refused(text, parts):
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / ("simulate.toml" if "simulate" in text else "demo.toml"), sets=[text])
    for part in parts:
        assert part in str(caught.value)


def test_the_table_is_found_beside_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    path = tmp_path / "lab" / "c.toml"
    path.write_text('[data]\ntable = "loops.csv"\n')
    monkeypatch.chdir(tmp_path)
    config = load_config("lab/c.toml")
    assert config.data is not None
    assert config.data.table == str(tmp_path / "lab" / "loops.csv")


def test_a_memory_of_measured_inputs_needs_them(tmp_path):
    path = tmp_path / "loops.csv"
    path.write_text("cycle,x_set,shots,n_x,n_y\n0,0,9,0,0\n1,0.5,9,,3\n")
    document = {"data": {"table": str(path)}}
    with pytest.raises(ConfigError, match=r"line 3 has no measured input .* set memory.source"):
        load_table(parse_config(document))
    assert len(load_table(parse_config(document | {"memory": {"source": "model"}}))) == 2
    path.write_text("cycle,x_set,y,y_err\n0,0,0,0.1\n")
    with pytest.raises(ConfigError, match="line 2 has no measured input"):
        load_table(parse_config(document))
    path.write_text("cycle,x_set,r_set,y,y_err\n0,0,0.5,0,0.1\n")
    assert len(load_table(parse_config(document))) == 1


def test_the_schema_is_json_and_tells_unit_default_and_range():
    schema = json.loads(json.dumps(json_schema(), allow_nan=False))
    sigma = schema["$defs"]["Device"]["properties"]["sigma_1_s"]
    assert (sigma["unit"], sigma["default"], sigma["minimum"], sigma["maximum"]) == ("s", 2e-5, 1e-8, 0.01)
    free = schema["$defs"]["Fit"]["properties"]["free"]
    assert set(free["propertyNames"]["enum"]) == {
        *PARAMETERS,
        *("overdispersion", "outlier_share", "crosstalk_1", "crosstalk_2"),
    }
    axes = schema["$defs"]["Sweep"]["properties"]["parameters"]["additionalProperties"]["anyOf"]
    assert {"$ref": "#/$defs/Axis"} in axes
    assert any(axis.get("type") == "array" for axis in axes)


def test_every_key_is_described_with_its_range():
    for name, table in TABLES.items():
        for key, field in table.model_fields.items():
            assert field.description, f"{name}.{key}"
    text = {key: meaning for _, _, keys in describe("fit") for key, meaning in keys}
    assert "(1e-08 to 0.01 s)" in text["sigma_1_s = 2e-05"]
    assert "(1 to 4096)" in text["starts = 16"]
    assert '("auto" | "closed_form" | "lindblad")' in text['engine = "auto"']
    assert "required" in text["table"]
    assert "rabi_scale_1, rabi_scale_2, detuning_1_hz" in text["free"]
    for verb in ("simulate", "optimize", "sweep"):
        assert len(describe(verb)) >= 3


def test_parameters_and_commands_are_the_promised_names():
    assert set(PARAMETERS) == {
        *("rabi_scale_1", "rabi_scale_2", "detuning_1_hz", "detuning_2_hz", "laser_linewidth_hz", "n_bar"),
        *("readout_error_bright", "readout_error_dark", "sigma_1_s", "sigma_2_s", "separation_s", "window_cycles"),
        *("eta_1", "eta_2", "lifetime_s", "branching", "lead_s", "tail_s"),
        *("laser_linewidth_1_hz", "laser_linewidth_2_hz", "stark_1_hz", "stark_2_hz"),
        *("amplitude_noise_1", "amplitude_noise_2", "detuning_noise_1_hz", "detuning_noise_2_hz"),
        *("phase_scale_1", "phase_scale_2", "phase_offset_1_rad", "phase_offset_2_rad", "visibility_1", "visibility_2"),
        *("phase_noise_1_rad", "phase_noise_2_rad", "loss_input", "loss", "efficiency", "dark_counts"),
    }
    assert all(math.isfinite(low) and math.isfinite(high) and low < high for low, high, _ in PARAMETERS.values())
    assert {"amplitude_1", "amplitude_2", "separation_s"} < set(COMMANDS)


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_ANYTHING = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
_KEYS = sorted({key for table in TABLES.values() for key in table.model_fields} | set(PARAMETERS) | set(COMMANDS))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    table=st.sampled_from([*TABLES, "devices"]),
    body=st.dictionaries(
        st.sampled_from(_KEYS),
        _ANYTHING | st.dictionaries(st.sampled_from(_KEYS), _ANYTHING, max_size=2),
        min_size=1,
        max_size=3,
    ),
)
def test_any_document_resolves_or_is_refused_in_one_sentence(table, body):
    message = "configuration: "
    try:
        assert isinstance(parse_config({table: body}), Config)
    except ConfigError as error:
        message = str(error)
    assert message.startswith("configuration: ")
    assert "\n" not in message
