"""Walk a model in the order its data flows, and visit every site with the statistics of its inputs.

A site is visited while the calibration data stands right before it: the hook that sees its input sums it up, the
visitor chooses the new weight, and the same forward pass goes on with what was chosen. So every site is fitted to the
model compressed so far, and the data runs through each block once. A model with a stack of alike blocks
(`model.layers`, `encoder.layer`, ...) is walked block by block, and between them only the hidden states are kept: what
comes before the blocks, each block, what comes after. Any other model is walked as one piece.

Where the data of all examples at once would exceed `memory_limit`, a block sees it batch by batch: its sites are then
visited together after the last batch, and the data runs through the block a second time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from tersor.activations.quantizers import Activation
from tersor.calibration.blocks import BlockRun, BlockStates, Stop, find_blocks, hidden_bytes
from tersor.calibration.moments import Moments, groups_of, has_inputs, inputs_of, takes_inputs
from tersor.calibration.offload import ActivationCache
from tersor.core.errors import DataError, ModelError
from tersor.formats.contract import Encoded
from tersor.kernels import reference
from tersor.methods.stats import Stats
from tersor.nn.packed import PackedWeight, packed_weight, with_input
from tersor.nn.sites import Site, is_convolution, leave_fused_path, put
from tersor.tasks.contract import Task
from tersor.tasks.inputs import scoring

MEMORY_LIMIT = 2**31  # bytes of calibration activations in memory
WIDTHS = 24  # what a block holds while it runs, in hidden states


class Chosen(NamedTuple):
    """The new weight of a site, its input quantizer, and a new bias; without a new one the bias stays as it is."""

    encoded: Encoded
    activation: Activation | None = None
    bias: nn.Parameter | None = None


Refine = Callable[[BlockRun, dict[Site, Chosen]], dict[Site, Chosen]]
Visit = Callable[[Site, Stats], Chosen | None]  # None: the site is kept as it is
Run = Callable[[BlockStates, int, bool], None]  # one batch of one stream; whether the hidden states go on
Around = Callable[[str], Any]  # a context manager around the work on one block, by its name; "" outside the blocks


@dataclass
class Walk:
    """One walk over a model.

    Attributes:
        model: compressed as the walk goes on.
        original: what the model was; runs beside it where `cross_moment` is needed.
        task: its calibration split is run.
        visit: called once for each of `sites`.
        needs: the fields of `Stats` it reads.
        refine: called for each block with what was chosen in it, to choose better with the whole block in view.
        around: entered for every block, and left when its sites are replaced.
        memory_limit: bytes of activations kept in memory; the rest lies on disk.
    """

    model: nn.Module
    original: nn.Module
    task: Task
    sites: Sequence[Site]
    visit: Visit
    needs: frozenset[str]
    refine: Refine | None = None
    around: Around = nullcontext
    memory_limit: int = MEMORY_LIMIT
    seed: int = 0

    def run(self) -> None:
        """Visit every site. The model is left in the mode it was in."""
        with ExitStack() as stack:
            stack.enter_context(reference())
            for model in {id(self.model): self.model, id(self.original): self.original}.values():
                stack.enter_context(scoring(model))
                undo = leave_fused_path(model)
                for call in undo if model is not self.model else ():
                    stack.callback(call)
            self.left = {site.name: site for site in self.sites}
            self.chosen: dict[Site, Chosen] = {}
            self.spill = ActivationCache(self.memory_limit)
            self.num_outputs = 0
            self.block_names, batch_size = self.survey()
            self.batches = list(self.task.batches("calibration", batch_size=batch_size))
            self.streams = [self.stream(self.model)]
            if "cross_moment" in self.needs:
                self.streams.append(self.stream(self.original))
            self.walk_blocks() if self.block_names else self.walk_whole()

    def stream(self, model: nn.Module) -> BlockStates:
        return BlockStates(model, self.task, self.block_names, self.spill, self.num_outputs)

    def survey(self) -> tuple[list[str], int]:
        """Which blocks there are, and how many examples can be worked on at a time, from a look at one example."""
        batch = next(iter(self.task.batches("calibration", batch_size=1)), None)
        if batch is None:
            raise DataError(f"{self.task.name}: the calibration split is empty; give more data, or --calibration FILE")
        names = find_blocks(self.model)
        with self.around(""), self.around(names[0]) if names else nullcontext():
            look = BlockStates(self.model, self.task, names, ActivationCache(0))
            if names and (width := hidden_bytes(look, batch)):
                self.singles, self.num_outputs = look.calls[0], look.num_outputs
                return names, max(1, self.memory_limit // (WIDTHS * width))
        if self.around is not nullcontext:
            raise ModelError(f"{type(self.model).__name__} is no stack of blocks; compress it without --stream")
        widest = 1

        def measure(site: Site, module: nn.Module, x: Tensor) -> Tensor:
            nonlocal widest
            widest = max(widest, x.nbytes)
            return x

        with before_sites(self.model, self.sites, measure):
            self.task.forward(self.model, batch)
        return [], max(1, self.memory_limit // (WIDTHS * widest))

    def walk_blocks(self) -> None:
        inside = {s.name for s in self.sites for n in self.block_names if s.owners[0].module.startswith(n + ".")}
        outside = [site for site in self.sites if site.name not in inside]
        with self.around(""):
            self.settle([site for site in outside if not has_inputs(self.model, site)])
            self.segment(outside, self.run_stem)
        for index, name in enumerate(self.block_names):
            sites = [site for site in self.sites if site.owners[0].module.startswith(name + ".")]
            with self.around(name):
                self.settle([site for site in sites if not has_inputs(self.model, site)])
                self.segment(sites, partial(BlockStates.block, index=index), index)
                self.settle(sites)
        if any(site.name in self.left for site in outside):
            with self.around(""):
                self.segment(outside, self.run_head, stop_when_done=True)
                self.settle(outside)

    def walk_whole(self) -> None:
        with self.around(""):
            self.settle([site for site in self.sites if not has_inputs(self.model, site)])
            self.segment(self.sites, self.run_whole, stop_when_done=True)
            self.settle(self.sites)

    def run_stem(self, stream: BlockStates, number: int, keep: bool) -> None:
        stream.stem(number, self.batches[number])

    def run_head(self, stream: BlockStates, number: int, keep: bool) -> None:
        stream.head(number, self.batches[number])

    def run_whole(self, stream: BlockStates, number: int, keep: bool) -> None:
        stream.until_stop(self.batches[number])

    def settle(self, sites: Sequence[Site]) -> None:
        """Visit those of the sites that are still left, without statistics."""
        for site in sites:
            if site.name in self.left:
                self.choose(site, Stats())
        self.replace()

    def choose(self, site: Site, stats: Stats) -> None:
        """Visit one site; until `replace`, what was chosen stands in its place as a float weight."""
        del self.left[site.name]
        chosen = self.visit(site, stats)
        if chosen is not None:
            self.chosen[site] = chosen
            self.hold(site, chosen)

    def hold(self, site: Site, chosen: Chosen) -> None:
        packed = PackedWeight(chosen.encoded, site.fold, site.dtype)
        weight = nn.Parameter(packed(), requires_grad=False) if has_inputs(self.model, site) else None
        for place in site.owners:
            module = self.model.get_submodule(place.module)
            if packed_weight(module, place.parameter) is not None:
                put(self.model, place, packed, None)
            elif weight is not None:
                setattr(module, place.parameter, weight)
            if chosen.bias is not None:
                module.bias = chosen.bias

    def replace(self) -> None:
        """Put what was chosen in its place for good."""
        for site, chosen in self.chosen.items():
            site.replace(self.model, chosen.encoded, chosen.activation)
        self.chosen = {}

    def segment(self, sites: Sequence[Site], run: Run, index: int | None = None, stop_when_done: bool = False) -> None:
        """Run all batches through a part of the model, and visit the sites they reach.

        Args:
            run: runs one batch of one stream; its last argument tells whether the hidden states go on.
            index: of the block this is, if it is one.
            stop_when_done: end the pass with the last site: nothing that follows is of use.
        """
        sites = [site for site in sites if site.name in self.left and has_inputs(self.model, site)]
        numbers = range(len(self.batches))
        at_once = len(self.batches) == 1
        until = sites if stop_when_done else None
        originals: dict[tuple[str, int], Tensor] = {}
        stream, inputs = self.streams[0], list(self.streams[0].hidden)
        if len(self.streams) > 1:
            for number in numbers:
                with before_sites(self.original, sites, OriginalInputs(originals, number, self.spill, until)):
                    run(self.streams[1], number, True)
        sums: dict[str, Moments] = {}
        for number in numbers:
            with before_sites(self.model, sites, InputRecorder(self, sums, originals, number, at_once, until)):
                run(stream, number, at_once)
        if not at_once:
            for site in sites:
                if site.name in sums:
                    self.choose(site, sums[site.name].stats())
        changed = index is not None and self.refine is not None and self.refined(index, inputs)
        if (changed or not at_once) and not stop_when_done:
            stream.hidden[:] = inputs or stream.hidden
            if any(chosen.activation for chosen in self.chosen.values()):
                self.replace()
            for number in numbers:
                run(stream, number, True)
        self.replace()

    def refined(self, index: int, inputs: list[Tensor]) -> bool:
        """Let `refine` see a block whole; whether it chose anything else."""
        assert self.refine is not None
        if len(self.streams) < 2 or not self.chosen:
            return False
        stream, name = self.streams[0], self.block_names[index]
        parameters = {
            site.name: (site.parameter.removeprefix(name + "."), site.fold, site.dtype) for site in self.chosen
        }
        calls = [of_batch[index] for of_batch in stream.calls]
        block = self.model.get_submodule(name)
        block_run = BlockRun(block, parameters, calls, inputs, self.streams[1].hidden, self.singles[index])
        better = self.refine(block_run, self.chosen)
        for site, chosen in better.items():
            self.chosen[site] = chosen
            self.hold(site, chosen)
        return bool(better)


class InputRecorder:
    """Sums up the inputs of sites as a pass reaches them; when `at_once`, visits each right there."""

    def __init__(
        self,
        walk: Walk,
        sums: dict[str, Moments],
        originals: dict[tuple[str, int], Tensor],
        number: int,
        at_once: bool,
        until: Sequence[Site] | None,
    ):
        self.walk, self.sums, self.originals, self.number, self.at_once = walk, sums, originals, number, at_once
        self.waiting = {site.name for site in until} if until else None
        self.mask = position_mask(walk.batches[number])
        self.latest: tuple[Tensor, Stats] | None = None  # sites that share an input share its sums
        self.seen: set[str] = set()
        self.whole: Tensor | None = next(iter(walk.streams[0].hidden[number : number + 1]), None)

    def __call__(self, site: Site, module: nn.Module, x: Tensor) -> Tensor:
        if site.name in self.seen:
            return x
        self.seen.add(site.name)
        quantized = x
        if self.at_once:
            quantized = self.visit(site, module, x)
        else:
            self.sum_up(site, module, x, self.sums.setdefault(site.name, self.moments(site, module)))
        if self.waiting is not None:
            self.waiting.discard(site.name)
            if not self.waiting:
                raise Stop
        return quantized

    def moments(self, site: Site, module: nn.Module) -> Moments:
        return Moments(site.shape[1], self.walk.needs, self.walk.seed, groups_of(module))

    def sum_up(self, site: Site, module: nn.Module, x: Tensor, moments: Moments) -> None:
        original = self.originals.pop((site.name, self.number), None)
        if original is not None and not self.paired(x, original):
            original = None
        others = inputs_of(module, original, self.mask) if original is not None else None
        for part in inputs_of(module, x, self.mask):
            if part.shape[-1] == site.shape[1]:
                moments.add(part, next(others) if others is not None else None)

    def paired(self, x: Tensor, original: Tensor) -> bool:
        """True if both hold the same tokens: experts get those that their own model routes to them."""
        self.whole = x if self.whole is None else self.whole
        all_rows = x.ndim > 2 or len(x) in (len(self.whole), self.whole.shape[:-1].numel())
        return original.shape == x.shape and all_rows

    def visit(self, site: Site, module: nn.Module, x: Tensor) -> Tensor:
        """Visit a site whose input is known. Returns the input that it runs on from now on."""
        if self.latest is None or self.latest[0] is not x or is_convolution(module):
            moments = self.moments(site, module)
            self.sum_up(site, module, x, moments)
            self.latest = (x, moments.stats())
            del moments  # sums as large as the statistics
        self.originals.pop((site.name, self.number), None)
        self.walk.choose(site, self.latest[1])
        chosen = self.walk.chosen.get(site)
        return x if chosen is None or chosen.activation is None else chosen.activation.fake_quantize(x)


class OriginalInputs:
    """Keeps the original model's inputs of the sites a pass reaches."""

    def __init__(
        self, kept: dict[tuple[str, int], Tensor], number: int, spill: ActivationCache, until: Sequence[Site] | None
    ):
        self.kept, self.number, self.spill = kept, number, spill
        self.waiting = {site.name for site in until} if until else None
        self.latest: tuple[Tensor, Tensor] | None = None

    def __call__(self, site: Site, module: nn.Module, x: Tensor) -> Tensor:
        if (site.name, self.number) not in self.kept:
            if self.latest is None or self.latest[0] is not x:
                self.latest = (x, self.spill.keep(x))
            self.kept[site.name, self.number] = self.latest[1]
        if self.waiting is not None:
            self.waiting.discard(site.name)
            if not self.waiting:
                raise Stop
        return x


@contextmanager
def before_sites(
    model: nn.Module, sites: Sequence[Site], see: Callable[[Site, nn.Module, Tensor], Tensor]
) -> Iterator[None]:
    """Call `see(site, module, input)` before each of the sites runs, and run it on what that returns."""
    with ExitStack() as stack:
        for site in sites:
            for place in site.owners:
                module = model.get_submodule(place.module)
                if takes_inputs(module):

                    def hook(module: nn.Module, args: Any, kwargs: Any, site: Site = site) -> Any:
                        return with_input(args, kwargs, lambda x: see(site, module, x))

                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def position_mask(batch: Any) -> Tensor | None:
    """Which positions of a batch are real; None where all are or nothing says so."""
    inputs = batch if isinstance(batch, Mapping) else getattr(batch, "inputs", None)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
