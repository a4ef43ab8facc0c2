"""Models as stacks of blocks that are run one by one, and the hidden states of the calibration data between them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from tersor.calibration.offload import ActivationCache
from tersor.nn.in_place import own_class
from tersor.nn.packed import Fold
from tersor.nn.sites import find_sites
from tersor.tasks.contract import Task


class Stop(BaseException):
    """Ends a forward pass whose rest is not needed; `except Exception` lets it through."""


@dataclass
class BlockCall:
    """The arguments of a block's call for one batch, apart from the hidden states, which do not outlive the block.

    Attributes:
        by_position: whether the hidden states came first, or as `hidden_states=`.
        args, kwargs: the other arguments.
    """

    by_position: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> "BlockCall":
        kept = {name: without_cache(value) for name, value in kwargs.items() if args or name != "hidden_states"}
        return cls(bool(args), tuple(map(without_cache, args[1:])), kept)

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The hidden states that the block returns for `hidden`: its output, or the first of several outputs."""
        return hidden_states(self.output(block, hidden))

    def output(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """The whole output of the block for `hidden`."""
        if self.by_position:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{**self.kwargs, "hidden_states": hidden})

    def take(self, examples: Tensor, num_examples: int, single: "BlockCall") -> "BlockCall":
        """The call for some of its examples.

        Args:
            single: the call for one example alone. It tells an axis of examples from an axis of positions that happens
                to be as long: only the former is 1 there. Where it has no such argument, as no padding is to be
                masked, the first of several axes counts as one of examples.
        """

        def pick(argument: Any, alone: Any) -> Any:
            if not isinstance(argument, Tensor) or not argument.ndim or len(argument) != num_examples:
                return argument
            of_examples = len(alone) == 1 if isinstance(alone, Tensor) and alone.ndim else argument.ndim > 1
            return argument[examples] if of_examples else argument

        args, kwargs = tree_map(pick, (self.args, self.kwargs), (single.args, single.kwargs))
        return BlockCall(self.by_position, args, kwargs)


def hidden_states(made: Any) -> Tensor:
    """The hidden states among what a block returns."""
    states: Tensor = made[0] if isinstance(made, tuple) else made
    return states


def hidden_of(*args: Any, **kwargs: Any) -> Tensor:
    """The hidden states among the arguments of a block."""
    return args[0] if args else kwargs["hidden_states"]


