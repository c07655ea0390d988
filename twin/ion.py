"""Atomic data of 171Yb+: levels, transitions, lifetimes, branching, hyperfine and Zeeman data, a citation [n] on each.

Only what was measured is typed in; `twin.atom` computes what follows from it, and explains the words that say how each
number reached this table ("read", "second-hand", ...).
"""

from fractions import Fraction

from twin.atom import Datum, Ion, Level, Transition


def _rest(datum: Datum) -> Datum:
    """Share left by the only other decay of the level."""
    return Datum(1 - datum.value, datum.uncertainty, datum.citations, "derived: one minus the other share", datum.note)


REFERENCES = {
    1: "J. S. Coursey, D. J. Schwab, J. J. Tsai, R. A. Dragoset, Atomic Weights and Isotopic Compositions, NIST",
    2: "A. Kramida, Yu. Ralchenko, J. Reader and NIST ASD Team, NIST Atomic Spectra Database, Yb I and Yb II",
    3: "S. Olmschenk et al., Phys. Rev. A 76, 052314 (2007); arXiv:0708.0657",
    4: "S. Olmschenk et al., Phys. Rev. A 80, 022502 (2009); arXiv:0906.0586",
    5: "N. Yu and L. Maleki (2000), the 2D3/2 lifetime as quoted by [3]",
    6: "E. H. Pinnington, G. Rieger, J. A. Kernahan, Phys. Rev. A 56, 2421 (1997)",
    7: "E. H. Pinnington, R. W. Berends, Q. Ji, Phys. Rev. A 50, 2758 (1994)",
    8: "P. Taylor et al., Phys. Rev. A 56, 2699 (1997)",
    9: "P. Taylor et al., Phys. Rev. A 60, 2829 (1999)",
    10: "T. R. Tan, C. L. Edmunds, A. R. Milne, M. J. Biercuk, C. Hempel, Phys. Rev. A 104, L010802 (2021)",
    11: "R. Lange et al., Phys. Rev. Lett. 127, 213001 (2021), corrected by arXiv:2107.11229v2",
    12: "CIPM Recommendation 2 (CI-2015), kept in the 2017 list; F. Riehle et al., Metrologia 55, 188 (2018)",
    13: "N. Huntemann et al., Phys. Rev. Lett. 108, 090801 (2012); arXiv:1111.2446",
    14: "R. M. Godun et al., Phys. Rev. Lett. 113, 210801 (2014); arXiv:1407.0164",
    15: "CCTF Recommendation PSFS-2 (2021); H. S. Margolis et al., arXiv:2401.14537",
    16: "Han et al., arXiv:2501.09973 (2025)",
    17: "Appl. Phys. Lett. 125, 084002 (2024)",
    18: "A doctoral thesis on 171Yb+ (its ground-state table)",
    19: "An ion laboratory's table of 171Yb+ levels and lasers",
    20: "W. F. Meggers (1967), observed g factors as listed in [2]",
    21: "J. E. Sansonetti, W. C. Martin, J. Phys. Chem. Ref. Data 34, 1559 (2005)",
}

_TABLE = "second-hand: a species table"
_QUOTED = "second-hand: quoted by a species table"
_ONLY = Datum(1.0, 0.0, (2,), "derived: S1/2 is the only lower level it decays to")
_P_TO_D = Datum(0.00501, 0.00015, (3,), _QUOTED, "its analysis takes tau(P1/2) = 8.07 ns")
_BRACKET_TO_D = Datum(0.016, None, (2, 21), _QUOTED, "not quoted: one minus A tau of the 297 nm line, A without rating")

