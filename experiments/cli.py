"""The console script ``iontwin``: reads and checks what the user gave, then hands over to a pipeline.

Every verb validates first (configuration, table, output folder) and computes second. JAX is imported only by the
pipelines, which are imported only when there is something to compute. Exit status: 0 done, 1 it ran and failed, 2 the
input is wrong, 130 interrupted. Text for people goes to stderr; stdout carries answers, with ``--json`` one object.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from experiments.calibration_verbs import VERBS
from experiments.console import (
    Failure,
    SchemaCommand,
    aligned,
    config_argument,
    finish,
    json_option,
    leaves,
    out_option,
    pipeline,
    replace_option,
    run_folder,
    seed_option,
    set_option,
)
from experiments.transfer_verb import transfer

DISTRIBUTION = "ion-memristor-twin"


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


@cli.command(cls=SchemaCommand)
@config_argument
@out_option
@replace_option
@seed_option
@set_option
@json_option
def simulate(config: Path, out: Path, replace: bool, seed: int | None, sets: Sequence[str], as_json: bool) -> None:
    """Run one or more loops, with or without shots."""
    from experiments.config import load_config

    resolved = load_config(config, verb="simulate", sets=sets, seed=seed)
    with run_folder(out, replace, resolved.to_toml()) as folder:
        result = pipeline("simulate", "run", resolved, folder, resolved.seed_of("simulate"))
    finish(result, as_json, f"written to {out}")


@cli.command(cls=SchemaCommand)
@config_argument
@click.option("--data", type=click.Path(path_type=Path), metavar="TABLE", help="Loop table, in place of data.table.")
@out_option
@replace_option
@seed_option
@set_option
@json_option
def fit(
    config: Path, data: Path | None, out: Path, replace: bool, seed: int | None, sets: Sequence[str], as_json: bool
) -> None:
    """Calibrate the twin to recorded loops; the demo is experiments/configs/demo.toml."""
    from experiments.config import load_config, load_tables

    resolved = load_config(config, verb="fit", sets=sets, data=data, seed=seed)
    tables = load_tables(resolved)
    with run_folder(out, replace, resolved.to_toml()) as folder:
        result = pipeline("calibrate", "run", resolved, tables, folder, resolved.seed_of("fit"))
    finish(result, as_json, f"written to {out}")


@cli.command(cls=SchemaCommand)
@config_argument
@click.option("--from", "fit_run", type=click.Path(path_type=Path), metavar="RUN", help="Fit whose device is used.")
@out_option
@replace_option
@seed_option
@set_option
@json_option
def optimize(
    config: Path, fit_run: Path | None, out: Path, replace: bool, seed: int | None, sets: Sequence[str], as_json: bool
) -> None:
    """Design pulse commands for a device, as configured or as calibrated by a fit."""
    from experiments.config import load_config
    from experiments.finished import finished_fit

    resolved = load_config(config, verb="optimize", sets=sets, seed=seed)
    if fit_run is not None:
        finished_fit(fit_run, resolved.device.platform)
    with run_folder(out, replace, resolved.to_toml()) as folder:
        result = pipeline("optimize", "run", resolved, fit_run, folder, resolved.seed_of("optimize"))
    finish(result, as_json, f"written to {out}")


@cli.command(cls=SchemaCommand)
@config_argument
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="STORE", help="Zarr store to create or to resume."
)
@click.option(
    "--workers", type=click.IntRange(1), default=None, metavar="N", help="Compute in N processes here (Dask)."
)
@click.option("--scheduler", metavar="ADDRESS", help="Compute on a running Dask cluster; see docs/cluster.md.")
@seed_option
@set_option
@json_option
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
    result = pipeline("sweep", "run", resolved, out, resolved.seed_of("sweep"), workers or 0, scheduler or "")
    finish(result, as_json, f"written to {out}")


@cli.command(cls=SchemaCommand)
@config_argument
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to create, with figures and report."
)
@replace_option
@set_option
@json_option
def trap(config: Path, out: Path | None, replace: bool, sets: Sequence[str], as_json: bool) -> None:
    """Show trap, chain, modes and Lamb-Dicke factors: what the memristor feels of voltages, geometry and beams."""
    from experiments.config import load_config

    resolved = load_config(config, verb="trap", sets=sets)
    if out is None:
        result = pipeline("trap", "run", resolved, None)
    else:
        with run_folder(out, replace, resolved.to_toml()) as folder:
            result = pipeline("trap", "run", resolved, folder)
    if not as_json:
        from experiments.listings import trap_tables

        for title, rows in trap_tables(result):
            if rows:
                click.echo(f"{title}\n{aligned(rows, header='what' not in rows[0])}\n")
    finish(result, as_json, f"written to {out}" if out else "")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@json_option
def report(run: Path, as_json: bool) -> None:
    """Write report.html of a run folder again."""
    from experiments.records import REPORT, Run

    folder = Run(run)
    pipeline("report", "rewrite", folder.path)
    finish({"status": "done", "report": folder.path / REPORT}, as_json, f"written to {folder.path / REPORT}")


@cli.command()
@click.argument("name")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to create, with figures and report."
)
@replace_option
@json_option
def reproduce(name: str, out: Path | None, replace: bool, as_json: bool) -> None:
    """Compute published, exact and earlier numbers again: NAME, or all of them with "all"."""
    from experiments.reproduced import check_name, shown

    check_name(name)
    if out is None:
        result = pipeline("reproduce", "run", name)
    else:
        with run_folder(out, replace, f"# iontwin reproduce {name}: there is nothing to configure.\n") as folder:
            result = pipeline("reproduce", "run_into", name, folder)
    if not as_json:
        click.echo(aligned([shown(row) for row in result["rows"]]))
    finish(result, as_json, f"written to {out}" if out else "")


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show devices, precision, gradients against finite differences, compile cache and versions."""
    result = pipeline("doctor", "run")
    if not as_json:
        click.echo(aligned([{"what": key, "value": value} for key, value in leaves(result)], header=False))
    finish(result, as_json)


for _verb in (*VERBS, transfer):
    cli.add_command(_verb)


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
