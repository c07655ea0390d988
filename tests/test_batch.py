"""Magnus steps and `evolve_batch`: order, promised error, blocks, shards, lanes that stay alone, single precision."""

import dataclasses
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twin import loop as loop_module
from twin.batch import _fitting, evolve_batch, in_blocks
from twin.dynamics import Magnus, StaticGrid, evolve
from twin.levels import LAMBDA, LevelSystem
from twin.memory import MovingAverage
from twin.memristor import ClosedForm, IonMemristor, Lindblad, Settings, run, sine_input
from twin.pulses import Gaussian, PiecewiseConstant

SIGMA = 20e-6
LANES = 150
WINDOW = (-120e-6, 420e-6)
TIMES = np.linspace(*WINDOW, 60)


@functools.cache
def devices():
    rng = np.random.default_rng(11)
    uniform = lambda low, high: rng.uniform(low, high, LANES)
    system = LAMBDA.system(
        detuning_1_hz=uniform(-1e4, 1e4),
        detuning_2_hz=uniform(-1e4, 1e4),
        lifetime_s=10 ** uniform(-4, -1),
        branching=0.4,
        shared_linewidth_hz=uniform(0, 2e3),
        linewidth_2_hz=uniform(0, 2e3),
    )
    sigma_1, sigma_2 = 10e-6 * 3 ** uniform(0, 1), 10e-6 * 3 ** uniform(0, 1)
    pulses = (
        Gaussian.from_area(uniform(0, 3 * math.pi), center_s=0.0, sigma_s=sigma_1),
        Gaussian.from_area(uniform(0, 3 * math.pi), center_s=uniform(0, 250e-6), sigma_s=sigma_2),
    )
    return system, pulses


def solve(method, save_s=None, door=evolve, **options):
    system, pulses = devices()
    return door(system, pulses, start="v", window_s=WINDOW, save_s=save_s, method=method, **options)


precise = functools.cache(lambda: np.asarray(solve(StaticGrid(1e-12), TIMES).populations))


@pytest.mark.parametrize("error", [1e-6, 1e-8])
@pytest.mark.parametrize("saved", [True, False])
def test_magnus_keeps_the_requested_error(error, saved):
    solution = solve(Magnus(error), TIMES if saved else None)
    exact = precise() if saved else precise()[-1:]
    assert np.all(solution.valid)
    assert np.abs(solution.populations - exact).max() < error
    assert np.asarray(solution.error_estimate).max() <= error * (1 + 1e-6)


def test_square_pulses_keep_it_too():
    # Nothing changes but at the edges: the Taylor polynomial alone decides.
    system, _ = devices()
    area = np.linspace(0.2, 12.0, LANES)
    pulses = (PiecewiseConstant.square(area, center_s=0.0, duration_s=50e-6),)
    results = [
        evolve(system, pulses, start="v", window_s=WINDOW, method=method) for method in (Magnus(), StaticGrid(1e-12))
    ]
    assert np.abs(results[0].populations - results[1].populations).max() < 1e-6


def test_a_pulse_with_jumps_is_refused_between_saves():
    system, _ = devices()
    pulses = (PiecewiseConstant.square(1.0, center_s=0.0, duration_s=50e-6),)
    with pytest.raises(ValueError, match="jumps"):
        evolve(system, pulses, start="v", window_s=WINDOW, save_s=TIMES, method=Magnus())


@pytest.mark.parametrize("equation", ["schroedinger", "lindblad"])
def test_the_error_falls_with_the_fourth_power_of_the_step(equation):
    energies = np.array([0.0, 1.2, 0.0]) / SIGMA
    system = LevelSystem(("v", "s", "m"), (("v", "s"), ("s", "m")), energies)
    start = "v" if equation == "schroedinger" else np.diag([1.0, 0.0, 0.0])
    pulse = Gaussian.from_area(2.7, center_s=0.0, sigma_s=SIGMA)
    at = lambda method: evolve(
        system, (pulse,), start=start, window_s=(-6 * SIGMA, 6 * SIGMA), save_s=[6 * SIGMA], method=method
    )
    counts = (64, 128, 256)
    got = np.array([np.asarray(at(Magnus(1e-6, steps=n)).populations[0]) for n in counts])
    error = np.abs(got - np.asarray(at(StaticGrid(1e-13)).populations[0])).max(axis=1)
    order = np.log2(error[:-1] / error[1:])
    assert np.all(order > 3.7)
    assert np.all(order < 4.3)


