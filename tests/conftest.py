"""Before any module of the project is imported: 64-bit JAX, and every jaxtyping annotation checked at run time."""

import equinox as eqx
import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
# Annotations say float where an int is as good.
install_import_hook(["twin", "calibration"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_module():
    """Compiled programs are let go after each file: a process may map no more than 65,530 pieces of memory (Linux)."""
    yield
    eqx.clear_caches()
    jax.clear_caches()
