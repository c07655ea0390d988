"""Atomic structure: records of levels, transitions and ions, and the quantities derived from them.

Only what was measured goes into a record; what follows from it (mass, wavelengths, linewidths, recoil, hyperfine
branching, g_F, Rabi frequencies) is computed. Each number says how it reached its table: "read" its source was read,
"abstract" only the abstract was, "second-hand" another source quotes it, "recalled" nobody checked it, "derived" it
follows there. The table of 171Yb+ is in `twin.ion`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from scipy import constants

Spin = int | float | Fraction
NUCLEAR_SPIN = Fraction(1, 2)
PROVENANCE = ("read", "abstract", "second-hand", "recalled", "derived")
_BOHR_MAGNETON_HZ_PER_TESLA = constants.value("Bohr magneton in Hz/T")


@dataclass(frozen=True)
class Datum:
    """One published number; its unit is the suffix of the name that holds it. A missing uncertainty has its reason."""

    value: float
    uncertainty: float | None
    citations: tuple[int, ...]
    provenance: str
    note: str = ""

    def __post_init__(self):
        if not math.isfinite(self.value):
            raise ValueError(f"`value` must be a finite number, but is {self.value}.")
        if self.uncertainty is None and not self.note:
            raise ValueError(f"The datum {self.value} has no uncertainty: `note` must say why.")
        if self.uncertainty is not None and not (math.isfinite(self.uncertainty) and self.uncertainty >= 0):
            raise ValueError(f"`uncertainty` of {self.value} must be zero or positive, but is {self.uncertainty}.")
        if self.provenance.split(":")[0] not in PROVENANCE:
            raise ValueError(f"`provenance` must begin with one of {PROVENANCE}, but is {self.provenance!r}.")
        if not self.citations:
            raise ValueError(f"The datum {self.value} needs at least one citation [n].")


@dataclass(frozen=True)
class Level:
    """Fine-structure level. `hyperfine_splitting_hz` is E(F=J+1/2) - E(F=J-1/2): negative where it is inverted."""

    label: str
    j: Fraction
    lifetime_s: Datum | None
    hyperfine_splitting_hz: Datum | None
    g_j: Datum | None
    note: str = ""

    def __post_init__(self):
        if self.j <= 0 or self.j.denominator != 2:
            raise ValueError(f"`j` of level {self.label} must be 1/2, 3/2, 5/2, ..., but is {self.j}.")
        if self.lifetime_s is not None and self.lifetime_s.value <= 0:
            raise ValueError(f"`lifetime_s` of level {self.label} must be positive, but is {self.lifetime_s.value}.")
        if None in (self.lifetime_s, self.hyperfine_splitting_hz, self.g_j) and not self.note:
            raise ValueError(f"Level {self.label} lacks a number: `note` must say which and why.")

    @property
    def hyperfine_a_hz(self) -> float:
        """Magnetic-dipole constant A = [E(J+1/2) - E(J-1/2)] / (J+1/2), the interval rule for I = 1/2."""
        return _known(self.hyperfine_splitting_hz, f"the hyperfine splitting of {self.label}") / float(self.j + 1 / 2)


@dataclass(frozen=True)
class Transition:
    """Line of order `multipole` (1, 2, 3 for E1, E2, E3); `branching` is its share of the upper level's decay."""

    label: str
    lower: str
    upper: str
    multipole: int
    branching: Datum | None
    measured_frequency_hz: Datum | None = None
    measured_wavelength_m: Datum | None = None
    component: str = "fine-structure line"

    def __post_init__(self):
        measured = [d for d in (self.measured_frequency_hz, self.measured_wavelength_m) if d is not None]
        if len(measured) != 1 or measured[0].value <= 0:
            raise ValueError(f"Transition {self.label} needs one positive number, its frequency or its wavelength.")
        if self.branching is not None and not 0 <= self.branching.value <= 1:
            raise ValueError(f"`branching` of {self.label} must lie in [0, 1], but is {self.branching.value}.")

    @property
    def frequency_hz(self) -> float:
        """Frequency, as measured or c / wavelength."""
        datum = self.measured_frequency_hz
        return constants.c / self.wavelength_m if datum is None else datum.value

    @property
    def wavelength_m(self) -> float:
        """Vacuum wavelength, as measured or c / frequency."""
        datum = self.measured_wavelength_m
        return constants.c / self.frequency_hz if datum is None else datum.value

    @property
    def wavenumber_rad_m(self) -> float:
        """|k| = 2 pi / wavelength, in vacuum."""
        return 2 * math.pi / self.wavelength_m


