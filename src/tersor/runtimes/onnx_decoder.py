"""ONNX files of language models with a cache, token by token, in ONNX Runtime; ours and those of other exporters.

A file that says so (`tersor.cache` in its metadata) appends to its past where it lies: past and present are then one
memory with room for more tokens. In any other file the present of a call is the past of the next.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import ModelError
from tersor.runtimes.contract import DecoderState

CACHE, IN_PLACE = "tersor.cache", "in place"  # what the metadata of a file says
PAST, PRESENT = "past_key_values", "present"
ROOM = 256  # tokens, to begin with


class OnnxDecoder:
    """An open session of such a file.

    Attributes:
        session: an onnxruntime.InferenceSession.
    """

    def __init__(self, path: Path, session: Any, library: Any):
        self.session, self.library = session, library
        self.inputs = {each.name: each for each in session.get_inputs()}
        self.past = [name for name in self.inputs if name.startswith(PAST)]
        logits = next((each for each in session.get_outputs() if each.name == "logits"), None)
        if not self.past or logits is None or not isinstance(logits.shape[-1], int):
            raise ModelError(f"{path}: takes no cache of keys and values; export the model again without --no-cache")
        self.in_place = session.get_modelmeta().custom_metadata_map.get(CACHE) == IN_PLACE
        self.dtype, self.logits_dtype = (
            np.float16 if "float16" in each.type else np.float32 for each in (self.inputs[self.past[0]], logits)
        )
        self.vocabulary = logits.shape[-1]
        self.reset()

    def reset(self) -> None:
        self.reading, self.kept = DecoderState(), dict[str, Any]()
        self.binding = self.session.io_binding()

    def feed(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        had = self.reading.length
        whole, positions = self.reading.add(ids, mask)
        if self.in_place:
            self.make_room(len(ids), had, whole.shape[1])
        else:
            self.feed_back(len(ids), had)
        values = {"input_ids": ids, "attention_mask": whole, "position_ids": positions}
        for name, array in values.items():
            if name in self.inputs:
                self.binding.bind_cpu_input(name, np.ascontiguousarray(array, dtype=np.int64))
        logits = np.empty((*ids.shape, self.vocabulary), self.logits_dtype)
        self.binding.bind_ortvalue_output("logits", self.library.OrtValue.ortvalue_from_numpy(logits))
        self.session.run_with_iobinding(self.binding)
        return logits.astype(np.float32, copy=False)

    def feed_back(self, num_rows: int, had: int) -> None:
        """Feeds the new key/value cache back as the past of the next call; of length 0 in the first call."""
        present = (
            self.binding.get_outputs()[: len(self.past)] if had else [self.empty(n, num_rows, 0) for n in self.past]
        )
        self.binding = self.session.io_binding()
        for name, value in zip(self.past, present, strict=True):
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_output(name.replace(PAST, PRESENT, 1), "cpu")

    def make_room(self, num_rows: int, had: int, needed: int) -> None:
        """Memory for as many tokens; twice what is needed where it must be more than there is."""
        room = self.kept[self.past[0]].shape()[2] if self.kept else 0
        if needed <= room:
            return
        kept = self.kept
        self.kept = {
            name: self.empty(name, num_rows, max(ROOM, 2 * needed), kept[name].numpy()[:, :, :had] if kept else None)
            for name in self.past
        }
        for name, value in self.kept.items():
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(name.replace(PAST, PRESENT, 1), value)

    def empty(self, name: str, num_rows: int, num_tokens: int, before: np.ndarray | None = None) -> Any:
        """Memory for an input, `[row, head, token, size]`: what there was before, then zeros."""
        _, num_heads, _, size = self.inputs[name].shape
        zeros = np.zeros((num_rows, num_heads, num_tokens, size), self.dtype)
        if before is not None:
            zeros[:, :, : before.shape[2]] = before
        return self.library.OrtValue.ortvalue_from_numpy(zeros)
