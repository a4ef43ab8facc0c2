"""ExecuTorch on the CPU (https://docs.pytorch.org/executorch): `.pte` files, whose parts for XNNPACK run on its
kernels, as they do on a phone."""

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersor.core.errors import InputError, MissingExtra, ModelError
from tersor.core.messages import first_line
from tersor.core.scratch import scratch_folder
from tersor.runtimes.contract import Feeds, Input, Profile, Session, check_feeds, run_clock
from tersor.runtimes.executorch_profile import read_profile

SIGNATURE = "tersor_signature"  # the method of our files that gives the names and shapes of inputs and outputs
TYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}


@dataclass(frozen=True)
class ExecuTorchRuntime:
    """The runtime `executorch`, which runs `.pte` files."""

    name: str = "executorch"
    suffixes: tuple[str, ...] = (".pte",)

    def version(self) -> str:
        from importlib.metadata import version

        library()
        return f"executorch {version('executorch')}"

    def open(self, path: str | Path, *, num_threads: int = 1) -> Session:
        return ExecuTorchSession(Path(path), num_threads)


class Pool:
    """The threads of ExecuTorch: one pool for the whole process. A program keeps to the one that it was loaded with, so
    it is loaded again where the pool has been replaced since."""

    number = 0  # of the pool, counted up with every new one

    @classmethod
    def of(cls, num_threads: int) -> int:
        """The number of a pool with so many threads."""
        if library()._threadpool_get_thread_count() != num_threads:
            library()._unsafe_reset_threadpool(num_threads)
            cls.number += 1
        return cls.number


class ExecuTorchSession:
    """A loaded ExecuTorch program."""

    def __init__(self, path: Path, num_threads: int):
        self.path, self.num_threads = path, num_threads
        self.load()
        self.inputs, self.outputs, self.limits = self.signature()

    def load(self) -> None:
        """Open the file with a pool of the right size."""
        self.pool = Pool.of(self.num_threads)
        try:
            self.program = library()._load_program(str(self.path))
            self.method = self.program.load_method("forward")
        except Exception as error:  # RuntimeError, mostly
            raise ModelError(f"{self.path}: ExecuTorch cannot open it ({first_line(error)})") from None

    def signature(self) -> tuple[tuple[Input, ...], list[str], list[tuple[int, ...]]]:
        """Inputs, the names of outputs, and the largest shape of each input. Files that are not ours name nothing, and
        take one size."""
        meta = self.method.method_meta()
        tensors = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
        limits = [tuple(each.sizes()) for each in tensors]
        names = {self.program.get_method_name(i) for i in range(self.program.num_methods())}
        if SIGNATURE in names:
            signature = json.loads(self.program.load_method(SIGNATURE)(())[0])
            declared, outputs = [(each["name"], each["shape"]) for each in signature["inputs"]], signature["outputs"]
        else:
            declared = [(f"input_{i}", shape) for i, shape in enumerate(limits)]
            outputs = [f"output_{i}" for i in range(meta.num_outputs())]
        for i, each in enumerate(tensors):
            if each.dtype() not in TYPES:
                raise ModelError(f"{self.path}: input {declared[i][0]} cannot be fed from NumPy (type {each.dtype()})")
        inputs = tuple(
            Input(name, np.dtype(TYPES[each.dtype()]), tuple(shape))
            for (name, shape), each in zip(declared, tensors, strict=True)
        )
        return inputs, outputs, limits

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        check_feeds(feeds, self.inputs, str(self.path))
        for each, limit in zip(self.inputs, self.limits, strict=True):
            shape = feeds[each.name].shape
            if any(size > most for size, most in zip(shape, limit, strict=True)):
                raise InputError(f"{self.path}: input {each.name} is {list(shape)}; the file holds up to {list(limit)}")
        if self.pool != Pool.number:
            self.load()
        made = self.method(self.tensors(feeds))
        arrays = (value.numpy().copy() if isinstance(value, torch.Tensor) else np.array(value) for value in made)
        return dict(zip(self.outputs, arrays, strict=True))

    def profile(self, feeds: Feeds, num_runs: int = 10) -> Profile:
        """Profile by ExecuTorch's own profiler, in a program loaded for it; some runs come before those that count."""
        check_feeds(feeds, self.inputs, str(self.path))
        if self.pool != Pool.number:
            self.load()
        program = library()._load_program(str(self.path), enable_etdump=True, debug_buffer_size=0)
        method, tensors = program.load_method("forward"), self.tensors(feeds)
        clock, walls = run_clock(self.num_threads), list[float]()
        begun = time.perf_counter()
        for _ in range(NUM_WARM + num_runs):
            started = clock()
            method(tensors)
            walls.append(clock() - started)
        busy = min(1.0, sum(walls) / (time.perf_counter() - begun))
        with scratch_folder() as folder, quiet():
            from executorch.devtools import Inspector

            dump = folder / "runs.etdp"
            program.write_etdump_result_to_file(str(dump), str(dump.with_suffix(".debug")))
            blocks = Inspector(etdump_path=str(dump)).event_blocks
            events = [event for block in blocks if block.name == "Execute" for event in block.events]
        return read_profile(events, walls, NUM_WARM, busy)

    def tensors(self, feeds: Feeds) -> tuple[torch.Tensor, ...]:
        """The arrays in the order the program takes them."""
        return tuple(torch.from_numpy(np.ascontiguousarray(feeds[each.name])) for each in self.inputs)


NUM_WARM = 3


def library() -> Any:
    """The bindings of ExecuTorch's runtime."""
    try:
        with quiet():
            from executorch.extension.pybindings import portable_lib
    except ImportError:
        raise MissingExtra("executorch", "running ExecuTorch files") from None
    return portable_lib


@contextmanager
def quiet() -> Iterator[None]:
    """ExecuTorch and what it imports tell their own developers of what is no concern of the user's."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
