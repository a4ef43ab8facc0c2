"""LSTM and GRU layers in int8, by the loops of recurrent_loops.py."""

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.activations.quantizers import Activation
from tersor.formats.contract import Encoded
from tersor.kernels.choice import WeightKernels
from tersor.kernels.contract import Kernel
from tersor.kernels.dot import DOT, Loops, fastest_exact


def dot_kernel(encoded: Encoded, kernels: WeightKernels) -> Kernel:
    """The row of the table for an int8 weight of any size; found out once, with a look at all its codes."""
    kernels.refresh(encoded, None)
    name = next((kernel.name for kernel in DOT if kernel.name in kernels.layouts), "") or fastest_exact(encoded)
    return next(kernel for kernel in DOT if kernel.name == name)


def recurrent_steps(
    encoded: Encoded,
    kernels: WeightKernels,
    of_x: Float[Tensor, "step batch gates"],
    bias: Tensor | None,
    state: tuple[Tensor, Tensor | None],
    reverse: bool,
) -> Float[Tensor, "step batch hidden"]:
    """All steps of an LSTM layer, whose cell is the second of `state` and is changed, or of a GRU layer, which has none
    and takes the bias of its products with the state."""
    from tersor.kernels.recurrent_loops import Steps, run_steps

    kernel = dot_kernel(encoded, kernels)
    layout = kernels.layout(kernel, encoded, Activation("int8-dynamic"))
    (h, c), (num_steps, batch, num_gates) = state, of_x.shape
    outputs = torch.empty(num_steps, batch, encoded.shape[1], dtype=torch.float32, device="cpu")
    addend = layout["nothing"] if bias is None else bias.float().contiguous()

    def run(first: int, last: int) -> None:  # and hold the tensors
        steps = Steps(
            of_x.data_ptr(), addend.data_ptr(), h.data_ptr(), 0 if c is None else c.data_ptr(), outputs.data_ptr(),
            num_steps, batch, int(reverse),
        )  # fmt: skip
        run_steps(layout["weight"], steps, first, last)

    work = num_steps * batch * num_gates * h.shape[1]
    Loops(kernel.name, "int8").over_time(run, batch, work)
    return outputs
