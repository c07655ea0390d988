"""Runs the benchmarks, writes results.json beside this file, and the table between the markers of the README."""

import json
import time
from pathlib import Path

import click

from experiments.benchmarks import loops, networks, spin_motion, steering, trajectories

WORKS = {
    "B1": trajectories.batch,
    "B2": loops.cycles,
    "B3": loops.likelihood,
    "B4": loops.command_line,
    "B5": loops.growth,
    "B6": loops.closed_form,
    "B7": trajectories.floor,
    "B8": steering.transfer,
    "B9": spin_motion.solves,
    "B10": networks.throughput,
    "loop": trajectories.loop,
}
# B4 and B9 take minutes whatever their size, B5, B8 and B10 start processes of their own; the loop
# was decided once.
_NOT_QUICK = ("B4", "B5", "B8", "B9", "B10", "loop")
BEGIN, END = "<!-- benchmarks begin -->", "<!-- benchmarks end -->"
_FOLDER = Path(__file__).parent
_README = _FOLDER.parent.parent / "README.md"


def table(results: list[dict]) -> str:
    """The results in Markdown."""
    lines = ["| work | engine | value | error | note |", "|---|---|---|---|---|"]
    for r in results:
        error = "" if r["error"] is None else f"{r['error']:.0e}"
        lines.append(f"| {r['work']} | {r['engine']} | {_number(r['value'])} {r['unit']} | {error} | {r['note']} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def with_table(readme: str, results: list[dict]) -> str:
    """The README with the table between its markers replaced."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    versions = results[0]["versions"]
    where = f"Python {versions['python']}, JAX {versions['jax']}, {results[0]['device']}."
    return f"{head}{BEGIN}\n{where}\n\n{table(results)}\n{END}{tail}"


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Smaller sizes, under two minutes; prints and writes no file.")
@click.option(
    "--only", multiple=True, type=click.Choice(list(WORKS)), help="Run only this; the others keep their entry."
)
def main(quick: bool, only: tuple[str, ...]) -> None:
    """See the module."""
    fresh: list[dict] = []
    for name, work in WORKS.items():
        if (only and name not in only) or (quick and name in _NOT_QUICK):
            continue
        began = time.perf_counter()
        fresh += [result.record() for result in work(quick)]
        click.echo(f"{name}: {time.perf_counter() - began:.0f} s", err=True)
        if not quick:
            _keep(fresh)  # a work that fails later loses nothing
    click.echo(table(fresh))
    if not quick:
        _README.write_text(with_table(_README.read_text(encoding="utf-8"), _keep(fresh)), encoding="utf-8")


def _keep(fresh: list[dict]) -> list[dict]:
    """Entries of results.json with those of the same work replaced."""
    path, work_of = _FOLDER / "results.json", lambda r: r["work"].split()[0]
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    done = {work_of(r) for r in fresh}
    records = sorted(fresh + [r for r in old if work_of(r) not in done], key=lambda r: list(WORKS).index(work_of(r)))
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return records


if __name__ == "__main__":
    main()
