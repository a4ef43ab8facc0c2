"""OpenVINO on the CPU (https://docs.openvino.ai): its own IR files, and ONNX files, which it reads as well."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tersor.core.errors import MissingExtra, ModelError
from tersor.core.messages import first_line
from tersor.runtimes.contract import Decoder, Feeds, Input, Profile, Session, check_feeds, run_clock
from tersor.runtimes.openvino_decoder import OpenVinoDecoder
from tersor.runtimes.openvino_profile import averages, read_profile

NUM_WARM = 3


@dataclass(frozen=True)
class OpenVino:
    """Runs `.xml` (with its `.bin`) and `.onnx` files.

    Attributes:
        precision: what float arithmetic runs in, `f32` or `bf16`; OpenVINO itself would choose bf16 where the CPU has
            it, without a word.
        dynamic_group_size: quantize the inputs of weight-only layers to int8 in groups of this many; None leaves it to
            the file.
    """

    name: str = "openvino"
    precision: str = "f32"
    dynamic_group_size: int | None = None
    suffixes: tuple[str, ...] = (".xml", ".onnx")

    def version(self) -> str:
        return f"openvino {library().__version__}"

    def open(self, path: str | Path, *, num_threads: int = 1) -> Session:
        return OpenVinoSession(Path(path), self.settings(num_threads))

    def open_decoder(self, path: str | Path, *, num_threads: int = 1) -> Decoder:
        settings = self.settings(num_threads) | {"KV_CACHE_PRECISION": self.precision}  # else it is uint8
        compiled = compile_model(read_model(Path(path)), Path(path), settings)
        return OpenVinoDecoder(Path(path), compiled)

    def settings(self, num_threads: int) -> dict[str, Any]:
        """The settings that a model is compiled with."""
        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": num_threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
            "ENABLE_CPU_PINNING": False,
        }
        if self.dynamic_group_size is not None:
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = self.dynamic_group_size
        return settings


class OpenVinoSession:
    """A file that OpenVINO has compiled for this machine."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.compiled = compile_model(read_model(path), path, settings)
        self.inputs = tuple(declared(port) for port in self.compiled.inputs)
        self.outputs = [name_of(port, f"output_{i}") for i, port in enumerate(self.compiled.outputs)]
        self.request = self.compiled.create_infer_request()

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        check_feeds(feeds, self.inputs, str(self.path))
        self.request.reset_state()
        found = self.request.infer(self.in_order(feeds), share_inputs=True)
        return {name: np.array(array) for name, array in zip(self.outputs, found.values(), strict=True)}

    def profile(self, feeds: Feeds, num_runs: int = 10) -> Profile:
        """Profile by OpenVINO's performance counters, in a model compiled for it, after some warm-up runs."""
        check_feeds(feeds, self.inputs, str(self.path))
        model = read_model(self.path)
        at_shapes = model.clone()
        at_shapes.reshape({port: list(feeds[name_of(port, "input")].shape) for port in at_shapes.inputs})
        compiled = compile_model(model, self.path, self.settings | {"PERF_COUNT": True})
        request, walls = compiled.create_infer_request(), list[float]()
        clock = run_clock(self.settings["INFERENCE_NUM_THREADS"])
        for run in range(NUM_WARM + num_runs):
            if run == NUM_WARM:
                warm, begun = request.get_profiling_info(), time.perf_counter()
            request.reset_state()
            started = clock()
            request.infer(self.in_order(feeds), share_inputs=True)
            walls.append(clock() - started)
        busy = min(1.0, sum(walls[NUM_WARM:]) / (time.perf_counter() - begun))
        counters = averages(warm, NUM_WARM, request.get_profiling_info(), NUM_WARM + num_runs, busy)
        return read_profile(counters, median(walls[NUM_WARM:]), compiled, at_shapes)

    def in_order(self, feeds: Feeds) -> list[np.ndarray]:
        """The arrays by position: a port may have several names."""
        return [feeds[each.name] for each in self.inputs]


def library(doing: str = "running OpenVINO files") -> Any:
    """The openvino package, which sends no reports from here: without openvino_telemetry it takes a stub.

    Args:
        doing: what it is needed for, as the message says if it is missing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it is an ImportError now
    try:
        import openvino
    except ImportError:
        raise MissingExtra("openvino", doing) from None
    return openvino


def read_model(path: Path) -> Any:
    """The file as an openvino.Model."""
    openvino = library()
    try:
        return openvino.Core().read_model(str(path))
    except Exception as error:  # RuntimeError and others, of many frontends
        raise ModelError(f"{path}: OpenVINO cannot read it ({first_line(error)})") from None


def compile_model(model: Any, path: Path, settings: dict[str, Any]) -> Any:
    """Compile a model for the CPU."""
    try:
        return library().Core().compile_model(model, "CPU", settings)
    except Exception as error:
        raise ModelError(f"{path}: OpenVINO cannot compile it ({first_line(error)})") from None


def declared(port: Any) -> Input:
    """The name, type and shape of an input, as the model declares them."""
    shape = tuple(None if size.is_dynamic else size.get_length() for size in port.get_partial_shape())
    return Input(name_of(port, "input"), np.dtype(port.get_element_type().to_dtype()), shape)


def name_of(port: Any, otherwise: str) -> str:
    """A port's name, or `otherwise` if it has none."""
    return min(port.get_names(), default=otherwise)
