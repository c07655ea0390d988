"""The run of a fit as other verbs take it: damaged, mismatched or of the other platform, it is refused by its place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import parse_config
from experiments.finished import finished_fit
from experiments.records import OutputError

ROOT = Path(__file__).parents[1]
BOXES = {"loss": [0.0, 0.3], "efficiency": [0.5, 1.0]}


def of(value: float, verdict: str = "identified") -> dict:
    return {"value": value, "std": 0.01, "ci95": [value - 0.02, value + 0.02], "unit": "", "verdict": verdict}


def result() -> dict:
    fixed = {"value": 0.0, "std": 0.0, "ci95": [0.0, 0.0], "unit": "", "verdict": "fixed"}
    return {
        "kind": "fit", "status": "converged",
        "parameters": {"loss": of(0.1), "efficiency": of(0.8, "weak"), "loss_input": fixed},
        "correlation": {"names": ["loss", "efficiency"], "matrix": [[1.0, -0.4], [-0.4, 1.0]]},
    }  # fmt: skip


def written(folder: Path, found: dict, boxes: dict | None = None, platform: str = "photonic") -> Path:
    document = {"device": {"platform": platform}, "fit": {"free": boxes or BOXES}}
    (folder / "config.toml").write_text(parse_config(document).to_toml())
    (folder / "result.json").write_text(json.dumps(found))
    return folder


def test_a_whole_run_is_taken(tmp_path):
    run = finished_fit(written(tmp_path, result()), "photonic")
    assert run.result["parameters"]["loss"]["value"] == 0.1


def test_parameters_of_each_table_are_taken(tmp_path):
    found = result()
    found["parameters"] = {"loss@A": of(0.1), "loss@B": of(0.2), "efficiency": of(0.8)}
    found["correlation"] = {"names": [*found["parameters"]], "matrix": [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]}
    finished_fit(written(tmp_path, found))


MISSING = object()
DAMAGED = [
    ("correlation", MISSING, "correlation is missing"),
    ("correlation.names", ["loss"], "correlation.names is"),
    ("correlation.names", ["loss", "loss"], "correlation.names is"),
    ("correlation.names", [1, 2], "correlation.names is"),
    ("correlation.matrix", MISSING, "correlation.matrix is missing"),
    ("correlation.matrix", [[1.0, 0.0], [0.0]], "2 rows of 2 numbers"),
    ("correlation.matrix", [[1.0, None], [None, 1.0]], "correlation.matrix.0.1 is null"),
    ("correlation.matrix", [[1.0, 1.4], [1.4, 1.0]], "correlation.matrix.0.1 is 1.4"),
    ("parameters", [1], r"parameters is \[1\]"),
    ("parameters.loss", 0.1, "parameters.loss is 0.1"),
    ("parameters.loss.verdict", "good", "parameters.loss.verdict is 'good'"),
    ("parameters.loss.verdict", MISSING, "parameters.loss.verdict is missing"),
    ("parameters.loss.value", None, "parameters.loss.value is null"),
    ("parameters.loss.value", "0.1", "parameters.loss.value is '0.1'"),
    ("parameters.loss.value", 7.0, r"parameters.loss.value is 7, which lies outside its box \[0, 0.3\]"),
    ("parameters.loss.std", None, "parameters.loss.std is null"),
    ("parameters.loss.std", True, "parameters.loss.std is True"),
    ("parameters.loss.std", -1.0, "parameters.loss.std is -1"),
]


@pytest.mark.parametrize(("key", "value", "said"), DAMAGED, ids=[f"{key}-{k}" for k, (key, *_) in enumerate(DAMAGED)])
def test_a_damaged_result_is_refused_by_file_and_key(tmp_path, key, value, said):
    found = table = result()
    *parents, last = key.split(".")
    for parent in parents:
        table = table[parent]
    table.pop(last)
    if value is not MISSING:
        table[last] = value
    with pytest.raises(OutputError, match=said) as caught:
        finished_fit(written(tmp_path, found))
    assert str(caught.value).startswith(f"{tmp_path / 'result.json'}: ")
    assert str(caught.value).endswith("fit again.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("boxes", [{"loss": [0.0, 0.3]}, {**BOXES, "dark_counts": [0.0, 0.1]}])
def test_the_configuration_of_another_fit_is_refused(tmp_path, boxes):
    with pytest.raises(OutputError, match=r"config.toml: fit.free.* different fits; fit again"):
        finished_fit(written(tmp_path, result(), boxes))


def test_a_configuration_without_a_fit_or_in_pieces_is_refused(tmp_path):
    written(tmp_path, result())
    for text, said in (("[device]\nplatform = 'photonic'\n", "[fit] is missing"), ("[device\n", "not valid TOML")):
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(OutputError) as caught:
            finished_fit(tmp_path)
        assert said in str(caught.value)
        assert "config.toml" in str(caught.value)
        assert str(caught.value).endswith("fit again.")


def test_a_search_that_found_nothing_is_refused(tmp_path):
    found = result()
    found |= {"status": "not converged: out of steps", "correlation": {"names": ["loss", "efficiency"], "matrix": []}}
    found["parameters"] = {"loss_input": found["parameters"]["loss_input"]}
    with pytest.raises(OutputError, match=r"found no parameters \(not converged: out of steps\); fit again"):
        finished_fit(written(tmp_path, found))


ION = "[device]\nengine = 'closed_form'\n"
GOES_ON = {
    "transfer": "[transfer]\nto = 'photonic'\nwhat = ['device']\n",
    "optimize": "[optimize]\ntarget = 'obedience'\n[optimize.bounds]\namplitude_1 = [0.5, 1.5]\n",
}


@pytest.mark.parametrize("verb", GOES_ON)
def test_a_fit_of_the_other_platform_is_refused_before_jax_is_imported(tmp_path, verb):
    fit = tmp_path / "fit"
    fit.mkdir()
    written(fit, result())
    (tmp_path / "ion.toml").write_text(ION + GOES_ON[verb])
    arguments = [verb, str(tmp_path / "ion.toml"), "--from", str(fit), "--out", str(tmp_path / "run")]
    code = (
        "import sys\nfrom experiments.cli import main\n"
        f"try:\n    main({arguments!r})\nfinally:\n    print('jax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.strip() == "False"
    assert f"{fit / 'config.toml'}: device.platform is 'photonic'" in done.stderr
    assert "set device.platform" in done.stderr
    assert not (tmp_path / "run").exists()
