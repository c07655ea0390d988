"""The console script ``iontwin``: reads and checks what the user gave, then hands over to a pipeline.

Every verb validates first (configuration, table, output folder) and computes second. JAX is imported only by the
pipelines, which are imported only when there is something to compute. Exit status: 0 done, 1 it ran and failed, 2 the
input is wrong, 130 interrupted. Text for people goes to stderr; stdout carries answers, with ``--json`` one object.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

DISTRIBUTION = "ion-memristor-twin"

_TRUE = ("1", "true", "t", "yes", "y", "on")


class Failure(Exception):
    """The run is over and failed; the message is the reason."""


class SchemaCommand(click.Command):
    """A command whose help ends with the schema of the configuration tables it reads."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from experiments.config import describe

        for table, purpose, keys in describe(str(self.name)):
            with formatter.section(table):
                formatter.write_text(purpose)
                formatter.write_dl(keys, col_max=34)
        super().format_epilog(ctx, formatter)


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"iontwin {version(DISTRIBUTION)}")
    except PackageNotFoundError:
        click.echo(f"iontwin, run from a source tree in which {DISTRIBUTION} is not installed")
    ctx.exit()


def _print_schema(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    import json

    from experiments.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
    ctx.exit()


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Compiled programs are kept in JAX_COMPILATION_CACHE_DIR (default: iontwin/jax in the user's cache folder); "
    "JAX_ENABLE_COMPILATION_CACHE=false switches this off. IONTWIN_TRACEBACK=1 shows where an error arose.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it.")
@click.option(
    "--schema", is_flag=True, is_eager=True, expose_value=False, callback=_print_schema,
    help="Print the JSON Schema of the configuration.",
)  # fmt: skip
def cli() -> None:
    """A digital twin of a quantum memristor made of one trapped ion: simulate it, calibrate it, design its pulses."""


_config = click.argument("config", type=click.Path(path_type=Path))
_out = click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to create for the run."
)
_replace = click.option("--replace", is_flag=True, help="Let it replace an earlier run there, once it is done.")
_seed = click.option("--seed", type=int, help="Replaces the seed of the configuration.")
_set = click.option(
    "--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Replaces one value of the configuration (TOML)."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")


@cli.command(cls=SchemaCommand)
@_config
@_out
@_replace
@_seed
@_set
@_json
def simulate(config: Path, out: Path, replace: bool, seed: int | None, sets: Sequence[str], as_json: bool) -> None:
    """Run one or more loops, with or without shots."""
    from experiments.config import load_config

    resolved = load_config(config, verb="simulate", sets=sets, seed=seed)
    with _run_folder(out, replace, resolved.to_toml()) as folder:
        result = _pipeline("simulate", "run", resolved, folder, resolved.seed_of("simulate"))
    _finish(result, as_json, f"written to {out}")


@cli.command(cls=SchemaCommand)
@_config
@click.option("--data", type=click.Path(path_type=Path), metavar="TABLE", help="Loop table, in place of data.table.")
@_out
@_replace
@_seed
@_set
@_json
def fit(
    config: Path, data: Path | None, out: Path, replace: bool, seed: int | None, sets: Sequence[str], as_json: bool
) -> None:
    """Calibrate the twin to recorded loops; the demo is experiments/configs/demo.toml."""
    from experiments.config import load_config, load_tables

    resolved = load_config(config, verb="fit", sets=sets, data=data, seed=seed)
    tables = load_tables(resolved)
    with _run_folder(out, replace, resolved.to_toml()) as folder:
        result = _pipeline("calibrate", "run", resolved, tables, folder, resolved.seed_of("fit"))
    _finish(result, as_json, f"written to {out}")


@cli.command(cls=SchemaCommand)
@_config
@_out
@_replace
@_seed
@_set
@_json
def coverage(config: Path, out: Path, replace: bool, seed: int | None, sets: Sequence[str], as_json: bool) -> None:
    """Simulate and fit many tables, and count how often 95 % intervals hold the truth; killed, it goes on."""
    from experiments.config import load_config

    resolved = load_config(config, verb="coverage", sets=sets, seed=seed)
    with _run_folder(out, replace, resolved.to_toml()) as folder:
        result = _pipeline("coverage", "run", resolved, folder, resolved.seed_of("coverage"))
    if not as_json:
        click.echo(_pipeline("coverage", "table", result))
    _finish(result, as_json, f"written to {out}")


@cli.command(cls=SchemaCommand)
@_config
@click.option("--from", "fit_run", type=click.Path(path_type=Path), metavar="RUN", help="Fit whose device is used.")
@_out
@_replace
@_seed
@_set
@_json
def optimize(
    config: Path, fit_run: Path | None, out: Path, replace: bool, seed: int | None, sets: Sequence[str], as_json: bool
) -> None:
    """Design pulse commands for a device, as configured or as calibrated by a fit."""
    from experiments.config import load_config
    from experiments.records import OutputError, Run

    resolved = load_config(config, verb="optimize", sets=sets, seed=seed)
    if fit_run is not None and "parameters" not in Run(fit_run).result:
        raise OutputError(f"{fit_run}: this run is no fit, it has no parameters; name the folder of a fit.")
    with _run_folder(out, replace, resolved.to_toml()) as folder:
        result = _pipeline("optimize", "run", resolved, fit_run, folder, resolved.seed_of("optimize"))
    _finish(result, as_json, f"written to {out}")


@cli.command(cls=SchemaCommand)
@_config
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="STORE", help="Zarr store to create or to resume."
)
@click.option(
    "--workers", type=click.IntRange(1), default=None, metavar="N", help="Compute in N processes here (Dask)."
)
@click.option("--scheduler", metavar="ADDRESS", help="Compute on a running Dask cluster; see docs/cluster.md.")
@_seed
@_set
@_json
def sweep(
    config: Path,
    out: Path,
    workers: int | None,
    scheduler: str | None,
    seed: int | None,
    sets: Sequence[str],
    as_json: bool,
) -> None:
    """Run loops over a grid, or a random, Sobol or Latin-hypercube set, of parameters; killed, it goes on where it was.

    The same command resumes it.
    """
    from experiments.config import load_config
    from experiments.records import check_output

    if workers and scheduler:
        raise click.UsageError("--workers starts a cluster and --scheduler uses one that runs; give one of them.")
    resolved = load_config(config, verb="sweep", sets=sets, seed=seed)
    check_output(out, resumable=True)
    result = _pipeline("sweep", "run", resolved, out, resolved.seed_of("sweep"), workers or 0, scheduler or "")
    _finish(result, as_json, f"written to {out}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@_json
def report(run: Path, as_json: bool) -> None:
    """Write report.html of a run folder again."""
    from experiments.records import REPORT, Run

    folder = Run(run)
    _pipeline("report", "rewrite", folder.path)
    _finish({"status": "done", "report": folder.path / REPORT}, as_json, f"written to {folder.path / REPORT}")


@cli.command()
@click.argument("name")
@_json
def reproduce(name: str, as_json: bool) -> None:
    """Compute published numbers again: NAME, or all of them with "all"."""
    rows = _pipeline("reproduce", "run", name)
    if not as_json:
        click.echo(_aligned(rows))
    failed = [row for row in rows if str(row["verdict"]).startswith("fail")]
    status = f"failed: {len(failed)} of {len(rows)} numbers are outside their tolerance" if failed else "done"
    _finish({"status": status, "rows": rows}, as_json)


@cli.command()
@_json
def doctor(as_json: bool) -> None:
    """Show devices, precision, gradients against finite differences, compile cache and versions."""
    result = _pipeline("doctor", "run")
    if not as_json:
        click.echo(_aligned([{"what": key, "value": value} for key, value in _leaves(result)], header=False))
    _finish(result, as_json)


@cli.command(cls=SchemaCommand)
@_config
@click.argument("tables", nargs=-1, type=click.Path(path_type=Path))
@click.option("--from", "fit_run", required=True, type=click.Path(path_type=Path), metavar="RUN", help="The fit.")
@_out
@_replace
@click.option("--watch", type=click.Path(path_type=Path), metavar="FOLDER", help="Track new files of it, until Ctrl-C.")
@click.option("--interval", type=click.FloatRange(0.1), default=10.0, metavar="S", help="Seconds between looks at it.")
@_set
@_json
def track(
    config: Path, tables: Sequence[Path], fit_run: Path, out: Path, replace: bool, watch: Path | None, interval: float,
    sets: Sequence[str], as_json: bool,
) -> None:  # fmt: skip
    """Tell from later loop tables, in order, whether a fit is still valid; a run that stands is continued."""
    from calibration.data import read_table
    from experiments.config import load_config
    from experiments.records import OutputError, Run, check_output, is_run

    resolved = load_config(config, verb="track", sets=sets)
    if "parameters" not in Run(fit_run).result:
        raise OutputError(f"{fit_run}: this run is no fit, it has no parameters; name the folder of a fit.")
    if not tables and watch is None:
        raise click.UsageError("there is nothing to track; name tables, or a folder with --watch.")
    if watch is not None and not watch.is_dir():
        raise click.UsageError(f"--watch {watch}: this is no folder; name the one that tables will appear in.")
    earlier = Run(out).result if is_run(out) and not replace else None
    check_output(out, replace=replace or (earlier or {}).get("kind") == "track")
    columns = {n: c.model_dump(exclude_none=True) for n, c in resolved.data.columns.items()} if resolved.data else {}
    given = [read_table(path, columns) for path in tables]
    opened = lambda: _run_folder(out, True, resolved.to_toml())
    result = _pipeline("track", "run", resolved, fit_run, given, earlier, opened, watch, interval)
    if not as_json:
        click.echo(result.get("verdict", "no table yet"))
    _finish(result, as_json, f"written to {out}")


@cli.command()
@click.argument("twin", type=click.Path(path_type=Path))
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--settings", type=click.Path(path_type=Path), metavar="TABLE", help="Loop table with the settings.")
@_out
@_replace
@_json
def predict(
    twin: Path, config: Path | None, settings: Path | None, out: Path, replace: bool, as_json: bool
) -> None:  # fmt: skip
    """Predict loops with 95 % bands from a twin (twin.json or the run of a fit), by CONFIG's [simulate] or a table."""
    from calibration.data import read_table
    from experiments.config import load_config
    from experiments.records import check_output

    if (config is None) == (settings is None):
        raise click.UsageError("name either a configuration with [simulate] or a table with --settings.")
    check_output(out, replace=replace)
    resolved = load_config(config, verb="simulate") if config is not None else None
    table = read_table(settings) if settings is not None else None
    text = resolved.to_toml() if resolved is not None else ""
    with _run_folder(out, replace, text) as folder:
        result = _pipeline("twins", "predict", twin, resolved, table, folder)
    _finish(result, as_json, f"written to {out}")


@cli.command()
@click.argument("incumbent", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.argument("tables", nargs=-1, required=True, type=click.Path(path_type=Path))
@_json
def compare(incumbent: Path, candidate: Path, tables: Sequence[Path], as_json: bool) -> None:
    """Say whether a candidate twin explains new loop tables better than the incumbent."""
    from calibration.data import read_table

    given = [read_table(path) for path in tables]
    result = _pipeline("twins", "compare", incumbent, candidate, given)
    if not as_json:
        click.echo(_aligned(result["tables"]))
        click.echo(f"{result['verdict']}: {result['reason']}")
    _finish(result, as_json)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), metavar="TABLE", help="Loop table, in place of the fit's own.")
