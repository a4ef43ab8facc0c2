"""LSTM and GRU layers that run on packed weights, with inputs quantized as they come.

The matrix of the inputs is multiplied with all steps at once, that of the hidden state once per step, all gates
together. In int8 both are products of integers (kernels/), and all steps are one compiled loop: at batch 1 a step is so
little work that calls of PyTorch would take most of its time. Elsewhere (on other devices, where
gradients flow, inside `reference()`, under `torch.compile`) the weights are decoded once per call.

The layers are those of PyTorch (Hochreiter and Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735; Cho et al.
2014, https://arxiv.org/abs/1406.1078) with their order of gates and two biases.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tersor.activations.quantizers import Activation
from tersor.core.errors import InputError
from tersor.core.memory import lies_here
from tersor.kernels import fast, linear
from tersor.kernels.dot import instruction_named
from tersor.kernels.int8 import is_int8
from tersor.kernels.recurrence import dot_kernel, recurrent_steps
from tersor.nn.in_place import Packed
from tersor.nn.packed import PREFIX, InputQuantizer, PackedWeight, pack_parameter

State = tuple[Tensor, ...]  # h, and c for an LSTM; `[batch, hidden]`
QUANTIZER = "quantizer_"
SMALLEST = 2**14  # weights of a hidden state, from which on a loop of our own pays compiling it


class PackedRecurrent(Packed):
    """An nn.LSTM or nn.GRU whose weights are packed with quantized inputs; weights that are not stay parameters."""

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool

    def quantizer(self, name: str) -> InputQuantizer | None:
        """The input quantizer of one of the weights; None if its inputs stay float."""
        return getattr(self, QUANTIZER + name, None)

    @property
    def kernel(self) -> str:
        """The kernel that runs a step: the instruction that its loop is made of, or `decode`."""
        recur = self.map_of("weight_hh_l0", None)
        return dot_kernel(recur.weight.encoded, recur.weight.memory).name if recur.is_int8 else "decode"  # type: ignore[union-attr]

    def map_of(self, name: str, bias: Tensor | None) -> "Map":
        """One of the weights, as the linear map it stands for."""
        packed = self._modules.get(PREFIX + name)
        return Map(packed if isinstance(packed, PackedWeight) else getattr(self, name), self.quantizer(name), bias)

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | State | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        if torch.is_autocast_enabled(input.data.device.type):
            return self.run_autocast(input, hx)
        if isinstance(input, PackedSequence):
            return self.run_sequence(input, hx)
        if input.dim() not in (2, 3):
            raise InputError(f"{self.mode}: the input has {input.dim()} axes; give [step, batch, feature]")
        batch_axis = 0 if self.batch_first else 1
        x = input if input.dim() == 3 else input.unsqueeze(batch_axis)
        steps = x.transpose(0, 1) if self.batch_first else x
        if not steps.shape[0]:
            raise InputError(f"{self.mode}: the input {tuple(input.shape)} has no steps; give one or more")
        states = self.states(hx, steps, batched=input.dim() == 3)
        y, last = self.run(steps, states, None)
        y = y.transpose(0, 1) if self.batch_first else y
        if input.dim() == 2:
            y, last = y.squeeze(batch_axis), tuple(state.squeeze(1) for state in last)
        return y, last if self.mode == "LSTM" else last[0]

    def run_autocast(
        self, input: Tensor | PackedSequence, hx: Tensor | State | None
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Run in the type of the weights, and give outputs and states in that of autocast, but for the cell of an LSTM:
        as PyTorch's layers do."""
        own, device = self.map_of("weight_ih_l0", None).weight.dtype, input.data.device.type
        given = hx if isinstance(hx, tuple) or hx is None else (hx,)
        states = None if given is None else tuple(state.to(own) for state in given)
        first = states if self.mode == "LSTM" or states is None else states[0]
        x = input._replace(data=input.data.to(own)) if isinstance(input, PackedSequence) else input.to(own)
        with torch.autocast(device, enabled=False):
            y, last = self.forward(x, first)
        dtype = torch.get_autocast_dtype(device)
        y = y._replace(data=y.data.to(dtype)) if isinstance(y, PackedSequence) else y.to(dtype)
        return y, (last[0].to(dtype), last[1]) if isinstance(last, tuple) else last.to(dtype)

    def run_sequence(self, input: PackedSequence, hx: Tensor | State | None) -> tuple[PackedSequence, Tensor | State]:
        """Run examples of different lengths; beyond an example's end its states stay as they are."""
        in_order = PackedSequence(input.data, input.batch_sizes)  # the longest first, whatever order they came in
        steps, lengths = pad_packed_sequence(in_order)
        states = self.states(hx, steps, batched=True)
        if input.sorted_indices is not None and hx is not None:
            states = tuple(state.index_select(1, input.sorted_indices) for state in states)
        y, last = self.run(steps, states, lengths.to(steps.device))
        if input.unsorted_indices is not None:
            last = tuple(state.index_select(1, input.unsorted_indices) for state in last)
        packed = input._replace(data=pack_padded_sequence(y, lengths).data)
        return packed, last if self.mode == "LSTM" else last[0]

    def states(self, hx: Tensor | State | None, steps: Tensor, batched: bool) -> State:
        """The first states, `[layers * directions, batch, hidden]` each."""
        num = 2 if self.mode == "LSTM" else 1
        shape = (self.num_layers * (1 + self.bidirectional), steps.shape[1], self.hidden_size)
        if hx is None:
            return tuple(steps.new_zeros(shape) for _ in range(num))
        given = tuple(state if batched else state.unsqueeze(1) for state in (hx if isinstance(hx, tuple) else (hx,)))
        if len(given) != num or any(state.shape != shape for state in given):
            shapes = ", ".join(str(tuple(state.shape)) for state in given)
            raise InputError(f"{self.mode}: the first states are {shapes}, and the layer has {num} of {shape}")
        return given

    def run(
        self, x: Float[Tensor, "step batch feature"], states: State, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        """Run all layers in both directions. Returns all outputs and the last states."""
        last: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(1 + self.bidirectional):
                first = tuple(state[len(last)] for state in states)
                y, final = self.run_layer(x, f"l{layer}{'_reverse' * direction}", first, lengths, bool(direction))
                outputs.append(y)
                last.append(final)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.training and self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout)
        return x, tuple(torch.stack(each) for each in zip(*last, strict=True))

    def run_layer(
        self, x: Tensor, suffix: str, first: State, lengths: Tensor | None, reverse: bool
    ) -> tuple[Tensor, State]:
        """Run one layer in one direction."""
        of_x, of_h = (getattr(self, f"bias_{each}_{suffix}") if self.bias else None for each in ("ih", "hh"))
        if self.mode == "LSTM" and of_x is not None:
            of_x, of_h = of_x + of_h, None
        gates = self.map_of(f"weight_ih_{suffix}", of_x)(x)
        recur = self.map_of(f"weight_hh_{suffix}", of_h)
        if lengths is None and gates.numel() and recur.is_int8 and recur.takes(gates, *first):
            return run_int8(self.mode, gates, recur, first, reverse)
        step = lstm_step if self.mode == "LSTM" else gru_step
        product, state, outputs = recur.decoded(), first, [gates[0]] * len(gates)
        for t in reversed(range(len(gates))) if reverse else range(len(gates)):
            new = step(gates[t], product(state[0]), state)
            if lengths is not None:
                real = (t < lengths).unsqueeze(1)
                new = tuple(torch.where(real, after, before) for after, before in zip(new, state, strict=True))
            state = new
            outputs[t] = state[0]
        return torch.stack(outputs), state


