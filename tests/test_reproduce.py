"""Reproduced numbers: all within their tolerance, told apart from what is only stated, and able to fail."""

import contextlib
import dataclasses
import io
from typing import Any, get_args

import numpy as np
import pytest

from experiments import reproduce, reproduce_plots, reproduced
from experiments.records import Run, RunFolder
from experiments.reproduced import Reproduced
from twin.memristor import PhotonicMemristor

KEYS = ["name", "quantity", "origin", "relation", "expected", "obtained", "tolerance", "verdict"]
ROW = reproduced.row("q", 1.0, 1.0, 0.1, origin="exact")


@pytest.fixture(scope="module")
def computed():
    """The rows of each name, what was said meanwhile and its notes, computed once."""
    found, arrays = {}, {}

    def compute(name: str) -> tuple[list[dict[str, Any]], str, str]:
        if name not in found:
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
                made = reproduce.COMPUTED[name]()
            arrays[name] = made.arrays
            found[name] = ([{"name": name, **row} for row in made.rows], said.getvalue(), " ".join(made.notes))
        return found[name]

    compute.arrays = arrays
    return compute


@pytest.mark.parametrize("name", reproduced.NAMES)
def test_every_number_is_reproduced(name, computed):
    rows, said, _ = computed(name)
    assert all(list(row) == KEYS for row in rows)
    assert {row["name"] for row in rows} == {name}
    assert [row for row in rows if row["verdict"] != "pass"] == []
    assert all(isinstance(row[key], float) for row in rows for key in ("expected", "obtained", "tolerance"))
    assert all(np.isfinite(row["obtained"]) for row in rows)
    assert all((0 < row["tolerance"]) == (row["relation"] == "=") for row in rows)
    assert {row["origin"] for row in rows} <= set(get_args(reproduced.Origin))
    assert said == ""


def test_the_published_statement_is_told_from_our_numbers(computed):
    """It is an upper limit, and the definition behind it was not readable."""
    found, _, notes = computed("separated-pulses")
    rows = {row["quantity"]: row for row in found}
    assert "was not readable" in notes
    published = rows["RSD(y) at 13 sigma, %"]
    assert [row for row in found if row["origin"] == "published"] == [published]
    assert (published["relation"], published["expected"]) == ("<", 0.03)
    assert published["obtained"] < 1e-6
    assert reproduced.shown(published)["expected"] == "< 0.03"
    crossing = rows["separation at which RSD(y) is 0.03 %, sigma"]
    assert (crossing["origin"], crossing["expected"]) == ("derived here", 4.71)
    assert abs(crossing["obtained"] - 4.71) < 0.01


def test_all_is_everything(monkeypatch):
    one = lambda rows: lambda: Reproduced(rows, {})
    monkeypatch.setattr(reproduce, "COMPUTED", {"a": one([ROW]), "b": one([ROW, ROW])})
    assert [row["name"] for row in reproduce.run("all")["rows"]] == ["a", "b", "b"]


def test_notes_are_told_with_the_numbers(monkeypatch, capsys):
    one = lambda *notes: lambda: Reproduced([ROW], {}, notes)
    monkeypatch.setattr(reproduce, "COMPUTED", {"a": one(), "b": one("not readable", "ours")})
    assert reproduce.run("all")["notes"] == ["b: not readable", "b: ours"]
    assert capsys.readouterr().err == "b: not readable\nb: ours\n"


def test_names_are_those_that_are_computed():
    assert tuple(reproduce.COMPUTED) == tuple(reproduce_plots.DRAWINGS) == reproduced.NAMES


def test_an_unknown_name_is_refused_with_the_known_ones():
    names = "separated-pulses, simultaneous-pulses, photonic-loop, crossed-pair, merlin-narma, x4, all"
    with pytest.raises(ValueError, match=names):
        reproduce.run("separated")


@pytest.mark.parametrize("obtained", [1.2, float("nan")])
def test_a_number_outside_its_tolerance_fails(obtained):
    assert reproduced.row("q", 1.0, obtained, 0.1, origin="exact")["verdict"] == "fail"
    assert reproduced.row("q", 1.0, obtained, origin="published", relation="<")["verdict"] == "fail"


