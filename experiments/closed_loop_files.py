"""A closed-loop search in one JSON file: how it was made and what it was told, so that it goes on another day."""

import json
from pathlib import Path

import numpy as np

from calibration.closed_loop import AbstractSearch, Round
from calibration.formats import write_atomic

FORMAT = "closed-loop-1"


class ClosedLoopError(ValueError):
    """A file of a search is refused; the message is one sentence with place, value and remedy."""


def save(path: str | Path, search: AbstractSearch) -> None:
    """Write what a search was told; the file is there whole or not at all."""
    rounds = [{name: part.tolist() for name, part in told._asdict().items()} for told in search.history]
    write_atomic(Path(path), (json.dumps(_made(search) | {"rounds": rounds}, indent=1) + "\n").encode())


def load(path: str | Path, search: AbstractSearch) -> None:
    """Tell a fresh search, made as the saved one was, what that one was told.

    Raises:
        ClosedLoopError: the file cannot be read, or belongs to another search.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        rounds = [Round(*(np.array(told[name], float) for name in Round._fields)) for told in content["rounds"]]
    except OSError as error:
        raise ClosedLoopError(f"{path}: this cannot be read ({error.strerror}); name the file of a search.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ClosedLoopError(f"{path}: this is no file of a search ({error!s:.80}); save it again.") from None
    for key, value in _made(search).items():
        if content.get(key) != value:
            raise ClosedLoopError(
                f"{path}: its {key} is {content.get(key)!r:.90}, but that of this search is {value!r:.90}; make the "
                "search as it was made."
            )
    try:
        search.replay(rounds)
    except ValueError as error:
        raise ClosedLoopError(f"{path}: {error}") from None


def _made(search: AbstractSearch) -> dict:
    """How a search was made, as JSON gives it back."""
    made = {
        "format": FORMAT,
        "search": type(search).__name__,
        "names": list(search.names),
        "low": search.low.tolist(),
        "high": search.high.tolist(),
        "settings": search.settings,
    }
    return json.loads(json.dumps(made))
