"""Multiply-accumulates that can be counted by hand."""

import pytest
import torch
from torch import nn

from tersor.nn.macs import count_macs

STEPS, BATCH, INPUTS, HIDDEN = 7, 3, 12, 16


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers_multiply_every_input_and_state_with_all_gates(kind, gates):
    first = 2 * gates * HIDDEN * (INPUTS + HIDDEN)  # both directions
    second = 2 * gates * HIDDEN * (2 * HIDDEN + HIDDEN)
    model = kind(INPUTS, HIDDEN, num_layers=2, bidirectional=True)
    found = count_macs(model, lambda model: model(torch.randn(STEPS, BATCH, INPUTS)))
    assert found == STEPS * BATCH * (first + second)
