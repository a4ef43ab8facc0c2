"""Parameters, non-zeros and bytes, counted over the whole model: compressed sites, and everything that was kept."""

from dataclasses import dataclass

import torch
from torch import nn

from tersor.checkpoint.layout import packed_sites, unpacked_tensors


@dataclass(frozen=True)
class Size:
    """The size of a model in memory.

    Attributes:
        num_parameters: weights it computes with (tied ones once, decoded shapes); buffers do not count.
        num_nonzeros: those of them that are not exactly zero.
        num_bytes: bytes of all tensors in memory: packed parts, copies that kernels laid out, unpacked parameters,
            persistent buffers.
    """

    num_parameters: int
    num_nonzeros: int
    num_bytes: int


def measure_size(model: nn.Module) -> Size:
    """Count without running the model.

    >>> measure_size(nn.Linear(3, 2))
    Size(num_parameters=8, num_nonzeros=8, num_bytes=32)
    """
    num_parameters = num_nonzeros = num_bytes = 0
    for site, packed, quantizer in packed_sites(model):
        num_parameters += site.num_weights
        num_nonzeros += int(torch.count_nonzero(packed()))
        num_bytes += packed.encoded.num_bytes + packed.memory.num_bytes
        num_bytes += sum(tensor.nbytes for tensor in quantizer.tensors.values()) if quantizer else 0
    buffers = {id(buffer) for buffer in model.buffers()}
    for tensor in unpacked_tensors(model, detach=False).values():
        num_bytes += tensor.nbytes
        if id(tensor) not in buffers:
            num_parameters += tensor.numel()
            num_nonzeros += int(torch.count_nonzero(tensor))
    return Size(num_parameters, num_nonzeros, num_bytes)