def pack_recurrent(layer: nn.Module, name: str, packed: PackedWeight, activation: Activation | None) -> None:
    """Have an nn.LSTM or nn.GRU run on a packed weight, with its input quantized."""
    pack_parameter(layer, name, packed, PackedRecurrent)
    layer._modules[QUANTIZER + name] = InputQuantizer(activation).train(layer.training) if activation else None


class Map(NamedTuple):
    """A linear map: its weight, packed or not, what quantizes its input, and its bias."""

    weight: Tensor | PackedWeight
    quantizer: InputQuantizer | None
    bias: Tensor | None

    @property
    def is_int8(self) -> bool:
        """True if the map can run on integers: packed int8 weights, and inputs quantized to int8."""
        if not isinstance(self.weight, PackedWeight) or self.quantizer is None:
            return False
        activation, encoded = self.quantizer.activation, self.weight.encoded
        large = encoded.shape[0] * encoded.shape[1] >= SMALLEST
        exact = large and is_int8(encoded, activation, torch.float32) and instruction_named("widening") is not None
        return activation.format == "int8-dynamic" and exact

    def takes(self, *floats: Tensor) -> bool:
        """True if the loop over all steps, which takes addresses, can read these and the bias, and none is trained."""
        if self.bias is not None and self.bias.shape != floats[0].shape[-1:]:
            return False
        given = floats if self.bias is None else (*floats, self.bias)
        plain = all(fast(each) and lies_here(each) for each in given)
        return plain and all(each.dtype is torch.float32 for each in floats)

    def __call__(self, x: Tensor) -> Tensor:
        """Matrix product for all time steps at once."""
        if isinstance(self.weight, PackedWeight):
            activation = self.quantizer.activation if self.quantizer is not None else None
            y = linear(x, self.weight.encoded, activation, self.bias, self.weight.memory)
            if y is not None:
                return y
        return self.decoded()(x)

    def decoded(self) -> Callable[[Tensor], Tensor]:
        """The map with its weight as a float matrix, for several calls."""
        weight = self.weight.matrix() if isinstance(self.weight, PackedWeight) else self.weight
        quantize = self.quantizer if self.quantizer is not None else nn.Identity()
        return lambda x: F.linear(quantize(x), weight, self.bias)


def lstm_step(of_x: Tensor, of_h: Tensor, state: State) -> State:
    """One step; the gates are input, forget, cell, output."""
    i, f, g, o = (of_x + of_h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(of_x: Tensor, of_h: Tensor, state: State) -> State:
    """One step; the gates are reset, update, new."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = of_x.chunk(3, -1), of_h.chunk(3, -1)
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (torch.lerp(n, state[0], (z_x + z_h).sigmoid()),)


@torch.no_grad()
def run_int8(mode: str, of_x: Tensor, recur: Map, first: State, reverse: bool) -> tuple[Tensor, State]:
    """All steps of a layer on integers; an LSTM's biases are in `of_x`."""
    assert isinstance(recur.weight, PackedWeight)
    of_x, h = of_x.contiguous(), first[0].contiguous()
    c = first[1].clone(memory_format=torch.contiguous_format) if mode == "LSTM" else None
    outputs = recurrent_steps(recur.weight.encoded, recur.weight.memory, of_x, recur.bias, (h, c), reverse)
    last = outputs[0 if reverse else -1].clone()
    return outputs, (last,) if c is None else (last, c)
