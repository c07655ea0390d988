"""Loop tables in laboratory formats: files made by the libraries that make them, what is read, what is refused.

QCoDeS measures and exports in a process of its own, so that nothing of it reaches other tests or the user's home. ARTIQ
is not on the package index: its files are laid out here with h5py, as artiq/master/worker_impl.py (`write_results`) and
artiq/master/worker_db.py (`DatasetManager.write_hdf5`, `_write`) do it.
"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import test_cli
import xarray as xr
from pyarrow import parquet

from calibration.columns import converted
from calibration.data import LoopTable, MappingError, TableError, read_table, table_from_dataset, write_table
from experiments.config import ConfigError, describe, json_schema, load_config, load_table, parse_config

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)

SAMPLE = LoopTable(
    loop=np.repeat(["1", "2"], 4),
    cycle=np.tile(np.arange(4), 2),
    x_set=np.tile([0.0, 0.07, 0.57, 1.0], 2),
    r_set=np.array([0.5, 0.45, 0.3, 0.35, 0.5, 0.4, 0.3, 0.2]),
    detuning_1_set_hz=np.repeat([3000.0, -1500.0], 4),
    detuning_2_set_hz=np.zeros(8),
    shots=np.full(8, 400),
    n_x=np.array([1.0, 30.0, 230.0, 399.0, 0.0, 28.0, 222.0, 400.0]),
    n_y=np.array([2.0, 17.0, np.nan, 260.0, 1.0, 17.0, 155.0, np.nan]),
)
COLUMNS = dict(SAMPLE.columns)
SHORT = {column: values[:-1] for column, values in COLUMNS.items()}  # the second loop broken off

QCODES = """
import csv, os, shutil, sys
from pathlib import Path

from qcodes.dataset import Measurement, initialise_or_create_database_at, load_or_create_experiment
from qcodes.parameters import ManualParameter

folder = Path(sys.argv[1])
with open(folder / "sample.csv") as file:
    rows = list(csv.DictReader(file))
initialise_or_create_database_at(str(folder / "station.db"))
experiment = load_or_create_experiment("memristor", "ion")
names = {"x_set": "input", "r_set": "transfer", "n_x": "dark_1", "n_y": "dark_2", "detuning_1_set_hz": "det"}
measured = {column: ManualParameter(name, unit="kHz" if name == "det" else "") for column, name in names.items()}
scale = {"detuning_1_set_hz": 1e-3}
cycle, loop_index, row = (ManualParameter(name) for name in ("cycle", "loop_index", "row"))
loop = ManualParameter("loop")

def export(name, setpoints, rows, also=()):
    measurement = Measurement(exp=experiment)
    for setpoint in setpoints:
        measurement.register_parameter(setpoint)
    for parameter in also:
        kind = "text" if parameter is loop else "numeric"
        measurement.register_parameter(parameter, setpoints=setpoints, paramtype=kind)
    for parameter in measured.values():
        measurement.register_parameter(parameter, setpoints=setpoints)
    with measurement.run() as saver:
        for k, one in enumerate(rows):
            places = {loop_index: float(one["loop"]), cycle: int(one["cycle"]), row: k, loop: one["loop"]}
            results = [(parameter, places[parameter]) for parameter in (*setpoints, *also)]
            results += [(p, float(one[c] or "nan") * scale.get(c, 1)) for c, p in measured.items()]
            saver.add_result(*results)
    saver.dataset.export("netcdf", path=str(folder / name), prefix="")
    (path,) = (folder / name).glob("*.nc")
    shutil.move(path, folder / f"{name}.nc")

for name in ("results_1", "ragged", "line"):
    (folder / name).mkdir()
