"""Reports: one file that needs nothing else, drawn from what was saved, for every kind of run."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import xarray as xr

from experiments import plots, report
from experiments.config import parse_config
from experiments.records import OutputError, Run, RunFolder

RNG = np.random.default_rng(5)
NAMES = (
    *("rabi_scale_1", "rabi_scale_2", "detuning_1_hz", "detuning_2_hz", "laser_linewidth_hz"),
    *("readout_error_bright", "readout_error_dark"),
)
BOXES = ((0.7, 1.3), (0.7, 1.3), (-5e3, 5e3), (-5e3, 5e3), (0.0, 2e3), (0.0, 0.05), (0.0, 0.05))
VERDICTS = ("identified", "identified", "weak", "identified", "not identified", "at bound", "identified")
FIXED = {"value": 0.4, "std": 0.0, "ci95": [0.4, 0.4], "unit": "", "verdict": "fixed"}
ABOUT = {"seed": 3, "device": "cpu, 2 cores", "precision": "float64", "versions": {"jax": "0.12.0"}}
BASE = parse_config({"data": {"table": "loops.csv"}, "fit": {"free": dict(zip(NAMES, map(list, BOXES), strict=True))}})


def loops() -> dict[str, Any]:
    """Three loops of an ideal memristor with 400 shots a cycle; the last loop was measured at every second cycle."""
    k = np.arange(121)
    columns: dict[str, list[np.ndarray]] = {}
    for label, window in (("A", 10), ("B", 15), ("C", 20)):
        x = np.sin(np.pi * k / 40) ** 2
        r = np.array([np.mean(np.concatenate([np.full(window, 0.5), x])[j : j + window]) for j in k])
        p_x, p_y = 0.005 + 0.98 * x, 0.005 + 0.98 * (1 - r) * x
        rows: dict[str, np.ndarray] = {"loop": np.full(121, label, object), "cycle": k, "x_set": x, "r": r}
        for name, p in (("x", p_x), ("y", p_y)):
            taken = np.where((label == "C") & (k % 2 == 1), np.nan, RNG.binomial(400, p) / 400)
            error = np.where(np.isnan(taken), np.nan, np.sqrt(p * (1 - p) / 400))
            rows |= {f"p_{name}": p, f"{name}_measured": taken, f"{name}_error": error}
            rows[f"residual_{name}"] = (taken - p) / error
        for name, values in rows.items():
            columns.setdefault(name, []).append(values)
    return {name: ("row", np.concatenate(parts)) for name, parts in columns.items()}


def parameters() -> dict[str, Any]:
    values = (1.0412, 0.9533, 780.0, -21.0, 240.0, 0.0, 0.0103)
    stds = (0.0021, 0.0027, 610.0, 95.0, 700.0, 0.0009, 0.0016)
    return {
        name: {"value": v, "std": s, "ci95": [max(v - 1.96 * s, low), min(v + 1.96 * s, high)],
               "unit": "Hz" if name.endswith("_hz") else "", "verdict": verdict}
        for name, v, s, (low, high), verdict in zip(NAMES, values, stds, BOXES, VERDICTS, strict=True)
    }  # fmt: skip


def fit_run(out: RunFolder) -> None:
    half = RNG.normal(size=(7, 9))
    matrix = np.corrcoef(half)
    out.write_config(BASE.to_toml())
    out.write_arrays(xr.Dataset(loops()))
    basin = {"log_likelihood": -2031.77, "starts": 13, "values": {n: p["value"] for n, p in parameters().items()}}
    out.write_result(
        {
            "kind": "fit", "status": "converged", "parameters": {**parameters(), "branching": FIXED},
            "correlation": {"names": list(NAMES), "matrix": matrix},
            "log_likelihood": -2031.77, "chi2_per_dof": 1.021, "n_data": 606, "n_free": 7,
            "notes": ["These data do not determine `laser_linewidth_hz`: <the interval> fills the prior box."],
            "basins": [basin, {**basin, "log_likelihood": -2050.1, "starts": 3}],
            "history": {"search": [-3000.0, -2200.0, -2100.0], "descend": [-2050.0, -2031.8], "polish": [-2031.77]},
            "seconds": {"import": 3.1, "search": 40.0}, "data_sha256": "0a1b" * 16, **ABOUT,
        }
    )  # fmt: skip


def intervals_run(out: RunFolder) -> None:
    """A fit with every kind of interval; the linewidth was not profiled in full, and one name belongs to a table."""
    fit_run(out)
    names = [*NAMES[:6], "readout_error_dark@monday"]
    rows = dict(zip(names, parameters().values(), strict=True))
    laplace = {name: one["ci95"] for name, one in rows.items()}
    arrays = loops()
    for name in (names[0], names[4], names[6]):
        held = rows[name]["value"] + np.linspace(-3.5, 3.5, 17) * rows[name]["std"]
        arrays[f"profile_{name}"] = (f"point_of_{name}", held)
        arrays[f"deviance_{name}"] = (f"point_of_{name}", np.linspace(-3.5, 3.5, 17) ** 2)
    draws = np.stack([one["value"] + one["std"] * RNG.normal(size=(4, 500)) for one in rows.values()], axis=-1)
    draws[..., 6] -= 2e-6 * (draws[..., 4] - 240.0)
    arrays["posterior"] = (("chain", "draw", "parameter"), draws)
    result = json.loads((out.work / "result.json").read_text())
    profiled = {name: laplace[name] for name in (names[0], names[4], names[6])}
    result |= {"parameters": rows, "uncertainty": {"names": names}}
    result["intervals"] = {"laplace": laplace, "profile": profiled, "posterior": laplace}
    out.write_arrays(xr.Dataset(arrays))
    out.write_result(result)


def optimize_run(out: RunFolder, target: str) -> None:
    t = np.linspace(-100e-6, 220e-6, 400)
    pulse = lambda peak, center, sigma: peak * np.exp(-((t - center) ** 2) / (2 * sigma**2))
    arrays: dict[str, Any] = {
        "t_s": ("time", t),
        "rabi_1_before_hz": ("time", pulse(9.97e3, 0.0, 20e-6)),
        "rabi_2_before_hz": ("time", pulse(9.97e3, 120e-6, 20e-6)),
        "rabi_1_after_hz": ("time", pulse(19.2e3, 0.0, 10.4e-6)),
        "rabi_2_after_hz": ("time", pulse(16.0e3, 96e-6, 12.5e-6)),
    }
    result: dict[str, Any] = {
        "kind": "optimize",
        "status": "converged",
        "target": target,
        "history": [0.03, 0.01, 0.003],
    }
    if target == "obedience":
        x, r = np.linspace(0, 1, 21), np.linspace(0, 1, 15)
        error = 0.04 * np.outer(np.sin(np.pi * x), np.cos(3 * r))
        arrays |= {"x_set": ("x_set", x), "r_set": ("r_set", r)}
        arrays |= {f"error_{when}": (("x_set", "r_set"), error * f) for when, f in (("before", 1), ("after", 0.15))}
        result["metric"] = {"name": "obedience_rms", "before": 0.0213, "after": 0.0032, "recomputed": 0.00321}
    else:
        u = 2 * np.pi * np.arange(40) / 40
        x = (1 - np.cos(u)) / 2
        for when, size in (("before", 0.6), ("after", 0.95)):
            y = x * (1 - 0.5 - size * 0.4 * np.cos(u - 1)) * size
            arrays |= {f"x_{when}": ("cycle", x * size), f"y_{when}": ("cycle", y)}
        result["metric"] = {"name": "area", "before": 0.18, "after": 0.27, "recomputed": 0.2700001}
    command = {"before": 1.0, "after": 1.0441, "low": 0.5, "high": 1.5, "unit": "", "at_bound": False}
    sigma = {"before": 2e-5, "after": 8e-6, "low": 8e-6, "high": 4e-5, "unit": "s", "at_bound": True}
    result |= {"commands": {"amplitude_1": command, "sigma_1_s": sigma}, "seconds": {"solve": 12.0}, **ABOUT}
    out.write_config(BASE.to_toml())
    out.write_arrays(xr.Dataset(arrays))
    out.write_result(result)


KINDS = {
    "fit": fit_run,
    "with intervals": intervals_run,
    "obedience": lambda out: optimize_run(out, "obedience"),
    "area": lambda out: optimize_run(out, "area"),
}
FIGURES = {
    "with intervals": {"loops", "residuals", "intervals", "correlation", "history", "profiles", "posterior"},
    "fit": {"loops", "residuals", "intervals", "correlation", "history"},
    "obedience": {"pulses", "errors", "history"},
    "area": {"pulses", "loop", "history"},
}


class Page(HTMLParser):
    """Text, references and open tags of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.links, self.open = "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module", params=KINDS)
