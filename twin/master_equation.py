"""The right-hand side of the Schrödinger and Lindblad equations in real components, unrolled over the level graph.

A Hermitian matrix of n levels has n^2 real components: the n populations, then real and imaginary part of rho_ab for
each a < b in lexicographic order. A pure state has 2n: real parts, then imaginary parts. The component axis is the
first, batch axes follow; every operation is elementwise in the batch, so lanes cannot influence each other.
Unrolling keeps only the couplings and jumps that exist (a three-level step is some fifty multiplications).

Runge-Kutta steps solve them in the interaction picture of the energies, where a level at rest does not turn: the
couplings turn instead (`turning`), and matter only while a pulse is on. `turned_back` leads to the rotating frame of
the graph, in which Magnus steps are taken: real couplings cost less, and energies are no trouble to an
exponential. Light shifts follow the drives and stay where they are in both; drives must then not be scaled with time.
"""

from collections.abc import Sequence
from itertools import combinations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from twin.levels import LevelSystem
from twin.pulses import Drive
from twin.trigonometry import cos_sin

# A complex number as (real, imaginary); None stands for an exact zero, so that no work is spent on it.
_Part = Float[Array, "..."] | None
_Pair = tuple[_Part, _Part]


def _add(a: _Part, b: _Part, sign: float = 1.0) -> _Part:
    if b is None:
        return a
    if a is None:
        return b if sign > 0 else -b
    return a + b if sign > 0 else a - b


def _negative(a: _Part) -> _Part:
    return None if a is None else -a


def _mul(a: _Part, b: _Part) -> _Part:
    return None if a is None or b is None else a * b


def _product(a: _Pair, b: _Pair) -> _Pair:
    return _add(_mul(a[0], b[0]), _mul(a[1], b[1]), -1.0), _add(_mul(a[0], b[1]), _mul(a[1], b[0]))


def _hamiltonian(system: LevelSystem, drives: list[Drive]) -> dict[tuple[int, int], _Pair]:
    """Off-diagonal elements that exist, `H[to, from] = Omega exp(-i phi) / 2` and its conjugate."""
    elements: dict[tuple[int, int], _Pair] = {}
    for (source, target), drive in zip(system.couplings, drives, strict=True):
        a, b = system.index(target), system.index(source)
        real, imag = 0.5 * drive.real, None if drive.imag is None else 0.5 * drive.imag
        old = elements.get((a, b), (None, None))
        new = (_add(old[0], real), _add(old[1], imag))
        elements[a, b] = new
        elements[b, a] = (new[0], None if new[1] is None else -new[1])
    return elements


def _lights(system: LevelSystem, h: dict[tuple[int, int], _Pair]) -> list[tuple[tuple[float, ...], _Part]]:
    """Weights of the levels and `coefficient |Omega|^2`, rad/s, of each light shift; H_ab is half of Omega."""
    found = []
    for shift in system.light_shifts:
        real, imag = h.get((system.index(shift.coupling[0]), system.index(shift.coupling[1])), (None, None))
        square = _add(_mul(real, real), _mul(imag, imag))
        found.append((shift.weights, _mul(4 * shift.coefficient_s, square)))
    return found


def _shift(lights: list[tuple[tuple[float, ...], _Part]], above: int, below: int | None = None) -> _Part:
    """By how much light raises a level, or the distance of two."""
    total: _Part = None
    for weights, size in lights:
        weight = weights[above] - (0.0 if below is None else weights[below])
        total = _add(total, _mul(jnp.asarray(weight), size) if weight else None)
    return total