@dataclass
class BlockStates:
    """A model that is run block by block, with the hidden states that all batches have reached.

    Attributes:
        batches: all of the calibration data.
        cache: keeps the hidden states within a memory limit.
        num_outputs: how many things a block returns in a tuple, hidden states first; 0 where it returns them alone.
        calls: how each block is called, a list for each batch.
        hidden: hidden states before the next block, a tensor for each batch.
    """

    model: nn.Module
    task: Task
    batches: Sequence[Any]
    block_names: Sequence[str]
    cache: ActivationCache
    num_outputs: int = 0
    calls: list[list[BlockCall]] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.block_names]

    def given(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which a block returns them: alone, or first in a tuple."""
        return (hidden, *[None] * (self.num_outputs - 1)) if self.num_outputs else hidden

    def first_output(self, batch: Any) -> Any:
        """The output of the first block for a batch."""
        found: list[tuple[BlockCall, Tensor]] = []

        def record(*args: Any, **kwargs: Any) -> Tensor:
            found.append((BlockCall.of(*args, **kwargs), hidden_of(*args, **kwargs)))
            raise Stop

        with stand_in(self.blocks[:1], [record]):
            self.until_stop(batch)
        call, hidden = found[0]
        return call.output(self.blocks[0], hidden)

    def hands_on(self, batch: Any, made: Any) -> bool:
        """True if the second block is given more of what the first one returned than hidden states, such as a bias for
        positions: a block alone would lack that."""
        seen: list[Any] = []

        def first(*args: Any, **kwargs: Any) -> Any:
            return (hidden_of(*args, **kwargs), *made[1:])

        def second(*args: Any, **kwargs: Any) -> Any:
            seen.extend(tree_leaves((args, kwargs)))
            raise Stop

        if not isinstance(made, tuple):
            return False
        with stand_in(self.blocks[:2], [first, second]):
            self.until_stop(batch)
        rest = [each for each in tree_leaves(made[1:]) if isinstance(each, Tensor)]
        return any(each is other for each in seen for other in rest)

    def stem(self, number: int, keep: bool = True) -> None:
        """Run what comes before the blocks on one batch, and note how they are called. The hidden states are kept in
        any case."""
        calls: list[BlockCall] = []
        hidden = torch.empty(0)

        def record(*args: Any, **kwargs: Any) -> Any:
            nonlocal hidden
            hidden = hidden_of(*args, **kwargs)
            calls.append(BlockCall.of(*args, **kwargs))
            if len(calls) == len(self.block_names):
                raise Stop
            return self.given(hidden)

        with stand_in(self.blocks, [record] * len(self.block_names)):
            self.until_stop(self.batches[number])
        self.calls[number:] = [calls]
        self.hidden[number:] = [self.cache.keep(hidden.detach())]

    def head(self, number: int, keep: bool = True) -> None:
        """Run what comes after the blocks on one batch; there are no hidden states to keep."""

        def passed(*args: Any, **kwargs: Any) -> Any:
            return self.given(hidden_of(*args, **kwargs))

        def last(*args: Any, **kwargs: Any) -> Any:
            return self.given(self.hidden[number])

        with stand_in(self.blocks, [*[passed] * (len(self.block_names) - 1), last]):
            self.until_stop(self.batches[number])

    def block(self, number: int, keep: bool, index: int) -> None:
        """Run one block on one batch; its output takes the place of the hidden states where they are to be kept."""
        name = self.block_names[index]
        made = self.calls[number][index].output(self.model.get_submodule(name), self.hidden[number])
        if keep:
            self.hidden[number] = self.cache.keep(hidden_states(made))

    def whole(self, number: int, keep: bool = True) -> None:
        """Run the whole model on one batch; there are no hidden states to keep."""
        with suppress(Stop):
            self.task.forward(self.model, self.batches[number])

    def in_line(self, batch: Any) -> bool:
        """True if a pass calls every block once, in order, each on the very tensor that the one before gave.

        The second pass is what counts: in its first, a task may call the model several times to find out how the
        output is to be read.
        """
        num_calls, latest, as_expected = 0, torch.empty(0), True

        def passed(index: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls, latest, as_expected
            hidden = hidden_of(*args, **kwargs)
            as_expected &= index == num_calls and (index == 0 or hidden is latest)
            num_calls, latest = num_calls + 1, hidden.clone()
            return self.given(latest)

        with stand_in(self.blocks, [partial(passed, index) for index in range(len(self.block_names))]):
            self.task.forward(self.model, batch)
            num_calls, as_expected = 0, True
            self.task.forward(self.model, batch)
        return as_expected and num_calls == len(self.block_names)

    def until_stop(self, batch: Any) -> None:
        """Run the whole model on a batch, as far as the forwards that stand in for its blocks let it."""
        with suppress(Stop):
            self.task.forward(self.model, batch)


@dataclass
class ReplayableBlock:
    """One block with its recorded calls, to be run on other weights and compared with the original's output.

    Attributes:
        parameters: of each site, by name: the place of its weight in the block, how it folds, its type.
        calls, inputs, targets: of every batch: the arguments, hidden states before the block, the original's after it.
        single: the arguments for one example alone.
    """

    block: nn.Module
    parameters: Mapping[str, tuple[str, Fold, torch.dtype]]
    calls: Sequence[BlockCall]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    single: BlockCall

    @property
    def num_examples(self) -> int:
        """The number of examples of the first batch, from which examples are drawn."""
        return len(self.inputs[0])

    def __call__(self, weights: Mapping[str, Tensor], examples: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output `[example, position, feature]` on some examples, differentiable in the weights
        `[out, in]`, and the original's output."""
        parameters = {}
        for name, weight in weights.items():
            place, fold, dtype = self.parameters[name]
            parameters[place] = fold.unfold(weight).to(dtype)
        call = self.calls[0].take(examples, self.num_examples, self.single)
        output = call.run(lambda *a, **k: functional_call(self.block, parameters, a, k), self.inputs[0][examples])
        return output, self.targets[0][examples]


def without_cache(argument: Any) -> Any:
    """The argument, or None in the place of a cache of keys and values, which every further run would add to."""
    return None if type(argument).__name__.endswith("Cache") else argument


@contextmanager
def stand_in(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Inside, the blocks run these functions in the place of their own `forward`."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block, forward_before in zip(blocks, before, strict=True):
            if forward_before is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward_before


def find_blocks(model: nn.Module) -> list[str]:
    """The names of the longest stack of alike blocks that hold most of the sites' weights; empty if there is none."""
    sites = find_sites(model)
    total = sum(site.num_weights for site in sites if site.kind != "embedding")
    best: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({own_class(child) for child in module}) != 1 or len(module) < 2:
            continue
        inside = sum(site.num_weights for site in sites if site.owners[0].module.startswith(path + "."))
        if 2 * inside > total and len(module) > len(best):
            best = [f"{path}.{index}" for index in range(len(module))]
    return best


def part_of(block_names: Sequence[str], name: str) -> str:
    """The block that a module or tensor belongs to; "" for what is outside the blocks.

    >>> part_of(["layers.0", "layers.1"], "layers.1.mlp"), part_of(["layers.1"], "layers.10")
    ('layers.1', '')
    """
    return next((block for block in block_names if name == block or name.startswith(block + ".")), "")


def hidden_bytes(states: BlockStates) -> int:
    """Bytes of the first batch's hidden states; 0 if the blocks do not simply take hidden states and give the like.
    Sets the number of things that a block returns."""
    batch = states.batches[0]
    try:
        made = states.first_output(batch)
        states.num_outputs = len(made) if isinstance(made, tuple) else 0
        if states.hands_on(batch, made):
            return 0
        states.stem(0)
        calls = states.calls[0]
        if len(calls) != len(states.block_names):
            return 0
        before = states.hidden[0]
        after = calls[0].run(states.blocks[0], before)
        alike = isinstance(after, Tensor) and after.shape == before.shape and after.dtype == before.dtype
        return before.nbytes if alike and states.in_line(batch) else 0
    except Exception:  # any code of the model may stumble over blocks that do nothing
        return 0
