"""Walk a model in the order its data flows, and visit every site with the statistics of its inputs.

A site is visited while the calibration data stands right before it: the hook that sees its input sums it up, the
visitor chooses the new weight, and the same forward pass goes on with what was chosen. So every site is fitted to the
model compressed so far, and the data runs through each block once. A model with a stack of alike blocks
(`model.layers`, `encoder.layer`, ...) is walked block by block, and between them only the hidden states are kept: what
comes before the blocks, each block, what comes after. Any other model is walked as one piece.

Where the data of all examples at once would exceed the plan's memory limit, a block sees it batch by batch: its sites
are then visited together after the last batch, and the data runs through the block a second time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from tersor.activations.quantizers import Activation
from tersor.calibration.blocks import BlockStates, ReplayableBlock, find_blocks, part_of
from tersor.calibration.inputs import BatchInputs, InputRecorder, OriginalInputs, position_mask
from tersor.calibration.moments import has_inputs
from tersor.calibration.offload import ActivationCache
from tersor.calibration.plan import BlockContext, WalkPlan, part_in_memory, running_plainly
from tersor.formats.contract import Encoded
from tersor.kernels import reference
from tersor.methods.stats import Stats
from tersor.nn.fused import leave_fused_path
from tersor.nn.packed import PackedWeight, packed_weight
from tersor.nn.sites import Site, put
from tersor.tasks.inputs import scoring


class Chosen(NamedTuple):
    """The new weight of a site, its input quantizer, and a new bias; without a new one the bias stays as it is."""

    encoded: Encoded
    activation: Activation | None = None
    bias: nn.Parameter | None = None


class Visitor(Protocol):
    """The contract of what a walk calls at every site: it chooses what stands in the site's place."""

    @property
    def needs(self) -> frozenset[str]:
        """The fields of `Stats` that `visit_site` reads."""

    def visit_site(self, site: Site, stats: Stats) -> Chosen | None:
        """The new weight of a site; None: the site stays as it is.

        Args:
            stats: of the inputs that the model compressed so far gives the site; empty where no input can be seen.
        """

    def tune_block(self, block_run: ReplayableBlock, chosen: Mapping[Site, Chosen]) -> dict[Site, Chosen]:
        """Better choices for some sites of a block that has just been walked, with the output of the block in view.

        Called only for visitors whose `needs` have `cross_moment`: without the original there is nothing to aim at.
        """


@dataclass(frozen=True)
class SiteObserver:
    """A visitor that changes nothing: it hands the statistics of each site to a function."""

    needs: frozenset[str]
    on_site: Callable[[Site, Stats], None]

    def visit_site(self, site: Site, stats: Stats) -> None:
        self.on_site(site, stats)

    def tune_block(self, block_run: ReplayableBlock, chosen: Mapping[Site, Chosen]) -> dict[Site, Chosen]:
        return {}


def walk(plan: WalkPlan, visitor: Visitor, original: nn.Module | None = None, seed: int = 0) -> None:
    """Visit every site of a plan once. The model of the plan is compressed as the walk goes on, and left in its mode.

    Args:
        original: the model as it was, run beside the other for visitors that need `cross_moment`.
        seed: of the samples of inputs.
    """
    steps = Walk.begun(plan, visitor, original, seed)
    undo = leave_fused_path(plan.model)
    with ExitStack() as stack:
        stack.enter_context(reference())
        stack.enter_context(scoring(plan.model))
        if steps.original is not None and steps.original.model is not plan.model:
            stack.enter_context(running_plainly(steps.original.model))
        try:
            steps.by_blocks() if plan.block_names else steps.as_one_piece()
        finally:
            for call in undo if not steps.num_chosen else ():  # packed weights cannot take the fused path
                call()