export("results_1", (loop_index, cycle), rows)
export("ragged", (loop_index, cycle), rows[:-1])
export("line", (row,), rows, also=(cycle, loop))
"""


@pytest.fixture(scope="module")
def qcodes(tmp_path_factory) -> Path:
    """Exports of QCoDeS: a full grid (loop, cycle), one whose second loop is shorter, and a single axis."""
    folder = tmp_path_factory.mktemp("qcodes")
    write_table(SAMPLE, folder / "sample.csv")
    home = {"HOME": str(folder), "USERPROFILE": str(folder)}
    command = [sys.executable, "-c", QCODES, str(folder)]
    done = subprocess.run(command, cwd=folder, env=os.environ | home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


GRID = {
    **{"loop": "loop_index", "x_set": "input", "r_set": "transfer", "detuning_1_set_hz": "det"},
    **{"shots": {"constant": 400}, "n_x": "dark_1", "n_y": "dark_2"},
}


def write_artiq(path: Path) -> Path:
    """A result file as ARTIQ 8 writes it: what was set, what was read of the dataset database, and about the run."""
    with h5py.File(path, "w") as file:
        datasets, archive = file.create_group("datasets"), file.create_group("archive")
        for key, value, attributes in [
            ("memristor.cycle", COLUMNS["cycle"], {}),
            ("memristor.input", COLUMNS["x_set"], {"unit": "%", "scale": 0.01, "precision": 1}),
            ("memristor.loop", COLUMNS["loop"].astype("S"), {}),
            ("memristor.detuning", COLUMNS["detuning_1_set_hz"], {"unit": "kHz"}),
            ("memristor.shots", 400, {}),
            ("memristor.dark_1", COLUMNS["n_x"].astype(np.int32), {}),
            ("memristor.dark_2", COLUMNS["n_y"], {}),
            ("memristor.image", np.zeros((3, 4)), {}),
        ]:
            datasets[key] = value
            for name, attribute in attributes.items():
                datasets[key].attrs[name] = attribute
        archive["memristor.transfer"] = COLUMNS["r_set"]
        archive["memristor.dark_1"] = np.zeros(3)
        file["artiq_version"], file["rid"], file["expid"] = "8.0", 42, "{}"
        file["start_time"], file["run_time"] = 1.7e9, 1.7e9
    return path


def write_hdf5(path: Path, **variables) -> Path:
    """Datasets at the root; a pair is values and unit."""
    with h5py.File(path, "w") as file:
        for name, value in variables.items():
            values, unit = value if isinstance(value, tuple) else (value, None)
            file[name] = values.astype("S") if isinstance(values, np.ndarray) and values.dtype.kind == "U" else values
            if unit is not None:
                file[name].attrs["unit"] = unit
    return path


def write_other_csv(path: Path) -> Path:
    """A CSV file under other names, in other units and with a column too many."""
    c = COLUMNS
    lines = ["run,k,input,r_set,det,dark after pulse 1,note,dark after both"]
    for i in range(8):
        n_y = "" if np.isnan(c["n_y"][i]) else f"{c['n_y'][i]:g}"
        lines.append(
            f"{c['loop'][i]},{c['cycle'][i]},{100 * c['x_set'][i]:.0f},{c['r_set'][i]},"
            f"{c['detuning_1_set_hz'][i] / 1e3},{c['n_x'][i]:g},fine,{n_y}"
        )
    path.write_text("\n".join(lines))
    return path


def write_pandas(path: Path) -> Path:
    """Parquet by pandas: categories, nullable integers, a column and an index that are not ours."""
    frame = pd.DataFrame({**COLUMNS, "det": COLUMNS["detuning_1_set_hz"] / 1e3, "note": "fine"})
    frame = frame.drop(columns="detuning_1_set_hz").astype({"loop": "category", "n_y": "Int64"})
    frame.index = pd.date_range("2026-01-01", periods=8, name="time")
    frame.to_parquet(path)
    return path


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, qcodes) -> Path:
    """A folder with the files that docs/formats.md names."""
    folder = tmp_path_factory.mktemp("shelf")
    write_other_csv(folder / "other_names.csv")
    write_artiq(folder / "000000042-Memristor.h5")
    (folder / "results_1.nc").write_bytes((qcodes / "results_1.nc").read_bytes())
    write_pandas(folder / "loops.parquet")
    return folder


def dataset(**changes) -> xr.Dataset:
    """The sample along one dimension, with changed variables; None removes one."""
    variables = {name: ("row", values) for name, values in COLUMNS.items()} | changes
    return xr.Dataset({name: value for name, value in variables.items() if value is not None})


def assert_columns(table: LoopTable, expected=COLUMNS) -> None:
    assert table.columns.keys() == expected.keys()
    for column, values in expected.items():
        np.testing.assert_array_equal(table.columns[column], values, strict=column != "loop", err_msg=column)


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(TableError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return message


# The documentation.


def test_every_example_of_the_documentation_reads_its_file(shelf):
    names = set()
    for k, example in enumerate(EXAMPLES):
        (shelf / f"{k}.toml").write_text(example)
        config = load_config(shelf / f"{k}.toml")
        assert_columns(load_table(config))
        assert config.data is not None
        names.add(Path(config.data.table).name)
        (shelf / "resolved.toml").write_text(config.to_toml())
        assert load_config(shelf / "resolved.toml") == config
    assert names == {"other_names.csv", "000000042-Memristor.h5", "results_1.nc", "loops.parquet"}


def test_the_notebook_of_the_documentation_runs(shelf, monkeypatch):
    monkeypatch.chdir(shelf)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    names: dict = {}
    exec(compile(code, "formats.md", "exec"), names)
    assert_columns(names["table"])


# What is read.


@pytest.mark.parametrize("suffix", [".nc", ".NC", ".parquet", ".csv", ".dat"])
def test_writing_and_reading_gives_the_same_table(tmp_path, suffix):
    values = LoopTable(
        **{c: COLUMNS[c] for c in ("loop", "cycle", "x_set", "detuning_1_set_hz", "detuning_2_set_hz")},
        **{"window_cycles": np.full(8, 7.3), "y": np.linspace(-0.1, 1 / 3, 8), "y_err": np.geomspace(1e-300, 1 / 7, 8)},
    )
    for table in (SAMPLE, values):
        path = tmp_path / f"table{suffix}"
        write_table(table, path)
        assert path.read_bytes().startswith(
            {".nc": b"\x89HDF", ".parquet": b"PAR1"}.get(suffix.lower(), b"loop,cycle,")
        )
        again = read_table(path)
        assert_columns(again, table.columns)
        assert again.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert again.name == str(path)
    assert [path.name for path in tmp_path.iterdir()] == [f"table{suffix}"]


def test_units_are_written(tmp_path):
    write_table(SAMPLE, tmp_path / "table.nc")
    write_table(SAMPLE, tmp_path / "table.parquet")
    with xr.open_dataset(tmp_path / "table.nc", engine="h5netcdf") as written:
        assert (written["detuning_1_set_hz"].attrs["units"], written["n_x"].attrs["units"]) == ("Hz", "1")
        assert written.sizes == {"row": 8}
    schema = parquet.read_schema(tmp_path / "table.parquet")
    assert schema.field("detuning_1_set_hz").metadata == {b"units": b"Hz"}
    assert pd.read_parquet(tmp_path / "table.parquet")["n_y"].isna().sum() == 2


@pytest.mark.parametrize("suffix", [".nc", ".parquet"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    old = tmp_path / f"old{suffix}"
    old.write_text("old")
    monkeypatch.setattr("calibration.formats.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_table(SAMPLE, old)
    assert old.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [old.name]


def test_files_with_our_names_need_no_mapping_and_the_name_of_the_file_does_not_matter(tmp_path):
    others = {"camera": (("frame", "px"), np.zeros((2, 3))), "comment": "fine"}
    netcdf3 = dataset(**others)
    netcdf3["cycle"] = netcdf3["cycle"].astype(np.int32)
    netcdf3["shots"] = netcdf3["shots"].astype(np.int32)
    netcdf3.to_netcdf(tmp_path / "classic.csv", engine="scipy", format="NETCDF3_CLASSIC")
    netcdf3.to_netcdf(tmp_path / "wide.csv", engine="scipy", format="NETCDF3_64BIT")
    dataset(**others).to_netcdf(tmp_path / "four.csv", engine="h5netcdf")
    write_hdf5(tmp_path / "plain.csv", **COLUMNS, camera=np.zeros((2, 3)), comment="fine")
    with h5py.File(tmp_path / "artiq.csv", "w") as file:  # as artiq_run --hdf5 writes it
        file.create_group("archive")
        for name, values in COLUMNS.items():
            file[f"datasets/{name}"] = values.tolist() if name == "loop" else values
        file["n_x"] = 3
    pd.DataFrame({**COLUMNS, "comment": "fine"}).to_parquet(tmp_path / "parquet.csv")
    for path in sorted(tmp_path.iterdir()):
        assert_columns(read_table(path))
    assert_columns(table_from_dataset(dataset(**others)))


@pytest.mark.parametrize(("name", "expected"), [("results_1", COLUMNS), ("ragged", SHORT)])
def test_a_grid_of_qcodes_becomes_rows(qcodes, name, expected):
    table = read_table(qcodes / f"{name}.nc", GRID)
    assert_columns(table, expected)
    assert table.lines is None


def test_a_line_of_qcodes_has_text_labels(qcodes):
    mapping = {name: source for name, source in GRID.items() if name != "loop"}
    assert_columns(read_table(qcodes / "line.nc", mapping))
    with xr.open_dataset(qcodes / "line.nc", engine="h5netcdf") as exported:
        assert "qcodes" in exported.attrs["snapshot"], "written by QCoDeS itself"
        assert exported["det"].attrs["unit"] == "kHz"


def test_qcodes_leaves_its_traces_where_it_was_told(qcodes):
    assert (qcodes / "station.db").is_file()


def test_coordinates_and_settings_of_a_grid_repeat_over_it():
    shape = lambda column: COLUMNS[column].reshape(2, 4)
    grid = xr.Dataset(
        {
            "x_set": ("cycle", COLUMNS["x_set"][:4]),
            "r_set": (("loop", "cycle"), shape("r_set")),
            "detuning_1_set_hz": ("loop", [3000.0, -1500.0]),
            "shots": ((), 400),
            "n_x": (("loop", "cycle"), shape("n_x")),
            "n_y": (("cycle", "loop"), shape("n_y").T),
        },
        coords={"loop": ["1", "2"], "cycle": np.arange(4)},
    )
    assert_columns(table_from_dataset(grid, {"shots": "shots"}))
    turned = table_from_dataset(grid.transpose("cycle", "loop"), {"shots": "shots"})
    np.testing.assert_array_equal(turned.cycle, np.repeat(np.arange(4), 2))
    for label in turned.labels:
        np.testing.assert_array_equal(turned.columns["n_y"][turned.rows(label)], COLUMNS["n_y"][SAMPLE.rows(label)])
    stacked = grid.stack(row=("loop", "cycle"))
    assert_columns(table_from_dataset(stacked, {"shots": "shots"}))


def test_packed_numbers_and_fill_values_are_decoded(tmp_path):
    packed = dataset()
    packed["n_y"].encoding = {"dtype": "int16", "_FillValue": -1}
    packed["x_set"].encoding = {"dtype": "int16", "scale_factor": 0.01, "_FillValue": -1}
    packed["cycle"].attrs["units"] = "cycles"
    packed.to_netcdf(tmp_path / "packed.nc", engine="h5netcdf")
    table = read_table(tmp_path / "packed.nc")
    np.testing.assert_array_equal(table.columns["n_y"], COLUMNS["n_y"])
    np.testing.assert_allclose(table.x_set, COLUMNS["x_set"], atol=1e-12)


def test_times_are_left_alone(tmp_path):
    measured = dataset(time=("row", np.arange(8.0), {"units": "days since 2026-01-01"}))
    measured["wait"] = ("row", np.arange(8.0), {"units": "s"})
    measured["odd"] = ("row", np.arange(8.0), {"units": "days since the last vent"})
    measured.to_netcdf(tmp_path / "times.nc", engine="h5netcdf")
    assert_columns(read_table(tmp_path / "times.nc"))
    message = refusal(read_table, tmp_path / "times.nc", {"window_cycles": "wait"})
    assert "unit of variable 'wait' is 's', but window_cycles takes '1'" in message
    assert "'time' is 'days since 2026-01-01'" in refusal(read_table, tmp_path / "times.nc", {"window_cycles": "time"})


def test_labels_are_texts_bytes_or_numbers():
    for labels in (COLUMNS["loop"].astype("S"), COLUMNS["loop"].astype(object), np.repeat([1, 2], 4)):
        assert_columns(table_from_dataset(dataset(loop=("row", labels))))
    numbers = table_from_dataset(dataset(loop=("row", np.repeat([1.0, 2.5], 4), {"unit": "kHz"})))
    assert numbers.labels == ("1", "2.5")


def test_settings_that_are_empty_throughout_are_absent_and_empty_shots_are_none():
    nothing = np.full(8, np.nan)
    shots = np.where(np.arange(8) == 7, np.nan, 400.0)
    n_x = np.where(np.arange(8) == 7, np.nan, COLUMNS["n_x"])
    table = table_from_dataset(dataset(window_cycles=("row", nothing), shots=("row", shots), n_x=("row", n_x)))
    assert table.window_cycles is None
    np.testing.assert_array_equal(table.columns["shots"], [400] * 7 + [0])


def test_a_column_of_parquet_may_be_null_throughout(tmp_path):
    columns = {name: pa.array(values.tolist(), from_pandas=True) for name, values in COLUMNS.items()}
    parquet.write_table(pa.table({**columns, "window_cycles": pa.nulls(8)}), tmp_path / "t.parquet")
    assert_columns(read_table(tmp_path / "t.parquet"))


def test_a_missing_category_is_no_label(tmp_path):
    frame = pd.DataFrame(COLUMNS)
    frame["loop"] = pd.Categorical([*COLUMNS["loop"][:7], None])
    frame.to_parquet(tmp_path / "t.parquet")
    assert "row 7, column loop is None" in refusal(read_table, tmp_path / "t.parquet")


# Units.

ARTIQ_NAMES = {
    **{"cycle": "memristor.cycle", "x_set": "memristor.input", "loop": "memristor.loop"},
    **{"shots": "memristor.shots", "n_x": "memristor.dark_1", "n_y": "memristor.dark_2"},
}
ARTIQ_UNITS = [  # stored, attributes, Hz
    (3000.0, {}, 3000.0),
    (3000.0, {"unit": "kHz"}, 3000.0),
    (3000.0, {"unit": "kHz", "scale": 1e3, "precision": 2}, 3000.0),
    (3.0, {"unit": "kHz", "scale": 1.0}, 3000.0),
    (3000.0, {"unit": "Hz"}, 3000.0),
    (2e6, {"unit": "MHz"}, 2e6),
    (0.25, {"unit": "mHz"}, 0.25),
    (3000.0, {"scale": 1}, 3000.0),
]


@pytest.mark.parametrize(("stored", "attributes", "hz"), ARTIQ_UNITS, ids=str)
def test_artiq_units_mean_what_its_dashboard_shows(tmp_path, stored, attributes, hz):
    path = write_artiq(tmp_path / "000000001-Any.h5")
    with h5py.File(path, "a") as file:
        file["datasets/offset"] = np.full(8, stored)
        file["datasets/offset"].attrs.update(attributes)
    table = read_table(path, {**ARTIQ_NAMES, "detuning_2_set_hz": "offset"})
    np.testing.assert_allclose(table.detuning_2_set_hz, hz, rtol=1e-15)
    in_mapping = read_table(path, {**ARTIQ_NAMES, "detuning_2_set_hz": {"name": "datasets/offset", "unit": "Hz"}})
    np.testing.assert_array_equal(in_mapping.detuning_2_set_hz, stored)


def test_artiq_scales_without_meaning_are_refused(tmp_path):
    for attributes, parts in [
        ({"scale": 1e3}, ["variable 'datasets/offset' is not stated beside its scale 1000", "mapping"]),
        ({"unit": "kHz", "scale": 0.0}, ["scale of variable 'datasets/offset' is", "0.0", "positive"]),
        ({"unit": "kHz", "scale": "big"}, ["scale of variable 'datasets/offset' is 'big'"]),
        ({"unit": "ms"}, ["unit of variable 'datasets/offset' is 'ms', but detuning_1_set_hz takes 'Hz'"]),
    ]:
        path = write_artiq(tmp_path / "a.h5")
        with h5py.File(path, "a") as file:
            file["datasets/offset"] = np.zeros(8)
            file["datasets/offset"].attrs.update(attributes)
        message = refusal(read_table, path, {**ARTIQ_NAMES, "detuning_1_set_hz": "offset"})
        assert message.startswith(f"{path}: ")
        for part in parts:
            assert part in message


@pytest.mark.parametrize("kind", ["h5", "nc", "parquet", "csv", "dataset"])
@pytest.mark.parametrize(
    ("column", "unit", "factor"),
    [
        ("detuning_1_set_hz", "kHz", 1e-3),
        ("detuning_1_set_hz", "GHz", 1e-9),
        ("detuning_1_set_hz", "mHz", 1e3),
        ("x_set", "%", 100.0),
        ("x_set", "1", 1.0),
        ("n_x", "counts", 1.0),
    ],
)
def test_a_unit_of_the_file_or_of_the_mapping_is_converted(tmp_path, kind, column, unit, factor):
    stored = COLUMNS[column] * factor if factor != 100 else np.round(COLUMNS[column] * factor)
    path = tmp_path / f"t.{kind}"

    def write(said: str | None):
        attributes = {} if said is None else {"unit": said}
        data = dataset(**{column: ("row", stored, attributes)})
        if kind == "h5":
            return write_hdf5(path, **{**COLUMNS, column: (stored, said)})
        if kind == "nc":
            data.to_netcdf(path, engine="h5netcdf")
        elif kind == "parquet":
            table = pa.table({name: pa.array(values.tolist()) for name, values in {**COLUMNS, column: stored}.items()})
            place = table.schema.get_field_index(column)
            parquet.write_table(table.cast(table.schema.set(place, table.field(place).with_metadata(attributes))), path)
        elif kind == "csv":
            data.to_dataframe().to_csv(path, index=False)
        return data if kind == "dataset" else path

    read = table_from_dataset if kind == "dataset" else read_table
    tables = [read(write(None), {column: {"name": column, "unit": unit}})]
    tables.append(read(write("furlong"), {column: {"name": column, "unit": unit}}))
    if kind != "csv":
        tables.append(read(write(unit)))
    for table in tables:
        np.testing.assert_allclose(table.columns[column], COLUMNS[column], rtol=2e-16)
    if unit in ("%", "1", "counts"):
        assert_columns(tables[0])
    if kind != "csv":
        message = refusal(read, write("furlong"))
        assert f"unit of variable '{column}' is 'furlong', but {column} takes " in message
        assert message.endswith("name it in the mapping.")


def test_percent_gives_the_nearest_float():
    percent = np.arange(101.0)
    assert np.array_equal(converted(percent, 0.01), [float(f"{k / 100:.2f}") for k in range(101)])


def test_constants(tmp_path):
    write_table(SAMPLE, tmp_path / "t.csv")
    constants = {
        **{"loop": {"constant": 7}, "shots": {"constant": 400}, "window_cycles": {"constant": 12.5}},
        **{"detuning_1_set_hz": {"constant": 2, "unit": "kHz"}, "cycle": {"name": "row"}},
    }
    write_hdf5(tmp_path / "t.h5", row=np.arange(8), **{name: COLUMNS[name] for name in ("x_set", "r_set", "n_y")})
    text = (tmp_path / "t.csv").read_text().splitlines()
    (tmp_path / "t.csv").write_text("\n".join([f"row,{text[0]}", *(f"{k},{t}" for k, t in enumerate(text[1:]))]))
    for path in (tmp_path / "t.h5", tmp_path / "t.csv"):
        table = read_table(path, constants)
        columns = table.columns
        assert table.labels == ("7",)
        np.testing.assert_array_equal(table.cycle, np.arange(8))
        for name, value in (("shots", 400), ("window_cycles", 12.5), ("detuning_1_set_hz", 2000.0)):
            np.testing.assert_array_equal(columns[name], np.full(8, value))
    with pytest.raises(TableError, match=r"row 0, column shots is 2\.5, but must be an integer"):
        read_table(tmp_path / "t.h5", {**constants, "shots": {"constant": 2.5}})


# What is found under which name.


def test_a_variable_that_is_mapped_is_not_also_taken_under_its_own_name():
    measured = dataset(x_set=None, x=("row", COLUMNS["x_set"]), y=("row", np.full(8, np.nan)))
    table = table_from_dataset(measured, {"x_set": "x", "n_x": "n_x"})
    assert_columns(table)
    swapped = dataset(n_x=("row", COLUMNS["n_y"]), n_y=("row", COLUMNS["n_x"]))
    assert_columns(table_from_dataset(swapped, {"n_x": "n_y", "n_y": "n_x"}))


def test_a_setting_that_serves_another_column_is_not_read_twice():
    commanded = dataset(x_set=None, r_set=("row", COLUMNS["x_set"]))
    assert table_from_dataset(commanded, {"x_set": "r_set"}).r_set is None
    both = table_from_dataset(commanded, {"x_set": "r_set", "r_set": "r_set"})
    np.testing.assert_array_equal(both.columns["r_set"], both.x_set)


def test_a_mapping_to_one_kind_of_data_leaves_the_other_aside(tmp_path):
    axes = {"x": ("px", np.arange(5.0)), "y": ("px", np.arange(5.0))}
    assert "mixes counts" in refusal(table_from_dataset, dataset(**axes))
    assert_columns(table_from_dataset(dataset(**axes), {"n_x": "n_x"}))
    pd.DataFrame({**COLUMNS, "x": 3.0}).to_csv(tmp_path / "t.csv", index=False)
    assert_columns(read_table(tmp_path / "t.csv", {"n_x": "n_x"}))
    values = dataset(y=("row", np.zeros(8)), y_err=("row", np.ones(8)))
    assert table_from_dataset(values, {"y": "y"}).kind == "values"


def test_artiq_names_are_looked_up_in_datasets_and_then_in_archive(tmp_path):
    path = write_artiq(tmp_path / "a.h5")
    more = {"r_set": "memristor.transfer", "detuning_1_set_hz": "/datasets/memristor.detuning"}
    assert_columns(read_table(path, ARTIQ_NAMES | more))
    message = refusal(read_table, path, {**ARTIQ_NAMES, "n_x": "archive/memristor.dark_1"})
    assert "variable 'datasets/memristor.cycle' is 8 (row), but 'archive/memristor.dark_1' is 3 (row)" in message


# What is refused.

BAD_DATASETS = [  # changed variables, mapping, parts of the message
    ({"cycle": None}, {}, ["the file lacks the column cycle", "[data.columns]"]),
    ({"cycle": None, "cycles": ("row", np.arange(8))}, {}, ["lacks the column cycle", "such as cycle = 'cycles'"]),
    ({"shots": None}, {}, ["the file lacks the column shots, which n_x needs", "[data.columns]"]),
    ({"n_x": None, "n_y": None}, {}, ["lacks the measurements"]),
    ({}, {"n_x": "nn_x"}, ["columns.n_x is 'nn_x', but dataset holds no such variable; did you mean 'n_x'?"]),
    ({}, {"n_x": "camera"}, ["columns.n_x is 'camera'", "it holds loop, cycle, x_set", "and 1 more"]),
    ({"shots": ((), 400)}, {}, ["variable 'shots' is a single value", "shots = 'shots' in [data.columns]"]),
    ({"n_x": (("row", "shot"), np.zeros((8, 3)))}, {}, ["variable 'n_y' is 8 (row), but 'n_x' is 8 (row) by 3 (shot)"]),
    ({"x_set": ("other", np.zeros(8))}, {}, ["variable 'x_set' is 8 (other), but 'n_x' is 8 (row)"]),
    ({"n_x": ((), 1), "n_y": None}, {"n_x": "n_x"}, ["no measurement has more than one value"]),
    ({"n_x": ("row", ["1"] * 7 + ["x"])}, {}, ["row 0, column n_x is the text '1'", "number"]),
    ({"n_x": ("row", np.array([1, 2, "x", 4, 5, 6, 7, 8], object))}, {}, ["row 2, column n_x is the text 'x'"]),
    ({"n_x": ("row", np.ones(8, bool))}, {}, ["column n_x has the type bool, but needs numbers"]),
    ({"x_set": ("row", np.ones(8) * 1j)}, {}, ["column x_set has the type complex128"]),
    ({"cycle": ("row", pd.date_range("2026", periods=8))}, {}, ["column cycle has the type datetime64"]),
    ({"n_x": ("row", np.full(8, 401))}, {}, ["row 0, column n_x is 401, but counts cannot exceed the shots"]),
    ({"n_x": ("row", np.full(8, 0.5))}, {}, ["row 0, column n_x is 0.5, but counts are non-negative integers"]),
    ({"n_x": ("row", np.full(8, np.inf))}, {}, ["row 0, column n_x is inf"]),
    ({"cycle": ("row", np.arange(8) + 0.5)}, {}, ["row 0, column cycle is 0.5, but must be an integer"]),
    ({"cycle": ("row", np.zeros(8))}, {}, ["row 1, column cycle is 0, but the cycles of a loop must increase"]),
    ({"x_set": ("row", np.linspace(0, 2, 8))}, {}, ["row 4, column x_set is 1.14", "[0, 1]"]),
    ({"x_set": ("row", [0.0] * 7 + [np.nan])}, {}, ["row 7, column x_set is empty; give it in every row."]),
    ({"x_set": ("row", np.full(8, np.nan))}, {}, ["row 0, column x_set is empty; give it in every row."]),
    ({"r_set": ("row", [0.0] * 7 + [np.nan])}, {}, ["row 7, column r_set is empty; give it in every row, or in none"]),
    ({"shots": ("row", [400.0] * 7 + [np.nan])}, {}, ["row 7, column shots is 0, but n_x is given"]),
    ({"loop": ("row", np.full(8, np.nan))}, {}, ["row 0, column loop is nan, but must be a text or a number"]),
    ({"loop": ("row", np.array(["A"] * 7 + [None], object))}, {}, ["row 7, column loop is nan"]),
    ({"loop": ("row", [" A"] * 8)}, {}, ["row 0, column loop is ' A'"]),
    ({name: ("row", values[:0]) for name, values in COLUMNS.items()}, {}, ["the table has no rows"]),
    ({"n_x": ("row", COLUMNS["n_x"], {"units": "kg"})}, {}, ["unit of variable 'n_x' is 'kg', but n_x takes '1'"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "mapping", "parts"), BAD_DATASETS, ids=[repr(p[0])[:60] for *_, p in BAD_DATASETS])
def test_a_bad_dataset_is_refused_with_its_place(changes, mapping, parts):
    message = refusal(table_from_dataset, dataset(**changes), mapping)
    assert message.startswith("columns." if "columns." in parts[0][:8] else "dataset: ")
    for part in parts:
        assert part in message


def test_what_is_no_dataset_is_refused():
    assert "this is a DataArray, but must be an xarray.Dataset" in refusal(table_from_dataset, dataset()["n_x"])


def test_hdf5_that_is_no_table_is_refused(tmp_path):
    path = tmp_path / "t.h5"
    for changes, mapping, parts in [
        ({"n_x": np.zeros((8, 3))}, {}, ["variable 'n_x' has the shape (8, 3)", "one value a row"]),
        ({"n_x": np.zeros(8, [("a", int), ("b", int)])}, {}, ["variable 'n_x' has the fields a, b"]),
        ({"n_x": np.zeros(5)}, {}, ["variable 'loop' is 8 (row), but 'n_x' is 5 (row)"]),
        ({"n_x": h5py.Empty("f")}, {}, ["variable 'n_x' has the shape None"]),
        ({"n_x": COLUMNS["n_x"].astype(str)}, {}, ["row 0, column n_x is the text '1.0'"]),
        ({"group/dark": np.zeros(8)}, {"n_x": "group"}, ["columns.n_x is 'group'", "no such variable"]),
        ({"group/dark": np.zeros(8)}, {"n_x": "drak"}, ["did you mean 'group/dark'?"]),
        ({}, {"n_x": "/"}, ["columns.n_x is '/'", "no such variable"]),
    ]:
        message = refusal(read_table, write_hdf5(path, **{**COLUMNS, **changes}), mapping)
        assert str(path) in message
        for part in parts:
            assert part in message
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    assert "lacks the column cycle" in refusal(read_table, tmp_path / "empty.h5")


@pytest.mark.parametrize("kind", ["h5", "nc", "classic.nc", "parquet"])
def test_a_truncated_file_is_refused(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    if kind == "h5":
        write_artiq(path)
    elif kind == "classic.nc":
        small = dataset(cycle=("row", COLUMNS["cycle"].astype(np.int32)), shots=("row", np.full(8, 400, np.int32)))
        small.to_netcdf(path, engine="scipy")
    else:
        write_table(SAMPLE, path)
    whole = path.read_bytes()
    for length in [4, 5, 8, *np.linspace(9, len(whole) - 1, 25).astype(int)]:
        path.write_bytes(whole[:length])
        message = refusal(read_table, path)
        assert message.startswith(f"{path}: ")
        assert "damaged" in message, (length, message)


def test_garbage_after_the_first_bytes_is_refused(tmp_path):
    noise = np.random.default_rng(1).bytes(3000)
    for start in (b"\x89HDF\r\n\x1a\n", b"CDF\x01", b"CDF\x02", b"CDF\x05", b"PAR1"):
        path = tmp_path / "t.bin"
        path.write_bytes(start + noise)
        assert "damaged" in refusal(read_table, path)
        path.write_bytes(start + noise + start)
        assert "damaged" in refusal(read_table, path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    write_table(SAMPLE, tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (lambda: read_table(tmp_path / "t.parquet"), lambda: write_table(SAMPLE, tmp_path / "t.parquet")):
        assert "pip install 'ion-memristor-twin[labs]'" in refusal(call)


def test_paths_that_are_no_readable_file(tmp_path):
    assert "no such file" in refusal(read_table, tmp_path / "absent.nc")
    assert "folder" in refusal(read_table, tmp_path)


# Mappings of CSV files, and wrong mappings.


def test_csv_errors_of_a_mapping(tmp_path):
    path = write_other_csv(tmp_path / "other.csv")
    good = {
        **{"loop": "run", "cycle": "k", "x_set": {"name": "input", "unit": "%"}, "shots": {"constant": 400}},
        **{"n_x": "dark after pulse 1", "n_y": "dark after both"},
    }
    assert "unknown column 'run'" in refusal(read_table, path)
    assert "[data.columns]" in refusal(read_table, path)
    for change, parts in [
        ({"n_x": "dark after puls 1"}, ["columns.n_x is", str(path), "did you mean 'dark after pulse 1'?"]),
        ({"x_set": "input"}, ["line 3, column x_set is 7.0", "[0, 1]"]),
        ({"n_x": "note"}, ["line 2, column n_x is 'fine', which is not a number"]),
    ]:
        message = refusal(read_table, path, {**good, **change})
        for part in parts:
            assert part in message
    del good["shots"]
    message = refusal(read_table, path, good)
    assert "line 1 (header) lacks the column shots, which n_x needs; add it or map it in [data.columns]" in message
    path.write_text(path.read_text().replace("note", "input"))
    good["shots"] = {"constant": 400}
    assert "has the column input 2 times" in refusal(read_table, path, good)
    path.write_text(path.read_text().replace(",input,dark", ",,dark"))
    assert len(read_table(path, good)) == 8, "a column without a name is ignored like any other"


BAD_MAPPINGS = [  # mapping, parts of the message after "columns."
    ({"n_z": "a"}, ["n_z is not a column of the loop table; did you mean n_"]),
    ({"picture": "a"}, ["picture is not a column", "the columns are loop, cycle"]),
    ({"a\nb": "a"}, ["'a\\nb' is not a column"]),
    ({"n_x": 3}, ["n_x is 3, but must be a name in the file, or a table"]),
    ({"n_x": {}}, ["n_x is {}, but must be a name in the file, or a table"]),
    ({"n_x": ""}, ["n_x.name is '', but must be the name"]),
    ({"n_x": {"name": 3}}, ["n_x.name is 3"]),
    ({"n_x": {"nam": "a"}}, ["n_x has 'nam', which is not a key; keys are name, unit, constant"]),
    ({"n_x": {"unit": "1"}}, ["n_x has neither name and constant"]),
    ({"n_x": {"name": "a", "constant": 1}}, ["n_x has both name and constant"]),
    ({"shots": {"constant": True}}, ["shots.constant is True, but must be a finite number"]),
    ({"shots": {"constant": "400"}}, ["shots.constant is '400'"]),
    ({"shots": {"constant": 10**400}}, ["shots.constant is 1000"]),
    ({"x_set": {"constant": float("nan")}}, ["x_set.constant is nan"]),
    ({"loop": {"constant": 1.5}}, ["loop.constant is 1.5, but must be a label"]),
    ({"loop": {"name": "a", "unit": "Hz"}}, ["loop.unit is 'Hz', but loop holds labels"]),
    ({"detuning_1_set_hz": {"name": "a", "unit": "khz"}}, ["detuning_1_set_hz.unit is 'khz'", "did you mean 'kHz'?"]),
    ({"detuning_1_set_hz": {"name": "a", "unit": "rad/s"}}, ["detuning_1_set_hz.unit is 'rad/s'", "takes 'Hz', 'mHz'"]),
    ({"x_set": {"name": "a", "unit": "kHz"}}, ["x_set.unit is 'kHz', but x_set takes '1', '%'"]),
    ({"x_set": {"name": "a", "unit": ["%"]}}, ["x_set.unit is ['%']"]),
]  # fmt: skip


@pytest.mark.parametrize(("mapping", "parts"), BAD_MAPPINGS, ids=[str(mapping)[:60] for mapping, _ in BAD_MAPPINGS])
def test_a_bad_mapping_is_refused_before_the_file_is_opened(tmp_path, mapping, parts):
    said = [refusal(read_table, tmp_path / "absent", mapping), refusal(table_from_dataset, xr.Dataset(), mapping)]
    with pytest.raises(MappingError):
        read_table(tmp_path / "absent", mapping)
    with pytest.raises(ConfigError) as caught:
        parse_config({"data": {"table": "absent", "columns": mapping}})
    said.append(str(caught.value))
    for message, start in zip(said, ["columns.", "columns.", "configuration: data.columns."], strict=True):
        assert message.startswith(start + parts[0])
        assert "\n" not in message
        for part in parts:
            assert part in message


def test_a_mapping_that_the_file_does_not_know_names_the_path_of_the_key(tmp_path):
    path = write_artiq(tmp_path / "a.h5")
    with pytest.raises(ConfigError) as caught:
        load_table(parse_config({"data": {"table": str(path), "columns": {"n_x": "datasets/memristor.inptu"}}}))
    assert str(caught.value) == (
        f"data.columns.n_x is 'datasets/memristor.inptu', but {path} holds no such variable; "
        "did you mean 'datasets/memristor.input'?"
    )


def test_a_row_without_a_measured_input_is_named(tmp_path):
    unknown = dataset(r_set=None, n_x=("row", np.where(np.arange(8) == 5, np.nan, COLUMNS["n_x"])))
    unknown.to_netcdf(tmp_path / "t.nc", engine="h5netcdf")
    with pytest.raises(ConfigError, match="row 5 has no measured input"):
        load_table(parse_config({"data": {"table": str(tmp_path / "t.nc")}}))


# The configuration and the command line.


def test_the_schema_and_the_help_tell_the_mapping():
    schema = json_schema()
    columns = schema["$defs"]["Data"]["properties"]["columns"]
    assert "detuning_1_set_hz" in columns["propertyNames"]["enum"]
    assert {"type": "string"} in columns["additionalProperties"]["anyOf"]
    assert {"$ref": "#/$defs/Column"} in columns["additionalProperties"]["anyOf"]
    keys = {title: [key for key, _ in lines] for title, _, lines in describe("fit")}
    assert keys["[data.columns.NAME]"] == ["name", "unit", "constant"]
    assert keys["[data]"][:2] == ["table", "columns"]


CONFIG = """
[device]
engine = "closed_form"

