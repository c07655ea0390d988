"""`iontwin coverage`: simulation-based calibration of the twin's own intervals.

Tables are simulated and fitted block by block; finished blocks stand in ``DIR.parts`` until the run is done, so that a
killed run goes on where it was when the same command is given again.
"""

import hashlib
import io
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calibration import coverage
from calibration.formats import write_atomic
from calibration.parameters import value_of
from calibration.posing import pose
from calibration.problem import Problem
from experiments import report
from experiments.build import device_from, settings_table
from experiments.progress import Work, work_progress
from experiments.provenance import Stopwatch, provenance
from experiments.records import RunFolder
from experiments.schema import Config

# Tables of one call of the compiled program: a block is what a kill can lose.
_TRIALS, _RANKS = 20, 10
_THIN, _DRAWS, _WARMUP = 4, 99, 300


def run(config: Config, out: RunFolder, seed: int) -> dict[str, Any]:
    """Count how often intervals hold the truth.

    Args:
        config: tables [device] (the truth), [fit] (what is free), [simulate] (the design) and [coverage].
        out: the run folder.
        seed: of all counts.

    Returns:
        What ``result.json`` holds.
    """
    assert config.fit is not None
    assert config.simulate is not None
    assert config.coverage is not None
    clock = Stopwatch()
    wanted = config.coverage
    device = device_from(config)
    settings = settings_table(config, windows=any(one.window_cycles is not None for one in config.simulate.loops))
    problem = pose(device, settings, config.fit.free, noise=config.fit.noise).problem
    truth = np.array([value_of(device, name) for name in problem.names], float)
    low, high = np.asarray(problem.free.low), np.asarray(problem.free.high)
    parts = _Parts(out.path.with_name(f"{out.path.name}.parts"), config.to_toml())
    rows: list[dict[str, Any]] = []
    with work_progress(out) as progress:
        if wanted.tables:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), wanted.tables)
            inside = jnp.asarray(np.clip(truth, low + 1e-6 * (high - low), high - 1e-6 * (high - low)))
            fitted = lambda k: coverage.trials(problem, inside, k, profile=wanted.profile)._asdict()
            found = parts.computed("tables", fitted, keys, _TRIALS, progress)
            rows += _counts(coverage.coverages(coverage.Trials(**found), truth, problem.names))
        if wanted.ranks:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), wanted.ranks)
            ranked = lambda k: {"ranks": coverage.ranks(problem, k, draws=_DRAWS, thin=_THIN, warmup=_WARMUP)}
            found = parts.computed("ranks", ranked, keys, _RANKS, progress)
            rows += _uniform(problem, found["ranks"])
    failed = [row for row in rows if row["verdict"] != "holds"]
    result = {
        "kind": "coverage",
        "status": "done",
        "truth": dict(zip(problem.names, truth.tolist(), strict=True)),
        "rows": rows,
        "notes": [_sentence(row, config) for row in failed],
        "seed": seed,
        "seconds": clock.stop(),
        **provenance(),
    }
    out.write_result(result)
    report.write(out)
    parts.remove()
    return result


class _Parts:
    """Finished blocks of a study on disk, as long as they belong to the same configuration."""

    def __init__(self, folder: Path, config: str):
        self.folder, self.key = folder, hashlib.sha256(config.encode()).hexdigest()[:16]

    def computed(
        self, what: str, compute: Callable[[Any], dict[str, Any]], keys, size: int, progress: Work
    ) -> dict[str, np.ndarray]:
        """Arrays of all blocks, joined along the tables; the last block is filled up and cut."""
        self.folder.mkdir(exist_ok=True)
        total = len(keys)
        blocks = -(-total // size)
        filled = keys[np.minimum(np.arange(blocks * size), total - 1)].reshape(blocks, size)
        path = lambda k: self.folder / f"{what}-{self.key}-{size}-{k}.npz"
        progress(what, sum(path(k).is_file() for k in range(blocks)) * size if blocks else 0, total)

        def one(k: int) -> None:
            found = {name: np.asarray(values) for name, values in compute(filled[k]).items()}
            data = io.BytesIO()
            np.savez(data, **found)
            write_atomic(path(k), data.getvalue())

        missing = [k for k in range(blocks) if not path(k).is_file()]
        done = blocks - len(missing)
        if missing:
            one(missing[0])  # compiles; the others share the cores
            with ThreadPoolExecutor(multiprocessing.cpu_count()) as pool:
                for count, _ in enumerate(pool.map(one, missing[1:]), done + 2):
                    progress(what, min(count * size, total), total)
        loaded = [np.load(path(k)) for k in range(blocks)]
        progress(what, total, total)
        return {name: np.concatenate([one[name] for one in loaded])[:total] for name in loaded[0].files}

    def remove(self) -> None:
        """Take the blocks away when the result stands."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _counts(found: list[coverage.Coverage]) -> list[dict[str, Any]]:
    return [
        {
            "parameter": one.parameter,
            "method": one.method,
            "held": one.held,
            "tables": one.tables,
            "coverage": one.held / one.tables,
            "low": one.low,
            "high": one.high,
            "verdict": "holds" if one.holds else "too few" if one.high < coverage.LEVEL else "too many",
        }
        for one in found
    ]


def _uniform(problem: Problem, ranks: np.ndarray) -> list[dict[str, Any]]:
    p = coverage.uniformity(ranks, _DRAWS)
    central = np.mean((ranks >= 0.025 * (_DRAWS + 1)) & (ranks < 0.975 * (_DRAWS + 1)), axis=0)
    return [
        {
            "parameter": name,
            "method": "posterior",
            "tables": len(ranks),
            "coverage": float(central[k]),
            "p_value": float(p[k]),
            "verdict": "holds" if p[k] >= 1e-3 / len(problem.names) else "ranks not uniform",
        }
        for k, name in enumerate(problem.names)
    ]


def _sentence(row: dict[str, Any], config: Config) -> str:
    if row["method"] == "posterior":
        return (
            f"The ranks of `{row['parameter']}` are not uniform (p = {row['p_value']:.2g}): its posterior is not right."
        )
    assert config.fit is not None
    low, high = config.fit.free[row["parameter"]]
    fault = "too short" if row["verdict"] == "too few" else "wider than they need to be"
    return (
        f"95 % intervals of `{row['parameter']}` by {row['method']} are {fault}: they held the truth in "
        f"{row['coverage']:.1%} of {row['tables']} tables. Its box is [{low:g}, {high:g}]; to be expected where "
        "it, or a parameter that goes with it, leans on an edge: use the posterior there."
    )


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = ["| parameter | method | tables | coverage of 95 % | 99.9 % interval, or p of ranks | verdict |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in result["rows"]:
        judged = f"p = {row['p_value']:.3f}" if "p_value" in row else f"{row['low']:.4f} to {row['high']:.4f}"
        lines.append(
            f"| `{row['parameter']}` | {row['method']} | {row['tables']} | {row['coverage']:.4f} | {judged} | "
            f"{row['verdict']} |"
        )
    return os.linesep.join(lines)
