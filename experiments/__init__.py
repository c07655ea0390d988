"""Runnable pipelines around the twin: command line, configurations, run folders, figures, reports.

Importing this package turns on 64-bit numbers in JAX without importing it, unless the environment says otherwise.
"""

import os
import sys

_64_BIT = os.environ.setdefault("JAX_ENABLE_X64", "1")
if "jax" in sys.modules and _64_BIT.lower() in ("1", "true", "t", "yes", "y", "on"):
    sys.modules["jax"].config.update("jax_enable_x64", True)
