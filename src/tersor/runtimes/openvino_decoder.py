"""OpenVINO files of language models that keep their cache inside ("stateful"), token by token."""

from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import ModelError
from tersor.runtimes.contract import DecoderState


class OpenVinoDecoder:
    """A compiled model with states for keys and values."""

    def __init__(self, path: Path, compiled: Any):
        self.names = {name for port in compiled.inputs for name in port.get_names()}
        self.request = compiled.create_infer_request()
        if not self.request.query_state():
            raise ModelError(f"{path}: keeps no cache; export the model again with --to openvino, without --no-cache")
        self.logits = next(port for port in compiled.outputs if "logits" in port.get_names())
        self.reset()

    def reset(self) -> None:
        self.reading = DecoderState()
        self.request.reset_state()

    def feed(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        whole, positions = self.reading.add(ids, mask)
        order = np.arange(len(ids), dtype=np.int32)
        values = {"input_ids": ids, "attention_mask": whole, "position_ids": positions, "beam_idx": order}
        found = self.request.infer(
            {name: np.ascontiguousarray(array) for name, array in values.items() if name in self.names},
            share_inputs=True,
        )
        return np.array(found[self.logits])