@dataclass(frozen=True)
class Ion:
    """Singly charged ion with nuclear spin 1/2: its cited data and what follows from them.

    Args:
        other_values: further published values, not used in formulas, under "<level or transition>.<quantity>.<which>".
    Raises:
        ValueError: a label does not resolve, branching ratios do not sum to one, a citation is missing, ...
    """

    name: str
    neutral_mass_u: Datum
    ionization_energy_ev: Datum
    levels: tuple[Level, ...]
    transitions: tuple[Transition, ...]
    other_values: Mapping[str, Datum]
    references: Mapping[int, str]

    def __post_init__(self):
        labels = [x.label for x in (*self.levels, *self.transitions)]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"The label {label!r} is used more than once.")
        for key in self.other_values:
            if key.split(".")[0] not in labels:
                raise ValueError(f"The value {key!r} must begin with the label of a level or transition.")
        for name, datum in self.data().items():
            for n in datum.citations:
                if n not in self.references:
                    raise ValueError(f"{name} cites [{n}], which is not in `references`.")
        for line in self.transitions:
            lower, upper = self.level(line.lower), self.level(line.upper)
            if not abs(upper.j - lower.j) <= line.multipole <= upper.j + lower.j:
                raise ValueError(f"Transition {line.label}: a field of order {line.multipole} cannot couple its J.")
        for level in self.levels:
            shares = [line.branching for line in self.transitions if line.upper == level.label]
            total = sum(share.value for share in shares if share is not None)
            complete = bool(shares) and None not in shares
            if (complete and abs(total - 1) > 1e-9) or (not complete and total > 0):
                raise ValueError(f"The branching ratios of {level.label} must sum to one, but sum to {total}.")
            if shares and not complete and not level.note:
                raise ValueError(f"The branching of {level.label} is not tabulated: its `note` must say why.")

    def data(self) -> dict[str, Datum]:
        """Every number with its name, the unit as suffix: the table to print."""
        rows = {"neutral_mass_u": self.neutral_mass_u, "ionization_energy_ev": self.ionization_energy_ev}
        fields = ("lifetime_s", "hyperfine_splitting_hz", "g_j")
        fields += ("branching", "measured_frequency_hz", "measured_wavelength_m")
        for item in (*self.levels, *self.transitions):
            found = {f"{item.label}.{field}": getattr(item, field, None) for field in fields}
            rows |= {name: datum for name, datum in found.items() if datum is not None}
        return rows | dict(self.other_values)

    def level(self, label: str) -> Level:
        """Level of this label."""
        return _find(self.levels, label, "level")

    def transition(self, label: str) -> Transition:
        """Transition of this label."""
        return _find(self.transitions, label, "transition")

    @property
    def mass_kg(self) -> float:
        """Ion mass: neutral atom minus one electron. The electron's binding energy would add 3.9e-11 of it."""
        return self.neutral_mass_u.value * constants.atomic_mass - constants.electron_mass

    def decay_rate_per_s(self, level: str) -> float:
        """Total decay rate 1/tau of a level."""
        return 1 / _known(self.level(level).lifetime_s, f"the lifetime of {level}")

    def natural_linewidth_hz(self, level: str) -> float:
        """Natural linewidth (full width at half maximum) 1/(2 pi tau)."""
        return self.decay_rate_per_s(level) / (2 * math.pi)

    def hyperfine_branching(self, transition: str, upper_f: Spin) -> dict[Fraction, Fraction]:
        """Decay of one upper F over the lower F, exact: (2J'+1)(2F+1) {J' F' I; F J k}^2, whatever the upper m_F.

        Args:
            upper_f: F' of the upper level.
        Returns:
            {F: probability} over both lower F; sums to one.
        """
        line = self.transition(transition)
        lower, upper = self.level(line.lower), self.level(line.upper)
        up = _check_f(upper, upper_f)
        return {
            f: (2 * upper.j + 1) * (2 * f + 1) * six_j_squared(upper.j, up, NUCLEAR_SPIN, f, lower.j, line.multipole)
            for f in (lower.j - NUCLEAR_SPIN, lower.j + NUCLEAR_SPIN)
        }

    def partial_rate_per_s(self, transition: str, upper_f: Spin, lower_f: Spin) -> float:
        """Einstein rate from any sublevel of upper F to all sublevels of lower F."""
        line = self.transition(transition)
        share = self.hyperfine_branching(transition, upper_f)[_check_f(self.level(line.lower), lower_f)]
        branching = _known(line.branching, f"the branching of {transition}")
        return self.decay_rate_per_s(line.upper) * branching * float(share)

    def recoil_frequency_hz(self, transition: str) -> float:
        """Recoil frequency hbar k^2 / (2 m) / (2 pi)."""
        return constants.hbar * self.transition(transition).wavenumber_rad_m ** 2 / (4 * math.pi * self.mass_kg)

    def zero_point_size_m(self, secular_hz: float) -> float:
        """Rms size of the motional ground state, sqrt(hbar / (2 m omega)), omega = 2 pi secular_hz."""
        _check_positive(secular_hz=secular_hz)
        return (constants.hbar / (4 * math.pi * self.mass_kg * secular_hz)) ** 0.5

    def lamb_dicke(self, transition: str, secular_hz: float, cos_angle: float = 1.0) -> float:
        """Lamb-Dicke parameter of one ion, |k| x0 cos(angle between beam and motion)."""
        return self.transition(transition).wavenumber_rad_m * cos_angle * self.zero_point_size_m(secular_hz)

    def doppler_nbar(self, secular_hz: float, cooling_level: str = "P1/2") -> float:
        """Mean phonon number at the Doppler limit, Gamma / (2 omega)."""
        _check_positive(secular_hz=secular_hz)
        return self.natural_linewidth_hz(cooling_level) / (2 * secular_hz)

    def doppler_temperature_k(self, cooling_level: str = "P1/2") -> float:
        """Doppler limit hbar Gamma / (2 k_B)."""
        return constants.h * self.natural_linewidth_hz(cooling_level) / (2 * constants.k)

    def saturation_intensity_w_m2(self, transition: str, lifetime_s: float | None = None) -> float:
        """I_sat = pi h c A / (3 lambda^3) for the line's partial rate A = branching / tau.

        Args:
            lifetime_s: tau, where another value than the level's own is wanted.
        """
        line = self.transition(transition)
        tau_s = 1 / self.decay_rate_per_s(line.upper) if lifetime_s is None else lifetime_s
        _check_positive(lifetime_s=tau_s)
        rate_per_s = _known(line.branching, f"the branching of {transition}") / tau_s
        return math.pi * constants.h * constants.c * rate_per_s / (3 * line.wavelength_m**3)

    def g_f(self, level: str, f: Spin) -> float:
        """Lande g_F = g_J [F(F+1) + J(J+1) - I(I+1)] / [2 F(F+1)] (nuclear g_I, a few 1e-4 of g_J, left out)."""
        at = self.level(level)
        f = _check_f(at, f)
        if f == 0:
            return 0.0
        spins = f * (f + 1) + at.j * (at.j + 1) - NUCLEAR_SPIN * (NUCLEAR_SPIN + 1)
        return _known(at.g_j, f"g_J of {level}") * float(spins / (2 * f * (f + 1)))

    def zeeman_hz_per_tesla(self, level: str, f: Spin, m_f: Spin) -> float:
        """Linear Zeeman shift g_F m_F mu_B / h, in Hz per tesla."""
        if abs(m_f) > f or (Fraction(m_f) - Fraction(f)).denominator != 1:
            raise ValueError(f"`m_f` must run from -F to F = {f} in steps of one, but is {m_f}.")
        return self.g_f(level, f) * float(m_f) * _BOHR_MAGNETON_HZ_PER_TESLA

    def clock_shift_hz_per_tesla2(self) -> float:
        """Quadratic shift of S1/2 F=0 - F=1, m_F=0, (g_J mu_B / h)^2 / (2 nu0): second order of Breit-Rabi, no g_I."""
        ground = self.level("S1/2")
        slope = _known(ground.g_j, "g_J of S1/2") * _BOHR_MAGNETON_HZ_PER_TESLA
        return slope**2 / (2 * _known(ground.hyperfine_splitting_hz, "the splitting of S1/2"))

    def sidebands_hz(self) -> dict[str, float]:
        """Modulation that brings light on one hyperfine component onto the other one in use."""
        labels = ("S1/2", "P1/2", "D3/2", "3[3/2]1/2")
        s12, p12, d32, bracket = (_known(self.level(x).hyperfine_splitting_hz, f"the splitting of {x}") for x in labels)
        return {"cooling": s12 + p12, "pumping": p12, "repump": d32 - bracket}


