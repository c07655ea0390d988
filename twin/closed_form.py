"""Exact solutions of the three-level ion, and where they hold.

Levels by role: v ("vacuum"), s ("signal"), m ("memory"). Pulse 1 couples v and s, pulse 2 couples s and m; in the
rotating frame, resonant unless said otherwise, and with hbar = 1,

    H(t) = 1/2 [ Omega_1(t) e^{-i phi_1} |s><v| + Omega_2(t) e^{-i phi_2} |m><s| + h.c. ]

As long as it acts alone, a pulse acts through its area theta_k = int Omega_k dt only. Gaussian pulses are
Omega_k(t) = Omega_k0 exp[-(t - t_k)^2/(2 sigma_k^2)]. The ion starts in v (Lambda and ladder schemes) or in s
(V scheme). All functions broadcast their arguments; areas and phases are in rad. Below, B_k is the coupling of pulse k
without its Omega_k/2, a Pauli matrix on the two levels it couples: B_1 = e^{-i phi_1} |s><v| + h.c.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.scipy.special import erfc
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Float, Real

from twin.trigonometry import cos_sin, transfer_area

Start = Literal["v", "s"]
Input = Real[ArrayLike, "*#batch"]
Output = Float[Array, "..."]
Populations = tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]
Amplitudes = tuple[Complex[Array, "..."], Complex[Array, "..."], Complex[Array, "..."]]


def _broadcast(*values: ArrayLike) -> tuple[Array, ...]:
    return tuple(jnp.broadcast_arrays(*(jnp.asarray(value, float) for value in values)))


def gaussian_area(peak_rad_s: Input, sigma_s: Input) -> Output:
    """Area of a Gaussian pulse in rad, theta = sqrt(2 pi) Omega_0 sigma, with sigma that of the Rabi envelope."""
    peak, sigma = _broadcast(peak_rad_s, sigma_s)
    return jnp.sqrt(2 * jnp.pi) * peak * sigma


def partial_area(t_s: Input, area_rad: Input, center_s: Input, sigma_s: Input) -> Output:
    """Area in rad that a Gaussian pulse has delivered by time t, theta(t) = (theta/2) erfc[-(t - t_0)/(sqrt(2) sigma)].

    The error-function integral of the envelope; in place of theta_k it makes `separated_populations` time-resolved.
    erfc keeps the digits of the leading tail, which 1 + erf loses.
    """
    t, area, center, sigma = _broadcast(t_s, area_rad, center_s, sigma_s)
    return area / 2 * erfc((center - t) / (jnp.sqrt(2.0) * sigma))


@jax.custom_jvp
def flat_root(x: Array) -> Array:
    """Square root with derivative exactly 0 at 0, where it diverges; NaN below. `set_area` says when that is right."""
    return jnp.sqrt(x)


@flat_root.defjvp
def _flat_root_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    slope = jnp.where(x == 0, 0.0, 0.5 / jnp.sqrt(jnp.where(x == 0, 1.0, x)))
    return flat_root(x), slope * dx


def set_area(x: Real[ArrayLike, "*batch"]) -> Float[Array, "*batch"]:
    """Pulse area in [0, pi] that transfers the fraction x, theta = 2 asin(sqrt x), so that sin^2(theta/2) = x.

    Derivative rule: dtheta/dx = 1/sqrt(x (1 - x)) on the open interval, where d sin^2(theta/2)/dx = 1 to rounding, and
    **exactly 0 at x = 0 and x = 1**, where it diverges. There two branches of theta meet, theta and -theta at 0, theta
    and 2 pi - theta at pi, which give the same population (the sign of a pulse is a choice of phase). Their slopes are
    opposite, and 0 is the mean of the two. Nothing is clipped, and no infinity meets the zero of dP/dtheta to make a
    NaN. The price: the derivative of a population with respect to a command of exactly 0 or 1 comes out as 0. Where
    commands are optimized, parametrize the open interval.

    Args:
        x: commanded transfer in [0, 1]; 1 - x for pulse 1 of the V scheme, which starts in s.

    Returns:
        Area in rad, shape of x; NaN for x outside [0, 1].
    """
    return transfer_area(jnp.asarray(x, float))


def separated_amplitudes(
    theta_1: Input, theta_2: Input, start: Start = "v", phase_1_rad: Input = 0.0, phase_2_rad: Input = 0.0
) -> Amplitudes:
    """Amplitudes after pulse 1, then pulse 2, each acting alone.

    A resonant pulse is the rotation e^{-i theta_k B_k/2} = cos(theta_k/2) - i B_k sin(theta_k/2) of its two levels, as
    B_k^2 = 1 there. The product of both gives

        start v:  c_v = cos(theta_1/2),                   c_s = -i e^{-i phi_1} sin(theta_1/2) cos(theta_2/2),
                  c_m = -e^{-i(phi_1 + phi_2)} sin(theta_1/2) sin(theta_2/2)
        start s:  c_v = -i e^{i phi_1} sin(theta_1/2),    c_s = cos(theta_1/2) cos(theta_2/2),
                  c_m = -i e^{-i phi_2} cos(theta_1/2) sin(theta_2/2)

    Args:
        theta_1, theta_2: areas; `partial_area` at a time t gives the amplitudes at that time.
        start: level of the ion before the pulses.
        phase_1_rad, phase_2_rad: laser phases, which never enter the populations.

    Returns:
        (c_v, c_s, c_m), complex, broadcast shape. For the error where pulses overlap see `overlap_bound`.
    """
    theta_1, theta_2, phase_1, phase_2 = _broadcast(theta_1, theta_2, phase_1_rad, phase_2_rad)
    stay, move = jnp.cos(theta_1 / 2) + 0j, -1j * jnp.sin(theta_1 / 2)
    c_v, c_s = (stay, move * jnp.exp(-1j * phase_1)) if start == "v" else (move * jnp.exp(1j * phase_1), stay)
    return c_v, c_s * jnp.cos(theta_2 / 2), -1j * jnp.exp(-1j * phase_2) * c_s * jnp.sin(theta_2 / 2)


def separated_populations(theta_1: Input, theta_2: Input, start: Start = "v") -> Populations:
    """Populations (P_v, P_s, P_m) after separated pulses, the squares of `separated_amplitudes`.

        (P_v, P_s, P_m) = (1 - x, (1 - R) x, R x),      R = sin^2(theta_2/2),
        x = P_s after pulse 1 = sin^2(theta_1/2) (start v) or cos^2(theta_1/2) (start s)

    P_s is the output y of the memristor. Args: as `separated_amplitudes`.
    """
    theta_1, theta_2 = _broadcast(theta_1, theta_2)
    (cos_1, sin_1), (cos_2, sin_2) = cos_sin(theta_1 / 2), cos_sin(theta_2 / 2)
    p_v, x = (cos_1**2, sin_1**2) if start == "v" else (sin_1**2, cos_1**2)
    return p_v, x * cos_2**2, x * sin_2**2


def separated_coherence(theta_1: Input, theta_2: Input, start: Start = "v") -> Output:
    """Imaginary part of rho_vs = c_v c_s^* after separated pulses of phase zero; the real part is zero.

    +- sin(theta_1) cos(theta_2/2) / 2, positive for start v. Args: as `separated_amplitudes`.
    """
    theta_1, theta_2 = _broadcast(theta_1, theta_2)
    sign = 0.5 if start == "v" else -0.5
    return sign * cos_sin(theta_1)[1] * cos_sin(theta_2 / 2)[0]


def overlap_angle(theta_1: Input, theta_2: Input, separation_s: Input, sigma_1_s: Input, sigma_2_s: Input) -> Output:
    """Angle w in rad by which overlapping Gaussian pulses miss the separated closed form.

    In the frame of pulse 2, U = e^{-i b(t) B_2/2} V with b(t) its area delivered so far, pulse 1 becomes (phases 0)

        i dV/dt = (Omega_1/2) [cos(b/2) |v><s| - i sin(b/2) |v><m| + h.c.] V,

    which is the closed form when b = 0. For small b the difference is a coupling -i (Omega_1 b/4) |v><m| + h.c., of
    the angle

        w = 1/4 int Omega_1(t) b(t) dt = (theta_1 theta_2/8) erfc[DT/sqrt(2 (sigma_1^2 + sigma_2^2))]:

    int Omega_1 b dt is theta_1 theta_2 times the probability that a normal time of width sigma_1 around t_1 comes after
    one of width sigma_2 around t_2 = t_1 + DT.

    Args:
        theta_1, theta_2: areas.
        separation_s: DT, centre of pulse 2 minus centre of pulse 1.
        sigma_1_s, sigma_2_s: Gaussian widths of the Rabi envelopes.

    Returns:
        w, broadcast shape.
    """
    theta_1, theta_2, separation, sigma_1, sigma_2 = _broadcast(theta_1, theta_2, separation_s, sigma_1_s, sigma_2_s)
    return theta_1 * theta_2 / 8 * erfc(separation / jnp.sqrt(2 * (sigma_1**2 + sigma_2**2)))


def overlap_error(
    theta_1: Input, theta_2: Input, separation_s: Input, sigma_1_s: Input, sigma_2_s: Input, start: Start = "v"
) -> Output:
    """Leading-order error of the closed form in the output, y_exact - (1 - R) x = +-(1/2) w sin(theta_1) sin(theta_2).

    + from v, - from s. First order in w of `overlap_angle`, taken to act between the pulses: c_m gains w c_v, and
    pulse 2 turns that into s. P_m changes by the opposite, P_v by less, of order |w|^(4/3) at equal widths, so 1 - P_v
    measures x best. An estimate, not a bound: at equal widths the largest error in y on a grid of areas is 8 % above it
    at 3 sigma, 3 % at 4, 1.4 % at 5, 0.5 % at 6 (start v), and up to 13 % below it from s; at unequal widths it is less
    accurate. Args and returns: as `overlap_angle`.
    """
    w = overlap_angle(theta_1, theta_2, separation_s, sigma_1_s, sigma_2_s)
    theta_1, theta_2 = _broadcast(theta_1, theta_2)
    half = 0.5 * w * jnp.sin(theta_1) * jnp.sin(theta_2)
    return half if start == "v" else -half


def overlap_bound(theta_1: Input, theta_2: Input, separation_s: Input, sigma_1_s: Input, sigma_2_s: Input) -> Output:
    """Bound |w| on the error of the separated closed form in *any* population, from either start.

    Rigorous for resonant Gaussian pulses run to their ends, at every separation. In the frame of pulse 2 (see
    `overlap_angle`) the two generators differ by (Omega_1/2) [(cos(b/2) - 1) |v><s| - i sin(b/2) |v><m| + h.c.], whose
    norm is |Omega_1 sin(b/4)| <= |Omega_1 b|/4. So the states end at most |w| apart, and a population, the expectation
    of a projector, differs by no more than its states do. Not sharp: at 3 to 8 sigma, where the error is largest on a
    grid of areas, the bound is 2.2 to 2.5 times larger, and its own largest value, at areas of pi, 4.6 to 6 times.
    Args and returns: as `overlap_angle`.
    """
    return jnp.abs(overlap_angle(theta_1, theta_2, separation_s, sigma_1_s, sigma_2_s))


def _sinc_of_root(square: Array) -> Array:
    """sin(z)/z as the entire function of z^2 that it is, so that every derivative exists at zero area."""
    small = square < 0.05
    z, q = jnp.sqrt(jnp.where(small, 1.0, square)), jnp.where(small, square, 0.0)
    series = 1 - q / 6 * (1 - q / 20 * (1 - q / 42 * (1 - q / 72 * (1 - q / 110))))
    return jnp.where(small, series, jnp.sin(z) / z)


def simultaneous_amplitudes(
    theta_1: Input, theta_2: Input, start: Start = "v", phase_1_rad: Input = 0.0, phase_2_rad: Input = 0.0
) -> Amplitudes:
    """Amplitudes after two simultaneous pulses of the same shape.

    With Omega_k(t) = theta_k f(t) the Hamiltonian commutes with itself at all times. It turns s and the bright state
    (theta_1 v + theta_2 m)/theta, theta^2 = theta_1^2 + theta_2^2, into each other and leaves the dark state alone:

        start v:  c_v = [theta_2^2 + theta_1^2 cos(theta/2)]/theta^2,   c_s = -i (theta_1/theta) sin(theta/2),
                  c_m = (theta_1 theta_2/theta^2) [cos(theta/2) - 1]
        start s:  c_v = -i (theta_1/theta) sin(theta/2),   c_s = cos(theta/2),   c_m = -i (theta_2/theta) sin(theta/2)

    with the phase factors of `separated_amplitudes`. Args and returns: as there.
    """
    theta_1, theta_2, phase_1, phase_2 = _broadcast(theta_1, theta_2, phase_1_rad, phase_2_rad)
    square = theta_1**2 + theta_2**2
    sine = _sinc_of_root(square / 4) / 2  # sin(theta/2)/theta
    turn = _sinc_of_root(square / 16) ** 2 / 8  # (1 - cos(theta/2))/theta^2
    e_1, e_2 = jnp.exp(-1j * phase_1), jnp.exp(-1j * phase_2)
    if start == "v":
        return 1 - theta_1**2 * turn + 0j, -1j * e_1 * theta_1 * sine, -e_1 * e_2 * theta_1 * theta_2 * turn
    return -1j * e_1.conj() * theta_1 * sine, 1 - square * turn + 0j, -1j * e_2 * theta_2 * sine


def simultaneous_populations(theta_1: Input, theta_2: Input, start: Start = "v") -> Populations:
    """(P_v, P_s, P_m) after simultaneous pulses of the same shape, the squares of `simultaneous_amplitudes`."""
    c_v, c_s, c_m = simultaneous_amplitudes(theta_1, theta_2, start)
    return c_v.real**2 + c_v.imag**2, c_s.real**2 + c_s.imag**2, c_m.real**2 + c_m.imag**2


def rosen_zener(area_rad: Input, detuning_rad_s: Input, tau_s: Input) -> Output:
    """Transfer by one detuned sech pulse, Omega(t) = (theta/(pi tau)) sech(t/tau).

        P = sin^2(theta/2) sech^2(pi delta tau/2)

    References:
        [1] Rosen and Zener, Phys. Rev. 40, 502 (1932).
    """
    theta, detuning, tau = _broadcast(area_rad, detuning_rad_s, tau_s)
    return (jnp.sin(theta / 2) / jnp.cosh(jnp.pi * detuning * tau / 2)) ** 2


def pi_pulse_dephasing(sigma_s: Input, dephasing_rate_per_s: Input) -> Output:
    """First-order infidelity of a resonant Gaussian pi pulse under white laser phase noise.

        1 - F = (D/2) int sin^2 theta(t) dt = (D sigma/2) 1.4572173...

    The Bloch vector turns by theta(t) in the plane of the drive. Coherence that decays at the rate D takes
    D sin^2 theta(t) off its component along the ideal vector in each second, and 1 - F is half of that. At
    D sigma = 1e-3 the law is 0.07 % too large.

    Args:
        sigma_s: Gaussian width of the Rabi envelope.
        dephasing_rate_per_s: D, decay rate of the coherence of the line: pi times the FWHM linewidth in Hz.

    Returns:
        Infidelity, broadcast shape.
    """
    sigma, rate = _broadcast(sigma_s, dephasing_rate_per_s)
    # The trapezoidal sum of an analytic integrand with Gaussian tails is exact to rounding at this step.
    t, step = jnp.linspace(-9.0, 9.0, 145), 0.125
    return rate * sigma / 2 * step * jnp.sum(jnp.sin(partial_area(t, jnp.pi, 0.0, 1.0)) ** 2)


def thermal_carrier_factor(eta: Input, n_bar: Input) -> Output:
    """Thermal mean of the carrier Rabi frequency over that without motion, <e^{-eta^2/2} L_n(eta^2)>.

        e^{-eta^2 (n_bar + 1/2)},   by the generating function of the Laguerre polynomials; exact

    It scales the mean area. Populations need the mean of sin^2, see `thermal_populations`.
    """
    eta, n_bar = _broadcast(eta, n_bar)
    return jnp.exp(-(eta**2) * (n_bar + 0.5))


def thermal_populations(
    theta_1: Input, theta_2: Input, eta_1: Input, eta_2: Input, n_bar: Input, start: Start = "v"
) -> Populations:
    """Populations after separated pulses on an ion with one thermal mode, Debye-Waller factors linearised in n.

    With theta_n = theta e^{-eta^2/2} L_n(eta^2) ~ theta' (1 - eta^2 n), theta' = theta e^{-eta^2/2}, the mean over
    p_n = n_bar^n/(n_bar + 1)^{n+1} is a geometric series,

        <e^{i theta_n}> = e^{i theta'}/(n_bar + 1 - n_bar e^{-i theta' eta^2}).

    Both pulses meet the same n, so y = <x_n (1 - R_n)> is not a product of means: its product of two cosines is a sum
    of cosines of theta_1n +- theta_2n, each with such a series. The neglected part of theta_n averages to
    theta' (eta^2 n_bar)^2/2.

    Args:
        theta_1, theta_2: areas without motion.
        eta_1, eta_2: Lamb-Dicke parameters of the two pulses.
        n_bar: mean phonon number.
        start: level of the ion before the pulses.

    Returns:
        (P_v, P_s, P_m), broadcast shape; theta_2 = 0 leaves the input x in P_s.
    """
    theta_1, theta_2, eta_1, eta_2, n_bar = _broadcast(theta_1, theta_2, eta_1, eta_2, n_bar)
    bare_1, bare_2 = theta_1 * jnp.exp(-(eta_1**2) / 2), theta_2 * jnp.exp(-(eta_2**2) / 2)

    def mean_cosine(sign_1: float, sign_2: float) -> Array:
        phase, per_phonon = sign_1 * bare_1 + sign_2 * bare_2, sign_1 * bare_1 * eta_1**2 + sign_2 * bare_2 * eta_2**2
        return (jnp.exp(1j * phase) / (n_bar + 1 - n_bar * jnp.exp(-1j * per_phonon))).real

    sign = -1.0 if start == "v" else 1.0  # x = (1 + sign cos theta_1)/2
    first, second = sign * mean_cosine(1.0, 0.0), mean_cosine(0.0, 1.0)
    both = sign * (mean_cosine(1.0, 1.0) + mean_cosine(1.0, -1.0)) / 2
    return (1 - first) / 2, (1 + first + second + both) / 4, (1 + first - second - both) / 4


def output_state(x: Input, r: Input, phase_rad: Input = 0.0) -> Complex[Array, "2 2 ..."]:
    """Output state of the memristor in {v, s}, after the population of m has been repumped incoherently to v.

        rho = [[1 - (1-R) x,  c e^{-i f}], [c e^{i f},  (1-R) x]],      c = sqrt((1-R) x (1-x))

    Pulse 2 and the repump are amplitude damping, K_0 = |v><v| + sqrt(1-R) |s><s| and K_1 = sqrt(R) |v><s|, of the input
    sqrt(1-x) |v> + e^{i f} sqrt(x) |s>: the single-rail map of the photonic memristor.

    Args:
        x, r: input population and transfer of pulse 2, in [0, 1].
        phase_rad: f, phase of s relative to v in the input.

    Returns:
        Density matrix in the order v, s, shape (2, 2, *batch). The derivative of c diverges at x = 0, x = 1 and R = 1
        and is given as 0 exactly there, as in `set_area`: c is the size of an amplitude that changes its sign.
    """
    x, r, phase = _broadcast(x, r, phase_rad)
    y, off = (1 - r) * x + 0j, output_coherence(x, r) / 2 * jnp.exp(-1j * phase)
    return jnp.stack([jnp.stack([1 - y, off]), jnp.stack([off.conj(), y])])


def output_purity(x: Input, r: Input) -> Output:
    """Purity of `output_state`, Tr rho^2 = (1-y)^2 + y^2 + 2 (1-R) x (1-x) = 1 - 2 R (1-R) x^2, as y = (1-R) x."""
    x, r = _broadcast(x, r)
    return 1 - 2 * r * (1 - r) * x**2


def output_coherence(x: Input, r: Input) -> Output:
    """l1 coherence of `output_state`, the sum of its |off-diagonal| elements, 2 sqrt((1-R) x (1-x))."""
    x, r = _broadcast(x, r)
    return 2 * flat_root((1 - r) * x * (1 - x))
