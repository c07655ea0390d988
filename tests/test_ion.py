"""Atomic data of 171Yb+: reference values, independent oracles, and the refusal of corrupted data."""

import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import sympy
from scipy import constants
from sympy.physics.wigner import wigner_6j

from twin.atom import Datum, Level, directivity, peak_intensity_w_m2, rabi_frequency_rad_s, six_j_squared
from twin.ion import YB171

GAUSS_TESLA = 1e-4
HALF = Fraction(1, 2)
LAMBDA_436_M = YB171.transition("436").wavelength_m

REFERENCE_VALUES = [
    ("mass_kg", lambda: YB171.mass_kg, 2.838455433e-25, 1e-8),
    ("wavelength_436_nm", lambda: LAMBDA_436_M * 1e9, 435.517611, 1e-8),
    ("wavelength_467_nm", lambda: YB171.transition("467").wavelength_m * 1e9, 466.878090, 1e-8),
    ("linewidth_d32_hz", lambda: YB171.natural_linewidth_hz("D3/2"), 3.0200, 1e-4),
    ("linewidth_d52_hz", lambda: YB171.natural_linewidth_hz("D5/2"), 22.10, 1e-3),
    ("linewidth_p12_hz", lambda: YB171.natural_linewidth_hz("P1/2"), 19.600e6, 1e-3),
    ("linewidth_f72_hz", lambda: YB171.natural_linewidth_hz("F7/2"), 1.598e-9, 1e-3),
    ("recoil_436_hz", lambda: YB171.recoil_frequency_hz("436"), 6153.646, 1e-6),
    ("recoil_369_hz", lambda: YB171.recoil_frequency_hz("369"), 8547.8, 1e-5),
    ("recoil_467_hz", lambda: YB171.recoil_frequency_hz("467"), 5354.7, 1e-5),
    ("lamb_dicke_436_1mhz", lambda: YB171.lamb_dicke("436", 1e6), 0.078445, 1e-5),
    ("lamb_dicke_436_3mhz", lambda: YB171.lamb_dicke("436", 3e6), 0.045290, 2e-5),
    ("lamb_dicke_369_1mhz", lambda: YB171.lamb_dicke("369", 1e6), 0.092454, 1e-5),
    ("lamb_dicke_467_1mhz", lambda: YB171.lamb_dicke("467", 1e6), 0.073176, 1e-5),
    ("zero_point_size_nm", lambda: YB171.zero_point_size_m(1e6) * 1e9, 5.43741, 1e-6),
    ("zeeman_mhz_per_g", lambda: YB171.zeeman_hz_per_tesla("D3/2", 2, 1) * GAUSS_TESLA / 1e6, 0.84187, 1e-4),
    ("g_f_s12", lambda: YB171.g_f("S1/2", 1), 1.0013, 1e-4),
    ("clock_hz_per_g2", lambda: YB171.clock_shift_hz_per_tesla2() * GAUSS_TESLA**2, 310.70, 1e-5),
    ("hyperfine_hz", lambda: YB171.level("S1/2").hyperfine_splitting_hz.value, 12642812118.466, 1e-10),
    ("hyperfine_a_d52_hz", lambda: YB171.level("D5/2").hyperfine_a_hz, -63.368e6, 1e-6),
    ("doppler_nbar", lambda: YB171.doppler_nbar(1e6), 9.800, 1e-3),
    ("doppler_temperature_k", lambda: YB171.doppler_temperature_k(), 0.4703e-3, 1e-4),
    ("sideband_cooling_hz", lambda: YB171.sidebands_hz()["cooling"], 14.7e9, 5e-3),
    ("sideband_pumping_hz", lambda: YB171.sidebands_hz()["pumping"], 2.1e9, 5e-3),
    ("sideband_repump_hz", lambda: YB171.sidebands_hz()["repump"], 3.07e9, 1e-3),
]


@pytest.mark.parametrize(("compute", "expected", "tolerance"), [r[1:] for r in REFERENCE_VALUES], ids=lambda x: "")
def test_reference_value(compute, expected, tolerance):
    assert compute() == pytest.approx(expected, rel=tolerance, abs=0)


def test_clock_frequency_ratio_agrees_with_the_direct_measurement():
    ratio = YB171.transition("467").frequency_hz / YB171.transition("436").frequency_hz
    assert ratio == pytest.approx(0.932829404530965, rel=1e-14, abs=0)
    measured = YB171.other_values["467.ratio_to_436.2014"]
    assert ratio == pytest.approx(measured.value, rel=6e-16 * math.sqrt(2), abs=0)