def test_too_few_steps_are_flagged():
    solution = solve(Magnus(1e-6, steps=8), np.linspace(*WINDOW, 20))
    assert 0 < np.sum(solution.valid) < LANES
    np.testing.assert_array_equal(solution.valid, np.asarray(solution.error_estimate) <= 1e-6 * (1 + 1e-8))
    assert np.isnan(solution.populations[..., ~np.asarray(solution.valid)]).all()


@pytest.mark.parametrize("method", [Magnus(), StaticGrid(1e-6)], ids=["magnus", "static grid"])
@pytest.mark.parametrize("save_s", [TIMES[:7], pytest.param(None, marks=pytest.mark.slow)], ids=["saved", "end"])
def test_blocks_and_shards_give_what_evolve_gives(method, save_s):
    whole = solve(method, save_s)
    for block, shards in ((32, 1), (64, 2), (LANES, 1)):
        parts = solve(method, save_s, evolve_batch, block=block, shards=shards)
        # The compiler may fuse a sum differently for another shape.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), parts, whole)


def test_shards_of_the_same_blocks_are_the_same_bits():
    one, three = (solve(Magnus(), TIMES, evolve_batch, block=16, shards=shards) for shards in (1, 3))
    jax.tree.map(np.testing.assert_array_equal, one, three)


def test_several_batch_axes_and_save_times_of_each_lane():
    system, pulses = jax.tree.map(
        lambda a: a.reshape(*a.shape[:-1], 3, 50) if a.shape[-1:] == (LANES,) else a, devices()
    )
    times = TIMES[:5, None, None] + np.linspace(0, 1e-6, LANES).reshape(3, 50)
    call = lambda door: door(system, pulses, start="v", window_s=WINDOW, save_s=times, method=Magnus())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), call(evolve_batch), call(evolve)
    )


def valid_populations(solution):
    return solution.populations, solution.valid


def test_a_bad_lane_stays_alone():
    system, pulses = devices()
    bad = 37
    call = lambda energies: evolve_batch(
        dataclasses.replace(system, energies_rad_s=energies),
        pulses,
        start="v",
        window_s=WINDOW,
        save_s=TIMES,
        method=Magnus(steps=6),
        reduce=valid_populations,
        block=16,
    )
    before, _ = call(system.energies_rad_s)
    after, valid = call(system.energies_rad_s.at[:, bad].set(jnp.nan))
    others = np.arange(LANES) != bad
    np.testing.assert_array_equal(np.asarray(after)[..., others], np.asarray(before)[..., others])
    assert np.isnan(after[..., bad]).all()
    np.testing.assert_array_equal(valid, others)


@pytest.mark.slow
def test_derivatives_go_through_blocks_in_both_modes():
    system, pulses = devices()

    def loss(scale):
        scaled = tuple(Gaussian(p.peak_rad_s * scale, p.center_s, p.sigma_s) for p in pulses)
        kept = evolve_batch(
            system,
            scaled,
            start="v",
            window_s=WINDOW,
            method=Magnus(1e-8, steps=900),
            reduce=valid_populations,
            block=64,
        )[0]
        return jnp.sum(kept[-1, 1] ** 2)

    step = 1e-4
    expected = (loss(1 + step) - loss(1 - step)) / (2 * step)
    assert jax.grad(loss)(1.0) == pytest.approx(float(expected), rel=1e-6)
    assert jax.jvp(loss, (1.0,), (1.0,))[1] == pytest.approx(float(expected), rel=1e-6)


def test_single_precision_states_its_error(capsys):
    kept = solve(Magnus(precision="single"), TIMES, evolve_batch, reduce=valid_populations)
    assert kept[0].dtype == jnp.float32
    said = capsys.readouterr().out
    assert "single precision" in said
    stated = float(said.split("difference ")[1].split()[0])
    true = np.abs(np.asarray(kept[0], float) - precise()).max()
    assert 1e-8 < stated < 2e-5
    assert true < 3 * stated + 1e-6


def test_a_single_device_is_refused():
    system = LAMBDA.system(detuning_1_hz=0.0, detuning_2_hz=0.0, lifetime_s=1.0, branching=0.4)
    with pytest.raises(ValueError, match="needs lanes"):
        evolve_batch(system, (), start="v", window_s=WINDOW)


def test_two_host_devices_give_the_same_numbers(tmp_path):
    program = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