# fmt: off
YB171 = Ion(
    name="171Yb+",
    neutral_mass_u=Datum(170.9363302, 2.2e-6, (1,), _TABLE),
    ionization_energy_ev=Datum(6.254, None, (2,), "recalled: rounded", "not needed: 4e-11 of the mass"),
    levels=(
        Level("S1/2", Fraction(1, 2), lifetime_s=None, note="ground level: no lifetime",
              hyperfine_splitting_hz=Datum(12642812118.466, None, (18,), "read", "not quoted; 3 mHz below [17]"),
              g_j=Datum(2.002615, 7e-5, (16,), _QUOTED, "a calculation; no modern measurement is quoted")),
        Level("P1/2", Fraction(1, 2), g_j=None, note="g_J not tabulated",
              lifetime_s=Datum(8.12e-9, 0.02e-9, (4,), "abstract"),
              hyperfine_splitting_hz=Datum(2.105e9, None, (3,), _QUOTED, "not quoted")),
        Level("D3/2", Fraction(3, 2),
              lifetime_s=Datum(52.7e-3, 2.4e-3, (3, 5), _QUOTED, "its uncertainty is recalled, not checked"),
              hyperfine_splitting_hz=Datum(0.86e9, 0.02e9, (3,), _QUOTED),
              g_j=Datum(0.802, None, (20,), _QUOTED, "not quoted; the same list is 4.6e-3 below [16] for S1/2")),
        Level("D5/2", Fraction(5, 2), g_j=None, note="g_J and the branching to S1/2 and F7/2 not tabulated",
              lifetime_s=Datum(7.2e-3, 0.3e-3, (8,), _QUOTED, "measured in 172Yb+"),
              hyperfine_splitting_hz=Datum(-190.104e6, 3e3, (10,), _QUOTED, "inverted")),
        Level("F7/2", Fraction(7, 2),
              lifetime_s=Datum(9.96e7, 0.50e7, (11,), "abstract", "v2; the printed 4.98(25)e7 s is low by exactly 2"),
              hyperfine_splitting_hz=Datum(3620e6, 2e6, (9,), _QUOTED),
              g_j=Datum(1.145, None, (20,), _QUOTED, "not quoted; the Lande value is 8/7")),
        Level("3[3/2]1/2", Fraction(1, 2), g_j=None, note="g_J not tabulated",
              lifetime_s=Datum(37.7e-9, 0.5e-9, (7,), _QUOTED),
              hyperfine_splitting_hz=Datum(-2.2095e9, 1.1e6, (3,), _QUOTED, "inverted")),
        Level("1[5/2]5/2", Fraction(5, 2), lifetime_s=None, hyperfine_splitting_hz=None, g_j=None,
              note="lifetime, branching, splitting and g_J not tabulated"),
        Level("1[3/2]3/2", Fraction(3, 2), lifetime_s=None, g_j=None,
              hyperfine_splitting_hz=Datum(1.7e9, None, (19,), "read", "not quoted, nor which F is above"),
              note="lifetime, branching and g_J not tabulated"),
    ),
    transitions=(
        Transition("369", "S1/2", "P1/2", 1, _rest(_P_TO_D), measured_wavelength_m=Datum(
            369.5262e-9, None, (2,), _TABLE, "not quoted; level energies give 369.5243 nm")),
        Transition("2438", "D3/2", "P1/2", 1, _P_TO_D, measured_wavelength_m=Datum(
            2.438e-6, None, (3,), _QUOTED, "not quoted: rounded to 1 nm")),
        Transition("436", "S1/2", "D3/2", 2, _ONLY, component="F=0 - F=2", measured_frequency_hz=Datum(
            688358979309308.3, 0.42, (12,), "read", "relative uncertainty 6e-16")),
        Transition("411", "S1/2", "D5/2", 2, None, measured_wavelength_m=Datum(
            410.969769e-9, None, (2,), _TABLE, "not quoted; a level energy, not of one isotope or F")),
        Transition("467", "S1/2", "F7/2", 3, _ONLY, component="F=0 - F=3", measured_frequency_hz=Datum(
            642121496772645.0, 0.39, (12,), "read", "relative uncertainty 6e-16")),
        Transition("935", "D3/2", "3[3/2]1/2", 1, _BRACKET_TO_D, measured_wavelength_m=Datum(
            935.187e-9, None, (2,), _TABLE, "not quoted; level energies give 935.186 nm")),
        Transition("297", "S1/2", "3[3/2]1/2", 1, _rest(_BRACKET_TO_D), measured_wavelength_m=Datum(
            297.143e-9, None, (2, 21), _TABLE, "not quoted")),
        Transition("638", "F7/2", "1[5/2]5/2", 1, None, measured_wavelength_m=Datum(
            638.62e-9, None, (2,), _TABLE, "not quoted; from level energies")),
        Transition("760", "F7/2", "1[3/2]3/2", 2, None, measured_wavelength_m=Datum(
            760e-9, None, (19,), "read", "not quoted: rounded to 1 nm")),
    ),
    other_values={
        "S1/2.hyperfine_splitting_hz.2024": Datum(12642812118.4690, 8e-4, (17,), _QUOTED),
        "S1/2.clock_shift_hz_per_gauss2.in_use": Datum(310.8, None, (18,), "read", "not quoted"),
        "S1/2.clock_shift_hz_per_gauss2.with_g_I": Datum(310.869, 0.022, (16,), _QUOTED),
        "P1/2.lifetime_s.1997": Datum(8.07e-9, 0.09e-9, (6,), _QUOTED),
        "D5/2.lifetime_s.F=2": Datum(7.1e-3, 0.4e-3, (10,), _QUOTED),
        "D5/2.lifetime_s.F=3": Datum(7.4e-3, 0.4e-3, (10,), _QUOTED),
        "F7/2.lifetime_s.as_printed_2021": Datum(4.98e7, 0.25e7, (11,), "abstract", "superseded: low by exactly 2"),
        "436.frequency_hz.2021": Datum(688358979309308.24, 0.14, (15,), "read", "relative uncertainty 2.0e-16"),
        "467.frequency_hz.2011": Datum(642121496772645.15, 0.52, (13,), "abstract"),
        "467.ratio_to_436.2014": Datum(0.93282940453096465, 3.1e-16, (14,), "second-hand: quoted by the CIPM list"),
    },
    references=REFERENCES,
)
# fmt: on