def test_binding_energy_of_the_removed_electron_is_negligible():
    energy_j = YB171.ionization_energy_ev.value * constants.e
    assert energy_j / constants.c**2 < 1e-10 * YB171.mass_kg
    assert (YB171.mass_kg + constants.electron_mass) / constants.atomic_mass == pytest.approx(170.9363302, rel=1e-15)


def test_octupole_lifetime_is_the_corrected_one():
    corrected, printed = YB171.level("F7/2").lifetime_s, YB171.other_values["F7/2.lifetime_s.as_printed_2021"]
    assert corrected.value == pytest.approx(2 * printed.value, rel=1e-12)
    assert corrected.value / (365.25 * 86400) == pytest.approx(3.16, abs=0.005)


def test_other_published_values_agree_within_three_standard_uncertainties():
    data = YB171.data()
    for used, other in (
        ("P1/2.lifetime_s", "P1/2.lifetime_s.1997"),
        ("D5/2.lifetime_s", "D5/2.lifetime_s.F=2"),
        ("D5/2.lifetime_s", "D5/2.lifetime_s.F=3"),
        ("436.measured_frequency_hz", "436.frequency_hz.2021"),
        ("467.measured_frequency_hz", "467.frequency_hz.2011"),
    ):
        one, two = data[used], data[other]
        assert abs(one.value - two.value) < 3 * math.hypot(one.uncertainty, two.uncertainty), other
    newer_hz = data["S1/2.hyperfine_splitting_hz.2024"].value
    assert abs(newer_hz - data["S1/2.hyperfine_splitting_hz"].value) < 4e-3
    for name in ("in_use", "with_g_I"):
        per_gauss2 = data[f"S1/2.clock_shift_hz_per_gauss2.{name}"].value
        assert YB171.clock_shift_hz_per_tesla2() * GAUSS_TESLA**2 == pytest.approx(per_gauss2, rel=1e-3)  # no g_I


def test_redundant_lines_close():
    """Ritz combination: by way of D3/2 or directly, to 3[3/2]1/2 and to P1/2."""
    for direct, via in (("297", "935"), ("369", "2438")):
        summed = YB171.transition("436").frequency_hz + YB171.transition(via).frequency_hz
        assert YB171.transition(direct).frequency_hz == pytest.approx(summed, rel=1e-4)


@pytest.mark.parametrize(
    ("line", "upper_f", "expected"),
    [
        ("436", 2, (Fraction(2, 5), Fraction(3, 5))),
        ("436", 1, (0, 1)),
        ("369", 1, (Fraction(1, 3), Fraction(2, 3))),
        ("369", 0, (0, 1)),
        ("467", 3, (Fraction(4, 7), Fraction(3, 7))),
    ],
)
def test_hyperfine_branching_is_exact(line, upper_f, expected):
    assert tuple(YB171.hyperfine_branching(line, upper_f).values()) == expected


@pytest.mark.parametrize("line", [t.label for t in YB171.transitions])
def test_hyperfine_branching_sums_to_one(line):
    upper = YB171.level(YB171.transition(line).upper)
    for f in (upper.j - HALF, upper.j + HALF):
        assert sum(YB171.hyperfine_branching(line, f).values()) == 1


def test_six_j_squared_equals_sympy():
    halves = [Fraction(n, 2) for n in range(6)]
    seen = 0
    for a in halves:
        for b in halves:
            for c, f in ((HALF, 1), (HALF, 2), (Fraction(3, 2), 2), (1, 3)):
                for d in halves[::2]:
                    for e in (a - 1, a, a + 1):
                        square = six_j_squared(a, b, c, d, e, f)
                        if square == 0:
                            continue
                        seen += 1
                        args = [sympy.Rational(x.numerator, x.denominator) for x in map(Fraction, (a, b, c, d, e, f))]
                        assert wigner_6j(*args) ** 2 == sympy.Rational(square.numerator, square.denominator)
    assert seen > 40


def test_six_j_squared_vanishes_outside_the_triangle():
    assert six_j_squared(1, 1, 3, 1, 1, 1) == 0 == wigner_6j(1, 1, 3, 1, 1, 1)
    assert six_j_squared(HALF, 1, 1, 1, 1, 1) == 0


def test_lande_factors():
    assert YB171.g_f("D3/2", 2) == pytest.approx(0.75 * 0.802)
    assert YB171.g_f("S1/2", 0) == 0
    landed = replace(YB171.level("F7/2"), g_j=Datum(8 / 7, 0.0, (20,), "derived"))
    ion = replace(YB171, levels=tuple(landed if x.label == "F7/2" else x for x in YB171.levels))
    assert ion.g_f("F7/2", 3) == pytest.approx(9 / 7, rel=1e-14)
    assert YB171.zeeman_hz_per_tesla("D3/2", 2, 0) == 0
    assert YB171.zeeman_hz_per_tesla("S1/2", 0, 0) == 0
    assert YB171.zeeman_hz_per_tesla("D3/2", 2, -2) == -2 * YB171.zeeman_hz_per_tesla("D3/2", 2, 1)