jax.config.update("jax_enable_x64", True)
import numpy as np
from test_batch import TIMES, devices, evolve_batch, solve
from twin.dynamics import Magnus
assert len(jax.devices()) == 2
np.save({path!r}, solve(Magnus(), TIMES, evolve_batch, block=16).populations)
"""
    here = solve(Magnus(), TIMES, evolve_batch, block=16, shards=1).populations
    folder, path = Path(__file__).parent, str(tmp_path / "there.npy")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent)])}
    subprocess.run([sys.executable, "-c", program.format(path=path)], check=True, env=environment)
    np.testing.assert_array_equal(np.load(path), here)


# ------------------------------------------------------------------------------------------------ loops in blocks


def fleet(count: int, **changes) -> IonMemristor:
    rng = np.random.default_rng(5)
    box = {"rabi_scale_1": (0.8, 1.2), "detuning_2_hz": (-4e3, 4e3), "laser_linewidth_hz": (0.0, 1e3)}
    values = {name: rng.uniform(*limits, count) for name, limits in box.items()}
    return IonMemristor(**({"memory": MovingAverage(4.0), "source": "model"} | values | changes))


def by_hand(device: IonMemristor, x, k: int):
    """Device k of a fleet alone."""
    return run(jax.tree.map(lambda a: a[k] if a.ndim else a, device), x)


@pytest.mark.parametrize(
    "method",
    [pytest.param(Lindblad(), marks=pytest.mark.slow), ClosedForm(), StaticGrid(1e-8)],
    ids=lambda m: type(m).__name__,
)
def test_a_fleet_in_blocks_is_its_devices(method):
    count, x = 3 * loop_module._BLOCK + 5, sine_input(periods=2, cycles_per_period=12)
    moving = {"n_bar": np.linspace(0, 5, count), "eta_1": 0.08, "eta_2": 0.07, "phonon_nodes": 4}
    device = fleet(count, method=method, **(moving if isinstance(method, ClosedForm) else {}))
    # Decided once, so that both have the same steps and nodes.
    device = device.prepared(np.asarray(x)[:, None], Settings())
    whole = run(device, np.asarray(x)[:, None])
    assert whole.y.shape == whole.x_set.shape == whole.r.shape == (len(x), count)
    assert bool(jnp.all(whole.valid))
    for k in (0, loop_module._BLOCK, count - 1):
        alone = by_hand(device, x, k)
        for name in ("x", "r", "y", "populations_2", "coherence", "purity"):
            np.testing.assert_allclose(getattr(whole, name)[..., k], getattr(alone, name), atol=1e-12)


def test_a_bad_device_of_a_fleet_is_alone():
    count, x = 3 * loop_module._BLOCK, sine_input(periods=1, cycles_per_period=12)[:, None]
    good = fleet(count).prepared(x, Settings())
    bad = eqx.tree_at(lambda d: d.rabi_scale_1, good, good.rabi_scale_1.at[7].set(jnp.nan))
    one, other = run(good, x), run(bad, x)
    assert not np.any(other.valid[1:, 7])
    assert np.isnan(other.y[1:, 7]).all()
    others = np.arange(count) != 7
    np.testing.assert_array_equal(one.y[:, others], other.y[:, others])


def test_any_function_in_blocks_with_what_lanes_share():
    numbers = np.arange(60.0).reshape(2, 30)
    squares = in_blocks(_squares_beside, jnp.asarray(numbers), (2, 30), shared=jnp.ones(3), block=7, shards=3)
    np.testing.assert_array_equal(squares[0], numbers**2)
    np.testing.assert_array_equal(squares[1], numbers + 3)
    with pytest.raises(ValueError, match="`block` must be at least 1"):
        in_blocks(_squares_beside, jnp.ones(3), (3,), block=0)


def _squares_beside(batched, shared):
    return batched**2, batched + jnp.sum(shared)


class _Small:
    """A device that reports its memory."""

    def memory_stats(self):
        return {"bytes_limit": 6400}


def test_blocks_fit_the_memory_that_a_device_reports():
    # A number in and two out: 24 bytes a lane, eight times.
    assert _fitting(_squares_beside, jnp.ones(1000), jnp.ones(3), (1000,), _Small()) == 6400 // (8 * 24)
    assert _fitting(_squares_beside, jnp.ones(1000), jnp.ones(3), (1000,), jax.devices("cpu")[0]) == 1000
