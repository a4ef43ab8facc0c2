"""Inputs of a session: made up in the declared types and shapes, or a task's own examples."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from tersor.core.errors import InputError
from tersor.runtimes.contract import Input

NUM_TOKENS = 50  # made-up token ids lie below this: every vocabulary has as many
LENGTH = 128


def synthetic_feeds(
    inputs: Sequence[Input],
    *,
    batch_size: int = 1,
    length: int = LENGTH,
    shape: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Inputs that depend on nothing but the arguments: two models with the same inputs get the same numbers.

    Token ids are drawn, masks are all ones, token types and past states zero, positions count up, floats are normal. A
    language model with its cache as inputs gets one token after `length` others.

    Args:
        length: size of every axis that is left open, but for the first, which is the batch; not of images.
        shape: shape of one example, for inputs of three axes and more whose sizes are left open.

    Raises InputError for sizes that the model does not take, or that nobody gave.
    """
    found = {each.name: made_up(each, batch_size, length, shape, seed) for each in inputs}
    if any("past" in each.name for each in inputs):  # a language model: one token after `length` others
        for name, value in (("input_ids", 1), ("position_ids", length)):
            if name in found:
                found[name] = np.full((batch_size, 1), value)
        found["attention_mask"] = np.ones((batch_size, length + 1), np.int64)
    return found


def made_up(each: Input, batch_size: int, length: int, shape: Sequence[int] | None, seed: int) -> np.ndarray:
    """Random values for one input, in its declared type and shape."""
    sizes = concrete(each, batch_size, length, shape)
    generator = np.random.default_rng([seed, *sizes])
    if each.dtype.kind == "f":
        values = generator.standard_normal(sizes)
        return (values * 0 if "past" in each.name else values).astype(each.dtype)
    if "mask" in each.name or each.dtype == bool:
        return np.ones(sizes, each.dtype)
    if "type" in each.name or each.name == "beam_idx":
        return np.zeros(sizes, each.dtype)
    if "position" in each.name:
        return np.broadcast_to(np.arange(sizes[-1]), sizes).astype(each.dtype)
    return generator.integers(1, NUM_TOKENS, sizes).astype(each.dtype)


def concrete(each: Input, batch_size: int, length: int, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The declared shape with every size known."""
    if not each.shape:
        return ()
    first, *rest = each.shape
    if first not in (None, batch_size):
        raise InputError(f"input {each.name} takes batches of {first} only; use --batch {first}")
    if shape is not None and len(rest) >= 2:
        if len(shape) != len(rest) or any(size not in (None, given) for size, given in zip(rest, shape, strict=True)):
            declared = ", ".join("any" if size is None else str(size) for size in rest)
            raise InputError(f"--shape {','.join(map(str, shape))} does not fit input {each.name}, which is {declared}")
        return (batch_size, *shape)
    if None in rest and len(rest) >= 3 and "past" not in each.name:
        raise InputError(
            f"input {each.name} leaves its size open ({', '.join('any' if s is None else str(s) for s in rest)}); "
            f"say it, for example --shape 3,32,32, or give --task and --data"
        )
    return (batch_size, *(length if size is None else size for size in rest))


def feeds_from(tensors: Mapping[str, Tensor], inputs: Sequence[Input]) -> dict[str, np.ndarray]:
    """A task's batch as the session declares its inputs: by name, or by being the only one. Masks that the task has no
    need of are ones, token types zeros.

    Raises InputError for an input that the batch does not hold.
    """
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    if len(inputs) == 1 and len(arrays) == 1:
        arrays = {inputs[0].name: next(iter(arrays.values()))}
    found = {}
    for each in inputs:
        array = arrays.get(each.name)
        like = next(iter(arrays.values()))
        if array is None and "mask" in each.name:
            array = np.ones(like.shape, each.dtype)
        elif array is None and "type" in each.name:
            array = np.zeros(like.shape, each.dtype)
        if array is None:
            raise InputError(f"the model takes {each.name}, and the task's examples hold {', '.join(arrays)}")
        found[each.name] = np.ascontiguousarray(array, dtype=each.dtype)
    return found
