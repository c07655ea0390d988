"""Tables of auxiliary scans: what is read, what is refused, and what a calibration makes of them."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from scipy import stats

from calibration.parameters import FreeParameters, anchored
from calibration.scan_tables import KINDS, ScanTable, TableError, read_scan, write_scan
from calibration.scans import Scan, synthesize_scan
from twin.dynamics import StaticGrid
from twin.memory import MovingAverage
from twin.memristor import IonMemristor
from twin.scans import PulseScan, RamseyScan

DOC = (Path(__file__).parents[1] / "docs" / "scans.md").read_text(encoding="utf-8")
RABI = "pulse,area_rad,sigma_s,detuning_set_hz,shots,n\n1,0.8,2e-5,0,400,57\n2,3.2,2e-5,10,200,\n1,1.6,2e-5,0,,\n"
FREQUENCY = "pulse,detuning_set_hz,p,p_err\n1,-4e3,0.61,0.03\n1,0,1.01,0.02\n1,4e3,,\n"
RAMSEY = "wait_s,phase_rad,shots,n\n3e-4,0,300,233\n8e-4,1.5,300,24\n"
READOUT = "prepared,photons,count,threshold\nbright,2,1,4\nbright,9,999,4\ndark,0,995,4\ndark,6,5,4\n"
GOOD = {"rabi": RABI, "frequency": FREQUENCY, "ramsey": RAMSEY, "readout": READOUT}
ION = IonMemristor(
    memory=MovingAverage(10.0), rabi_scale_1=1.06, rabi_scale_2=0.95, detuning_1_hz=420.0, detuning_2_hz=-350.0,
    laser_linewidth_hz=90.0, readout_error_bright=0.01, readout_error_dark=0.02,
)  # fmt: skip


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "scan.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, kind: str | None = None) -> str:
    with pytest.raises(TableError) as caught:
        read_scan(path, kind)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return message


def settings(kind: str, rows: int = 20, shots: int = 1000) -> ScanTable:
    """A scan to be synthesized."""
    counts = {"shots": np.full(rows, shots), "n": np.zeros(rows)}
    columns = {
        "rabi": {"pulse": 1 + np.arange(rows) % 2, "area_rad": np.linspace(0.3, 7, rows)},
        "frequency": {"pulse": np.ones(rows), "detuning_set_hz": np.linspace(-1.2e4, 1.2e4, rows)},
        "ramsey": {"wait_s": np.linspace(1e-4, 2e-3, rows), "detuning_set_hz": np.full(rows, 600.0)},
        "readout": {"prepared": ["bright"] * 4 + ["dark"] * 4, "photons": [1, 3, 9, 12, 0, 1, 5, 8],
                    "count": [1, 3, 500, 496, 700, 280, 12, 8], "threshold": [4] * 8},
    }[kind]  # fmt: skip
    return ScanTable(kind=kind, columns=columns | (counts if kind != "readout" else {}))


@pytest.mark.parametrize("kind", GOOD)
def test_the_kind_is_told_and_tables_are_written_back(tmp_path, kind):
    table = read_scan(write(tmp_path, GOOD[kind]))
    assert table.kind == kind
    assert list(table.columns) == GOOD[kind].splitlines()[0].split(",")
    write_scan(table, tmp_path / "again.csv")
    again = read_scan(tmp_path / "again.csv", kind)
    for column, values in table.columns.items():
        np.testing.assert_array_equal(again[column], values)
        assert again[column].dtype == values.dtype
        assert not values.flags.writeable
    np.testing.assert_array_equal(table.lines, 2 + np.arange(len(table)))
    # What was not read from a file hashes as its text would.
    assert ScanTable(kind=kind, columns=table.columns).sha256 == again.sha256


def test_every_cell_lands_in_its_place(tmp_path):
    table = read_scan(write(tmp_path, RABI))
    np.testing.assert_array_equal(table["pulse"], [1, 2, 1])
    np.testing.assert_array_equal(table["shots"], [400, 200, 0])
    np.testing.assert_array_equal(table["n"], [57, np.nan, np.nan])
    np.testing.assert_array_equal(table.area_rad, [0.8, 3.2, 1.6])
    assert table["pulse"].dtype == table["shots"].dtype == np.int64
    assert read_scan(write(tmp_path, FREQUENCY)).area_rad is None
    time_scan = read_scan(write(tmp_path, "pulse,rabi_hz,sigma_s,shots,n\n1,9973.557010035818,20e-6,9,9\n"))
    np.testing.assert_allclose(time_scan.area_rad, np.pi, rtol=1e-12)


def test_an_optional_setting_that_is_empty_everywhere_counts_as_absent(tmp_path):
    table = read_scan(write(tmp_path, "wait_s,phase_rad,area_rad,p,p_err\n1e-3,,,0.5,0.1\n"))
    assert table.get("phase_rad") is table.get("area_rad") is None


def test_examples_of_the_documentation_are_read(tmp_path):
    examples = re.findall(r"```csv\n(.*?)```", DOC, re.DOTALL)
    kinds = [read_scan(write(tmp_path, text)).kind for text in examples]
    assert kinds == ["rabi", "rabi", "frequency", "ramsey", "readout"]
    for text in examples:
        p = Scan.from_table(read_scan(write(tmp_path, text))).predict(ION)
        assert np.all((p > 0) & (p < 1))
    # The tables list every column there is, and no other.
    for kind, title in zip(KINDS, ("Rabi scan", "Frequency scan", "Ramsey scan", "Readout histogram"), strict=True):
        section = re.search(rf"## {title}\n(.*?)(\n## |\Z)", DOC, re.DOTALL).group(1)
        assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == set(KINDS[kind].settings)


WRONG = [  # kind, old, new, expected parts of the message
    ("rabi", "1,0.8,", "3,0.8,", ["line 2", "column pulse is 3", "1 or 2"]),
    ("rabi", "1,0.8,", "1.5,0.8,", ["line 2", "column pulse is '1.5'", "integer"]),
    ("rabi", "0.8", "800", ["line 2", "column area_rad is 800.0", "[0, 300] rad"]),
    ("rabi", "0.8", "-1", ["line 2", "column area_rad is -1.0"]),
    ("rabi", "0.8", "nan", ["line 2", "column area_rad is 'nan'", "a setting must be given"]),
    ("rabi", "0.8", "1 rad", ["line 2", "column area_rad is '1 rad'", "plain number"]),
    ("rabi", "0.8,2e-5", "0.8,20", ["line 2", "column sigma_s is 20.0", "unit"]),
    ("rabi", "0.8,2e-5", "0.8,", ["line 2", "column sigma_s is empty", "in every row, or in none"]),
    ("rabi", "2e-5,10", "2e-5,1e9", ["line 3", "column detuning_set_hz is 1000000000.0", "laser minus line"]),
    ("rabi", "400,57", "400,401", ["line 2", "column n is 401", "exceed the shots"]),
    ("rabi", "400,57", "400,-1", ["line 2", "column n is -1", "non-negative"]),
    ("rabi", "400,57", "400,5.5", ["line 2", "column n is '5.5'", "integer"]),
    ("rabi", "400,57", ",57", ["line 2", "column shots is 0", "at least 1"]),
    ("rabi", "400,57", "-4,", ["line 2", "column shots is -4", "negative"]),
    ("rabi", "400,57", "400,", ["no row holds a measurement"]),
    ("rabi", "400,57", "400", ["line 2 has 5 fields where the header has 6"]),
    ("rabi", "area_rad", "area", ["line 1 (header)", "unknown column 'area'", "did you mean"]),
    ("rabi", "area_rad,", "rabi_hz,", ["line 1 (header)", "lacks the column sigma_s"], "sigma_s", "p"),
    ("rabi", "pulse,", "area_rad,", ["line 1 (header)", "area_rad 2 times"]),
    ("rabi", "detuning_set_hz", "rabi_hz", ["line 1 (header)", "either area_rad or rabi_hz"]),
    ("rabi", "detuning_set_hz", "wait_s", ["line 1 (header)", "ramsey scan has not"]),
    ("rabi", "detuning_set_hz", "p", ["line 1 (header)", "mixes counts (shots, n) and values (p)"]),
    ("rabi", "detuning_set_hz,shots", "detuning_set_hz,sigma_s", ["sigma_s 2 times"]),
    ("rabi", "pulse,", "p,", ["lacks the column pulse"]),
    ("frequency", "p_err", "shots", ["mixes counts (shots) and values (p)"]),
    ("frequency", "0.61", "61", ["line 2", "column p is 61.0", "fraction"]),
    ("frequency", "0.61,0.03", "0.61,", ["line 2", "column p_err is empty", "standard error"]),
    ("frequency", "0.61,0.03", ",0.03", ["line 2", "column p is empty", "p_err is given"]),
    ("frequency", "0.61,0.03", "0.61,0", ["line 2", "column p_err is 0.0", "positive"]),
    ("frequency", "-4e3", "", ["line 2", "column detuning_set_hz is empty", "give it in every row."]),
    ("ramsey", "3e-4", "-3e-4", ["line 2", "column wait_s is -0.0003", "[0, 100] s"]),
    ("ramsey", "3e-4", "300", ["line 2", "column wait_s is 300.0", "unit"]),
    ("ramsey", "1.5", "", ["line 3", "column phase_rad is empty"]),
    ("ramsey", "shots,n", "shots,", ["line 1 (header)", "column without a name"]),
    ("ramsey", ",shots,n", ",shots,p_err", ["mixes"]),
    ("readout", "bright,2", "grey,2", ["line 2", "column prepared is 'grey'", "'bright' or 'dark'"]),
    ("readout", "bright,2", ",2", ["line 2", "column prepared is empty"]),
    ("readout", "bright,2", "bright,9", ["line 3", "column photons is 9", "counted before"]),
    ("readout", "bright,2", "bright,-2", ["line 2", "column photons is -2", "not negative"]),
    ("readout", "995,4", "995,5", ["line 4", "column threshold is 5", "constant"]),
    ("readout", "1,4", "1,0", ["line 2", "column threshold is 0", "at least 1"]),
    ("readout", "1,4", "-1,4", ["line 2", "column count is -1", "not negative"]),
    ("readout", "1,4", "1.5,4", ["line 2", "column count is '1.5'", "integer"]),
    ("readout", "count", "shots", ["line 1 (header)", "column shots, which a readout scan has not"]),
    ("readout", ",threshold", ",n", ["column n, which a readout scan has not"]),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[0]} {case[1]}->{case[2]}")
def test_a_wrong_table_is_refused_in_one_sentence(tmp_path, case):
    kind, old, new, parts, *more = case
    text = GOOD[kind].replace(old, new, 1)
    assert text != GOOD[kind]
    if more:
        text = text.replace(*more, 1)
    message = refusal(write(tmp_path, text))
    for part in parts:
        assert part in message, message


def test_files_that_are_no_scan_are_refused(tmp_path):
    assert "no such file; name the table of a scan" in refusal(tmp_path / "none.csv")
    with pytest.raises(TableError, match="this is a folder; name the table of a scan"):
        read_scan(tmp_path)
    assert "one row a setting" in refusal(write(tmp_path, ""))
    assert "header without rows, but one row a setting" in refusal(write(tmp_path, RAMSEY.splitlines()[0]))
    assert "only comments" in refusal(write(tmp_path, "# nothing\n"))
    assert "UTF-16" in refusal(write(tmp_path, RABI.encode("utf-16")))
    assert "separates columns by semicolons" in refusal(write(tmp_path, RABI.replace(",", ";")))
    assert "does not tell the kind of scan" in refusal(write(tmp_path, "pulse,shots,n\n1,9,9\n"))
    assert "kind 'sideband' is unknown" in refusal(write(tmp_path, RABI), "sideband")
    assert "unknown column 'wait_s'" in refusal(write(tmp_path, RAMSEY), "rabi")
    dark = "prepared,photons,count,threshold\ndark,0,0,4\ndark,6,0,4\n"
    assert "no shot of an ion prepared dark was counted" in refusal(write(tmp_path, dark))


def test_tables_made_in_python_keep_the_same_rules():
    with pytest.raises(TableError, match="scan: row 1, column area_rad is empty, but an area"):
        ScanTable(kind="rabi", columns={"pulse": [1, 1], "area_rad": [1, np.nan], "p": [0, 1], "p_err": [1, 1]})
    with pytest.raises(TableError, match=r"row 0, column pulse is 1\.5, but must be an integer"):
        ScanTable(kind="frequency", columns={"pulse": [1.5], "detuning_set_hz": [0], "p": [0], "p_err": [1]})
    with pytest.raises(TableError, match=r"column wait_s has shape \(2,\)"):
        ScanTable(kind="ramsey", columns={"p": [0.5], "wait_s": [1e-3, 1e-3], "p_err": [1]})
    with pytest.raises(TableError, match="column wait_s has type <U3, but needs numbers"):
        ScanTable(kind="ramsey", columns={"wait_s": ["1ms"], "p": [0], "p_err": [1]})


def test_reading_a_scan_needs_no_jax(tmp_path):
    code = (
        "import sys; from calibration.scan_tables import read_scan; read_scan(sys.argv[1]); print('jax' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    path = write(tmp_path, RABI)
    done = subprocess.run([sys.executable, "-c", code, path], check=True, cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n"


# ------------------------------------------------------------------------------------------- as data of a calibration


@pytest.mark.slow
def test_rows_are_asked_in_the_order_of_the_table():
    table = settings("rabi", 7)
    p = np.asarray(Scan.from_table(table).predict(ION))
    for k, pulse in enumerate(table["pulse"]):
        one = PulseScan(int(pulse), table["area_rad"][k : k + 1]).probability(ION)
        assert p[k] == pytest.approx(float(one[0]), abs=3e-9)
    defaults = {"pulse": [1], "detuning_set_hz": [500.0], "p": [0.5], "p_err": [0.1]}
    scan = Scan.from_table(ScanTable(kind="frequency", columns=defaults))
    same = PulseScan(1, np.array([np.pi]), None, 500.0).probability(ION)
    np.testing.assert_allclose(scan.predict(ION), same, atol=1e-12)
    defaults = {"wait_s": [3e-4], "p": [0.5], "p_err": [0.1]}
    scan = Scan.from_table(ScanTable(kind="ramsey", columns=defaults))
    np.testing.assert_allclose(scan.predict(ION), RamseyScan(np.array([3e-4])).probability(ION), atol=1e-12)


def test_a_readout_is_two_binomials(tmp_path):
    scan = Scan.from_table(read_scan(write(tmp_path, READOUT)))
    np.testing.assert_allclose(scan.predict(ION), [0.01, 0.02])
    expected = stats.binom(1000, 0.01).logpmf(1) + stats.binom(1000, 0.02).logpmf(5)
    assert scan.log_likelihood(ION) == pytest.approx(expected, rel=1e-10)
    only = "\n".join(READOUT.splitlines()[:1] + READOUT.splitlines()[3:])
    scan = Scan.from_table(read_scan(write(tmp_path, only)))
    assert scan.log_likelihood(ION) == pytest.approx(stats.binom(1000, 0.02).logpmf(5), rel=1e-10)
    assert scan.n_data == 1


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_counts_follow_the_prediction(kind):
    table = settings(kind)
    made = synthesize_scan(ION, table, jax.random.key(3), 4000)
    scan = Scan.from_table(made)
    assert made.kind == kind
    residual = scan.observed.residual(scan.predict(ION))
    assert np.max(np.abs(residual)) < 4.5
    if kind != "readout":
        assert 0.3 < np.mean(np.asarray(residual) ** 2) < 2.2
    np.testing.assert_array_equal(scan.observed.scale, 4000)
    again = synthesize_scan(ION, table, jax.random.key(3), 4000)
    assert again.sha256 == made.sha256 != synthesize_scan(ION, table, jax.random.key(4), 4000).sha256
    if kind == "readout":
        assert made["count"].sum() == 8000
    # The shots of the settings, if no others are named.
    np.testing.assert_array_equal(Scan.from_table(synthesize_scan(ION, table, jax.random.key(0))).observed.scale, 1000)


def test_cells_not_measured_stay_empty(tmp_path):
    made = synthesize_scan(ION, read_scan(write(tmp_path, RABI)), jax.random.key(0))
    np.testing.assert_array_equal(np.isnan(made["n"]), [False, True, True])
    assert Scan.from_table(made).n_data == 1
    with pytest.raises(ValueError, match="synthetic counts need `shots`"):
        synthesize_scan(ION, read_scan(write(tmp_path, FREQUENCY)), jax.random.key(0))
    counted = synthesize_scan(ION, read_scan(write(tmp_path, FREQUENCY)), jax.random.key(0), 50)
    assert set(counted.columns) == {"pulse", "detuning_set_hz", "shots", "n"}
    one_side = ScanTable(kind="readout", columns={"prepared": ["dark"], "photons": [0], "count": [5], "threshold": [4]})
    with pytest.raises(ValueError, match="either side of the threshold"):
        synthesize_scan(dataclasses.replace(ION, readout_error_dark=0.9), one_side, jax.random.key(0), 100)


@pytest.mark.parametrize("kind", ["rabi", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "rabi")])
def test_gradient_of_the_log_likelihood_against_finite_differences(kind):
    boxes = tables.DEMO | {"sigma_1_s": (18e-6, 22e-6), "separation_s": (110e-6, 130e-6), "n_bar": (0.0, 4.0)}
    ion = dataclasses.replace(ION, n_bar=2.0, eta_1=0.07, eta_2=0.06, phonon_nodes=4, method=StaticGrid(error=1e-11))
    ion = anchored(ion)
    parameters = FreeParameters.from_boxes(boxes)
    scan = Scan.from_table(synthesize_scan(ion, settings(kind, 9), jax.random.key(1))).planned(ion, boxes)
    loss = jax.jit(lambda share: scan.log_likelihood(parameters.apply(ion, parameters.low + parameters.width * share)))
    at = jnp.asarray(np.random.default_rng(5).uniform(0.35, 0.65, len(boxes)))
    slope = jax.grad(loss)(at)
    for k, name in enumerate(boxes):
        step = 1e-4 * (np.arange(len(boxes)) == k)
        coarse, fine = ((loss(at + h * step) - loss(at - h * step)) / (2e-4 * h) for h in (1.0, 0.5))
        assert slope[k] == pytest.approx(float((4 * fine - coarse) / 3), rel=1e-5, abs=1e-4), name
    used = np.asarray(jnp.abs(slope) > 1e-9)
    assert used.sum() == (2 if kind == "readout" else len(boxes) - (kind != "rabi") * 3)


def test_new_values_reuse_the_program():
    traces = []

    @eqx.filter_jit
    def value_and_slope(values, scan, parameters):
        traces.append(1)
        return jax.value_and_grad(lambda v: scan.log_likelihood(parameters.apply(ION, v)))(values)

    parameters = FreeParameters.from_boxes(tables.DEMO)
    for kind in KINDS:
        table = settings(kind)
        scans = [
            Scan.from_table(synthesize_scan(ION, table, jax.random.key(k))).planned(ION, tables.DEMO) for k in range(2)
        ]
        first = value_and_slope(parameters.middle, scans[0], parameters)
        traces.clear()
        second = value_and_slope(parameters.middle * 0.99 + 1e-3, scans[0], parameters)
        third = value_and_slope(parameters.middle, scans[1], parameters)
        assert traces == [], kind
        assert len({float(value) for value, _ in (first, second, third)}) == 3


def test_scans_alone_recover_scale_and_detuning():
    """Rabi and frequency scan of pulse 1, counts drawn from the truth: Gauss-Newton lands within its errors."""
    names = ("rabi_scale_1", "detuning_1_hz")
    boxes = {name: tables.DEMO[name] for name in names}
    parameters = FreeParameters.from_boxes(boxes)
    rabi = ScanTable(kind="rabi", columns={"pulse": np.ones(20), "area_rad": np.linspace(0.4, 8, 20),
                                           "shots": np.full(20, 500), "n": np.zeros(20)})  # fmt: skip
    made = [synthesize_scan(ION, t, jax.random.key(8 + k)) for k, t in enumerate((rabi, settings("frequency")))]
    scans = [Scan.from_table(table).planned(ION, boxes) for table in made]
    start = dataclasses.replace(ION, method=StaticGrid(differentiation="forward"))

    @jax.jit
    def step(values):
        information, slope = jnp.zeros((2, 2)), jnp.zeros(2)
        for scan in scans:
            p, of = scan.predict(parameters.apply(start, values)), scan.observed
            jacobian = jax.jacfwd(lambda v, scan=scan: scan.predict(parameters.apply(start, v)))(values)
            weighted = jacobian / of.variance(p)[:, None]
            information += weighted.T @ jacobian
            slope += weighted.T @ (of.estimate() - p)
        return values + jnp.linalg.solve(information, slope), information

    values = jnp.array([0.97, -600.0])
    for _ in range(8):
        values, information = step(values)
    error = jnp.sqrt(jnp.diag(jnp.linalg.inv(information)))
    pull = (values - jnp.array([1.06, 420.0])) / error
    assert np.all(np.abs(pull) < 4)
    assert np.all(error < jnp.array([0.01, 100.0]))
    # Both are needed: without the frequency scan the sign of the detuning is free.
    mirrored = parameters.apply(ION, values * jnp.array([1.0, -1.0]))
    assert scans[0].log_likelihood(mirrored) == pytest.approx(
        float(scans[0].log_likelihood(parameters.apply(ION, values))), abs=1e-4
    )
    assert scans[1].log_likelihood(mirrored) < scans[1].log_likelihood(parameters.apply(ION, values)) - 10
