"""Free parameters: bijectors to their prior boxes, and their place in a device."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from scipy import stats

from calibration.parameters import FreeParameters, anchored, unit_of, value_of, with_parameters, with_window
from twin.memory import AbstractMemory, Exponential, MovingAverage
from twin.memristor import IonMemristor, PhotonicMemristor

DEMO = {
    **tables.SCALES,
    "detuning_1_hz": (-5e3, 5e3),
    "detuning_2_hz": (-5e3, 5e3),
    "laser_linewidth_hz": (0.0, 2e3),
    **tables.READOUT,
}


@pytest.fixture
def free() -> FreeParameters:
    return FreeParameters.from_boxes(DEMO)


# ------------------------------------------------------------------------------------------------ the bijector


def test_values_in_the_box_survive_the_round_trip(free):
    share = jnp.array([1e-12, 1e-6, 0.02, 0.3, 0.5, 0.77, 0.999, 1 - 1e-9])
    values = free.low + free.width * share[:, None]
    u = free.unbounded(values)
    assert np.all(np.isfinite(u))
    np.testing.assert_allclose(free.bounded(u), values, rtol=0, atol=1e-14 * np.max(np.abs(free.width)))
    # relative to each box, which widths from 0.05 to 10,000 share
    np.testing.assert_allclose((free.bounded(u) - free.low) / free.width, share[:, None] + jnp.zeros(7), atol=1e-12)


def test_coordinates_survive_the_round_trip(free):
    u = jnp.linspace(-12.0, 12.0, 49)[:, None] + jnp.zeros(7)
    np.testing.assert_allclose(free.unbounded(free.bounded(u)), u, atol=1e-6)
    np.testing.assert_allclose(free.bounded(jnp.zeros(7)), (free.low + free.high) / 2)


def test_the_bijector_is_the_logistic_curve(free):
    u = jnp.array([-3.0, -0.2, 0.0, 1.0, 2.0, 5.0, 7.0])
    low, high = (np.array([box[k] for box in DEMO.values()]) for k in (0, 1))
    np.testing.assert_allclose(free.bounded(u), low + (high - low) / (1 + np.exp(-np.asarray(u))), rtol=1e-14)


def test_no_coordinate_leaves_the_box():
    """Not by a rounding error either: a probability of 1 + 2e-16 is refused further down."""
    rng = np.random.default_rng(0)
    low = np.round(rng.uniform(-10, 10, 2000), 2)
    high = np.round(low + rng.uniform(0.01, 2, 2000), 2)
    box = FreeParameters.from_boxes({f"p{k}": (a, b) for k, (a, b) in enumerate(zip(low, high, strict=True)) if a < b})
    u = jnp.array([-1e308, -1e3, -38.0, -20.0, -3.0, 0.0, 3.0, 20.0, 38.0, 1e3, 1e308])[:, None]
    values = np.asarray(box.bounded(u + jnp.zeros(len(box.names))))
    assert np.all(values >= np.asarray(box.low))
    assert np.all(values <= np.asarray(box.high))
    inner = values[3:-3]
    assert np.all(inner > np.asarray(box.low))
    assert np.all(inner < np.asarray(box.high))
    assert np.all(np.diff(values, axis=0)[4:6] > 0)


def test_the_gradient_is_finite_everywhere_and_right(free):
    slope = jax.vmap(jax.jacfwd(free.bounded))
    u = jnp.array([-1e308, -800.0, -40.0, -2.0, 0.0, 3.0, 40.0, 800.0, 1e308])[:, None] + jnp.zeros(7)
    jacobian = np.asarray(slope(u))
    assert np.all(np.isfinite(jacobian))
    np.testing.assert_array_equal(jacobian * (1 - np.eye(7)), 0.0)
    share = 1 / (1 + np.exp(-np.clip(np.asarray(u), -700, 700)))
    expected = np.asarray(free.width) * share * (1 - share)
    np.testing.assert_allclose(np.einsum("sii->si", jacobian)[2:6], expected[2:6], rtol=1e-12)
    reverse = np.asarray(jax.vmap(jax.jacrev(free.bounded))(u))
    np.testing.assert_allclose(reverse, jacobian, rtol=1e-12)


def test_draws_are_uniform_and_independent(free):
    values = np.asarray(free.draw(jax.random.key(3), 4000))
    assert values.shape == (4000, 7)
    share = (values - np.asarray(free.low)) / np.asarray(free.width)
    for column in share.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    off_diagonal = np.corrcoef(share.T)[~np.eye(7, dtype=bool)]
    assert np.max(np.abs(off_diagonal)) < 4.5 / np.sqrt(4000)
    np.testing.assert_array_equal(values, free.draw(jax.random.key(3), 4000))
    assert not np.any(values == np.asarray(free.draw(jax.random.key(4), 4000)))


@pytest.mark.parametrize(
    "box", [(1.3, 0.7), (0.7, 0.7), (np.nan, 1.0), (0.0, np.nan), (0.0, np.inf), (-np.inf, 0.0)], ids=str
)
def test_an_empty_or_endless_box_is_refused(box):
    with pytest.raises(ValueError, match=r"box of `rabi_scale_1` must be finite with low below high, but is \["):
        FreeParameters.from_boxes({"rabi_scale_2": (0.7, 1.3), "rabi_scale_1": box})


def test_no_free_parameter_is_refused():
    with pytest.raises(ValueError, match="at least one parameter must be free"):
        FreeParameters.from_boxes({})


def test_boxes_and_widths_keep_their_names(free):
    assert free.boxes == DEMO
    np.testing.assert_allclose(free.width, [b - a for a, b in DEMO.values()])


def test_a_new_box_is_no_new_program(free):
    traces = 0

    @eqx.filter_jit
    def values(parameters, u):
        nonlocal traces
        traces += 1
        return parameters.bounded(u)

    values(free, jnp.zeros(7))
    other = FreeParameters.from_boxes({name: (low - 1, high + 2) for name, (low, high) in DEMO.items()})
    np.testing.assert_allclose(values(other, jnp.ones(7)), other.bounded(jnp.ones(7)))
    assert traces == 1


# ------------------------------------------------------------------------------------------------ in a device


def test_applied_values_stand_in_the_device_and_nothing_else_moves(free):
    device = tables.ion(sigma_1_s=21e-6)
    values = free.low + 0.3 * free.width
    applied = free.apply(device, values)
    for name, value in zip(DEMO, values, strict=True):
        assert float(value_of(applied, name)) == float(value)
        assert float(value_of(device, name)) != float(value)  # the given device is left as it was
    for name in ("sigma_1_s", "sigma_2_s", "separation_s", "lifetime_s", "branching", "amplitude_1"):
        assert float(getattr(applied, name)) == float(getattr(device, name))
    assert applied.method == device.method
    assert applied.memory is device.memory


def test_the_gradient_flows_into_the_device(free):
    device = tables.ion()

    @jax.jit
    @jax.grad
    def slope(values):
        applied = free.apply(device, values)
        return jnp.sum(jnp.stack([(k + 1) * value_of(applied, name) for k, name in enumerate(free.names)]))

    np.testing.assert_allclose(slope(free.low + 0.5 * free.width), np.arange(1.0, 8.0))


@pytest.mark.parametrize(
    ("memory", "other"),
    [(MovingAverage(10.0), MovingAverage(6.4)), (Exponential(10.0), Exponential(6.4))],
    ids=["moving average", "exponential"],
)
def test_the_window_is_a_parameter_of_the_memory(memory: AbstractMemory, other: AbstractMemory):
    device = tables.ion(memory=memory)
    assert float(value_of(device, "window_cycles")) == 10.0
    for changed in (
        with_parameters(device, {"window_cycles": jnp.array(6.4)}),
        FreeParameters.from_boxes({"window_cycles": (1.0, 20.0)}).apply(device, jnp.array([6.4])),
    ):
        assert type(changed.memory) is type(memory)
        assert float(value_of(changed, "window_cycles")) == 6.4
        x = jnp.asarray(np.random.default_rng(0).uniform(size=30))
        np.testing.assert_array_equal(changed.memory.filter(x), other.filter(x))


def test_a_streaming_buffer_keeps_its_length():
    assert with_window(MovingAverage(10.0, capacity=32), jnp.array(17.5)).capacity == 32


class Forgetful(AbstractMemory):
    """Always 1/2."""

    def filter(self, x):
        return jnp.full_like(x, 0.5)

    def init(self, shape=()):
        return jnp.zeros(shape)

    def read(self, state):
        return jnp.full_like(state, 0.5)

    def update(self, state, x):
        return state


def test_a_memory_without_a_window_says_so():
    with pytest.raises(ValueError, match="memory Forgetful has no window; use MovingAverage or Exponential"):
        with_parameters(tables.ion(memory=Forgetful()), {"window_cycles": jnp.array(3.0)})


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (tables.ion(), "rabi_scale_3"),
        (tables.ion(), "detuning_1_khz"),
        (tables.ion(), "areas"),
        (PhotonicMemristor(memory=MovingAverage(10.0)), "rabi_scale_1"),
        # fields that are no physical numbers
        (tables.ion(), "scheme"),
        (tables.ion(), "source"),
        (tables.ion(), "method"),
        (tables.ion(), "memory"),
        (tables.ion(), "steps"),
        (tables.ion(), "phonon_nodes"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_an_unknown_name_is_refused(device, name):
    with pytest.raises(ValueError, match=f"`{name}` is no parameter of {type(device).__name__}"):
        FreeParameters.from_boxes({name: (1.0, 2.0)}).apply(device, jnp.array([1.5]))


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("rabi_scale_1", ""),
        ("n_bar", ""),
        ("branching", ""),
        ("readout_error_dark", ""),
        ("detuning_1_hz", "Hz"),
        ("detuning_2_set_hz", "Hz"),
        ("laser_linewidth_hz", "Hz"),
        ("sigma_1_s", "s"),
        ("separation_s", "s"),
        ("heating_rate_per_s", "1/s"),
        ("window_cycles", "cycles"),
    ],
)
def test_the_unit_is_in_the_name(name, unit):
    assert unit_of(name) == unit


# ------------------------------------------------------------------------------------------------ widths and areas


@pytest.mark.parametrize("k", [1, 2])
def test_a_freed_width_changes_the_area_in_proportion(k):
    """Area = peak x actual width, and the peak belongs to the width that the controller believes in."""
    device = anchored(tables.ion(sigma_1_s=20e-6, sigma_2_s=25e-6))
    width = float(getattr(device, f"sigma_{k}_s"))
    x, r = jnp.array([0.2, 0.5, 1.0]), jnp.array([0.1, 0.4, 0.9])
    wider = with_parameters(device, {f"sigma_{k}_s": jnp.array(1.1 * width)})
    stronger = with_parameters(device, {f"rabi_scale_{k}": jnp.array(1.1)})
    before, after = device.areas(x, r)[k - 1], wider.areas(x, r)[k - 1]
    np.testing.assert_allclose(after, 1.1 * before, rtol=1e-13)
    for one, other in zip(wider.areas(x, r), stronger.areas(x, r), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13)
    both = with_parameters(device, {f"sigma_{k}_s": jnp.array(1.1 * width), f"rabi_scale_{k}": jnp.array(1 / 1.1)})
    np.testing.assert_allclose(both.areas(x, r)[k - 1], before, rtol=1e-13)


def test_without_an_anchor_the_controller_follows_the_width():
    device = tables.ion()
    x = jnp.array([0.2, 0.5, 1.0])
    wider = with_parameters(device, {"sigma_1_s": jnp.array(26e-6)})
    np.testing.assert_array_equal(wider.areas(x, x)[0], device.areas(x, x)[0])


def test_anchoring_keeps_what_the_controller_already_believes():
    device = anchored(tables.ion(sigma_1_s=22e-6, nominal_sigma_1_s=20e-6))
    assert float(device.nominal_sigma_1_s) == 20e-6
    assert float(device.nominal_sigma_2_s) == float(device.sigma_2_s)
    np.testing.assert_allclose(device.areas(jnp.array(1.0), jnp.array(1.0))[0], 1.1 * np.pi, rtol=1e-13)


def test_anchoring_leaves_other_devices_alone():
    device = PhotonicMemristor(memory=MovingAverage(10.0))
    assert anchored(device) is device
    assert isinstance(anchored(tables.ion()), IonMemristor)
