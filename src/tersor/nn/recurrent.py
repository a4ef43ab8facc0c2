"""LSTM and GRU layers that run on packed weights, with inputs quantized as they come.

The matrix of the inputs is multiplied with all steps at once, that of the hidden state once per step, all gates
together. In int8 both are products of integers (kernels/), and a step writes into memory that is allocated once: at
batch 1 a step is so little work that allocating would take most of its time. Elsewhere (on other devices, where
gradients flow, inside `reference()`, under `torch.compile`) the weights are decoded once per call.

The layers are those of PyTorch (Hochreiter and Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735; Cho et al.
2014, https://arxiv.org/abs/1406.1078) with their order of gates and two biases.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tersor.activations.quantizers import Activation
from tersor.core.errors import InputError
from tersor.kernels import fast, linear
from tersor.kernels.int8 import INT_MM
from tersor.nn.in_place import Packed
from tersor.nn.packed import PREFIX, InputQuantizer, PackedWeight, pack_parameter

State = tuple[Tensor, ...]  # h, and c for an LSTM; `[batch, hidden]`
QUANTIZER = "quantizer_"


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
        """The kernel that runs a step: `int_mm`, or `decode`."""
        return INT_MM.name if self.map_of("weight_hh_l0", None).is_int8 else "decode"

    def map_of(self, name: str, bias: Tensor | None) -> "Map":
        """One of the weights, as the linear map it stands for."""
        packed = self._modules.get(PREFIX + name)
        return Map(packed if isinstance(packed, PackedWeight) else getattr(self, name), self.quantizer(name), bias)

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | State | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        if isinstance(input, PackedSequence):
            return self.run_sequence(input, hx)
        if input.dim() not in (2, 3):
            raise InputError(f"{self.mode}: the input has {input.dim()} axes; give [step, batch, feature]")
        batch_axis = 0 if self.batch_first else 1
        x = input if input.dim() == 3 else input.unsqueeze(batch_axis)
        steps = x.transpose(0, 1) if self.batch_first else x
        states = self.states(hx, steps, batched=input.dim() == 3)
        y, last = self.run(steps, states, None)
        y = y.transpose(0, 1) if self.batch_first else y
        if input.dim() == 2:
            y, last = y.squeeze(batch_axis), tuple(state.squeeze(1) for state in last)
        return y, last if self.mode == "LSTM" else last[0]

    def run_sequence(self, input: PackedSequence, hx: Tensor | State | None) -> tuple[PackedSequence, Tensor | State]:
        """Examples of different lengths; states stay as they are beyond an example's end."""
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
        """All layers, in both directions. Returns all outputs and the last states."""
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
        """One layer in one direction."""
        of_x, of_h = (getattr(self, f"bias_{each}_{suffix}") if self.bias else None for each in ("ih", "hh"))
        if self.mode == "LSTM" and of_x is not None:
            of_x, of_h = of_x + of_h, None
        gates = self.map_of(f"weight_ih_{suffix}", of_x)(x)
        recur = self.map_of(f"weight_hh_{suffix}", of_h)
        if recur.is_int8 and fast(gates) and lengths is None and gates.dtype is torch.float32 and gates.numel():
            return (int8_lstm if self.mode == "LSTM" else int8_gru)(gates, recur, first, reverse)
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
        """True if it can run on integers."""
        if not isinstance(self.weight, PackedWeight) or self.quantizer is None:
            return False
        activation = self.quantizer.activation
        return activation.format == "int8-dynamic" and INT_MM.fits(self.weight.encoded, activation, torch.float32)

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


MAGIC = 1.5 * 2**23  # the last bits of a float32 that this was added to are its value, rounded to a whole number


