"""The contract of a runtime: what runs a model's file, and the session that one file becomes.

Everything goes in and comes out as named NumPy arrays, so that the same numbers can be fed to every runtime and what
they give can be compared.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from tersor.core.errors import InputError

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Input:
    """An input that a model declares; `shape` holds None where any size will do."""

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer of a model, per run.

    Attributes:
        name: name of the layer, as the runtime or the model names it.
        kind: name of the operator that the runtime runs there.
        part: `product` (matrix products, convolutions, attention), `decode` (a packed weight made float), `quantize`
            (a quantized input or output made, or made float again) or `other`.
        seconds: median over the runs.
        kernel: the implementation that ran, as the runtime names it.
        precision: type that is multiplied: `fp32`, `bf16`, `int8`, ...; empty for what is no product.
        weights: storage of a product's weights, `float` or `packed`; empty where it has none.
        macs: multiply-accumulates; 0 where there are none or they are not known.
        num_bytes: bytes of the inputs, the weights as they are stored, and the outputs; 0 where not known.
    """

    name: str
    kind: str
    part: str
    seconds: float
    kernel: str = ""
    precision: str = ""
    weights: str = ""
    macs: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Profile:
    """The time of a run by layers, in the order they ran, and as a whole.

    Attributes:
        seconds: median of whole runs; what it has beyond the layers is time between them. On one thread these are
            seconds of the processor, which other work on the machine cannot stretch.
        num_calls: operators started in one run.
    """

    layers: tuple[LayerTime, ...]
    seconds: float
    num_calls: int


@runtime_checkable
class Session(Protocol):
    """The contract of an opened model that is ready to run."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The inputs that `run` must be fed."""

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """All outputs by name. Raises InputError where `feeds` are not the declared inputs."""

    def profile(self, feeds: Feeds, num_runs: int = 10) -> Profile:
        """Time every layer over `num_runs` runs, by the runtime's own profiler where it has one."""


@runtime_checkable
class Runtime(Protocol):
    """The contract of a runtime, which opens model files of some kinds."""

    @property
    def name(self) -> str:
        """The name that `--runtime` takes."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files it opens; an empty one is a folder."""

    def version(self) -> str:
        """The version of the library. Raises MissingExtra if it is not installed."""

    def open(self, path: str | Path, *, num_threads: int = 1) -> Session:
        """Raises MissingExtra where the library is not installed, ModelError for a file it cannot open."""


def run_clock(num_threads: int) -> Callable[[], float]:
    """The clock that times whole runs: the process's CPU time on one thread, else the wall clock."""
    return time.process_time if num_threads == 1 else time.perf_counter


def check_feeds(feeds: Feeds, inputs: tuple[Input, ...], place: str) -> None:
    """Raises InputError for inputs that are missing, unknown, or of another type or shape than declared."""
    names = {each.name for each in inputs}
    for word, wrong in (("lacks", names - feeds.keys()), ("does not take", feeds.keys() - names)):
        if wrong:
            of = "its inputs" if word == "lacks" else "the inputs"
            raise InputError(f"{place}: the feed {word} {', '.join(sorted(wrong))}; {of} are {', '.join(names)}")
    for each in inputs:
        array = feeds[each.name]
        fits = len(array.shape) == len(each.shape) and all(
            declared in (None, given) for declared, given in zip(each.shape, array.shape, strict=True)
        )
        if array.dtype != each.dtype or not fits:
            declared = [size if size is not None else "any" for size in each.shape]
            raise InputError(
                f"{place}: input {each.name} is {array.dtype} {list(array.shape)}; declared: {each.dtype} {declared}"
            )


@runtime_checkable
class Decoder(Protocol):
    """A language model that keeps the keys and values of the tokens it has read."""

    def reset(self) -> None:
        """Forget all tokens fed so far."""

    def feed(
        self, ids: Int64[np.ndarray, "row new"], mask: Int64[np.ndarray, "row new"] | None = None
    ) -> Float32[np.ndarray, "row new vocabulary"]:
        """Read some more tokens of every row; the logits after each. Texts of different lengths are padded on the left:
        `mask` is 0 there, and all tokens count without it."""


@runtime_checkable
class Decodes(Protocol):
    """The contract of a runtime that also runs language models token by token."""

    def open_decoder(self, path: str | Path, *, num_threads: int = 1) -> Decoder:
        """Raises as `open`, and ModelError for a file without a cache."""


@dataclass
class DecoderState:
    """The state that every decoder keeps: which of the tokens fed so far are no padding, `[row, token]`."""

    mask: Int64[np.ndarray, "row token"] | None = None

    @property
    def length(self) -> int:
        """Number of tokens fed so far to each row, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]

    def add(
        self, ids: Int64[np.ndarray, "row new"], mask: Int64[np.ndarray, "row new"] | None
    ) -> tuple[Int64[np.ndarray, "row token"], Int64[np.ndarray, "row new"]]:
        """Count new tokens. Returns the whole mask, and the position of every new token in its text.

        >>> DecoderState().add(np.array([[5, 7, 9]]), np.array([[0, 1, 1]]))
        (array([[0, 1, 1]]), array([[0, 0, 1]]))
        """
        new = np.ones_like(ids) if mask is None else mask
        self.mask = new if self.mask is None else np.concatenate([self.mask, new], axis=1)
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)
        return self.mask, np.ascontiguousarray(positions[:, -ids.shape[1] :])
