"""Verbs that tell whether a calibration can be trusted, and what to measure next."""

from collections.abc import Sequence
from pathlib import Path

import click

from experiments.console import (
    SchemaCommand,
    aligned,
    config_argument,
    finish,
    json_option,
    out_option,
    pipeline,
    replace_option,
    run_folder,
    seed_option,
    set_option,
)


@click.command(cls=SchemaCommand)
@config_argument
@out_option
@replace_option
@seed_option
@set_option
@json_option
def coverage(config: Path, out: Path, replace: bool, seed: int | None, sets: Sequence[str], as_json: bool) -> None:
    """Simulate and fit many tables, and count how often 95 % intervals hold the truth; killed, it goes on."""
    from experiments.config import load_config

    resolved = load_config(config, verb="coverage", sets=sets, seed=seed)
    with run_folder(out, replace, resolved.to_toml()) as folder:
        result = pipeline("coverage", "run", resolved, folder, resolved.seed_of("coverage"))
    if not as_json:
        click.echo(pipeline("coverage", "table", result))
    finish(result, as_json, f"written to {out}")


@click.command(cls=SchemaCommand)
@config_argument
@click.argument("tables", nargs=-1, type=click.Path(path_type=Path))
@click.option("--from", "fit_run", required=True, type=click.Path(path_type=Path), metavar="RUN", help="The fit.")
@out_option
@replace_option
@click.option("--watch", type=click.Path(path_type=Path), metavar="FOLDER", help="Track new files of it, until Ctrl-C.")
@click.option("--interval", type=click.FloatRange(0.1), default=10.0, metavar="S", help="Seconds between looks at it.")
@set_option
@json_option
def track(
    config: Path, tables: Sequence[Path], fit_run: Path, out: Path, replace: bool, watch: Path | None, interval: float,
    sets: Sequence[str], as_json: bool,
) -> None:  # fmt: skip
    """Tell from later loop tables, in order, whether a fit is still valid; a run that stands is continued."""
    from calibration.data import read_table
    from experiments.config import load_config
    from experiments.finished import finished_fit
    from experiments.records import Run, check_output, is_run

    resolved = load_config(config, verb="track", sets=sets)
    finished_fit(fit_run, resolved.device.platform)
    if not tables and watch is None:
        raise click.UsageError("there is nothing to track; name tables, or a folder with --watch.")
    if watch is not None and not watch.is_dir():
        raise click.UsageError(f"--watch {watch}: this is no folder; name the one that tables will appear in.")
    earlier = Run(out).result if is_run(out) and not replace else None
    check_output(out, replace=replace or (earlier or {}).get("kind") == "track")
    columns = resolved.data.mapping() if resolved.data else {}
    given = [read_table(path, columns) for path in tables]
    opened = lambda: run_folder(out, True, resolved.to_toml())
    result = pipeline("track", "run", resolved, fit_run, given, earlier, opened, watch, interval)
    if not as_json:
        click.echo(result.get("verdict", "no table yet"))
    finish(result, as_json, f"written to {out}")


@click.command()
@click.argument("twin", type=click.Path(path_type=Path))
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--settings", type=click.Path(path_type=Path), metavar="TABLE", help="Loop table with the settings.")
@out_option
@replace_option
@json_option
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
    with run_folder(out, replace, text) as folder:
        result = pipeline("twins", "predict", twin, resolved, table, folder)
    finish(result, as_json, f"written to {out}")


@click.command()
@click.argument("incumbent", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.argument("tables", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def compare(incumbent: Path, candidate: Path, tables: Sequence[Path], as_json: bool) -> None:
    """Say whether a candidate twin explains new loop tables better than the incumbent."""
    from calibration.data import read_table

    given = [read_table(path) for path in tables]
    result = pipeline("twins", "compare", incumbent, candidate, given)
    if not as_json:
        click.echo(aligned(result["tables"]))
        click.echo(f"{result['verdict']}: {result['reason']}")
    finish(result, as_json)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), metavar="TABLE", help="Loop table, in place of the fit's own.")
@click.option("--rivals", is_flag=True, help="Fit rival explanations as well, and rank them.")
@out_option
@replace_option
@seed_option
@json_option
def check(
    run: Path, data: Path | None, rivals: bool, out: Path, replace: bool, seed: int | None, as_json: bool
) -> None:
    """Test whether the model of a fit is right, and compare it with rival explanations."""
    from experiments.config import load_config, load_tables
    from experiments.finished import finished_fit
    from experiments.records import CONFIG

    finished = finished_fit(run)
    config = load_config(run / CONFIG, verb="fit", data=data, seed=seed)
    if config.data is not None and config.data.scans:
        raise click.UsageError(f"{run}: this fit has scans, but a check takes only loops; fit the loops alone.")
    tables = load_tables(config)
    if rivals and config.device.platform != "ion":
        raise click.UsageError(
            "--rivals are those of the ion, but device.platform is 'photonic'; leave the option out."
        )
    if rivals and len(tables) > 1:
        raise click.UsageError(f"--rivals take one table, but this fit has {len(tables)}; leave the option out.")
    with run_folder(out, replace, config.to_toml()) as folder:
        result = pipeline("check", "run", config, tables, finished.result, folder, rivals, config.seed_of("fit"))
    finish(result, as_json, f"written to {out}")


@click.command(cls=SchemaCommand)
@config_argument
@click.option("--from", "fit_run", required=True, type=click.Path(path_type=Path), metavar="RUN", help="The fit.")
@out_option
@replace_option
@seed_option
@set_option
@json_option
def design(
    config: Path, fit_run: Path, out: Path, replace: bool, seed: int | None, sets: Sequence[str], as_json: bool
) -> None:
    """Say which loop to measure next: the one that takes most from a named uncertainty in a minute."""
    from experiments.config import load_config, load_tables
    from experiments.finished import finished_fit
    from experiments.records import CONFIG

    resolved = load_config(config, verb="design", sets=sets, seed=seed)
    finished = finished_fit(fit_run, resolved.device.platform)
    fitted = load_config(fit_run / CONFIG, verb="fit")
    tables = load_tables(fitted)
    with run_folder(out, replace, resolved.to_toml()) as folder:
        result = pipeline("design", "run", resolved, fitted, tables, finished.result, folder)
    if not as_json:
        click.echo(pipeline("design", "table", result))
    finish(result, as_json, f"written to {out}")


VERBS = (coverage, track, predict, compare, check, design)
"""What the console script adds to its own verbs."""