@click.option("--rivals", is_flag=True, help="Fit rival explanations as well, and rank them.")
@_out
@_replace
@_seed
@_json
def check(
    run: Path, data: Path | None, rivals: bool, out: Path, replace: bool, seed: int | None, as_json: bool
) -> None:
    """Test whether the model of a fit is right, and compare it with rival explanations."""
    from experiments.config import load_config, load_tables
    from experiments.records import CONFIG, OutputError, Run

    finished = Run(run)
    if finished.result.get("kind") != "fit" or not finished.result.get("parameters"):
        raise OutputError(f"{run}: this run holds no calibrated parameters; name the folder of a fit that ended well.")
    config = load_config(run / CONFIG, verb="fit", data=data, seed=seed)
    tables = load_tables(config)
    if rivals and config.device.platform != "ion":
        raise click.UsageError(
            "--rivals are those of the ion, but device.platform is 'photonic'; leave the option out."
        )
    if rivals and len(tables) > 1:
        raise click.UsageError(f"--rivals take one table, but this fit has {len(tables)}; leave the option out.")
    with _run_folder(out, replace, config.to_toml()) as folder:
        result = _pipeline("check", "run", config, tables, finished.result, folder, rivals, config.seed_of("fit"))
    _finish(result, as_json, f"written to {out}")


