"""Before any module of the project is imported: 64-bit JAX, and every jaxtyping annotation checked at run time."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
# Annotations say float where an int is as good.
install_import_hook(["twin", "calibration"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
