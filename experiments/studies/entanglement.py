"""Two memristors on one ion, and entangled pairs through two nodes: the numbers of docs/quantum_networks.md.

Run it with ``python -m experiments.studies.entanglement``; ``--out FILE.png`` draws the figure as well.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.special import ellipe, ellipk

from experiments.console import aligned
from experiments.plots import BLUE, GREEN, GREY, ORANGE, styled
from twin import hysteresis
from twin.entanglement import PairTrace, play_pair, store_pair
from twin.memory import MovingAverage
from twin.memory_inputs import CROSSED, OWN
from twin.memristor import IonMemristor, Lindblad, PhotonicMemristor, sine_input
from twin.methods import ClosedForm
from twin.qubit_pairs import both_or_none, one_excitation
from twin.star import ZEEMAN_HZ_PER_TESLA, Star, StarLoop, quadrupole_beam, run_star

CYCLES = 80  # in a period of the input
# Beam at 45 degrees to the field, polarization 35 degrees out of their plane: all five lines are driven.
BEAM = quadrupole_beam(np.pi / 4, np.deg2rad(35))
PHOTONIC = PhotonicMemristor(memory=MovingAverage(20.0))
IMPERFECT = {
    "photonic, ideal": PHOTONIC,
    "photonic, real": dataclasses.replace(
        PHOTONIC,
        loss=jnp.asarray(0.1),
        visibility_2=jnp.asarray(0.97),
        phase_noise_2_rad=jnp.asarray(0.1),
        efficiency=jnp.asarray(0.9),
    ),
    "ion, real": IonMemristor(
        memory=MovingAverage(20.0),
        method=Lindblad(1e-8),
        rabi_scale_2=0.97,
        detuning_2_hz=500.0,
        laser_linewidth_hz=100.0,
        separation_s=180e-6,
        tail_s=160e-6,
        lead_s=160e-6,
    ),
}


# ---------------------------------------------------------------------------------------------------- the star


def star(*, cascade: bool, memory_inputs, ideal: bool, window: float) -> Star:
    """Two memristors on one ion with memories of this many cycles."""
    memories = (MovingAverage(window), MovingAverage(window))
    if ideal:
        return Star(memories=memories, cascade=cascade, memory_inputs=memory_inputs, method=ClosedForm())
    return Star(
        memories=memories,
        cascade=cascade,
        memory_inputs=memory_inputs,
        rabi_scales=(0.98, 1.02, 1.01, 0.97),
        detunings_hz=(200.0, -300.0, 250.0, 100.0),
        laser_linewidth_hz=100.0,
        beam=BEAM,
        field_tesla=5e-4,
    )


def star_inputs(lead: float) -> jax.Array:
    """Inputs of A and B over two periods; B's leads by a fraction of a period."""
    shifts = (0.0, -lead * CYCLES)
    return jnp.stack([sine_input(periods=2, cycles_per_period=CYCLES, delay_cycles=shift) for shift in shifts])


def second_period(values: jax.Array, end: int = 0) -> jax.Array:
    """Cycles of the second period, by which the memory has forgotten its start, and `end` more."""
    return values[..., CYCLES : 2 * CYCLES + end]


def star_rows() -> tuple[list[dict], dict[str, StarLoop]]:
    """Areas and form factors of both loops, ideal and with imperfections."""
    rows, loops = [], {}
    inputs = {"own": OWN, "crossed": CROSSED}
    for cascade, name, lead in ((True, "own", 0.0), (True, "crossed", 0.0), (False, "crossed", -0.25)):
        for ideal in (True, False):
            device = star(cascade=cascade, memory_inputs=inputs[name], ideal=ideal, window=0.25 * CYCLES)
            loop = run_star(device, star_inputs(lead))
            assert bool(loop.valid.all())
            loops[f"{cascade} {name} {ideal}"] = loop
            x, y = second_period(loop.x), second_period(loop.y)
            rows.append(
                {
                    "scheme": ("cascade, " if cascade else "prepared anew, ") + name,
                    "ion": "ideal" if ideal else "real",
                    **{f"area {n}": f"{float(hysteresis.signed_area(x[k], y[k])):+.4f}" for k, n in enumerate("AB")},
                    "area y_A(x_B)": f"{float(hysteresis.signed_area(x[1], y[0])):+.4f}",
                    "F of y_A(x_B)": f"{float(hysteresis.form_factor(x[1], y[0])):.3f}",
                }
            )
    return rows, loops


