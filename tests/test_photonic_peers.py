"""The photonic memristor against Perceval's circuits and MerLin's memristive phase shifter, where they are installed.

Perceval is in the test extra. MerLin needs torch and is not: `pip install -e ".[photonics]"` brings both.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from twin.memory import Exponential, MovingAverage
from twin.memristor import PhotonicMemristor, run

MEMORY = MovingAverage(4.0)
COMMANDS = [(0.0, 0.3), (0.25, 0.7), (0.61, 0.44), (0.9, 0.05), (1.0, 1.0)]
CHIP = {"phase_scale_1": 0.93, "phase_scale_2": 1.08, "phase_offset_1_rad": 0.11, "phase_offset_2_rad": -0.2}
LOSSES = {"loss_input": 0.12, "loss": 0.27}


# ----------------------------------------------------------------------------------------------------------- Perceval


def phases(x, r, chip):
    """Phases of both interferometers."""
    return [chip.get(f"phase_scale_{k}", 1.0) * 2 * np.arcsin(np.sqrt(c)) + chip.get(f"phase_offset_{k}_rad", 0.0)
            for k, c in ((1, x), (2, r))]  # fmt: skip


def evolved(perceval, phase_1, phase_2, loss_input=0.0, loss=0.0):
    """Density matrix of three modes over |000>, |100>, |010>, |001>: two interferometers, loss of mode 1 after each."""
    from perceval.backends import SLOSBackend
    from perceval.components import BS, PS
    from perceval.simulators import Simulator

    state = perceval.DensityMatrix.from_svd(perceval.BasicState([1, 0, 0]))
    for first, phase, lost in ((0, phase_1, loss_input), (1, phase_2, loss)):
        arms = (
            perceval.Circuit(2).add(0, BS()).add(0, PS(phase / 2)).add(1, PS(-phase / 2)).add(0, BS(theta=-np.pi / 2))
        )
        simulator = Simulator(SLOSBackend())
        simulator.set_circuit(perceval.Circuit(3).add(first, arms))
        state = simulator.evolve_density_matrix(state)
        if lost:
            state.apply_loss(1, lost)
    basis = [perceval.BasicState(modes) for modes in ([0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1])]
    order = [state.index[one] for one in basis]
    return np.asarray(state.mat.todense())[np.ix_(order, order)]


@pytest.mark.parametrize("fields", [{}, CHIP, CHIP | LOSSES], ids=["ideal", "phases", "losses"])
def test_states_are_those_of_perceval(fields):
    perceval = pytest.importorskip("perceval")
    device = PhotonicMemristor(memory=MEMORY, **fields)
    losses = {name: fields.get(name, 0.0) for name in LOSSES}
    for x, r in COMMANDS:
        rho = evolved(perceval, *phases(x, r, fields), **losses)
        modes, output = device.mode_state(x, r), device.output_state(x, r)
        np.testing.assert_allclose(modes, rho[1:, 1:], rtol=0, atol=1e-10)
        assert 1 - np.trace(modes) == pytest.approx(rho[0, 0].real, abs=1e-10)
        single_rail = [[1 - rho[2, 2], rho[1, 2]], [rho[2, 1], rho[2, 2]]]
        np.testing.assert_allclose(output, single_rail, rtol=0, atol=1e-10)


def test_phase_noise_is_the_mean_of_percevals_circuits():
    perceval = pytest.importorskip("perceval")
    sigma = {"phase_noise_1_rad": 0.2, "phase_noise_2_rad": 0.35}
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    weights = weights / weights.sum()
    x, r = 0.61, 0.44
    phase_1, phase_2 = phases(x, r, CHIP)
    mean = sum(
        w_1 * w_2 * evolved(perceval, phase_1 + 0.2 * z_1, phase_2 + 0.35 * z_2, **LOSSES)
        for (z_1, w_1), (z_2, w_2) in itertools.product(zip(nodes, weights, strict=True), repeat=2)
    )
    modes = PhotonicMemristor(memory=MEMORY, **CHIP, **LOSSES, **sigma).mode_state(x, r)
    np.testing.assert_allclose(modes, mean[1:, 1:], rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------- MerLin


def merlin_states(dtype, x_set, tau):
    """Amplitudes of three modes, cycle by cycle, of a layer whose memristive phase remembers 1 - p(reference)."""
    torch, merlin = pytest.importorskip("torch"), pytest.importorskip("merlin")

    def remember(phase, amplitudes):
        # An interferometer of two equal beam splitters transfers cos^2(phase / 2).
        r = torch.cos(phase / 2) ** 2
        x = 1 - torch.abs(amplitudes[:, 0]) ** 2
        return 2 * torch.acos(torch.sqrt(r + (x - r) / tau))

    half = np.pi / 2
    builder = merlin.CircuitBuilder(n_modes=3)
    builder.add_superpositions((0, 1), theta=half)
    builder.add_angle_encoding(modes=[1])
    builder.add_superpositions((0, 1), theta=half)
    builder.add_superpositions((1, 2), theta=half)
    builder.add_memristive_ps(2, remember, initial_state=half)  # a history of 1/2
    builder.add_superpositions((1, 2), theta=half)
    layer = merlin.QuantumLayer(input_size=1, builder=builder, input_state=[1, 0, 0], n_photons=1, dtype=dtype,
                                measurement_strategy=merlin.MeasurementStrategy.amplitudes())  # fmt: skip
    assert list(layer.output_keys) == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    angles = 2 * np.arccos(np.sqrt(x_set))
    with torch.no_grad():
        return np.array([layer(torch.tensor([[angle]], dtype=dtype)).numpy()[0] for angle in angles])


@pytest.mark.parametrize(("precision", "error"), [("float64", 1e-10), ("float32", 1e-6)])
def test_a_sequence_is_that_of_merlins_memristive_phase_shifter(precision, error):
    """Phases of its modes are those of asymmetric drive, so moduli are compared: populations and coherences."""
    torch = pytest.importorskip("torch")
    x_set = np.random.default_rng(0).uniform(0.05, 0.95, 12)
    amplitudes = merlin_states(getattr(torch, precision), x_set, tau=4.0)
    device = PhotonicMemristor(memory=Exponential(4.0), source="model")
    loop = run(device, x_set)
    modes = device.mode_state(jnp.asarray(x_set), loop.r)
    theirs = np.abs(np.einsum("ki,kj->ijk", amplitudes, amplitudes.conj()))
    np.testing.assert_allclose(np.abs(modes), theirs, rtol=0, atol=error)
    np.testing.assert_allclose(loop.populations_2, theirs[[0, 1, 2], [0, 1, 2]], rtol=0, atol=error)
    # Single rail: vacuum is the photon in either other mode, coherence that with the reference.
    output = device.output_state(jnp.asarray(x_set), loop.r)
    np.testing.assert_allclose(output[0, 0], 1 - theirs[1, 1], rtol=0, atol=error)
    np.testing.assert_allclose(np.abs(output[0, 1]), theirs[0, 1], rtol=0, atol=error)
