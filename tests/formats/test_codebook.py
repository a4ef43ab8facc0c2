"""Codebooks: as good as theory says, and exact where there are few values."""

import pytest
import torch

from laws import random
from tersor.formats.codebook import Codebook


@pytest.mark.parametrize(("num_values", "distortion"), [(4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_reaches_the_best_quantizer_of_a_gaussian(num_values, distortion):
    """Max 1960, table I."""
    weight, format = random(64, 4096), Codebook(num_values, per_tensor=True)
    error = (format.fake_quantize(weight, format.fit(weight)) - weight).square().mean().item()
    assert error == pytest.approx(distortion, rel=0.02)


@pytest.mark.parametrize("per_tensor", [True, False])
def test_few_values_are_kept_exactly(per_tensor):
    weight = torch.tensor([0.5, -1.0, 0.0, 3.0])[torch.randint(4, (5, 60), generator=torch.Generator().manual_seed(0))]
    for num_values in (4, 8, 16):
        format = Codebook(num_values, per_tensor)
        assert torch.equal(format.fake_quantize(weight, format.fit(weight)), weight)


def test_a_row_has_its_own_values():
    weight = random(4, 512) * torch.tensor([[1e-3], [1.0], [100.0], [0.1]])
    errors = [
        ((format.fake_quantize(weight, format.fit(weight)) - weight) / weight.std(dim=1, keepdim=True)).square().mean()
        for format in (Codebook(16), Codebook(16, per_tensor=True))
    ]
    assert errors[0] < 0.012
    assert errors[1] > 0.1


def test_bytes_are_the_nominal_ones():
    weight = random(16, 192)
    for format, num_bytes in ((Codebook(8), 16 * (72 + 16)), (Codebook(16, per_tensor=True), 16 * 96 + 32)):
        assert format.encode(weight, format.fit(weight)).num_bytes == num_bytes
