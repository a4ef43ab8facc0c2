"""Bitmask: the bytes it takes, and files that do not add up."""

import pytest
import torch

from laws import random
from tersor.core.errors import FormatError
from tersor.formats.bitmask import Bitmask
from tersor.formats.contract import Encoded


def sparse(density=0.25):
    weight = random(9, 21)
    weight[random(9, 21, seed=1).abs() > torch.special.erfinv(torch.tensor(density)).item() * 2**0.5] = 0
    return weight, Bitmask().encode(weight, Bitmask().fit(weight))


def test_one_bit_each_and_two_bytes_for_what_is_kept():
    weight, encoded = sparse()
    assert encoded.num_bytes == 9 * 3 + 2 * int((weight != 0).sum())
    assert torch.equal(encoded.decode(), weight.half().float())


def test_a_mask_decides_not_the_values():
    """A kept zero stays kept, a masked weight is gone."""
    weight = torch.tensor([[0.0, 1.0, 2.0]])
    encoded = Bitmask().encode(weight, {"mask": torch.tensor([[True, False, True]])})
    assert encoded.parts["values"].tolist() == [0.0, 2.0]
    assert encoded.decode().tolist() == [[0.0, 0.0, 2.0]]


@pytest.mark.parametrize("change", ["a value short", "a value more", "no values", "a bit more"])
def test_damaged_files_are_refused(change):
    _, encoded = sparse()
    mask, values = encoded.parts["mask"].clone(), encoded.parts["values"]
    if change == "a bit more":
        mask[0, 0] = 255
    length = {"a value short": len(values) - 1, "a value more": len(values) + 1, "no values": 0}.get(
        change, len(values)
    )
    values = torch.cat([values, values])[:length]
    with pytest.raises(FormatError, match=r"bits set for \d+ values; the file is damaged"):
        Bitmask().decode(Encoded(Bitmask(), encoded.shape, {"mask": mask, "values": values}))


def test_bits_after_a_row_do_not_count():
    weight, encoded = sparse()
    mask = encoded.parts["mask"].clone()
    mask[:, -1] |= 0b11100000  # 21 columns: the last byte of a row holds five
    damaged = Encoded(Bitmask(), encoded.shape, {**encoded.parts, "mask": mask})
    assert torch.equal(damaged.decode(), weight.half().float())


def test_overflow_names_the_weight():
    weight = torch.tensor([[1.0, -7e4]])
    with pytest.raises(FormatError, match=r"bitmask: the largest weight 7e\+04 overflows fp16"):
        Bitmask().encode(weight, Bitmask().fit(weight))
