"""The doctor: what it finds here, and that it sees an illness."""

import dataclasses

import jax
import pytest

from experiments import doctor
from experiments.console import leaves as _leaves
from twin.memristor import ClosedForm


@pytest.fixture(scope="module")
def found():
    return doctor.run()


def test_this_installation_is_well(found):
    assert found["status"] == "done"
    assert found["precision"] == {"float": "float64", "ok": True}
    assert {"python", "jax", "jaxlib", "diffrax", "equinox", "optax"} <= set(found["versions"])
    assert found["devices"]
    assert found["run"]["second_s"] < found["run"]["first_s"]


def test_derivatives_are_checked_with_their_error(found):
    assert set(found["gradients"]) == {"rabi_scale_1", "detuning_1_hz", "window_cycles"}
    for check in found["gradients"].values():
        assert check["ok"]
        assert 0 < check["relative_error"] < 1e-7
        assert check["gradient"] == pytest.approx(check["finite_difference"], rel=1e-7)


def test_the_closed_form_is_checked(found):
    assert 0 < found["closed_form"]["largest_error"] < 1e-8


def test_it_prints_as_lines(found):
    lines = dict(_leaves(found))
    assert lines["precision ok"] == "yes"
    assert "cpu" in lines["devices"] or "gpu" in lines["devices"]
    assert all(not isinstance(value, dict | list) for value in lines.values())


def test_an_illness_is_named(monkeypatch):
    """A closed form that is off by a little; a derivative that is off."""

    def off(device, x_set):
        loop = play(device, x_set)
        return dataclasses.replace(loop, y=loop.y + 1e-7) if isinstance(device.method, ClosedForm) else loop

    play = doctor.run_loop
    monkeypatch.setattr(doctor, "run_loop", off)
    for check in ("_precision", "_compile_cache"):
        monkeypatch.setattr(doctor, check, lambda: {"ok": True})
    monkeypatch.setattr(doctor, "_gradients", lambda: {"a": {"ok": True}, "b": {"ok": False}})
    # Compiled before, the first run here may be the faster one.
    failed = doctor.run()["status"].removeprefix("failed: ").split(", ")
    assert set(failed) - {"run"} == {"closed_form", "gradients.b"}


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        (tmp_path / "file").write_text("")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file"))
        assert not doctor._compile_cache()["ok"]
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "new"))
        found = doctor._compile_cache()
        assert (found["folder"], found["ok"]) == (str(tmp_path / "new"), True)
        jax.config.update("jax_compilation_cache_dir", None)
        assert doctor._compile_cache()["ok"]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