def test_a_wrong_twin_is_seen(monkeypatch):
    """A loss of one part in a million moves the areas beyond their tolerance."""
    lossy = lambda **fields: dataclasses.replace(PhotonicMemristor(**fields), loss=1e-6)
    monkeypatch.setattr(reproduce, "PhotonicMemristor", lossy)
    verdicts = {row["quantity"]: row["verdict"] for row in reproduce.run("photonic-loop")["rows"]}
    assert verdicts["loop area at T/T_osc = 0.25"] == "fail"
    assert verdicts["loop area, 40 cycles a period, window 10"] == "fail"


def test_richardson_removes_two_orders():
    k = np.array([100.0, 200.0, 400.0])
    assert reproduced.extrapolated(3.0 + 2 / k - 5 / k**2) == pytest.approx(3.0, abs=1e-13)


def test_the_crossed_pair_says_what_of_the_paper_is_not_known(computed):
    found, _, notes = computed("crossed-pair")
    rows = {row["quantity"]: row for row in found}
    assert "were not readable" in notes
    assert [(row["expected"], row["tolerance"]) for row in found if row["origin"] == "published"] == [(0.95, 5e-3)]
    largest = rows["largest form factor of y_A over x_B"]
    assert (largest["origin"], largest["expected"], largest["tolerance"]) == ("derived here", 0.9516, 1e-3)
    assert largest["obtained"] == pytest.approx(0.951581, abs=1e-6)
    assert rows["Phi of the largest form factor (rad)"]["obtained"] < 0


@pytest.mark.parametrize("name", reproduced.NAMES)
def test_every_name_has_a_figure_of_its_arrays(name, computed):
    computed(name)
    figure = reproduce_plots.DRAWINGS[name].draw(computed.arrays[name])
    lines = sum(len(ax.lines) + len(ax.collections) for ax in figure.axes)
    assert lines > 0
    assert all(ax.get_xlabel() for ax in figure.axes if ax.lines)


def test_panels_of_crossed_pairs_are_even():
    """The colour bar of the map takes nothing from one column of the loops."""
    angle = np.linspace(0, 2 * np.pi, 40)
    loops = {name: np.tile(0.5 + 0.4 * turn(angle), (6, 1)) for name, turn in (("x_a", np.cos), ("x_b", np.cos),
                                                                             ("y_a", np.sin))}  # fmt: skip
    axis = np.linspace(0.0, 1.0, 5)
    over = {"map_window": axis, "map_phase_rad": axis, "map_form_factor": np.outer(axis, axis)}
    figure = reproduce_plots.crossed_pair({"window": np.ones(6), "phase_rad": np.ones(6), **loops, **over})
    figure.draw_without_rendering()
    places = [ax.get_window_extent() for ax in figure.axes]
    assert len(places) == 6 + 2
    left = sorted({round(place.x0) for place in places[:6]})
    assert len(left) == 3
    assert left[2] - left[1] == pytest.approx(left[1] - left[0], abs=5)
    assert np.ptp([place.width for place in places[:6]]) < 1


def test_a_run_folder_holds_numbers_figures_and_report(computed, monkeypatch, tmp_path):
    computed("photonic-loop")
    limit = reproduced.row("limit", 0.5, 1.0, origin="published", relation="<")
    made = Reproduced([ROW, limit], computed.arrays["photonic-loop"], ("The definition is ours.",))
    monkeypatch.setattr(reproduce, "COMPUTED", {"photonic-loop": lambda: made})
    with RunFolder(tmp_path / "run") as folder:
        folder.write_config("# nothing to configure\n")
        rows = reproduce.run_into("photonic-loop", folder)["rows"]
    run = Run(tmp_path / "run")
    assert len(rows) == 2 and run.result["rows"] == rows
    assert run.result["status"].startswith("failed: 1 of 2")
    assert (tmp_path / "run" / "figures" / "photonic_loop.svg").stat().st_size > 1000
    assert run.result["notes"] == ["photonic-loop: The definition is ours."]
    assert "photonic-loop: The definition is ours." in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h1>Reproduced numbers: photonic-loop</h1>" in html and "The definition is ours." in html
    assert "1 of 2 numbers are within their tolerance" in html and "data:image/svg+xml" in html
    assert all(piece in html for piece in ("origin", "exact", "published", "&lt; 0.5"))
    assert run.arrays["photonic_loop__x"].shape == made.arrays["x"].shape