def _find(items, label: str, kind: str):
    for item in items:
        if item.label == label:
            return item
    raise ValueError(f"There is no {kind} {label!r}: known are {', '.join(item.label for item in items)}.")


def _known(datum: Datum | None, what: str) -> float:
    if datum is None:
        raise ValueError(f"The table has no value for {what}: see the note of its level.")
    return datum.value


def _check_f(level: Level, f: Spin) -> Fraction:
    if Fraction(f) not in (level.j - NUCLEAR_SPIN, level.j + NUCLEAR_SPIN):
        low = level.j - NUCLEAR_SPIN
        raise ValueError(f"F of level {level.label} must be {low} or {low + 1}, but is {f}.")
    return Fraction(f)


def _check_positive(**values: float):
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive and finite, but is {value}.")


def six_j_squared(a: Spin, b: Spin, c: Spin, d: Spin, e: Spin, f: Spin) -> Fraction:
    """Square of the Wigner 6j symbol {a b c; d e f}, exact, by the formula of G. Racah, Phys. Rev. 62, 438 (1942)."""
    a, b, c, d, e, f = (Fraction(x) for x in (a, b, c, d, e, f))
    triads = ((a, b, c), (a, e, f), (d, b, f), (d, e, c))
    if any(sum(t).denominator != 1 or not abs(t[0] - t[1]) <= t[2] <= t[0] + t[1] for t in triads):
        return Fraction(0)
    low = [int(sum(t)) for t in triads]
    high = [int(a + b + d + e), int(b + c + e + f), int(c + a + f + d)]
    racah_sum = Fraction(0)
    for t in range(max(low), min(high) + 1):
        denominator = math.prod(math.factorial(n) for n in (*(t - x for x in low), *(x - t for x in high)))
        racah_sum += Fraction((-1) ** t * math.factorial(t + 1), denominator)
    square = racah_sum**2
    for x, y, z in triads:
        numerator = math.prod(math.factorial(int(n)) for n in (x + y - z, x - y + z, y + z - x))
        square *= Fraction(numerator, math.factorial(int(x + y + z + 1)))
    return square


