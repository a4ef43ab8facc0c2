"""Unsigned b-bit codes to bytes and back, without waste: eight codes fill exactly b bytes.

Codes of one row stand one after another, least significant bit first (code j occupies bits j*b ... j*b+b-1 of the
row). A row ends on a byte boundary, so rows stay apart. Two 4-bit codes per byte: the first in the low half.
"""

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor


def packed_width(num_codes: int, bits: int) -> int:
    """Bytes of one row of `num_codes` codes.

    >>> packed_width(128, 3), packed_width(9, 1)
    (48, 2)
    """
    return -(-num_codes * bits // 8)


def pack(codes: UInt8[Tensor, "out n"], bits: int) -> UInt8[Tensor, "out width"]:
    """Pack codes below `2**bits`.

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), bits=4).tolist()
    [[33, 3]]
    """
    num_rows, num_codes = codes.shape
    octets = torch.nn.functional.pad(codes, (0, -num_codes % 8)).view(num_rows, -1, 8)
    packed = torch.zeros(num_rows, octets.shape[1], bits, dtype=torch.uint8, device=codes.device)
    for j in range(8):
        first, shift = divmod(j * bits, 8)
        packed[..., first] |= octets[..., j] << shift
        if shift + bits > 8:
            packed[..., first + 1] |= octets[..., j] >> (8 - shift)
    return packed.view(num_rows, -1)[:, : packed_width(num_codes, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "out width"], bits: int, num_codes: int) -> UInt8[Tensor, "out n"]:
    """The inverse of `pack`.

    >>> unpack(torch.tensor([[33, 3]], dtype=torch.uint8), bits=4, num_codes=3).tolist()
    [[1, 2, 3]]
    """
    num_rows = packed.shape[0]
    if bits == 4:  # the common case, in one step
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :num_codes]
    groups = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    codes = torch.empty(num_rows, groups.shape[1], 8, dtype=torch.uint8, device=packed.device)
    for j in range(8):
        first, shift = divmod(j * bits, 8)
        code = groups[..., first] >> shift
        if shift + bits > 8:
            code = code | (groups[..., first + 1] << (8 - shift))
        torch.bitwise_and(code, (1 << bits) - 1, out=codes[..., j])
    return codes.flatten(1)[:, :num_codes]


def grouped(weight: Shaped[Tensor, "out in"], group_size: int) -> Shaped[Tensor, "out groups k"]:
    """Neighbouring columns together; the last group ends in zeros where the columns do not fill it.

    >>> grouped(torch.tensor([[1, 2, 3]]), group_size=2).tolist()
    [[[1, 2], [3, 0]]]
    """
    missing = -weight.shape[1] % group_size
    full = torch.nn.functional.pad(weight, (0, missing)) if missing else weight
    return full.unflatten(1, (-1, group_size))


def ungrouped(w_ogk: Shaped[Tensor, "out groups k"], num_columns: int) -> Shaped[Tensor, "out in"]:
    """The inverse of `grouped`."""
    return w_ogk.flatten(1)[:, :num_columns].contiguous()
