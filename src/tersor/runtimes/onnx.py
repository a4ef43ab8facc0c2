"""ONNX Runtime on the CPU (https://onnxruntime.ai): ONNX files, all graph optimizations on, threads that sleep."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import MissingExtra, ModelError
from tersor.core.messages import first_line
from tersor.core.scratch import scratch_folder
from tersor.runtimes.contract import Decoder, Feeds, Input, Profile, Session, check_feeds, run_clock
from tersor.runtimes.onnx_decoder import OnnxDecoder
from tersor.runtimes.onnx_profile import read_graph, read_profile

TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True)
class OnnxRuntime:
    """The runtime `onnx`, which runs `.onnx` files."""

    name: str = "onnx"
    suffixes: tuple[str, ...] = (".onnx",)

    def version(self) -> str:
        return f"onnxruntime {library().__version__}"

    def open(self, path: str | Path, *, num_threads: int = 1) -> Session:
        return OnnxSession(Path(path), num_threads)

    def open_decoder(self, path: str | Path, *, num_threads: int = 1) -> Decoder:
        return OnnxDecoder(Path(path), open_session(Path(path), num_threads), library())


class OnnxSession:
    """An ONNX file opened in ONNX Runtime."""

    def __init__(self, path: Path, num_threads: int):
        self.path, self.num_threads = path, num_threads
        self.session = open_session(path, num_threads)
        self.inputs = tuple(declared(path, each) for each in self.session.get_inputs())
        self.outputs = [each.name for each in self.session.get_outputs()]

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        check_feeds(feeds, self.inputs, str(self.path))
        return dict(zip(self.outputs, self.session.run(None, dict(feeds)), strict=True))

    def profile(self, feeds: Feeds, num_runs: int = 10) -> Profile:
        """Profile by ONNX Runtime's own profiler, in a session of its own; two runs come before those that count."""
        check_feeds(feeds, self.inputs, str(self.path))
        with scratch_folder() as folder:
            session = open_session(self.path, self.num_threads, profile=folder)
            clock, walls = run_clock(self.num_threads), list[float]()
            for _ in range(num_runs + NUM_WARM):
                started = clock()
                session.run(None, dict(feeds))
                walls.append(clock() - started)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            graph = read_graph(folder / OPTIMIZED)
        return read_profile(events, graph, walls, NUM_WARM)


NUM_WARM, OPTIMIZED = 2, "optimized.onnx"


def library() -> Any:
    """The onnxruntime package."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnx", "running ONNX files") from None
    return onnxruntime


def open_session(path: Path, num_threads: int, profile: Path | None = None) -> Any:
    """An InferenceSession with the settings that every number of ours is measured with; one that profiles writes its
    events and its optimized graph to a folder."""
    ort = library()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile / "run")
        options.optimized_model_filepath = str(profile / OPTIMIZED)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base of their own
        raise ModelError(f"{path}: ONNX Runtime cannot open it ({first_line(error)})") from None


def declared(path: Path, each: Any) -> Input:
    """The name, type and shape of an input, as the file declares them."""
    if each.type not in TYPES:
        raise ModelError(f"{path}: input {each.name} is {each.type}, which cannot be fed from NumPy")
    shape = tuple(size if isinstance(size, int) and size > 0 else None for size in each.shape)
    return Input(each.name, np.dtype(TYPES[each.type]), shape)