def visit_without_data(
    model: nn.Module, sites: Sequence[Site], visitor: Visitor, block_context: BlockContext | None = None
) -> None:
    """Visit every site without statistics, and put what the visitor chooses in its place at once."""
    block_names = find_blocks(model)
    for part, inside in groupby(sites, lambda site: part_of(block_names, site.parameter)):
        with part_in_memory(block_context, part):
            for site in inside:
                chosen = visitor.visit_site(site, Stats())
                if chosen is not None:
                    site.replace(model, chosen.encoded, chosen.activation)


@dataclass(frozen=True)
class ModelPart:
    """A part of a model that all batches run through before the next part begins.

    Attributes:
        run: runs one batch by its number; the last argument tells whether the hidden states go on to the next part.
        index: of the block that this is, if it is one.
        is_last: nothing comes after it, so a pass may end with its last site.
    """

    run: Callable[[BlockStates, int, bool], None]
    index: int | None = None
    is_last: bool = False


@dataclass
class Walk:
    """The order of one walk, and how far it has come.

    Attributes:
        states: the model that is compressed, and where the calibration data stands in it.
        original: the same of the original model, if it runs beside.
        cache: keeps activations within the memory limit.
        pending: the sites that have not been visited, by name.
        chosen: what stands in the places of sites as float weights, until `install_packed`.
        num_chosen: how many sites have been given a new weight so far.
    """

    plan: WalkPlan
    visitor: Visitor
    seed: int
    states: BlockStates
    original: BlockStates | None
    cache: ActivationCache
    pending: dict[str, Site]
    chosen: dict[Site, Chosen] = field(default_factory=dict)
    num_chosen: int = 0

    @classmethod
    def begun(cls, plan: WalkPlan, visitor: Visitor, original: nn.Module | None, seed: int) -> "Walk":
        """A walk before its first step."""
        cache = ActivationCache(plan.memory_limit)
        batches = list(plan.task.batches("calibration", batch_size=plan.batch_size))

        def states(model: nn.Module) -> BlockStates:
            return BlockStates(model, plan.task, batches, plan.block_names, cache, plan.num_outputs)

        if "cross_moment" not in visitor.needs:
            original = None
        elif original is None:
            raise ValueError("cross_moment needs the original model")
        beside = None if original is None else states(original)
        pending = {site.name: site for site in plan.sites}
        return cls(plan, visitor, seed, states(plan.model), beside, cache, pending)

    @property
    def model(self) -> nn.Module:
        """The model that is compressed."""
        return self.plan.model

    def by_blocks(self) -> None:
        """Go through what comes before the blocks, each block, and what comes after if a site there is pending."""
        plan, outside = self.plan, self.plan.outside()
        with plan.part(""):
            self.visit_unreached(site for site in outside if not has_inputs(self.model, site))
            self.go_through(ModelPart(BlockStates.stem), outside)
        for index, name in enumerate(plan.block_names):
            sites = plan.of_block(name)
            with plan.part(name):
                self.visit_unreached(site for site in sites if not has_inputs(self.model, site))
                self.go_through(ModelPart(partial(BlockStates.block, index=index), index), sites)
                self.visit_unreached(sites)
        if any(site.name in self.pending for site in outside):
            with plan.part(""):
                self.go_through(ModelPart(BlockStates.head, is_last=True), outside)
                self.visit_unreached(outside)

    def as_one_piece(self) -> None:
        """Go through the whole model at once."""
        sites = self.plan.sites
        with self.plan.part(""):
            self.visit_unreached(site for site in sites if not has_inputs(self.model, site))
            self.go_through(ModelPart(BlockStates.whole, is_last=True), sites)
            self.visit_unreached(sites)

    def go_through(self, part: ModelPart, sites: Sequence[Site]) -> None:
        """Run all batches through a part, and visit those of the sites that they reach."""
        sites = [site for site in sites if site.name in self.pending and has_inputs(self.model, site)]
        inputs, originals = list(self.states.hidden), self.original_inputs(part, sites)
        recorder = InputRecorder(self.model, sites, self.visitor.needs, self.seed, part.is_last)
        at_once = len(self.states.batches) == 1
        if at_once:
            with recorder.asking(self.batch_inputs(0, originals), self.visit):
                part.run(self.states, 0, True)
        else:
            for number in range(len(self.states.batches)):
                with recorder.summing(self.batch_inputs(number, originals)):
                    part.run(self.states, number, False)
            for site in sites:
                if site.name in recorder.sums:
                    self.visit(site, recorder.sums[site.name].stats())
        tuned = part.index is not None and self.tune_block(part.index, inputs)
        if (tuned or not at_once) and not part.is_last:
            self.go_through_again(part, inputs)
        self.install_packed()

    def go_through_again(self, part: ModelPart, inputs: list[Tensor]) -> None:
        """Run all batches through a part whose weights have changed since, so that the hidden states are right."""
        self.states.hidden[:] = inputs or self.states.hidden
        if any(chosen.activation for chosen in self.chosen.values()):
            self.install_packed()
        for number in range(len(self.states.batches)):
            part.run(self.states, number, True)

    def original_inputs(self, part: ModelPart, sites: Sequence[Site]) -> dict[int, dict[str, Tensor]]:
        """The inputs of the original's sites in a part, by number of the batch and name; empty if none runs beside."""
        if self.original is None:
            return {}
        recorder = OriginalInputs(self.original.model, sites, self.cache, part.is_last)
        for number in range(len(self.original.batches)):
            with recorder.recording(number):
                part.run(self.original, number, True)
        return recorder.by_batch

    def batch_inputs(self, number: int, originals: dict[int, dict[str, Tensor]]) -> BatchInputs:
        """The description of one batch that tells the rows of its inputs apart."""
        hidden, batch = self.states.hidden, self.states.batches[number]
        whole = hidden[number] if number < len(hidden) else None
        return BatchInputs(position_mask(batch), whole, originals.get(number, {}))

    def visit(self, site: Site, stats: Stats) -> Activation | None:
        """Have the visitor choose for one site, and let the model run on it from here on, as a float weight.

        Called inside a running forward pass where there is one batch: one pass through a block is enough then. Returns
        the quantizer of the site's input.
        """
        del self.pending[site.name]
        chosen = self.visitor.visit_site(site, stats)
        if chosen is None:
            return None
        self.num_chosen += 1
        self.chosen[site] = chosen
        self.install_float(site, chosen)
        return chosen.activation

    def visit_unreached(self, sites: Iterable[Site]) -> None:
        """Visit those of the sites that are pending, without statistics."""
        for site in sites:
            if site.name in self.pending:
                self.visit(site, Stats())
        self.install_packed()

    def tune_block(self, index: int, inputs: list[Tensor]) -> bool:
        """Let the visitor choose again with the output of a whole block in view; True if it chose anything else."""
        if self.original is None or not self.chosen:
            return False
        name = self.plan.block_names[index]
        parameters = {
            site.name: (site.parameter.removeprefix(name + "."), site.fold, site.dtype) for site in self.chosen
        }
        calls = [of_batch[index] for of_batch in self.states.calls]
        block, single = self.model.get_submodule(name), self.plan.single_calls[index]
        block_run = ReplayableBlock(block, parameters, calls, inputs, self.original.hidden, single)
        better = self.visitor.tune_block(block_run, self.chosen)
        for site, chosen in better.items():
            self.chosen[site] = chosen
            self.install_float(site, chosen)
        return bool(better)

    def install_float(self, site: Site, chosen: Chosen) -> None:
        """Put a new weight in the place of a site as floats, with which a running pass can go on."""
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

    def install_packed(self) -> None:
        """Put all that was chosen in its place for good."""
        for site, chosen in self.chosen.items():
            site.replace(self.model, chosen.encoded, chosen.activation)
        self.chosen = {}