def reached(system: LevelSystem, nonzero: Sequence[int], *, pure: bool) -> tuple[int, ...]:
    """Components that become nonzero in the course of the evolution, if these are at its beginning."""
    n = len(system.levels)
    neighbours = [(system.index(a), system.index(b)) for a, b in system.couplings]
    neighbours += [(b, a) for a, b in neighbours]
    if pure:
        kept = {k % n for k in nonzero}
        while new := {b for a, b in neighbours if a in kept} - kept:
            kept |= new
        return (*sorted(kept), *(n + j for j in sorted(kept)))
    pairs = list(combinations(range(n), 2))
    elements = {(k, k) if k < n else pairs[(k - n) // 2] for k in nonzero}
    decays = [(system.index(d.source), system.index(d.target)) for d in system.decays]
    while True:
        found = {(target, target) for source, target in decays if (source, source) in elements}
        for a, b in elements:
            found |= {(min(c, b), max(c, b)) for x, c in neighbours if x == a}
            found |= {(min(a, c), max(a, c)) for x, c in neighbours if x == b}
        if found <= elements:
            break
        elements |= found
    off = [k for j, pair in enumerate(pairs) if pair in elements for k in (n + 2 * j, n + 2 * j + 1)]
    return (*(j for j in range(n) if (j, j) in elements), *off)


def lindblad_components(
    system: LevelSystem, drives: list[Drive], rho: Sequence[_Part], *, rotating: bool
) -> list[_Part]:
    """d rho / dt component by component, 1/s; None stands for an exact zero.

    `rotating`: in the rotating frame, where drives do not turn and energies do; else in the interaction picture.
    """
    n = len(system.levels)
    pairs = list(combinations(range(n), 2))
    parts: dict[tuple[int, int], _Pair] = {(j, j): (rho[j], None) for j in range(n)}
    for k, (a, b) in enumerate(pairs):
        real, imag = rho[n + 2 * k], rho[n + 2 * k + 1]
        parts[a, b], parts[b, a] = (real, imag), (real, _negative(imag))
    h = _hamiltonian(system, drives)
    lights = _lights(system, h)
    loss: list[_Part] = [None] * n
    for decay in system.decays:
        source = system.index(decay.source)
        loss[source] = _add(loss[source], decay.rate_per_s)

    def commutator(a: int, b: int) -> _Pair:
        """(H rho - rho H)_ab without the energies."""
        total: _Pair = (None, None)
        for c in range(n):
            if (a, c) in h:
                term = _product(h[a, c], parts[c, b])
                total = (_add(total[0], term[0]), _add(total[1], term[1]))
            if (c, b) in h:
                term = _product(parts[a, c], h[c, b])
                total = (_add(total[0], term[0], -1.0), _add(total[1], term[1], -1.0))
        return total

    out: list[_Part] = []
    for j in range(n):
        change = commutator(j, j)[1]  # -i times an imaginary number
        loss_j = _mul(loss[j], rho[j])
        change = _add(change, loss_j, -1.0)
        for decay in system.decays:
            if system.index(decay.target) == j:
                change = _add(change, _mul(decay.rate_per_s, rho[system.index(decay.source)]))
        out.append(change)
    for a, b in pairs:
        real, imag = commutator(a, b)
        energy = _shift(lights, a, b)
        if rotating:
            energy = _add(system.energies_rad_s[a] - system.energies_rad_s[b], energy)
        real, imag = _add(real, _mul(energy, parts[a, b][0])), _add(imag, _mul(energy, parts[a, b][1]))
        damping: _Part = None
        for level in (a, b):
            damping = _add(damping, _mul(jnp.asarray(0.5), loss[level]))
        for d in system.dephasings:
            square = (d.weights[a] - d.weights[b]) ** 2
            damping = _add(damping, square * d.rate_per_s if square else None)
        out.append(_add(imag, _mul(damping, parts[a, b][0]), -1.0))
        out.append(_add(_negative(real), _mul(damping, parts[a, b][1]), -1.0))
    return out


def schroedinger_components(
    system: LevelSystem, drives: list[Drive], amplitudes: Sequence[_Part], *, rotating: bool
) -> list[_Part]:
    """d c / dt component by component, `i dc/dt = H c`; None and `rotating` as for `lindblad_components`."""
    n = len(system.levels)
    h = _hamiltonian(system, drives)
    lights = _lights(system, h)
    reals: list[_Part] = []
    imags: list[_Part] = []
    for a in range(n):
        energy = _add(system.energies_rad_s[a] if rotating else None, _shift(lights, a))
        real: _Part = _mul(energy, amplitudes[a])
        imag: _Part = _mul(energy, amplitudes[n + a])
        for b in range(n):
            if (a, b) in h:
                term = _product(h[a, b], (amplitudes[b], amplitudes[n + b]))
                real, imag = _add(real, term[0]), _add(imag, term[1])
        reals.append(imag)
        imags.append(_negative(real))
    return reals + imags


def turning(system: LevelSystem, drives: list[Drive], time_s: Float[Array, "..."]) -> list[Drive]:
    """Drives in the interaction picture, `H[to, from] exp(i (E_to - E_from) t)`, a time after its start."""
    turned = []
    for (source, target), drive in zip(system.couplings, drives, strict=True):
        energy = system.energies_rad_s[system.index(target)] - system.energies_rad_s[system.index(source)]
        # Without the barrier the compiler computes both anew for each of the lanes that share a time.
        real, imag = _product((drive.real, drive.imag), lax.optimization_barrier(cos_sin(energy * time_s)))
        assert real is not None  # a drive has a real part
        turned.append(Drive(real, imag))
    return turned


def turned_back(
    system: LevelSystem,
    state: Float[Array, "saves kept ..."],
    time_s: Float[Array, "saves ..."],
    kept: tuple[int, ...],
    *,
    pure: bool,
) -> Float[Array, "saves kept ..."]:
    """State in the rotating frame of the graph, a time after the start of the interaction picture.

    `kept` names the components that are there; of a complex number always both.
    """
    n = len(system.levels)
    if pure:
        turning_pairs = [(j, n + j, system.energies_rad_s[j]) for j in range(n)]
    else:
        turning_pairs = [
            (n + 2 * k, n + 2 * k + 1, system.energies_rad_s[a] - system.energies_rad_s[b])
            for k, (a, b) in enumerate(combinations(range(n), 2))
        ]
    turning_pairs = [(kept.index(real), kept.index(imag), e) for real, imag, e in turning_pairs if real in kept]
    if not turning_pairs:
        return state
    reals, imags, energies = zip(*turning_pairs, strict=True)
    real, imag = state[:, np.array(reals)], state[:, np.array(imags)]
    cos, sin = cos_sin(jnp.stack(energies) * time_s[:, None])
    turned = state.at[:, np.array(reals)].set(cos * real + sin * imag)
    return turned.at[:, np.array(imags)].set(cos * imag - sin * real)


def pack_density(
    rho: Complex[np.ndarray, "levels levels ..."] | Float[np.ndarray, "levels levels ..."],
) -> Float[np.ndarray, "components ..."]:
    """Real components of a density matrix; it must be Hermitian."""
    rho = np.asarray(rho, dtype=complex)
    if not np.allclose(rho, rho.conj().swapaxes(0, 1), atol=1e-12):
        raise ValueError("the density matrix must be Hermitian, but differs from its adjoint by more than 1e-12.")
    off = [part for a, b in combinations(range(len(rho)), 2) for part in (rho[a, b].real, rho[a, b].imag)]
    return np.stack([*(rho[j, j].real for j in range(len(rho))), *off])


def unpack_density(components: Float[Array, "components ..."], levels: int) -> Complex[Array, "levels levels ..."]:
    """The density matrix from its real components."""
    rows = [[components[j] + 0j if i == j else None for j in range(levels)] for i in range(levels)]
    for k, (a, b) in enumerate(combinations(range(levels), 2)):
        value = components[levels + 2 * k] + 1j * components[levels + 2 * k + 1]
        rows[a][b], rows[b][a] = value, value.conj()
    return jnp.stack([jnp.stack(row) for row in rows])
