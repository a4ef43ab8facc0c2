"""Losses on hidden states of blocks, and on how attention relates positions (MiniLM).

Hidden states: every block of the student is to say what the teacher's block at the same relative depth says (Romero et
al. 2014, https://arxiv.org/abs/1412.6550; Jiao et al. 2019, TinyBERT, https://arxiv.org/abs/1909.10351). Relations:
the queries of the last block among each other, and so its keys and its values, whatever their width (Wang et al. 2020,
MiniLMv2, https://arxiv.org/abs/2012.15828).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from tersor.calibration.blocks import find_blocks
from tersor.core.errors import InputError
from tersor.training.architectures import attention_of
from tersor.training.losses import kl

Seen = dict[str, Tensor]


@contextmanager
def watching(model: nn.Module, names: Sequence[str]) -> Iterator[Seen]:
    """Inside, the outputs of these modules are recorded under their names."""
    seen: Seen = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    hooks = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def pairs_of_blocks(student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Each of the student's blocks with the teacher's at the same relative depth; the last with the last.

    Raises InputError where one has no stack of blocks, or the student more than the teacher.
    """
    ours, theirs = blocks_of(student, "the student"), blocks_of(teacher, "the teacher")
    if len(ours) > len(theirs):
        raise InputError(f"hidden: the student has {len(ours)} blocks and the teacher {len(theirs)}; leave hidden out")
    depths = [(number + 1) * len(theirs) // len(ours) - 1 for number in range(len(ours))]
    return [(name, theirs[depth]) for name, depth in zip(ours, depths, strict=True)]


def pairs_of_projections(student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Queries, keys and values of the student's last block with those of the teacher's."""
    named = []
    for model, who in ((student, "the student"), (teacher, "the teacher")):
        attention, last = attention_of(model, "relation"), blocks_of(model, who)[-1]
        named.append([f"{last}.{name}" for name in (attention.query, attention.key, attention.value)])
    return list(zip(*named, strict=True))


def blocks_of(model: nn.Module, who: str) -> list[str]:
    """Names of the model's blocks. Raises InputError where it has none."""
    blocks = find_blocks(model)
    if not blocks:
        raise InputError(
            f"hidden and relation compare blocks, and {who} ({type(model).__name__}) is no stack of at least two alike "
            f"blocks; leave them out"
        )
    return blocks


def hidden_loss(
    student: Float[Tensor, "row position dim"],
    teacher: Float[Tensor, "row position dim"],
    mask: Bool[Tensor, "row position"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference over positions and dimensions; padding (mask False) does not count."""
    squares = (student.float() - teacher.float()).square().mean(-1)
    return squares.mean() if mask is None else squares[mask].mean()


def relation_loss(
    student: Float[Tensor, "row position wide"],
    teacher: Float[Tensor, "row position wider"],
    num_heads: int,
    mask: Bool[Tensor, "row position"] | None = None,
) -> Float[Tensor, ""]:
    """Mean KL from the teacher's to the student's relations, over heads and positions that are not padding."""
    divergence = kl(relations(teacher, num_heads, mask), relations(student, num_heads, mask))
    return divergence.mean() if mask is None else divergence.transpose(1, 2)[mask].mean()


def relations(
    vectors: Float[Tensor, "row position dim"], num_heads: int, mask: Bool[Tensor, "row position"] | None
) -> Float[Tensor, "row head position position"]:
    """Log of the softmax over positions of scaled dot products, in each of `num_heads` equal parts of the vectors.

    Raises InputError where the parts would not be equal.
    """
    if vectors.shape[-1] % num_heads:
        raise InputError(
            f"num_relation_heads is {num_heads}, and does not divide a width of {vectors.shape[-1]}; take a divisor"
        )
    parts = vectors.float().unflatten(-1, (num_heads, -1)).transpose(1, 2)
    scores = parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -float("inf"))
    return log_softmax(scores, -1)