def test_clock_shift_is_the_curvature_of_the_diagonalized_hamiltonian():
    """Independent: H/h = A I.S + g_J mu_B B S_z for two spins 1/2, m_F = 0 block, by eigenvalues."""
    a_hz = YB171.level("S1/2").hyperfine_a_hz
    field_tesla = 0.01  # large, so that the shift stands far above rounding
    zeeman_hz = YB171.level("S1/2").g_j.value * constants.value("Bohr magneton in Hz/T") * field_tesla
    low, high = np.linalg.eigvalsh([[-a_hz / 4 + zeeman_hz / 2, a_hz / 2], [a_hz / 2, -a_hz / 4 - zeeman_hz / 2]])
    shift_hz = (high - low) - a_hz
    expected = a_hz * (math.sqrt(1 + 2 * YB171.clock_shift_hz_per_tesla2() * field_tesla**2 / a_hz) - 1)
    assert shift_hz == pytest.approx(expected, rel=1e-9)


def test_saturation_intensity():
    tau_s = YB171.other_values["P1/2.lifetime_s.1997"].value
    assert YB171.saturation_intensity_w_m2("369", tau_s) * 0.1 == pytest.approx(
        50.83, rel=1e-3
    )  # 1 W/m^2 = 0.1 mW/cm^2
    own = YB171.saturation_intensity_w_m2("369")
    assert own == pytest.approx(YB171.saturation_intensity_w_m2("369", 8.12e-9))


def test_rabi_frequency_of_the_quadrupole_example():
    rate_per_s = YB171.partial_rate_per_s("436", upper_f=2, lower_f=0)
    assert rate_per_s == pytest.approx(7.590, rel=1e-4)
    assert directivity(2, 0, math.pi / 4) == pytest.approx(3.75)
    intensity_w_m2 = peak_intensity_w_m2(power_w=1e-3, waist_m=20e-6)
    omega_rad_s = rabi_frequency_rad_s(LAMBDA_436_M, rate_per_s, intensity_w_m2, directivity(2, 0, math.pi / 4))
    assert omega_rad_s / (2 * math.pi) == pytest.approx(275.6e3, rel=1e-4)


def test_rabi_frequency_dipole_limit():
    line = YB171.transition("369")
    rate_per_s = 1 / 8.07e-9
    omega_rad_s = rabi_frequency_rad_s(line.wavelength_m, rate_per_s, 500.0, directivity(1, 0, math.pi / 2))
    light_rad_s = 2 * math.pi * line.frequency_hz
    expected = 6 * math.pi * constants.c**2 * rate_per_s * 500.0 / (constants.hbar * light_rad_s**3)
    assert omega_rad_s**2 == pytest.approx(expected, rel=1e-12)


