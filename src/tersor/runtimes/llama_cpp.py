"""llama.cpp on the CPU (https://github.com/ggml-org/llama.cpp), through llama-cpp-python: GGUF files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import InputError, MissingExtra, ModelError
from tersor.core.messages import first_line
from tersor.runtimes.contract import Decoder, DecoderState, Feeds, Input, Profile, Session, check_feeds

LONGEST = 2048  # tokens that a context holds at most, where the model's own is longer; each has logits in memory


@dataclass(frozen=True)
class LlamaCpp:
    """The runtime `llama.cpp`, which runs `.gguf` files, one text at a time."""

    name: str = "llama.cpp"
    suffixes: tuple[str, ...] = (".gguf",)

    def version(self) -> str:
        return f"llama-cpp-python {library().__version__}"

    def open(self, path: str | Path, *, num_threads: int = 1) -> Session:
        return LlamaCppSession(Path(path), num_threads)

    def open_decoder(self, path: str | Path, *, num_threads: int = 1) -> Decoder:
        return LlamaCppDecoder(Path(path), num_threads)


class LlamaCppDecoder:
    """A GGUF file with a context of its own."""

    def __init__(self, path: Path, num_threads: int):
        llama_cpp = library()
        try:
            self.model = llama_cpp.Llama(
                model_path=str(path),
                n_ctx=LONGEST,
                n_threads=num_threads,
                n_threads_batch=num_threads,
                n_gpu_layers=0,
                logits_all=True,
                verbose=False,
            )
        except Exception as error:  # ValueError, AssertionError: whatever is wrong with the file
            raise ModelError(f"{path}: llama.cpp cannot open it ({first_line(error)})") from None
        self.path = path
        about = self.model.metadata
        self.longest = min(LONGEST, int(about.get(f"{about.get('general.architecture')}.context_length", LONGEST)))
        self.reset()

    def reset(self) -> None:
        self.reading = DecoderState()
        self.model.reset()

    def feed(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        if len(ids) != 1 or (mask is not None and not mask.all()):
            raise InputError(f"{self.path}: llama.cpp reads one text at a time here, without padding")
        had = self.reading.length
        if had + ids.shape[1] > self.longest:
            limit = f"{self.longest}, the context length of the model" if self.longest < LONGEST else f"{LONGEST} here"
            raise InputError(f"{self.path}: {had + ids.shape[1]} tokens; llama.cpp is given room for {limit}")
        self.reading.add(ids, None)
        self.model.eval(ids[0].tolist())
        return np.array(self.model.scores[None, had : had + ids.shape[1]])


class LlamaCppSession:
    """The same as a function of whole texts."""

    def __init__(self, path: Path, num_threads: int):
        self.path, self.decoder = path, LlamaCppDecoder(path, num_threads)
        self.inputs = (Input("input_ids", np.dtype("int64"), (1, None)),)

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        check_feeds(feeds, self.inputs, str(self.path))
        self.decoder.reset()
        return {"logits": self.decoder.feed(feeds["input_ids"])}

    def profile(self, feeds: Feeds, num_runs: int = 10) -> Profile:
        """Raises InputError: llama.cpp does not time its layers."""
        raise InputError(f"{self.path}: llama.cpp does not say what its layers take; use tersor bench")


def library() -> Any:
    """The llama_cpp package."""
    try:
        import llama_cpp
    except ImportError:
        raise MissingExtra("llama", "running GGUF files") from None
    return llama_cpp