def _prepare_jax() -> None:
    """Settings that JAX reads from the environment when it is first imported."""
    precision = os.environ.get("JAX_ENABLE_X64", "1")
    if precision.lower() not in _TRUE:
        raise click.UsageError(
            f"JAX_ENABLE_X64 is {precision!r}, which switches 64-bit numbers off, but the twin needs them; unset it."
        )
    import platformdirs

    cache = platformdirs.user_cache_path("iontwin", appauthor=False) / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # XLA reports its own simplifier as errors; they are none of a user's business.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _pipeline(module: str, function: str, *arguments: Any) -> Any:
    """Call a pipeline; what it prints goes to stderr, so that stdout holds answers only."""
    from experiments.provenance import timed_import

    _prepare_jax()
    with contextlib.redirect_stdout(sys.stderr):
        return getattr(timed_import(f"experiments.{module}"), function)(*arguments)


@contextlib.contextmanager
def _run_folder(out: Path, replace: bool, config_toml: str) -> Generator[Any, None, None]:
    """The run folder; a run that fails while it computes keeps its folder, with the reason."""
    from experiments.records import RESULT, RunFolder

    reason, unexpected = "", None
    with RunFolder(out, replace=replace) as folder:
        folder.write_config(config_toml)
        try:
            yield folder
        except RuntimeError as error:
            reason = str(error)
            folder.log(f"failed: {reason}")
            if not (folder.work / RESULT).exists():
                folder.write_result({"status": f"failed: {reason}"})
        except Exception as error:
            # What was computed is not thrown away because its report, say, could not be drawn.
            if not (folder.work / RESULT).exists():
                raise
            folder.log(f"the result stands, but what follows it failed: {error!r}")
            unexpected = error
    if unexpected is not None:
        raise unexpected
    if reason:
        raise Failure(f"{_first_line(reason)} (see {out})")