def test_saturation_is_where_rabi_frequency_is_gamma_over_sqrt_two():
    rate_per_s = YB171.decay_rate_per_s("P1/2") * YB171.transition("369").branching.value
    intensity_w_m2 = YB171.saturation_intensity_w_m2("369")
    omega_rad_s = rabi_frequency_rad_s(YB171.transition("369").wavelength_m, rate_per_s, intensity_w_m2, 3.0)
    assert omega_rad_s == pytest.approx(rate_per_s / math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize(("multipole", "delta_m"), [(1, 0), (1, 1), (1, -1), (2, 0), (2, 1), (2, -2)])
def test_directivity_integrates_to_eight_pi(multipole, delta_m):
    nodes, weights = np.polynomial.legendre.leggauss(8)
    pattern = [directivity(multipole, delta_m, math.acos(x)) for x in nodes]
    assert 2 * math.pi * np.dot(weights, pattern) == pytest.approx(8 * math.pi, rel=1e-12)


def test_directivity_at_the_named_angles():
    assert directivity(2, 1, 0.0) == pytest.approx(5)
    assert directivity(2, 2, math.pi / 2) == pytest.approx(2.5)


def test_every_number_has_citation_uncertainty_and_unit():
    units = ("_s", "_hz", "_hz_per_gauss2", "_m", "_u", "_ev", "g_j", "branching", "ratio_to_436")
    for name, datum in YB171.data().items():
        quantity = name if "." not in name else name.split(".")[1]
        assert quantity.endswith(units), name
        assert datum.citations and all(n in YB171.references for n in datum.citations), name
        assert datum.uncertainty is not None or datum.note.startswith("not "), name
    cited = {n for datum in YB171.data().values() for n in datum.citations}
    assert cited == set(YB171.references)


def _with_level(which, **changes):
    return replace(YB171, levels=tuple(replace(x, **changes) if x.label == which else x for x in YB171.levels))


def _with_line(label, **changes):
    return replace(
        YB171, transitions=tuple(replace(x, **changes) if x.label == label else x for x in YB171.transitions)
    )


GOOD = YB171.level("D3/2").lifetime_s

CORRUPTED = [
    (lambda: replace(GOOD, value=math.nan), "`value` must be a finite number, but is nan"),
    (lambda: replace(GOOD, uncertainty=-1e-3), "`uncertainty` of 0.0527 must be zero or positive, but is -0.001"),
    (lambda: replace(GOOD, uncertainty=math.nan), "`uncertainty` of 0.0527 must be zero or positive, but is nan"),
    (lambda: replace(GOOD, uncertainty=None, note=""), "`note` must say why"),
    (lambda: replace(GOOD, citations=()), "needs at least one citation"),
    (lambda: replace(GOOD, provenance="somewhere"), "`provenance` must begin with one of"),
    (lambda: _with_level("D3/2", lifetime_s=replace(GOOD, value=-52.7e-3)), "`lifetime_s` of level D3/2 must be pos"),
    (lambda: _with_level("D3/2", lifetime_s=replace(GOOD, citations=(99,))), r"D3/2.lifetime_s cites \[99\]"),
    (lambda: _with_level("D3/2", lifetime_s=None), "Level D3/2 lacks a number"),
    (lambda: _with_level("D3/2", j=Fraction(1)), "`j` of level D3/2 must be 1/2"),
    (lambda: _with_level("P1/2", label="S1/2"), "label 'S1/2' is used more than once"),
    (lambda: _with_level("D5/2", note="g_J unknown", label="2D5/2"), "'D5/2.lifetime_s.F=2' must begin with the label"),
    (lambda: _with_line("436", upper="D7/2"), "There is no level 'D7/2': known are S1/2"),
    (lambda: _with_line("436", multipole=3), "Transition 436: a field of order 3 cannot"),
    (lambda: _with_line("2438", branching=Datum(0.0501, 0.0015, (3,), "read")), "ratios of P1/2 must sum to one"),
    (lambda: _with_line("2438", branching=None), "ratios of P1/2 must sum to one"),
    (lambda: _with_line("2438", branching=Datum(1.2, 0.0, (3,), "read")), r"`branching` of 2438 must lie in \[0, 1\]"),
    (lambda: _with_line("436", measured_frequency_hz=None), "Transition 436 needs one positive number"),
    (lambda: _with_line("436", measured_wavelength_m=Datum(435e-9, 0.0, (2,), "read")), "needs one positive number"),
    (lambda: replace(YB171, other_values={"H.lifetime_s": GOOD}), "'H.lifetime_s' must begin with the label"),
]


@pytest.mark.parametrize(("corrupt", "sentence"), CORRUPTED)
def test_corrupted_data_are_refused(corrupt, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        corrupt()
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: YB171.level("D7/2"), "no level 'D7/2'"),
        (lambda: YB171.transition("370"), "no transition '370'"),
        (lambda: YB171.natural_linewidth_hz("1[5/2]5/2"), "no value for the lifetime of"),
        (lambda: YB171.partial_rate_per_s("411", 2, 0), "no value for the branching of 411"),
        (lambda: YB171.g_f("P1/2", 1), "no value for g_J of P1/2"),
        (lambda: YB171.hyperfine_branching("436", 3), "F of level D3/2 must be 1 or 2, but is 3"),
        (lambda: YB171.zeeman_hz_per_tesla("D3/2", 2, 3), "`m_f` must run from -F to F = 2"),
        (lambda: YB171.zero_point_size_m(-1e6), "`secular_hz` must be positive"),
        (lambda: YB171.doppler_nbar(math.nan), "`secular_hz` must be positive"),
        (lambda: peak_intensity_w_m2(1e-3, 0.0), "`waist_m` must be positive"),
        (lambda: rabi_frequency_rad_s(435e-9, 7.6, 1e6, -1.0), "`directivity` must be zero or positive"),
        (lambda: directivity(3, 0, 0.0), "No pattern for `multipole` 3"),
    ],
)
def test_bad_questions_are_answered_with_a_sentence(ask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask()


def test_ground_level_may_lack_a_lifetime_only_with_a_note():
    with pytest.raises(ValueError, match="`note` must say which and why"):
        Level("S1/2", HALF, None, None, None)


def test_import_needs_no_jax():
    code = "import sys, twin.ion; print(sorted({'jax', 'equinox', 'xarray', 'matplotlib', 'sympy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
