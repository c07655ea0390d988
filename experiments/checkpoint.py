"""Where a search stands, kept beside its run folder, so that the same command goes on when it was killed."""

import hashlib
import io
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from calibration.formats import write_atomic

_EVERY_S = 2.0


class Checkpoint:
    """One file, ``.NAME.search.npz``, of the search that would leave the run folder NAME.

    Args:
        run: path of the run folder.
        of: everything that the search depends on; another search has another file content and is not gone on with.
    """

    def __init__(self, run: Path, of: str):
        self.path = run.with_name(f".{run.name}.search.npz")
        self._digest = hashlib.sha256(of.encode()).hexdigest()
        self._written_s = -np.inf

    def load(self) -> tuple[str, int, Float[np.ndarray, " numbers"]] | None:
        """Stage, iterations done in it, and the numbers there; None where this search left nothing that can be read."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if str(file["digest"]) != self._digest:
                    return None
                return str(file["stage"]), int(file["done"]), np.asarray(file["point"], float)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def keep(self, stage: str, done: int, point: Float[np.ndarray, " numbers"], *, at_once: bool = False) -> None:
        """Write where the search stands, every few seconds, or at once."""
        now = time.monotonic()
        if now - self._written_s < _EVERY_S and not at_once:
            return
        buffer = io.BytesIO()
        np.savez(buffer, digest=self._digest, stage=stage, done=done, point=np.asarray(point))
        write_atomic(self.path, buffer.getvalue())
        self._written_s = now

    def remove(self) -> None:
        """The search is done."""
        self.path.unlink(missing_ok=True)


def same_but_iterations(config_toml: str, files: Iterable[Path]) -> str:
    """What a search depends on: its configuration, without how long it may take, and the contents of files."""
    lines = [line for line in config_toml.splitlines() if not line.startswith("iterations = ")]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]
    return "\n".join([*lines, *hashes])