class Int8Product:
    """A hidden state in int8 times a matrix in int8, into memory that is allocated once."""

    def __init__(self, recur: Map, h: Float[Tensor, "batch hidden"]):
        assert isinstance(recur.weight, PackedWeight)
        grid = recur.weight.encoded.integers
        assert grid is not None
        self.matrix, self.weight_scale = grid.stored.t(), grid.scale.float().view(1, -1) / 127
        # One more column holds the least of what is the largest.
        self.magnitude = h.new_full((len(h), h.shape[1] + 1), 127e-12)
        self.absolute, self.largest = self.magnitude[:, :-1], h.new_empty(len(h), 1)
        self.magic, self.rounded = torch.full_like(h, MAGIC), torch.empty_like(h)
        first_bytes = slice(None, None, 4) if sys.byteorder == "little" else slice(3, None, 4)
        self.last_bits, self.codes = (
            self.rounded.view(torch.int8)[:, first_bytes],
            torch.empty_like(h, dtype=torch.int8),
        )
        self.sums = torch.empty(len(h), self.matrix.shape[1], dtype=torch.int32)
        self.product = torch.empty(self.sums.shape)

    def add(self, h: Tensor, to: Tensor, out: Tensor) -> None:
        """`out = to + product`."""
        self.quantize(h)
        torch._int_mm(self.codes, self.matrix, out=self.sums)
        self.scale(to, out)

    def quantize(self, h: Tensor) -> None:
        """The codes of `Int8Dynamic`: `round(127 h / largest)`, halves to the even number."""
        torch.abs(h, out=self.absolute)
        torch.amax(self.magnitude, -1, True, out=self.largest)
        torch.addcdiv(self.magic, h, self.largest, value=127, out=self.rounded)
        self.codes.copy_(self.last_bits)

    def scale(self, to: Tensor, out: Tensor) -> None:
        """The sums as floats, added to `to`."""
        self.product.copy_(self.sums).mul_(self.largest)
        torch.addcmul(to, self.product, self.weight_scale, out=out)


@torch.no_grad()
def int8_lstm(of_x: Tensor, recur: Map, first: State, reverse: bool) -> tuple[Tensor, State]:
    """All steps of an LSTM layer; its biases are in `of_x`. PyTorch's tanh is several times slower than its sigmoid, so
    the cell's gate is doubled, and the cell is kept times -2: tanh(x) = 2 sigmoid(2 x) - 1 = 1 - 2 sigmoid(-2 x)."""
    h, c = first[0].contiguous(), first[1] * -2
    outputs = of_x.new_empty(*of_x.shape[:2], h.shape[-1])
    product, gates, squashed = Int8Product(recur, h), torch.empty_like(of_x[0]), torch.empty_like(h)
    i, f, g, o = gates.chunk(4, -1)
    cell = slice(2 * h.shape[-1], 3 * h.shape[-1])
    doubled = torch.ones_like(product.weight_scale)
    doubled[:, cell] = 2
    product.weight_scale, of_x = product.weight_scale * doubled, of_x * doubled
    steps = list(zip(of_x.unbind(0), outputs.unbind(0), strict=True))
    for x, y in reversed(steps) if reverse else steps:
        product.add(h, x, gates)
        gates.sigmoid_()
        c.mul_(f).addcmul_(i, g, value=-4).add_(i, alpha=2)
        torch.sigmoid(c, out=squashed)
        torch.addcmul(o, o, squashed, value=-2, out=y)
        h = y
    return outputs, (h, c * -0.5)


@torch.no_grad()
def int8_gru(of_x: Tensor, recur: Map, first: State, reverse: bool) -> tuple[Tensor, State]:
    """All steps of a GRU layer."""
    h = first[0].contiguous()
    outputs = of_x.new_empty(*of_x.shape[:2], h.shape[-1])
    product, of_h, new = Int8Product(recur, h), torch.empty_like(of_x[0]), torch.empty_like(h)
    bias = recur.bias if recur.bias is not None else torch.zeros(of_h.shape[-1])
    hidden = h.shape[-1]
    both_h, n_h = of_h[:, : 2 * hidden], of_h[:, 2 * hidden :]
    r, z = both_h.chunk(2, -1)
    both_x, n_x = of_x[..., : 2 * hidden].unbind(0), of_x[..., 2 * hidden :].unbind(0)
    steps = list(zip(both_x, n_x, outputs.unbind(0), strict=True))
    for rz, n, y in reversed(steps) if reverse else steps:
        product.add(h, bias, of_h)
        both_h.add_(rz).sigmoid_()
        torch.addcmul(n, r, n_h, out=new)
        new.tanh_()
        torch.lerp(new, h, z, out=y)
        h = y
    return outputs, (h,)
