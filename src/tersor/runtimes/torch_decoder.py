"""Language models in PyTorch, token by token, with transformers' own cache."""

import numpy as np
import torch
from torch import nn

from tersor.core.errors import ModelError
from tersor.core.threads import threads
from tersor.nn.cached_call import call_with_cache
from tersor.runtimes.contract import DecoderState


class TorchDecoder:
    """A Hugging Face language model in memory."""

    def __init__(self, model: nn.Module, name: str, num_threads: int = 1):
        can_generate = getattr(model, "can_generate", None)
        if can_generate is None or not can_generate():
            raise ModelError(f"{name}: {type(model).__name__} writes no text; give a causal language model")
        self.model, self.num_threads = model.eval(), num_threads
        self.reset()

    def reset(self) -> None:
        self.reading, self.cache = DecoderState(), None

    def feed(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        whole, positions = self.reading.add(ids, mask)
        with torch.inference_mode(), threads(self.num_threads):
            logits, self.cache = call_with_cache(
                self.model,
                self.cache,
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(whole),
                position_ids=torch.from_numpy(positions),
            )
        return logits.float().numpy()
