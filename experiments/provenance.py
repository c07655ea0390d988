"""Where a result comes from: versions, device and precision, and the seconds it took."""

import importlib
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

PACKAGES = ("ion-memristor-twin", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy")

# What JAX reports while a program becomes machine code; nothing of it recurs for a program that was compiled before.
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


_import_s: dict[str, float] = {}


def timed_import(name: str) -> ModuleType:
    """Import a pipeline with all it needs; the seconds are remembered for `Stopwatch`."""
    began = time.perf_counter()
    module = importlib.import_module(name)
    _import_s.setdefault(name, time.perf_counter() - began)
    return module


def versions() -> dict[str, str]:
    """Version of Python and of each package a number may depend on; "source tree" for a package not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source tree"
    return found


def provenance() -> dict[str, Any]:
    """The keys `device`, `precision` and `versions` of a ``result.json``."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    return {
        "device": f"cpu, {os.cpu_count()} cores" if cpu else f"{device.platform}, {device.device_kind}",
        "precision": str(jnp.result_type(float)),
        "versions": versions(),
    }


def hashes_of(tables: Mapping[str, Any]) -> str | dict[str, str]:
    """The key `data_sha256` of a ``result.json``: the hash of the only table, or those of all by name."""
    hashes = {name: table.sha256 for name, table in tables.items()}
    return hashes if len(hashes) > 1 else next(iter(hashes.values()))


class Stopwatch:
    """Seconds of a run in import, compilation and solution, from its construction on.

    Compilation is the time during which JAX, in any thread, was tracing, lowering or compiling, by its own report; the
    rest counts as solution. Stop it when the run is done: it listens to JAX until then.
    """

    def __init__(self):
        import jax.monitoring

        self._compiling: list[tuple[float, float]] = []
        self._began = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event in _COMPILING:
            now = time.perf_counter()
            self._compiling.append((max(self._began, now - seconds), now))

    def seconds(self) -> dict[str, float]:
        """{"import", "compile", "solve"} so far; import is what the process spent on its pipelines."""
        passed = time.perf_counter() - self._began
        # Reports overlap: a program holds others, and threads compile side by side.
        compile_s, until = 0.0, self._began
        for start, end in sorted(self._compiling):
            compile_s += max(0.0, end - max(start, until))
            until = max(until, end)
        return {"import": sum(_import_s.values()), "compile": compile_s, "solve": passed - compile_s}

    def stop(self) -> dict[str, float]:
        """`seconds()`, and an end of listening."""
        import jax.monitoring

        jax.monitoring.unregister_event_duration_listener(self._listen)
        return self.seconds()
