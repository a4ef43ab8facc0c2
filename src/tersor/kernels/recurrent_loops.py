"""All steps of an LSTM or GRU layer in int8, compiled by numba: a step is a product of codes, and its gates.

PyTorch would take ten calls for each step, which cost more than the work of a layer at batch 1.
"""
# mypy: ignore-errors

from typing import NamedTuple

import numpy as np

from tersor.core.compiled import compiled
from tersor.kernels.loops import MAGIC, Span, bits_of, float_of, floats, multiply, new_codes, quantize

ONE, TWO = np.float32(1), np.float32(2)
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
LEAST, MOST = np.float32(-87), np.float32(87)  # between which exp is a float32 like any other
C0, C1, C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
C3, C4, C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
EXPONENT, BIAS = np.int32(23), np.int32(127)  # of a float32: where it begins, and what stands for 0


class Steps(NamedTuple):
    """Addresses of floats of one layer in one direction.

    Attributes:
        of_x: `[step, batch, gates]`, products with the inputs.
        bias: `[gates]`, of the products with the state; 0 where it is in `of_x`.
        h: `[batch, hidden]`, the first state.
        c: `[batch, hidden]`, the cell, which the steps change; 0 in a GRU.
        out: `[step, batch, hidden]`.
    """

    of_x: int
    bias: int
    h: int
    c: int
    out: int
    num_steps: int
    batch: int
    reverse: int


@compiled()
def exp(x):
    """e to the power of x, within one or two units of the last place (Cephes, Moshier 1992)."""
    x = min(max(x, LEAST), MOST)
    shifted = x * LOG2_E + MAGIC
    whole = shifted - MAGIC
    r = x - whole * LN2_HIGH - whole * LN2_LOW
    series = ((((C0 * r + C1) * r + C2) * r + C3) * r + C4) * r + C5
    power = bits_of(shifted) - bits_of(MAGIC)
    return (series * r * r + r + ONE) * float_of((power + BIAS) << EXPONENT)


@compiled()
def sigmoid(x):
    """1 / (1 + exp(-x)); NaN stays NaN."""
    y = ONE / (ONE + exp(-x))
    return x if x != x else y


@compiled()
def tanh(x):
    """2 sigmoid(2 x) - 1."""
    return TWO * sigmoid(TWO * x) - ONE


@compiled()
def lstm_gates(gates, c, y):
    """One example's gates, in the order input, forget, cell, output, to its cell and state."""
    hidden = len(y)
    i, f, g, o = gates[:hidden], gates[hidden : 2 * hidden], gates[2 * hidden : 3 * hidden], gates[3 * hidden :]
    for j in range(hidden):
        cell = sigmoid(f[j]) * c[j] + sigmoid(i[j]) * tanh(g[j])
        c[j] = cell
        y[j] = sigmoid(o[j]) * tanh(cell)


@compiled()
def gru_gates(of_x, of_h, h, y):
    """One example's gates, in the order reset, update, new, to its state."""
    hidden = len(y)
    r_x, z_x, n_x = of_x[:hidden], of_x[hidden : 2 * hidden], of_x[2 * hidden :]
    r_h, z_h, n_h = of_h[:hidden], of_h[hidden : 2 * hidden], of_h[2 * hidden :]
    for j in range(hidden):
        new = tanh(n_x[j] + sigmoid(r_x[j] + r_h[j]) * n_h[j])
        y[j] = new + sigmoid(z_x[j] + z_h[j]) * (h[j] - new)


@compiled()
def run_steps(weight, steps, first, last):
    """All steps of the examples `first` to `last` of a batch, which know nothing of one another."""
    num, hidden, width = last - first, weight.num_columns, weight.num_rows
    stride = (hidden + 3) // 4 * weight.instruction.input_bytes
    codes, scales = new_codes(weight.instruction, num, stride), np.empty(num, np.float32)
    made = np.empty((num, width), np.float32)
    made_at, num_panels = np.int64(made.ctypes.data), (width + 15) // 16
    h = steps.h + 4 * hidden * first
    for step in range(steps.num_steps):
        t = steps.num_steps - 1 - step if steps.reverse else step
        of_x = steps.of_x + 4 * width * (t * steps.batch + first)
        out = steps.out + 4 * hidden * (t * steps.batch + first)
        quantize(weight, h, 4 * hidden, num, codes, scales)
        addend, addend_stride = (of_x, 4 * width) if steps.c else (steps.bias, 0)
        span = Span(addend, addend_stride, made_at, 4 * width, 0, num_panels)
        multiply(weight, codes.ctypes.data, stride, scales.ctypes.data, num, span)
        for b in range(num):
            y, row = floats(out + 4 * hidden * b, hidden), 4 * hidden * b
            if steps.c:
                lstm_gates(made[b], floats(steps.c + 4 * hidden * first + row, hidden), y)
            else:
                gru_gates(floats(of_x + 4 * width * b, width), made[b], floats(h + row, hidden), y)
        h = out