def directivity(multipole: int, delta_m: int, angle_rad: float) -> float:
    """8 pi x normalised emission pattern of one Delta m, into the direction and for the best polarisation there.

    Args:
        multipole: 1 (E1) or 2 (E2).
        delta_m: change of m, 0 to +-multipole.
        angle_rad: angle between the wave vector and the quantisation axis.
    Returns:
        Dimensionless; integrates to 8 pi over the sphere.
    """
    cos2 = math.cos(angle_rad) ** 2
    patterns = {
        (1, 0): 3 * (1 - cos2),
        (1, 1): 1.5 * (1 + cos2),
        (2, 0): 15 * cos2 * (1 - cos2),
        (2, 1): 2.5 * (1 - 3 * cos2 + 4 * cos2**2),
        (2, 2): 2.5 * (1 - cos2**2),
    }
    if (multipole, abs(delta_m)) not in patterns:
        raise ValueError(f"No pattern for `multipole` {multipole}, `delta_m` {delta_m}: E1 and E2, |delta_m| <= order.")
    return patterns[multipole, abs(delta_m)]


def peak_intensity_w_m2(power_w: float, waist_m: float) -> float:
    """Intensity on the axis of a Gaussian beam, 2 P / (pi w^2), w its 1/e^2 intensity radius."""
    _check_positive(power_w=power_w, waist_m=waist_m)
    return 2 * power_w / (math.pi * waist_m**2)


def rabi_frequency_rad_s(
    wavelength_m: float, partial_rate_per_s: float, intensity_w_m2: float, directivity: float
) -> float:
    """Rabi frequency of a sublevel pair, any multipole: Omega^2 = Dir lambda^2 A I / (2 pi hbar omega).

    Args:
        wavelength_m: vacuum wavelength.
        partial_rate_per_s: Einstein rate A from this upper sublevel to this lower sublevel.
        intensity_w_m2: intensity at the ion.
        directivity: `directivity(...)` for full use of the polarisation, less otherwise.
    Returns:
        Omega, rad/s: an upper bound for a real beam.
    """
    _check_positive(wavelength_m=wavelength_m, partial_rate_per_s=partial_rate_per_s, intensity_w_m2=intensity_w_m2)
    if not 0 <= directivity < math.inf:
        raise ValueError(f"`directivity` must be zero or positive, and finite, but is {directivity}.")
    omega_rad_s = 2 * math.pi * constants.c / wavelength_m
    square = directivity * wavelength_m**2 * partial_rate_per_s * intensity_w_m2
    return (square / (2 * math.pi * constants.hbar * omega_rad_s)) ** 0.5
