"""The loop table: what is read, what is refused and how the refusal reads."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibration.data import LoopTable, TableError, read_table, write_table

DEMO = Path(__file__).parents[1] / "experiments" / "data" / "ion_loops.csv"

GOOD = """# a comment
loop,cycle,x_set,r_set,window_cycles,detuning_1_set_hz,detuning_2_set_hz,shots,n_x,n_y
A,0,0.0,0.5,10,0,-3e3,400,0,2
A,1,0.25,0.45,10,0,-3e3,400,99,
B,0,0.5,0.5,15,3000,0,200,101,50
A,2,1,0.4,10,0,-3e3,,,
"""
THIRD = "cycle,x_set,shots,n_x,n_y,n_m\n0,0,9,1,2,3\n1,0.5,9,4,5,\n2,1,9,7,0,9\n"
VALUES = "cycle,x_set,x,x_err,y,y_err\n0,0,-0.01,0.02,,\n1,0.5,0.52,0.03,0.26,0.02\n"


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "loops.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(TableError) as caught:
        read_table(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return message


def test_the_shipped_loops_are_read_whole():
    table = read_table(DEMO)
    assert len(table) == 363
    assert table.labels == ("A", "B", "C")
    assert table.kind == "counts"
    assert table.sha256 == hashlib.sha256(DEMO.read_bytes()).hexdigest()
    b = table.rows("B")
    assert len(b) == 121
    np.testing.assert_array_equal(table.cycle[b], np.arange(121))
    columns = {column: values[b] for column, values in table.columns.items()}
    assert set(columns["window_cycles"]) == {15.0}
    assert set(table.detuning_1_set_hz[b]) == {3000.0}
    assert set(columns["shots"]) == {400}
    # the recorded transfer is the mean of the previous 15 measured inputs
    np.testing.assert_allclose(columns["r_set"][40], np.mean(columns["n_x"][25:40] / 400), atol=1e-9)


def test_every_cell_lands_in_its_place(tmp_path):
    table = read_table(write(tmp_path, GOOD))
    assert table.loop.tolist() == ["A", "A", "B", "A"]
    np.testing.assert_array_equal(table.cycle, [0, 1, 0, 2])
    np.testing.assert_array_equal(table.x_set, [0.0, 0.25, 0.5, 1.0])
    np.testing.assert_array_equal(table.r_set, [0.5, 0.45, 0.5, 0.4])
    np.testing.assert_array_equal(table.window_cycles, [10.0, 10.0, 15.0, 10.0])
    np.testing.assert_array_equal(table.detuning_1_set_hz, [0.0, 0.0, 3000.0, 0.0])
    np.testing.assert_array_equal(table.detuning_2_set_hz, [-3000.0, -3000.0, 0.0, -3000.0])
    np.testing.assert_array_equal(table.shots, [400, 400, 200, 0])
    np.testing.assert_array_equal(table.n_x, [0.0, 99.0, 101.0, np.nan])
    np.testing.assert_array_equal(table.n_y, [2.0, np.nan, 50.0, np.nan])
    np.testing.assert_array_equal(table.rows("A"), [0, 1, 3])
    np.testing.assert_array_equal(table.lines, [3, 4, 5, 6])
    assert table.columns["shots"].dtype == table.cycle.dtype == np.int64
    assert table.x is table.x_err is table.y is table.y_err is None


def test_a_third_column_is_counted_among_what_the_second_left(tmp_path):
    """Both ends are allowed: nothing left for m, and everything that is left."""
    table = read_table(write(tmp_path, THIRD))
    np.testing.assert_array_equal(table.n_m, [3.0, np.nan, 9.0])
    write_table(table, tmp_path / "again.csv")
    np.testing.assert_array_equal(read_table(tmp_path / "again.csv").n_m, table.n_m)
    assert read_table(write(tmp_path, THIRD.replace("9,4,5,", "9,4,9,0"))).n_m[1] == 0
    assert read_table(write(tmp_path, GOOD)).n_m is None


def test_absent_settings_have_their_defaults(tmp_path):
    table = read_table(write(tmp_path, VALUES))
    assert table.kind == "values"
    assert table.labels == ("A",)
    assert table.r_set is table.window_cycles is table.shots is table.n_x is table.n_y is None
    np.testing.assert_array_equal(table.detuning_1_set_hz, [0.0, 0.0])
    np.testing.assert_array_equal(table.detuning_2_set_hz, [0.0, 0.0])
    np.testing.assert_array_equal(table.x, [-0.01, 0.52])
    np.testing.assert_array_equal(table.y_err, [np.nan, 0.02])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: b"\xef\xbb\xbf" + text.encode(), id="byte-order mark"),
        pytest.param(lambda text: text.replace("\n", "\r\n").encode(), id="CRLF"),
        pytest.param(lambda text: text.replace("\n", "\r").encode(), id="CR"),
        pytest.param(lambda text: text.replace(",", " , ").encode(), id="spaces"),
        pytest.param(lambda text: text.replace("\n", "\n\n \n  # note, with a comma\n").encode(), id="blank lines"),
        pytest.param(lambda text: text.rstrip("\n").encode(), id="no final newline"),
        pytest.param(lambda text: text.replace("A,", '"A",').replace("400", "400.0").encode(), id="quotes and floats"),
    ],
)
def test_harmless_spellings_read_the_same(tmp_path, change):
    expected = read_table(write(tmp_path, GOOD)).columns
    table = read_table(write(tmp_path, change(GOOD))).columns
    assert table.keys() == expected.keys()
    for column, values in expected.items():
        np.testing.assert_array_equal(table[column], values)


def test_a_setting_that_is_empty_in_every_row_counts_as_absent(tmp_path):
    table = read_table(write(tmp_path, "cycle,x_set,r_set,window_cycles,shots,n_y\n0,0,,,9,1\n1,1,,,9,2\n"))
    assert table.r_set is None
    assert table.window_cycles is None


CELLS = [  # old, new, expected parts of the message
    ("400,0,2", "400,0,401", ["line 3", "column n_y is 401", "exceed the shots"]),
    ("400,99", "400,-1", ["line 4", "column n_x is -1", "non-negative"]),
    ("400,99", "400,9.5", ["line 4", "column n_x is '9.5'", "integer"]),
    ("400,99", "400,nan", ["line 4", "column n_x is 'nan'", "leave the cell empty"]),
    ("400,99", "400,x", ["line 4", "column n_x is 'x'", "not a number", "plain number"]),
    ("400,99", "400,1_0", ["line 4", "'1_0'", "not a number"]),
    ("400,99", "400,٣", ["line 4", "'٣'", "not a number"]),
    ("400,99", "400,1e400", ["line 4", "'1e400'", "integer"]),
    ("400,99", "400,1e300", ["line 4", "'1e300'", "too large"]),
    ("200,101", "-200,101", ["line 5", "column shots is -200", "negative"]),
    ("200,101", "0,101", ["line 5", "column shots is 0", "n_x is given", "at least 1"]),
    ("200,101", ",101", ["line 5", "column shots is 0", "n_x is given"]),
    ("200,101", "200.5,101", ["line 5", "column shots is '200.5'", "integer"]),
    ("A,1,0.25", "A,1,1.25", ["line 4", "column x_set is 1.25", "[0, 1]"]),
    ("A,1,0.25", "A,1,-1e-9", ["line 4", "column x_set is -1e-09", "[0, 1]"]),
    ("A,1,0.25", "A,1,inf", ["line 4", "column x_set is 'inf'", "finite"]),
    ("A,1,0.25", "A,1,1e400", ["line 4", "column x_set is '1e400'", "too large"]),
    ("A,1,0.25", 'A,1,"0,25"', ["line 4", "column x_set is '0,25'", "decimal mark"]),
    ("A,1,0.25", "A,1,0,25", ["line 4", "11 fields", "header has 10", "decimal mark"]),
    ("A,1,0.25", "A,1,", ["line 4", "column x_set is empty", "every row"]),
    ("0.25,0.45", "0.25,1.45", ["line 4", "column r_set is 1.45", "[0, 1]"]),
    ("0.25,0.45", "0.25,", ["line 4", "column r_set is empty", "every row, or in none"]),
    ("A,2,1,0.4,10", "A,2,1,0.4,12", ["line 6", "column window_cycles is 12.0", "constant"]),
    ("0.5,15", "0.5,0.99", ["line 5", "column window_cycles is 0.99", "[1, "]),
    ("0.5,15", "0.5,-3", ["line 5", "column window_cycles is -3.0"]),
    ("15,3000", "15,6.88e14", ["line 5", "column detuning_1_set_hz", "laser minus line in Hz"]),
    ("15,3000", "15,-inf", ["line 5", "column detuning_1_set_hz", "finite"]),
    ("15,3000", "15,", ["line 5", "column detuning_1_set_hz is empty", "or in none"]),
    ("A,2,1", "A,1,1", ["line 6", "column cycle is 1", "each number once"]),
    ("A,2,1", "A,0,1", ["line 6", "column cycle is 0", "increase"]),
    ("A,2,1", "A,2.5,1", ["line 6", "column cycle is '2.5'", "integer"]),
    ("A,2,1", ",2,1", ["line 6", "column loop is empty", "or in none"]),
    ("A,2,1", "\x07,2,1", ["line 6", r"column loop is '\x07'", "printable"]),
    (",400,99,", ",400,99", ["line 4", "9 fields", "header has 10"]),
    ("A,1,0.25", '"A,1,0.25', ["line 4", "not valid CSV", "quotation marks"]),
    ("r_set", "R_set", ["line 2 (header)", "'R_set'", "did you mean r_set?"]),
    ("r_set", "r_sett", ["'r_sett'", "did you mean r_set?"]),
    ("r_set", "flags", ["'flags'", "remove it", "window_cycles"]),
    ("r_set", "", ["line 2 (header)", "without a name", "comma"]),
    ("r_set", "x_set", ["column x_set 2 times", "keep one"]),
    ("n_y", "x_err", ["mixes counts (shots, n_x) and values (x_err)", "keep one kind"]),
    ("x_set,r_set", "r_set,detuning_1_set_hz", ["detuning_1_set_hz 2 times"]),
]


@pytest.mark.parametrize(("old", "new", "parts"), CELLS, ids=[repr(new) for _, new, _ in CELLS])
def test_a_bad_cell_is_refused_with_its_place(tmp_path, old, new, parts):
    assert old in GOOD
    message = refusal(write(tmp_path, GOOD.replace(old, new, 1)))
    for part in parts:
        assert part in message


FILES = [  # content, expected parts of the message
    (b"", ["empty"]),
    (b"\xef\xbb\xbf\n", ["empty"]),
    (b" \n\n", ["empty"]),
    (b"# nothing\n", ["only comments"]),
    (GOOD.splitlines()[1], ["line 1", "header without rows"]),
    (GOOD.encode("utf-16"), ["UTF-16", "UTF-8"]),
    (GOOD.encode("utf-32"), ["UTF-16", "UTF-8"]),
    (GOOD.encode("utf-16-le"), ["null byte"]),
    (GOOD.replace("B,", "ß,").encode("latin-1"), ["line 5", "0xdf", "UTF-8"]),
    (b"PK\x03\x04...", ["spreadsheet", "CSV"]),
    (b"\x89HDF\r\n", ["HDF5", "damaged"]),
    (b"\x1f\x8b...", ["gzip", "CSV"]),
    (GOOD.encode() + b"\0", ["line 7", "null byte"]),
    (bytes(range(1, 256)), ["UTF-8"]),
    (GOOD.replace(",", ";"), ["line 2", "semicolons", "commas"]),
    (GOOD.replace(",", "\t"), ["line 2", "tabs"]),
    (GOOD.replace(",", "¦"), ["unknown column", "remove it"]),
    ("x_set,shots,n_y\n0,9,1\n", ["lacks the column cycle"]),
    ("cycle,shots,n_y\n0,9,1\n", ["lacks the column x_set"]),
    ("cycle,x_set\n0,0\n", ["lacks the measurements"]),
    ("cycle,x_set,shots\n0,0,9\n", ["lacks the measurements"]),
    ("cycle,x_set,n_y\n0,0,9\n", ["lacks the column shots"]),
    ("cycle,x_set,y\n0,0,0.1\n", ["lacks the column y_err", "y needs"]),
    ("cycle,x_set,x_err,y,y_err\n0,0,0.1,0,0.1\n", ["lacks the column x, which x_err needs"]),
    ("cycle,x_set,shots,n_x,n_y\n0,0,9,,\n1,0,9,,\n", ["no row holds a measurement"]),
    ("cycle,x_set,y,y_err\n0,0,,\n", ["no row holds a measurement"]),
    ("cycle,x_set,y,y_err\n0,0,42,3\n", ["line 2", "column y is 42.0", "fraction"]),
    ("cycle,x_set,y,y_err\n0,0,0.1,0\n", ["line 2", "column y_err is 0.0", "positive"]),
    ("cycle,x_set,y,y_err\n0,0,0.1,-1\n", ["line 2", "column y_err is -1.0", "positive"]),
    ("cycle,x_set,y,y_err\n0,0,0.1,\n", ["line 2", "column y_err is empty", "y is given"]),
    ("cycle,x_set,y,y_err\n0,0,,0.1\n", ["line 2", "column y is empty", "y_err is given"]),
    ("cycle,x_set,shots,n_y\n0,0,9,1\n2,0,9,1\n", ["line 3", "column cycle is 2", "missing", "give r_set"]),
    ("loop,cycle,x_set,shots,n_y\nA,0,0,9,1\nB,0,0,9,1\nA,2,0,9,1\n", ["line 4", "column cycle is 2", "missing"]),
    (THIRD.replace("9,4,5,", "9,4,5,5"), ["line 3", "column n_m is 5", "n_y and n_m together", "exceed the shots"]),
    (THIRD.replace("9,7,0,9", "9,7,0,10"), ["line 4", "column n_m is 10", "exceed the shots"]),
    (THIRD.replace("9,4,5,", "9,4,,5"), ["line 3", "column n_m is 5", "n_y of the row is missing"]),
    (THIRD.replace("1,2,3", "1,2,-1"), ["line 2", "column n_m is -1", "non-negative"]),
    (THIRD.replace("1,2,3", "1,2,0.5"), ["line 2", "column n_m is '0.5'", "integer"]),
    (THIRD.replace("9,4,5,", ",,,5"), ["line 3", "column shots is 0", "n_m is given"]),
    ("cycle,x_set,shots,n_x,n_m\n0,0,9,1,2\n", ["n_m", "n_y", "add it"]),
    ("cycle,x_set,n_m,y,y_err\n0,0,2,0.1,0.1\n", ["mixes counts", "keep one kind"]),
]


@pytest.mark.parametrize(
    ("content", "parts"), FILES, ids=[repr(parts[-1]) + str(k) for k, (_, parts) in enumerate(FILES)]
)
def test_a_bad_file_is_refused_with_the_reason(tmp_path, content, parts):
    message = refusal(write(tmp_path, content))
    for part in parts:
        assert part in message


def test_missing_cycles_are_fine_where_r_set_was_recorded(tmp_path):
    table = read_table(write(tmp_path, "cycle,x_set,r_set,shots,n_y\n0,0,0.5,9,1\n7,0,0.5,9,1\n"))
    np.testing.assert_array_equal(table.cycle, [0, 7])


def test_paths_that_are_no_readable_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.csv")
    assert "folder" in refusal(tmp_path)
    file = write(tmp_path, GOOD)
    assert "cannot be read" in refusal(file / "below.csv")
    assert "cannot be read" in refusal(tmp_path / "null\0.csv")
    assert "cannot be read" in refusal(tmp_path / ("x" * 5000))


def test_writing_and_reading_gives_the_same_table(tmp_path):
    for content in (GOOD, VALUES, DEMO.read_bytes()):
        table = read_table(write(tmp_path, content))
        copy = tmp_path / "copy.csv"
        write_table(table, copy)
        again = read_table(copy)
        assert again.columns.keys() == table.columns.keys()
        for column, values in table.columns.items():
            np.testing.assert_array_equal(again.columns[column], values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.csv", "loops.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    table = read_table(write(tmp_path, GOOD))
    old = tmp_path / "old.csv"
    old.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("calibration.formats.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_table(table, old)
    assert old.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loops.csv", "old.csv"]


def make(**changes: Any) -> LoopTable:
    columns: dict[str, Any] = {
        "loop": np.array(["A", "A"]),
        "cycle": np.array([0, 1]),
        "x_set": np.array([0.0, 0.5]),
        "detuning_1_set_hz": np.zeros(2),
        "detuning_2_set_hz": np.zeros(2),
        "shots": np.array([9, 9]),
        "n_y": np.array([1.0, np.nan]),
    }
    return LoopTable(**(columns | changes))


def test_a_table_made_in_python_keeps_the_same_rules():
    table = make()
    assert len(table.sha256) == 64
    assert table.sha256 != make(shots=np.array([9, 8])).sha256
    with pytest.raises(ValueError, match="read-only"):
        table.x_set[0] = 1.0
    for changes, message in [
        ({"n_y": np.array([10.0, 1.0])}, "loop table: row 0, column n_y is 10, but counts cannot exceed"),
        ({"n_y": np.array([1.0, 1.5])}, r"row 1, column n_y is 1\.5, but counts are non-negative integers"),
        ({"x_set": np.array([0.0, np.nan])}, "row 1, column x_set is empty, but a set point"),
        ({"cycle": np.array([0.0, 0.5])}, r"row 1, column cycle is 0\.5, but must be an integer"),
        ({"shots": np.array([9.0, np.nan])}, "row 1, column shots is nan, but must be an integer"),
        ({"x_set": np.zeros(3)}, r"column x_set has shape \(3,\)"),
        ({"x_set": np.array(["a", "b"])}, "column x_set has type .* needs numbers"),
        ({"loop": np.array(["#A", "#A"])}, "row 0, column loop is '#A'"),
        ({"loop": np.array(["A ", "A "])}, "row 0, column loop is 'A '"),
        ({"shots": None}, "n_x and n_y need the column shots"),
        ({"n_y": None}, "needs n_x or n_y"),
        ({"x": np.zeros(2), "x_err": np.ones(2)}, "keep one kind of data"),
        ({"shots": None, "n_y": None, "x": np.zeros(2)}, "x and x_err belong together"),
    ]:
        with pytest.raises(TableError, match=message):
            make(**changes)
    with pytest.raises(TableError, match="has no rows"):
        make(**{column: values[:0] for column, values in make().columns.items()})


HOSTILE = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@HOSTILE
@given(data=st.data())
def test_random_corruption_is_read_or_refused_never_a_traceback(tmp_path, data):
    content = bytearray(data.draw(st.sampled_from([GOOD.encode(), VALUES.encode()])))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        stop = min(len(content), start + data.draw(st.integers(0, 8)))
        content[start:stop] = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b",", b"\n", b'"', b"-", b"1e9"]))
        )
    path, message = write(tmp_path, bytes(content)), ""
    try:
        read_table(path)
    except TableError as error:
        message = str(error)
    assert not message or message.startswith(f"{path}: ")
    assert "\n" not in message


@HOSTILE
@given(text=st.text(max_size=12), column=st.integers(0, 9))
def test_any_text_in_a_cell_is_a_number_within_the_rules_or_refused(tmp_path, text, column):
    lines = GOOD.splitlines()
    fields = lines[3].split(",")
    fields[column] = text
    lines[3] = ",".join(fields)
    path, refused = write(tmp_path, "\n".join(lines).encode("utf-8", "surrogatepass")), ""
    try:
        table = read_table(path)
    except TableError as error:
        refused = str(error)
    else:
        columns = table.columns
        for name in ("x_set", "r_set"):
            assert np.all((columns[name] >= 0) & (columns[name] <= 1))
        assert np.all(columns["window_cycles"] >= 1)
        assert np.nanmin(columns["shots"] - columns["n_x"]) >= 0
    assert not refused or refused.startswith(f"{path}: ")


@HOSTILE
@given(data=st.data(), rows=st.integers(1, 5))
def test_any_valid_table_survives_the_file(tmp_path, data, rows):
    def column(elements):
        return np.array(data.draw(st.lists(elements, min_size=rows, max_size=rows)))

    label = data.draw(
        st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=6).filter(lambda s: s[0] != "#")
    )
    unit = st.floats(0, 1)
    table = LoopTable(
        loop=np.full(rows, label),
        cycle=np.arange(rows) + data.draw(st.integers(-(2**40), 2**40)),
        x_set=column(unit),
        r_set=column(unit),
        window_cycles=np.full(rows, data.draw(st.floats(1, 1e6))),
        detuning_1_set_hz=column(st.floats(-1e8, 1e8)),
        detuning_2_set_hz=column(st.floats(-1e8, 1e8)),
        y=column(st.floats(-0.5, 1.5)),
        y_err=column(st.floats(0, 1e300, exclude_min=True)),
    )
    path = tmp_path / "table.csv"
    write_table(table, path)
    again = read_table(path)
    assert again.columns.keys() == table.columns.keys()
    for name, values in table.columns.items():
        np.testing.assert_array_equal(again.columns[name], values)


def test_reading_a_table_does_not_import_jax():
    code = (
        f"import sys; from calibration.data import read_table; read_table({str(DEMO)!r}); "
        "print(sorted({'jax', 'equinox', 'pandas', 'xarray', 'h5py', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DEMO.parents[2])
    assert done.stdout.strip() == "[]"
