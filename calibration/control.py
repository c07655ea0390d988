"""Pulse design: commands that make the calibrated device the memristor it was meant to be.

Commands are what a controller sets: amplitudes relative to nominal, widths, separation, laser offsets, each within
bounds. Gradients run through the full Lindblad dynamics and, for loop targets, through the memory.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calibration._minimize import Progress, Stage, minimize
from calibration.parameters import FreeParameters, anchored, unit_of, value_of
from calibration.robust import Robust
from calibration.targets import AbstractTarget
from calibration.uncertainty import at_edge
from twin.dynamics import Adaptive, StaticGrid
from twin.memristor import Automatic, ClosedForm, IonMemristor, Lindblad, planned

COMMANDS = (
    *("amplitude_1", "amplitude_2", "sigma_1_s", "sigma_2_s", "separation_s"),
    *("detuning_1_set_hz", "detuning_2_set_hz"),
)
_SET = ("detuning_1_set_hz", "detuning_2_set_hz")
_STARTS = 4


@dataclass(frozen=True)
class Command:
    """One command before and after, with its bounds."""

    before: float
    after: float
    low: float
    high: float
    unit: str
    at_bound: bool


@dataclass(frozen=True)
class Design:
    """What a pulse optimization found.

    Attributes:
        status: "converged" or "not converged: WHY".
        metric: name of the target's number; `before`, `after` as the optimizer saw it, `recomputed` after the
            optimization by the adaptive reference solver, which shares no grid with it.
        device: the device under the new commands; `offsets_hz`: the new laser offsets.
        history: value of the target after each chunk of iterations.
    """

    status: str
    metric: str
    before: float
    after: float
    recomputed: float
    commands: dict[str, Command]
    device: IonMemristor
    offsets_hz: tuple[float, float]
    history: list[float]


def optimize(
    device: IonMemristor,
    target: AbstractTarget,
    bounds: Mapping[str, tuple[float, float]],
    *,
    iterations: int = 200,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Design:
    """Finds commands within bounds that serve the target best on this device.

    Main arguments:
        device: the (calibrated) device; its present commands are the first start, so the result is never worse.
        target: of `calibration.targets`, or `Robust` over many devices.
        bounds: (low, high) of each command that may change, names in `COMMANDS`.

    Other arguments:
        iterations: at most, a third of them Adam, the rest L-BFGS; for each of four starts.
        seed: of the other starts, uniform within the bounds.
        on_progress: called as (stage, iterations done, most iterations, best value so far).

    Returns:
        A `Design`.

    Raises:
        ValueError: an unknown command; bounds that exclude the present command; a closed-form device, which obeys by
            construction.
    """
    if isinstance(device.method, ClosedForm | Adaptive):
        raise ValueError(
            "pulse design needs the Lindblad engine on a static grid: the closed form knows no imperfection but "
            "the Rabi scales; give the device the method Lindblad()."
        )
    if isinstance(device.method, Automatic):
        device = dataclasses.replace(device, method=Lindblad(device.method.error))
    device = cast(IonMemristor, anchored(device))
    present = {name: _present(device, name) for name in bounds}
    for name, value in present.items():
        low, high = bounds[name]
        if not low <= value <= high:
            raise ValueError(f"the bounds of `{name}`, [{low:g}, {high:g}], exclude the present command {value:g}.")
    free = FreeParameters.from_boxes(bounds)
    offset = max((max(abs(v) for v in bounds[n]) for n in _SET if n in bounds), default=0.0)
    box = {name: _actual(device, name, box) for name, box in free.boxes.items() if name not in _SET}
    if isinstance(target, Robust):
        for name, (low, high) in target.box(device).items():
            now = float(value_of(device, name))
            least, most = box.get(name, (now, now))
            box[name] = (least + low - now, most + high - now)  # changes are added to what is commanded
    # Planned for areas that do not grow with the width: the controller lowers the amplitude of a wider pulse.
    plain = dataclasses.replace(device, nominal_sigma_1_s=None, nominal_sigma_2_s=None)
    # Each member is a device with solves of its own.
    one = target.target if isinstance(target, Robust) else target
    plain = planned(plain, box, detuning_set_hz=offset, solves=one.solves)
    method = plain.method
    if isinstance(method, StaticGrid):
        # All cycles of a target share pulse shapes and times.
        method = dataclasses.replace(method, shared=True)
    device = dataclasses.replace(device, steps=plain.steps, method=method, slow_noise=plain.slow_noise)
    args = (device, free, target)
    before = jnp.array(list(present.values()), float)
    inside = free.low + free.width * (1e-3 + (1 - 2e-3) * (before - free.low) / free.width)
    starts = jnp.concatenate([inside[None], free.draw(jax.random.key(seed), _STARTS - 1)])
    value_before = float(_value(args, before))
    history: list[float] = []
    points = free.unbounded(starts)
    explore = max(1, iterations // 3)
    for stage_name, stage in (
        ("explore", Stage("adam", explore, 1e-6, 0.1)),
        ("descend", Stage("lbfgs", max(1, iterations - explore), 1e-7)),
    ):

        def report(done, losses, stage_name=stage_name, most=stage.iterations):
            history.append(target.of_loss(float(jnp.nanmin(losses))))
            if on_progress is not None:
                on_progress(stage_name, done, most, history[-1])

        found = minimize(_loss, args, points, stage, on_progress=report)
        points = found.points
    losses = np.asarray(found.values)
    if not np.any(np.isfinite(losses)):
        return _unchanged(device, target, present, bounds, value_before, history)
    best = int(np.nanargmin(losses))
    after = free.bounded(points[best])
    status = (
        "converged" if bool(found.converged[best]) else "not converged: the search still moved at its last iteration"
    )
    if float(losses[best]) >= float(_loss_at(args, before)):
        after = before  # no start beat the present commands
    edge = at_edge(np.asarray(after), np.asarray(free.low), np.asarray(free.high))
    commands = {
        name: Command(present[name], float(after[k]), *free.boxes[name], unit_of(name), bool(edge[k]))
        for k, name in enumerate(free.names)
    }
    designed, offsets = apply_commands(device, dict(zip(free.names, after, strict=True)))
    reference = dataclasses.replace(designed, method=Adaptive(rtol=1e-11, atol=1e-12))
    return Design(
        status=status,
        metric=target.name,
        before=value_before,
        after=float(_value(args, after)),
        recomputed=float(eqx.filter_jit(target.value)(reference, offsets)),
        commands=commands,
        device=designed,
        offsets_hz=(float(offsets[0]), float(offsets[1])),
        history=history,
    )


def apply_commands(device: IonMemristor, values: Mapping[str, Array]) -> tuple[IonMemristor, tuple[Array, Array]]:
    """The device under these commands, and the laser offsets that go with them (Hz).

    A commanded width scales the actual one by the ratio that the calibration found between the two.
    """
    fields = {}
    for name, value in values.items():
        if name not in COMMANDS:
            raise ValueError(f"`{name}` is no pulse command; choose among {', '.join(COMMANDS)}.")
        if name.startswith("sigma"):
            fields[f"nominal_{name}"] = value
            fields[name] = _ratio(device, name) * value
        elif name not in _SET:
            fields[name] = value
    offsets = (jnp.asarray(values.get(_SET[0], 0.0), float), jnp.asarray(values.get(_SET[1], 0.0), float))
    return dataclasses.replace(device, **fields), offsets


def _ratio(device: IonMemristor, name: str):
    nominal = getattr(device, f"nominal_{name}")
    return 1.0 if nominal is None else getattr(device, name) / nominal


def _present(device: IonMemristor, name: str) -> float:
    if name not in COMMANDS:
        raise ValueError(f"`{name}` is no pulse command; choose among {', '.join(COMMANDS)}.")
    if name in _SET:
        return 0.0
    return float(getattr(device, name) / (_ratio(device, name) if name.startswith("sigma") else 1.0))


def _actual(device: IonMemristor, name: str, box: tuple[float, float]) -> tuple[float, float]:
    ratio = float(_ratio(device, name)) if name.startswith("sigma") else 1.0
    return box[0] * ratio, box[1] * ratio


def _loss(u: Float[Array, " commands"], args, each) -> Float[Array, ""]:
    del each
    return _loss_at(args, args[1].bounded(u))


@eqx.filter_jit
def _loss_at(args, values: Float[Array, " commands"]) -> Float[Array, ""]:
    device, free, target = args
    return target.loss(*apply_commands(device, dict(zip(free.names, values, strict=True))))


@eqx.filter_jit
def _value(args, values: Float[Array, " commands"]) -> Float[Array, ""]:
    device, free, target = args
    return target.value(*apply_commands(device, dict(zip(free.names, values, strict=True))))


def _unchanged(device, target, present, bounds, value, history) -> Design:
    commands = {n: Command(v, v, *bounds[n], unit_of(n), False) for n, v in present.items()}
    why = "not converged: the target is not finite from any start; narrow the bounds"
    return Design(why, target.name, value, value, value, commands, device, (0.0, 0.0), history)