[data]
table = "absent.csv"

[data.columns]
loop = "loop_index"
x_set = "input"
r_set = "transfer"
detuning_1_set_hz = { name = "det", unit = "kHz" }
shots = { constant = 400 }
n_x = "dark_1"
n_y = "dark_2"

[fit.free]
rabi_scale_1 = [0.7, 1.3]
"""


def test_the_command_fits_a_laboratory_file_through_the_mapping_of_the_configuration(tmp_path, qcodes):
    (tmp_path / "lab.toml").write_text(CONFIG)
    data, out = qcodes / "results_1.nc", tmp_path / "run"
    done = test_cli.staged("fine", "fit", tmp_path / "lab.toml", "--data", data, "--out", out)
    assert done.returncode == 0, done.stderr
    config = load_config(out / "config.toml", verb="fit")
    assert config.data is not None
    assert config.data.table == str(data)
    assert_columns(load_table(config))


def test_the_command_refuses_in_one_sentence_and_writes_nothing(tmp_path, qcodes):
    (tmp_path / "lab.toml").write_text(CONFIG)
    sets = {
        "data.columns.n_x=dark_3": "data.columns.n_x is 'dark_3', but",
        "data.columns.n_z=dark_1": "data.columns.n_z is not a column",
        "data.columns.n_x.unit=Hz": "data.columns.n_x",
        "data.columns.shots.constant=20": "row 1, column n_x is 30, but counts cannot exceed the shots",
    }
    for change, said in sets.items():
        arguments = ("--data", qcodes / "results_1.nc", "--out", tmp_path / "run", "--set", change)
        done = test_cli.run("fit", tmp_path / "lab.toml", *arguments)
        message, imported = done.stderr.splitlines()
        assert done.returncode == 2
        assert message.startswith("iontwin: ")
        assert said in message
        assert "jax" not in imported
        assert [path.name for path in tmp_path.iterdir()] == ["lab.toml"]