def neighbour_rows() -> list[dict]:
    """What the light on neighbouring lines does, against the magnetic field."""
    rows = []
    x_set, r = jnp.array([0.4, 0.7]), jnp.array([0.6, 0.3])
    base = star(cascade=True, memory_inputs=OWN, ideal=False, window=5.0)
    base = dataclasses.replace(base, laser_linewidth_hz=jnp.zeros(()), detunings_hz=jnp.zeros(4))
    plain = dataclasses.replace(base, beam=None).prepared().respond(x_set, r).populations[0]
    for field in (1e-5, 5e-5, 1e-4, 5e-4):
        device = dataclasses.replace(base, field_tesla=jnp.asarray(field))
        seen = device.prepared().respond(x_set, r).populations[0]
        phase = device.common_level_shift_coefficients() * np.pi**2 / (2 * np.sqrt(np.pi) * device.sigma_s)
        rows.append(
            {
                "field (G)": f"{field * 1e4:g}",
                "splitting (kHz)": f"{field * ZEEMAN_HZ_PER_TESLA / 1e3:.0f}",
                "phase at pi (rad)": f"{float(jnp.max(jnp.abs(phase))):.4f}",
                "populations move by": f"{float(jnp.max(jnp.abs(seen - plain))):.1e}",
                "transfer, estimate": f"{float(jnp.max(device.off_resonant_transfer())):.1e}",
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------- pairs


def with_window(node, window: float):
    """The node with a moving average of this many cycles."""
    return dataclasses.replace(node, memory=MovingAverage(window))


def concurrence_loop(node, window: float) -> PairTrace:
    """Pairs with one excitation that swings between two equal nodes."""
    own = with_window(node, window)
    return play_pair((own, own), one_excitation(sine_input(periods=2, cycles_per_period=CYCLES)))


def closed_area(window: float) -> float:
    """sin(2 lag) / (6 m) [ (m - 2) E(m) + 2 (1 - m) K(m) ], m = S^2, with S and lag of the discrete average."""
    w = 2 * np.pi / CYCLES
    m = (np.sin(window * w / 2) / (window * np.sin(w / 2))) ** 2
    return float(np.sin(w * (window + 1)) / (6 * m) * ((m - 2) * ellipe(m) + 2 * (1 - m) * ellipk(m)))


def loop_area(trace: PairTrace) -> float:
    """Area of concurrence out against in, over half a period of the input: one of the concurrence."""
    half = slice(CYCLES, CYCLES + CYCLES // 2 + 1)
    return float(hysteresis.signed_area(trace.concurrence_in[half], trace.concurrence_out[half]))


def loop_rows() -> list[dict]:
    """Areas of the concurrence loop for windows of the memory."""
    rows = []
    for share in (0.1, 0.25, 0.375, 0.5, 0.75):
        window = share * CYCLES
        row = {"T / T_osc": f"{share:g}", "closed form": f"{closed_area(window):+.5f}"}
        rows.append(
            row | {name: f"{loop_area(concurrence_loop(node, window)):+.5f}" for name, node in IMPERFECT.items()}
        )
    return rows


def kind_rows() -> list[dict]:
    """What is left of the entanglement of two kinds of pairs, in the mean over a period."""
    rows = []
    x = sine_input(periods=2, cycles_per_period=CYCLES)
    for name, states in (("one excitation", one_excitation(x)), ("both or none", both_or_none(x))):
        for kind, node in IMPERFECT.items():
            trace = play_pair((node, node), states)
            before, after = second_period(trace.concurrence_in), second_period(trace.concurrence_out)
            lost = (before > 1e-6) & (after == 0)
            rows.append(
                {
                    "pairs": name,
                    "nodes": kind,
                    "mean C in": f"{float(before.mean()):.3f}",
                    "mean C out": f"{float(after.mean()):.3f}",
                    "mean negativity out": f"{float(second_period(trace.negativity_out).mean()):.3f}",
                    "cycles that lose all": f"{float(lost.mean()):.2f}",
                    "residual": f"{float(trace.residual.max()):.0e}",
                }
            )
    return rows


# ---------------------------------------------------------------------------------------------------- the figure


@styled
def draw(loops: dict[str, StarLoop]) -> Figure:
    """Four panels: loops of the star, the loop between memristors, concurrence loops, a stored pair."""
    figure = Figure(figsize=(7.4, 6.4), layout="constrained")
    ((own, between), (entangled, stored)) = figure.subplots(2, 2)
    for ideal, dash in ((True, "-"), (False, "--")):
        loop = loops[f"True own {ideal}"]
        for k, (name, colour) in enumerate((("A", BLUE), ("B", ORANGE))):
            label = f"{name}, {'ideal' if ideal else 'real'}"
            own.plot(second_period(loop.x, 1)[k], second_period(loop.y, 1)[k], dash, color=colour, label=label)
        loop = loops[f"False crossed {ideal}"]
        x, y = second_period(loop.x, 1)[1], second_period(loop.y, 1)[0]
        between.plot(x, y, dash, color=GREEN, label="ideal" if ideal else "real")
    own.set(title="Cascade on one ion, own memories", xlabel="x", ylabel="y")
    between.set(title="Crossed memories, B a quarter behind", xlabel="x of B", ylabel="y of A")
    for (name, node), colour in zip(IMPERFECT.items(), (BLUE, GREY, ORANGE), strict=True):
        trace = concurrence_loop(node, 0.25 * CYCLES)
        half = slice(CYCLES, CYCLES + CYCLES // 2 + 1)
        entangled.plot(trace.concurrence_in[half], trace.concurrence_out[half], color=colour, label=name)
        kept = store_pair((node, node), one_excitation(0.3), 12)
        stored.semilogy(np.arange(13), np.append(kept.concurrence_in, kept.concurrence_out[-1]), "o-", color=colour,
                        markersize=3, label=name)  # fmt: skip
    entangled.set(title="A new pair in each cycle", xlabel="concurrence in", ylabel="concurrence out")
    stored.set(title="One pair, again and again", xlabel="cycle", ylabel="concurrence")
    for axes in (own, between, entangled, stored):
        axes.grid()
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    """Print the tables, and draw the figure where it is asked for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.entanglement", description=__doc__)
    parser.add_argument("--out", metavar="FILE.png", help="where to draw the figure")
    out = parser.parse_args().out
    rows, loops = star_rows()
    for title, table in (
        ("Two memristors on one ion, T / T_osc = 0.25", rows),
        ("Light on neighbouring lines", neighbour_rows()),
        ("Area of concurrence out against concurrence in, pairs with one excitation", loop_rows()),
        ("Kinds of pairs, T / T_osc = 0.25", kind_rows()),
    ):
        print(f"{title}\n{aligned(table)}\n", flush=True)
    if out is not None:
        draw(loops).savefig(out, dpi=130)


if __name__ == "__main__":
    main()