def kind_and_run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "run"
    with RunFolder(path) as out:
        KINDS[request.param](out)
        report.write(out)
    return request.param, path


def test_a_report_is_one_whole_file_without_network(kind_and_run):
    kind, run = kind_and_run
    page = Page(run / "report.html")
    assert page.open == []
    assert {path.stem for path in (run / "figures").iterdir()} == FIGURES[kind]
    assert len(page.links) == len(FIGURES[kind])
    drawn = {base64.b64decode(link.removeprefix("data:image/svg+xml;base64,")) for link in page.links}
    assert drawn == {path.read_bytes() for path in (run / "figures").iterdir()}
    assert not re.search(r"url\(|@import|<script|<link", (run / "report.html").read_text(encoding="utf-8"))


def test_a_report_is_drawn_again_from_the_folder_alone(kind_and_run):
    _, run = kind_and_run
    first = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    for path in (run / "figures").iterdir():
        path.unlink()
    report.rewrite(run)
    assert (run / "report.html").read_bytes() == first


@pytest.mark.parametrize("kind_and_run", ["fit"], indirect=True)
def test_a_fit_is_judged_in_words(kind_and_run):
    _, run = kind_and_run
    text = Page(run / "report.html").text
    for part in ("χ²/dof = 1.021", "4 are identified", "1 is not identified", "as it should be", "606 measurements",
                 "<the interval> fills", "sigma_1_s = 2e-05", "seconds in search", "branching = 0.4."):  # fmt: skip
        assert part in text
    assert "fixed" not in report.verdict(json.loads((run / "result.json").read_text()))
    assert "0.95330.0027" in text  # value and standard error, each to the same digit


