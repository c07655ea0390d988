"""Numbers of a physical module: real arrays whose trailing axes are the batch.

A field declared with `physical()` is converted to a float array on construction, so that it has a gradient and a new
value does not recompile. `leading` names the axes that belong to the quantity itself (levels, slices); whatever
follows is batch (None: nothing is), and all fields of all modules of one solve broadcast against each other there.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float


def real_array(value) -> Float[Array, "..."]:
    """A float array of JAX's default precision."""
    return jnp.asarray(value, dtype=jnp.result_type(float))


def _real_or_none(value) -> Float[Array, "..."] | None:
    return None if value is None else real_array(value)


def physical(leading: int | None = 0, **options) -> Any:
    """A field with a physical number, or None; `leading` axes come before those of the batch (None: all of them)."""
    return eqx.field(converter=_real_or_none, metadata={"leading": leading}, **options)


class Rows(eqx.Module):
    """An array whose first axis is not batch."""

    number: Float[Array, "rows ..."] = physical(1)


def batch_shape(*modules) -> tuple[int, ...]:
    """Common batch shape of modules, arrays (all axes batch) and tuples of them."""
    return jnp.broadcast_shapes((), *(x.shape[lead:] for x, lead in _leaves(modules, 0)))


def _leaves(tree, leading: int):
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _leaves(item, leading)
    elif isinstance(tree, eqx.Module):
        for f in dataclasses.fields(tree):
            leading = f.metadata.get("leading", 0)
            if leading is not None and not f.metadata.get("static", False):
                yield from _leaves(getattr(tree, f.name), leading)
    elif tree is not None:
        yield tree, leading


def broadcast_batch(tree, shape: tuple[int, ...], leading: int = 0, narrow: tuple[int, ...] | None = None):
    """The same tree with every number spread over the whole batch, or over `narrow`, with ones in it, where it fits."""
    if isinstance(tree, (tuple, list)):
        return tuple(broadcast_batch(item, shape, leading, narrow) for item in tree)
    if isinstance(tree, eqx.Module):
        new = {
            f.name: broadcast_batch(getattr(tree, f.name), shape, f.metadata.get("leading", 0), narrow)
            for f in dataclasses.fields(tree)
            if not f.metadata.get("static", False)
        }
        return dataclasses.replace(tree, **new)
    if tree is None:
        return None
    # New axes go between the leading ones and the batch: three energies are not three lanes.
    lead, batch = tree.shape[:leading], tree.shape[leading:]
    batch = (1,) * (len(shape) - len(batch)) + batch
    fits = narrow is not None and all(n == 1 or n == size for n, size in zip(batch, narrow, strict=True))
    return jnp.broadcast_to(tree.reshape(lead + batch), lead + (narrow if fits else shape))


def with_last_axis(tree, leading: int | None = 0):
    """The same modules with room for one more axis behind those of the batch."""
    if isinstance(tree, tuple | list):
        return tuple(with_last_axis(item, leading) for item in tree)
    if isinstance(tree, eqx.Module):
        fields = [f for f in dataclasses.fields(tree) if not f.metadata.get("static", False)]
        new = {f.name: with_last_axis(getattr(tree, f.name), f.metadata.get("leading", 0)) for f in fields}
        return dataclasses.replace(tree, **new)
    if not eqx.is_array(tree) or leading is None or tree.ndim <= leading:
        return tree
    return tree[..., None]


def is_traced(*trees) -> bool:
    """Whether any number is still a tracer, so that Python cannot look at its value."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def check_values(name: str, value, accept, requirement: str, remedy: str) -> None:
    """Refuses known values for which `accept(array)` is false; tracers are judged lane by lane by validity flags."""
    if value is None or is_traced(value):
        return
    array = np.asarray(value, float)
    good = np.isfinite(array) & accept(array)
    if not np.all(good):
        raise ValueError(f"`{name}` must be {requirement}, but is {array[~good].ravel()[0]}; {remedy}.")


def check_positive(name: str, value, unit: str) -> None:
    """Refuses a known value that is not positive and finite."""
    check_values(name, value, lambda v: v > 0, "positive and finite", f"give it in {unit}")


def check_not_negative(name: str, value, unit: str) -> None:
    """Refuses a known value that is negative or not finite."""
    check_values(name, value, lambda v: v >= 0, "zero or positive, and finite", f"give it in {unit}")
