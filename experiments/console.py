"""What all verbs of the console script share: options, the hand-over to a pipeline, run folders, answers."""

import contextlib
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

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


config_argument = click.argument("config", type=click.Path(path_type=Path))
out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to create for the run."
)
replace_option = click.option("--replace", is_flag=True, help="Let it replace an earlier run there, once it is done.")
seed_option = click.option("--seed", type=int, help="Replaces the seed of the configuration.")
set_option = click.option(
    "--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Replaces one value of the configuration (TOML)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")


def prepare_jax() -> None:
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


def pipeline(module: str, function: str, *arguments: Any) -> Any:
    """Call a pipeline; what it prints goes to stderr, so that stdout holds answers only."""
    from experiments.provenance import timed_import

    prepare_jax()
    with contextlib.redirect_stdout(sys.stderr):
        return getattr(timed_import(f"experiments.{module}"), function)(*arguments)


@contextlib.contextmanager
def run_folder(out: Path, replace: bool, config_toml: str) -> Generator[Any, None, None]:
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
        raise Failure(f"{first_line(reason)} (see {out})")


def finish(result: Mapping[str, Any], as_json: bool, said: str = "") -> None:
    """Print the result; a result whose status says so is a failure."""
    from experiments.records import to_json

    if as_json:
        click.echo(to_json(result), nl=False)
    if said:
        click.echo(said, err=True)
    status = str(result.get("status", "done"))
    if status.startswith(("failed", "not converged")):
        raise Failure(status)


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Nested dictionaries as (path, value), with words for booleans and lists."""
    if isinstance(value, Mapping):
        return [leaf for key, entry in value.items() for leaf in leaves(entry, f"{path} {key}".strip())]
    if isinstance(value, bool):
        return [(path, "yes" if value else "NO")]
    return [(path, ", ".join(map(str, value)) if isinstance(value, list) else value)]


def aligned(rows: Sequence[Mapping[str, Any]], header: bool = True) -> str:
    """Rows of equal keys as a text table."""
    columns = list(rows[0]) if rows else []
    lines = [columns] if header else []
    lines += [[f"{row[key]:.10g}" if isinstance(row[key], float) else str(row[key]) for key in columns] for row in rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