@pytest.mark.parametrize("kind_and_run", ["with intervals"], indirect=True)
def test_intervals_stand_side_by_side(kind_and_run):
    """A row a parameter, a column a method; a dash where it was not asked for."""
    html = (kind_and_run[1] / "report.html").read_text(encoding="utf-8")
    (table,) = re.findall(r"<h2>Intervals</h2>.*?</table>", html, re.DOTALL)
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in table.split("<tr>")[1:]]
    assert rows[0] == ["parameter", "Laplace", "profile", "posterior", "unit"]
    assert len(rows) == 8
    assert rows[1][1:] == ["[1.0371, 1.0453]"] * 3 + [""]
    assert rows[2][2] == "–"
    assert rows[5][1:] == ["[0, 1612]"] * 3 + ["Hz"]


@pytest.mark.parametrize("kind_and_run", ["fit"], indirect=True)
def test_a_fit_without_further_intervals_has_no_table_of_them(kind_and_run):
    assert "<h2>Intervals</h2>" not in (kind_and_run[1] / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind_and_run", ["obedience"], indirect=True)
def test_a_design_is_judged_in_words(kind_and_run):
    text = Page(kind_and_run[1] / "report.html").text
    assert "rms of y − (1 − r_set) x_set: 0.0213 before, 0.0032 after (recomputed: 0.00321)" in text
    assert "At their bounds: sigma_1_s." in text
    assert re.search(r"sigma_1_s\s*20\s*8\s*8\s*40\s*µs\s*at bound", text)


def test_a_poor_fit_is_called_so():
    result = {"kind": "fit", "status": "converged", "parameters": parameters(), "n_data": 606, "n_free": 7}
    result["log_likelihood"] = -9000.0
    assert "does not explain" in report.verdict({**result, "chi2_per_dof": 1.4})
    assert "too few data" in report.verdict({**result, "chi2_per_dof": None})


@pytest.mark.parametrize(
    ("value", "std", "shown", "unit"),
    [(2.1e-5, 3e-7, 21.0, "µs"), (0.0527, 2e-4, 52.7, "ms"), (4e-8, 1e-9, 40.0, "ns")],
)
def test_times_are_given_in_a_unit_that_suits_them(value, std, shown, unit):
    row = {"value": value, "std": std, "ci95": [value - std, None], "unit": "s", "verdict": "identified"}
    found = report._readable(row)
    assert (found["value"], found["unit"], found["verdict"]) == (shown, unit, "identified")
    assert found["ci95"] == [pytest.approx(shown * (1 - std / value)), None]
    assert report._readable({"value": 300.0, "unit": "Hz"}) == {"value": 300.0, "unit": "Hz"}


def test_a_failed_run_has_a_report_with_the_reason(tmp_path):
    with RunFolder(tmp_path / "run") as out:
        out.write_config(BASE.to_toml())
        out.write_result({"status": "failed: the line search gave up"})
        report.write(out)
    assert "the line search gave up" in Page(tmp_path / "run" / "report.html").text


def test_numbers_that_are_not_finite_leave_a_report(tmp_path):
    with RunFolder(tmp_path / "run") as out:
        fit_run(out)
        result = json.loads((out.work / "result.json").read_text())
        result["chi2_per_dof"] = float("nan")
        result["parameters"]["detuning_1_hz"] |= {"std": float("nan"), "ci95": [float("nan"), float("nan")]}
        result["correlation"]["matrix"][2] = [float("nan")] * 7
        result["history"]["search"][0] = float("inf")
        out.write_result(result)
        report.write(out)
    assert "–" in Page(tmp_path / "run" / "report.html").text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(OutputError, match="no run folder"):
        report.rewrite(tmp_path)


@pytest.mark.parametrize(
    ("value", "std", "text"),
    [(1.04123, 0.0021, "1.0412"), (-20.4, 95.0, "−20"), (780.2, 610.0, "780"), (2.0013e-5, 3e-8, "2.0013e−05"),
     (2e-5, None, "2e−05"), (None, 1.0, "–"), (12345, None, "12\u202f345"), (0.0, 0.1, "0"),
     (0.25135397, None, "0.25135"), (True, None, "True")],
)  # fmt: skip
def test_numbers_for_reading(value, std, text):
    assert report.number(value, std) == text


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.svg(plots.history({"search": [1.0, 0.5]}, "objective"))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("result", "device", "title"),
    [
        ({"kind": "fit"}, {}, "Calibration of an ion memristor twin"),
        ({"kind": "fit"}, {"platform": "photonic"}, "Calibration of a photonic memristor twin"),
        ({"kind": "predict"}, {}, "Prediction of a memristor twin"),
        ({"kind": "transfer"}, {"platform": "photonic"}, "Transfer between platforms"),
        ({"kind": "reproduce", "names": ["x4", "photonic-loop"]}, {}, "Reproduced numbers: x4, photonic-loop"),
    ],
)
def test_a_title_says_of_what(result, device, title):
    run = SimpleNamespace(result=result, config=parse_config({"device": device}))
    assert report.heading(cast(Run, run)) == title
