"""The verb that moves a device, or its control, to the other platform."""

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
@click.option("--from", "fit_run", type=click.Path(path_type=Path), metavar="RUN", help="Fit whose device is moved.")
@out_option
@replace_option
@seed_option
@set_option
@json_option
def transfer(
    config: Path, fit_run: Path | None, out: Path, replace: bool, seed: int | None, sets: Sequence[str], as_json: bool
) -> None:
    """Move a device, or control designed on it, to the other platform; tell what is lost, recalibrated or not."""
    from experiments.config import load_config
    from experiments.finished import finished_fit
    from experiments.messages import ConfigError

    resolved = load_config(config, verb="transfer", sets=sets, seed=seed)
    assert resolved.transfer is not None
    if fit_run is not None:
        finished_fit(fit_run, resolved.device.platform)
        if resolved.transfer.source:
            raise ConfigError(f"{config}: transfer.source is given beside --from, whose fit tells how devices differ; "
                              "remove either.")  # fmt: skip
    with run_folder(out, replace, resolved.to_toml()) as folder:
        result = pipeline("transfer", "run", resolved, fit_run, folder, resolved.seed_of("transfer"))
    if not as_json:
        from experiments.listings import DESIGNED_ON, transfer_tables

        for title, rows in transfer_tables(result):
            if rows:
                click.echo(f"{title}\n{aligned(rows)}\n")
        if result["control"]:
            click.echo(f"{DESIGNED_ON}\n")
    finish(result, as_json, f"written to {out}")
