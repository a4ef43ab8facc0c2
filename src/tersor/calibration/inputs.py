"""Hooks before the sites of a model that see what the sites are given, sum it up, or keep it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tersor.activations.quantizers import Activation
from tersor.calibration.blocks import Stop
from tersor.calibration.moments import Moments, groups_of, inputs_of, takes_inputs
from tersor.calibration.offload import ActivationCache
from tersor.methods.stats import Stats
from tersor.nn.packed import input_of, with_input
from tersor.nn.sites import Site, is_convolution

OnInput = Callable[[Site, nn.Module, Tensor], Tensor]
"""Called with a site, the module that is about to run and its input; the module runs on what it returns."""

OnStats = Callable[[Site, Stats], Activation | None]
"""Called inside a running forward pass, right before a site runs, with the statistics of the input that it is about to
see. A weight that it puts in the site's place takes effect in the same pass, and so does the input quantizer that it
returns; None: the site runs on the input as it is."""


@dataclass
class BatchInputs:
    """One batch of calibration data, as far as it says which rows of an input are which tokens.

    Attributes:
        mask: which positions `[example, position]` are real; None: all are.
        whole: a tensor with a row for every token of the batch: the hidden states before a block, or else the first
            input that is seen.
        originals: the original model's inputs by site; each is dropped once it is used.
    """

    mask: Tensor | None
    whole: Tensor | None = None
    originals: dict[str, Tensor] = field(default_factory=dict)

    def add_to(self, moments: Moments, site: Site, module: nn.Module, x: Tensor) -> None:
        """Add the input `x` of a site to its sums, with that of the original model where the two can be paired."""
        original = self.originals.pop(site.name, None)
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


@dataclass
class InputRecorder:
    """Sums up the inputs of the sites in one part of a model. Its hooks are there only inside its context managers.

    Attributes:
        needs: the fields of `Stats` to gather.
        seed: of the sample of inputs.
        stop_when_done: end each pass with the last site: nothing that follows is of use.
        sums: of every site that a pass has reached, by name.
    """

    model: nn.Module
    sites: Sequence[Site]
    needs: frozenset[str]
    seed: int = 0
    stop_when_done: bool = False
    sums: dict[str, Moments] = field(default_factory=dict)

    @contextmanager
    def summing(self, batch: BatchInputs) -> Iterator[None]:
        """Inside, a forward pass adds the inputs of the sites to `sums`."""

        def add(site: Site, module: nn.Module, x: Tensor) -> Tensor:
            if site.name not in self.sums:
                self.sums[site.name] = self.no_moments(site, module)
            batch.add_to(self.sums[site.name], site, module, x)
            return x

        with before_sites(self.model, self.sites, add, first_only=True, stop_when_done=self.stop_when_done):
            yield

    @contextmanager
    def asking(self, batch: BatchInputs, on_stats: OnStats) -> Iterator[None]:
        """Inside, a forward pass calls `on_stats` right before each site runs, and goes on with what that chose."""
        latest: tuple[Tensor, Stats] | None = None  # sites that share an input share its statistics

        def ask(site: Site, module: nn.Module, x: Tensor) -> Tensor:
            nonlocal latest
            if latest is None or latest[0] is not x or is_convolution(module):
                latest = (x, self.stats_of(batch, site, module, x))
            batch.originals.pop(site.name, None)
            activation = on_stats(site, latest[1])
            return x if activation is None else activation.fake_quantize(x)

        with before_sites(self.model, self.sites, ask, first_only=True, stop_when_done=self.stop_when_done):
            yield

    def stats_of(self, batch: BatchInputs, site: Site, module: nn.Module, x: Tensor) -> Stats:
        """The statistics of one input; the sums, which are as large, do not outlive this."""
        moments = self.no_moments(site, module)
        batch.add_to(moments, site, module, x)
        return moments.stats()

    def no_moments(self, site: Site, module: nn.Module) -> Moments:
        """Empty sums for the inputs of a site."""
        return Moments(site.shape[1], self.needs, self.seed, groups_of(module))


@dataclass
class OriginalInputs:
    """Keeps what the original model's sites are given, within the memory limit of `cache`.

    Attributes:
        by_batch: inputs by the number of the batch and the name of the site.
    """

    model: nn.Module
    sites: Sequence[Site]
    cache: ActivationCache
    stop_when_done: bool = False
    by_batch: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @contextmanager
    def recording(self, number: int) -> Iterator[None]:
        """Inside, a forward pass of batch `number` is recorded."""
        inputs = self.by_batch.setdefault(number, {})
        latest: tuple[Tensor, Tensor] | None = None  # sites that share an input share what is kept of it

        def keep(site: Site, module: nn.Module, x: Tensor) -> Tensor:
            nonlocal latest
            if latest is None or latest[0] is not x:
                latest = (x, self.cache.keep(x))
            inputs[site.name] = latest[1]
            return x

        with before_sites(self.model, self.sites, keep, first_only=True, stop_when_done=self.stop_when_done):
            yield


@contextmanager
def before_sites(
    model: nn.Module,
    sites: Sequence[Site],
    on_input: OnInput,
    *,
    first_only: bool = False,
    stop_when_done: bool = False,
) -> Iterator[None]:
    """Inside, `on_input` is called whenever one of the sites is about to run.

    Args:
        first_only: only the first time that each of them runs.
        stop_when_done: raise `Stop` once each of them has been about to run.
    """
    waiting = {site.name for site in sites}
    with ExitStack() as stack:
        for site in sites:
            for place in site.owners:
                module = model.get_submodule(place.module)
                if takes_inputs(module):

                    def hook(module: nn.Module, args: Any, kwargs: Any, site: Site = site) -> Any:
                        if first_only and site.name not in waiting:
                            return None
                        waiting.discard(site.name)
                        changed = on_input(site, module, input_of(args, kwargs))
                        if stop_when_done and not waiting:
                            raise Stop
                        return with_input(args, kwargs, changed)

                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def position_mask(batch: Any) -> Tensor | None:
    """The attention mask `[example, position]` of a batch: True for tokens, False for padding; None without one."""
    inputs = batch if isinstance(batch, Mapping) else getattr(batch, "inputs", None)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
