"""`python -m experiments.studies.register`: how long registers take, and what many modes cost, on this machine.

Warm times are medians of five calls with new numbers; the first call compiles.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.console import aligned
from twin.apparatus import Apparatus
from twin.chain import zigzag_ratio
from twin.memory import MovingAverage
from twin.memristor import IonMemristor, Lindblad, run
from twin.phonons import planned
from twin.register import Register
from twin.trap import HarmonicTrap

_CYCLES, _REPEATS = 1000, 5


def register(ions: int, seed: int, motion) -> tuple[Register, np.ndarray]:
    """A register of different ions with crosstalk to nearest neighbours, and its inputs."""
    rng = np.random.default_rng(seed)
    spread = lambda width: 1 + width * rng.normal(size=ions)
    ion = IonMemristor(
        memory=MovingAverage(10.0),
        method=Lindblad(1e-8),
        rabi_scale_1=spread(0.03),
        rabi_scale_2=spread(0.03),
        detuning_1_hz=200 * rng.normal(size=ions),
        laser_linewidth_hz=50.0,
        n_bar=0.0 if motion is None else 0.5,
        motion=motion,
    )
    phase = np.pi * (np.arange(_CYCLES)[:, None] / 40 + rng.random(ions))
    # A constructor that the type checker does not see: memory and source are the ion's.
    given = {"ion": ion, "count": ions, "crosstalk_1": 0.02, "crosstalk_2": 0.02}
    return Register(**given), np.sin(phase) ** 2


def moving(ions: int):
    """Motion of every ion of a chain across whose axis the beams come: as many modes as ions."""
    axial_hz = 2.9e6 / (1.3 * float(zigzag_ratio(ions)))
    apparatus = Apparatus(HarmonicTrap((3e6, 2.9e6, axial_hz)), ions, (1.0, 0.0, 0.0))
    return planned(apparatus.motion(apparatus.chain().modes().check(), None, heated=False), 0.5, 3.8, 1e-8)


def measured(ions: int, motion) -> dict[str, object]:
    """First call, warm median, and the largest stated error of a register."""
    seconds, loop = [], None
    for seed in range(_REPEATS + 1):
        device, x = register(ions, seed, motion)
        begin = time.perf_counter()
        loop = jax.block_until_ready(run(device, x))
        seconds.append(time.perf_counter() - begin)
    assert loop is not None
    return {
        "ions": ions,
        "modes": 0 if motion is None else len(motion.eta_1),
        "cycles": _CYCLES,
        "first call (s)": round(seconds[0], 1),
        "warm (s)": round(statistics.median(seconds[1:]), 2),
        "valid": bool(jnp.all(loop.valid)),
        "error": f"{float(jnp.max(loop.error_estimate)):.0e}",
        "method": loop.method,
    }


def neighbours_matter(ions: int = 70) -> float:
    """Largest change of y by 2 % of the neighbours' field."""
    device, x = register(ions, 0, None)
    alone = dataclasses.replace(device, crosstalk_1=jnp.zeros(()), crosstalk_2=jnp.zeros(()))
    return float(jnp.max(jnp.abs(run(device, x).y - run(alone, x).y)))


if __name__ == "__main__":
    rows = [measured(ions, None) for ions in (5, 70, 300)]
    rows += [measured(ions, moving(ions)) for ions in (5, 70, 300)]
    print(aligned(rows))
    print(f"2 % of the neighbours' field moves y by up to {neighbours_matter():.3f}")