def _finish(result: Mapping[str, Any], as_json: bool, said: str = "") -> None:
    """Print the result; a result whose status says so is a failure."""
    from experiments.records import to_json

    if as_json:
        click.echo(to_json(result), nl=False)
    if said:
        click.echo(said, err=True)
    status = str(result.get("status", "done"))
    if status.startswith(("failed", "not converged")):
        raise Failure(status)


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Nested dictionaries as (path, value), with words for booleans and lists."""
    if isinstance(value, Mapping):
        return [leaf for key, entry in value.items() for leaf in _leaves(entry, f"{path} {key}".strip())]
    if isinstance(value, bool):
        return [(path, "yes" if value else "NO")]
    return [(path, ", ".join(map(str, value)) if isinstance(value, list) else value)]


def _aligned(rows: Sequence[Mapping[str, Any]], header: bool = True) -> str:
    """Rows of equal keys as a text table."""
    columns = list(rows[0]) if rows else []
    lines = [columns] if header else []
    lines += [[f"{row[key]:.10g}" if isinstance(row[key], float) else str(row[key]) for key in columns] for row in rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")


def _terminate(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the console script and exit.

    Args:
        arguments: the command line without the program's name; None takes that of the process.
    """
    signal.signal(signal.SIGTERM, _terminate)  # so that a run that is told to stop removes its partial folder
    try:
        status = cli.main(arguments, prog_name="iontwin", standalone_mode=False) or 0
    except click.Abort:
        click.echo("iontwin: interrupted.", err=True)
        status = 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = 2
    except click.ClickException as error:
        click.echo(f"iontwin: {error.format_message()}", err=True)
        status = 2
    except Failure as error:
        click.echo(f"iontwin: {error}", err=True)
        status = 1
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("IONTWIN_TRACEBACK"):
            raise
        click.echo(f"iontwin: {error}", err=True)
        status = 2 if isinstance(error, ValueError) else 1
    sys.exit(status)
