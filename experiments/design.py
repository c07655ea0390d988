"""`iontwin design`: which loop to measure next, and whether the forecast holds in simulation."""

import itertools
from typing import Any

import numpy as np

from calibration.data import LoopTable
from calibration.design import Candidate, Designer, Proposal, Verification
from calibration.scan_tables import ScanTable
from experiments import report
from experiments.build import device_from
from experiments.progress import work_progress
from experiments.provenance import Stopwatch, provenance
from experiments.records import RunFolder
from experiments.schema import Config
from experiments.schema import Design as Settings


def run(
    config: Config, fitted: Config, tables: dict[str, LoopTable | ScanTable], finished: dict[str, Any], out: RunFolder
) -> dict[str, Any]:
    """Rank the loops of [design] by what they take from the uncertainty of its target, a minute.

    Args:
        config: with a table [design].
        fitted: the configuration of the fit. tables: what it was fitted to. finished: its result.
        out: the run folder.

    Returns:
        What ``result.json`` holds.

    Raises:
        ValueError: a target that the fit did not free, or no loop within the time allowed.
    """
    assert config.design is not None
    assert fitted.fit is not None
    clock, wanted = Stopwatch(), config.design
    loops = {name: table for name, table in tables.items() if isinstance(table, LoopTable)}
    if len(loops) != len(tables) or fitted.fit.per_table:
        raise ValueError("iontwin design works on fits of loop tables with shared parameters; this fit has more.")
    if wanted.target not in fitted.fit.free:
        free = ", ".join(fitted.fit.free)
        raise ValueError(f"design.target is {wanted.target!r}, which the fit did not free; name one of {free}.")
    candidates = [c for c in _candidates(wanted) if c.minutes(wanted.shot_s, wanted.overhead_s) <= wanted.most_minutes]
    if not candidates:
        raise ValueError(f"design.most_minutes is {wanted.most_minutes:g}, but every loop takes longer; allow more.")
    out.log(f"{len(candidates)} loops to choose from")
    values = {name: finished["parameters"][name]["value"] for name in fitted.fit.free}
    designer = Designer(device_from(fitted), loops, fitted.fit.free, values, candidates, noise=fitted.fit.noise)
    with work_progress(out) as progress:
        ranked = designer.proposals(
            wanted.target, shot_s=wanted.shot_s, overhead_s=wanted.overhead_s, on_progress=progress
        )
        checked: dict[str, tuple[Proposal, Verification]] = {}
        if wanted.verify:
            chance = ranked[int(np.random.default_rng(wanted.seed).integers(1, max(len(ranked), 2)))]
            for name, proposal in (("best", ranked[0]), ("random", chance)):
                found = designer.verified(
                    proposal, wanted.target, simulations=wanted.verify, seed=wanted.seed,
                    on_progress=lambda what, done, most, name=name: progress(f"{what} ({name})", done, most),
                )  # fmt: skip
                checked[name] = proposal, found
    best = ranked[0]
    result = {
        "kind": "design",
        "status": "done",
        "target": wanted.target,
        "std_now": float(np.sqrt(np.linalg.inv(designer.information)[_at(designer, wanted.target)])),
        "proposals": [_row(one) for one in ranked],
        "verified": {
            name: {**_row(proposal), **{k: float(v) for k, v in found._asdict().items()}}
            for name, (proposal, found) in checked.items()
        },
        "notes": _notes(wanted, best, checked),
        "seed": wanted.seed,
        "seconds": clock.stop(),
        **provenance(),
    }
    out.write_result(result)
    report.write(out)
    return result


def _at(designer: Designer, name: str) -> tuple[int, int]:
    k = designer.problem.names.index(name)
    return k, k


def _candidates(wanted: Settings) -> list[Candidate]:
    found = []
    for window, period, offsets, amplitude, shots in itertools.product(
        wanted.window_cycles, wanted.cycles_per_period, wanted.offsets_hz, wanted.amplitudes, wanted.shots
    ):
        periods = max(1, wanted.cycles // period)
        found.append(Candidate(window, period, periods, *offsets, amplitude, shots))
    return found


def _row(one: Proposal) -> dict[str, Any]:
    return {
        **one.candidate._asdict(),
        "reduction": float(one.reduction),
        "minutes": float(one.minutes),
        "rate_per_minute": float(one.rate),
        "std_after": float(one.std),
    }


def _notes(wanted: Settings, best: Proposal, checked: dict[str, tuple[Proposal, Verification]]) -> list[str]:
    c = best.candidate
    notes = [
        f"Measure next: window {c.window_cycles:g} cycles, {c.periods} periods of {c.cycles_per_period}, laser offsets "
        f"{c.detuning_1_set_hz:+g} and {c.detuning_2_set_hz:+g} Hz, largest input {c.amplitude:g}, {c.shots} shots: in "
        f"{best.minutes:.3g} minutes it takes {best.reduction:.0%} of the variance of `{wanted.target}`."
    ]
    for name, (proposal, found) in checked.items():
        notes.append(
            f"The {name} loop: {proposal.reduction:.1%} of the variance forecast, {found.realized:.1%} realized in "
            f"{found.simulations} of {found.asked} simulations (95 % interval {found.low:.1%} to {found.high:.1%})."
        )
        if found.simulations < 0.9 * found.asked:
            notes.append(f"Only {found.simulations} of {found.asked} refits of the {name} loop reached an optimum.")
    return notes


def table(result: dict[str, Any]) -> str:
    """The best loops, and what simulations say, as Markdown tables."""
    head = "| window | period | offsets (Hz) | largest input | shots | minutes | variance taken | a minute |"
    lines = [head, "|" + "---|" * 8]
    for row in result["proposals"][:8]:
        lines.append(
            f"| {row['window_cycles']:g} | {row['cycles_per_period']} | {row['detuning_1_set_hz']:+g}, "
            f"{row['detuning_2_set_hz']:+g} | {row['amplitude']:g} | {row['shots']} | {row['minutes']:.2f} | "
            f"{row['reduction']:.1%} | {row['rate_per_minute']:.3f} |"
        )
    if result["verified"]:
        lines += ["", "| loop | forecast | realized | 95 % interval | simulations |", "|---|---|---|---|---|"]
        for name, row in result["verified"].items():
            lines.append(
                f"| {name} | {row['predicted']:.1%} | {row['realized']:.1%} | {row['low']:.1%} to {row['high']:.1%} | "
                f"{row['simulations']:.0f} |"
            )
    return "\n".join(lines)
