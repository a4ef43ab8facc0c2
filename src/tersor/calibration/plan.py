"""The plan of a walk, made before anything is changed: the blocks of a model, and how many examples fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tersor.calibration.blocks import BlockCall, BlockStates, find_blocks, hidden_bytes
from tersor.calibration.inputs import before_sites
from tersor.calibration.offload import ActivationCache
from tersor.core.errors import DataError, ModelError
from tersor.kernels import reference
from tersor.nn.fused import without_fused_path
from tersor.nn.sites import Site
from tersor.tasks.contract import Task
from tersor.tasks.inputs import scoring

MEMORY_LIMIT = 2**31  # bytes of calibration activations in memory
WIDTHS = 24  # what a block holds while it runs, in hidden states

BlockContext = Callable[[str], AbstractContextManager[None]]
"""Given the name of a block, or "" for everything outside the blocks: has the weights of that part in memory inside."""


@dataclass(frozen=True)
class WalkPlan:
    """The way in which calibration data can go through a model.

    Attributes:
        model, task, sites: what the plan is for; the calibration split of the task is run.
        memory_limit: bytes of activations kept in memory; the rest lies on disk.
        batch_size: how many examples are worked on at a time.
        block_names: the stack of blocks, in order; empty where the model has to be run as one piece.
        num_outputs: how many things a block returns in a tuple, hidden states first; 0 where it returns them alone.
        single_calls: how each block is called for one example alone.
        block_context: brings the weights of a part into memory; None where the whole model is there.
    """

    model: nn.Module
    task: Task
    sites: tuple[Site, ...]
    memory_limit: int
    batch_size: int
    block_names: tuple[str, ...] = ()
    num_outputs: int = 0
    single_calls: tuple[BlockCall, ...] = ()
    block_context: BlockContext | None = None

    def of_block(self, name: str) -> list[Site]:
        """The sites inside a block."""
        return [site for site in self.sites if site.owners[0].module.startswith(name + ".")]

    def outside(self) -> list[Site]:
        """The sites outside all blocks."""
        inside = {site.name for name in self.block_names for site in self.of_block(name)}
        return [site for site in self.sites if site.name not in inside]

    def part(self, name: str) -> AbstractContextManager[None]:
        """Inside, the weights of a block are in memory; of what is outside the blocks for ""."""
        return part_in_memory(self.block_context, name)


def part_in_memory(block_context: BlockContext | None, name: str) -> AbstractContextManager[None]:
    """Inside, the weights of one part of the model are in memory."""
    return nullcontext() if block_context is None else block_context(name)


def survey(
    model: nn.Module,
    task: Task,
    sites: Sequence[Site],
    memory_limit: int | None = None,
    block_context: BlockContext | None = None,
) -> WalkPlan:
    """The plan for a walk, from a look at one example. The model is left as it was.

    Args:
        sites: the weights that will be visited.
        memory_limit: bytes of activations to be kept in memory; None: `MEMORY_LIMIT`.
        block_context: brings the weights of one part after the other into memory; None: the whole model is there.

    Raises:
        DataError: the calibration split is empty.
        ModelError: the parts cannot be run one by one, and the model is not in memory as a whole.
    """
    limit = MEMORY_LIMIT if memory_limit is None else memory_limit
    batch = next(iter(task.batches("calibration", batch_size=1)), None)
    if batch is None:
        raise DataError(f"{task.name}: the calibration split is empty; give more data, or --calibration FILE")
    names = find_blocks(model)

    width, look = 0, BlockStates(model, task, [batch], names, ActivationCache(0))
    with running_plainly(model), part_in_memory(block_context, ""):
        if block_context is None:
            task.forward(model, batch)  # so that a task that looks at its first output sees that of the whole model
        if names:
            with part_in_memory(block_context, names[0]):
                width = hidden_bytes(look)
        if not width:
            if block_context is not None:
                raise ModelError(f"{type(model).__name__} is no stack of blocks; compress it without --stream")
            widest = largest_input(model, task, sites, batch)
            return WalkPlan(model, task, tuple(sites), limit, examples_at_once(limit, widest))
    return WalkPlan(
        model=model,
        task=task,
        sites=tuple(sites),
        memory_limit=limit,
        batch_size=examples_at_once(limit, width),
        block_names=tuple(names),
        num_outputs=look.num_outputs,
        single_calls=tuple(look.calls[0]),
        block_context=block_context,
    )


def examples_at_once(memory_limit: int, num_bytes: int) -> int:
    """The number of examples to work on within a memory limit, where one has `num_bytes` of hidden states."""
    return max(1, memory_limit // (WIDTHS * num_bytes))


def largest_input(model: nn.Module, task: Task, sites: Sequence[Site], batch: Any) -> int:
    """Bytes of the largest input that any of the sites gets for a batch; at least 1."""
    widest = 1

    def measure(site: Site, module: nn.Module, x: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, x.nbytes)
        return x

    with before_sites(model, sites, measure):
        task.forward(model, batch)
    return widest


@contextmanager
def running_plainly(model: nn.Module) -> Iterator[None]:
    """Inside, the model scores with the operations of its modules alone: no fused path, no kernels for packed weights.
    It is left as it was."""
    with reference(), scoring(model), without_fused_path(model):
        yield
