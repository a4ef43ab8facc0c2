"""K-quants, the integer formats of llama.cpp with quantized scales (https://github.com/ggml-org/llama.cpp/pull/1684):
`q6_k`, `q5_k`, `q4_k`, `q3_k`, `q2_k`.

A row is cut into super-blocks of 256 columns and those into blocks of 16 or 32. A block's scale, and its minimum, are
small integers in units of the super-block's:

    q2_k, q4_k, q5_k    weight = code * (block_scale * scale) - block_minimum * minimum
    q3_k, q6_k          weight = (code - 2**(bits - 1)) * (block_scale * scale)

All products are exact in float32, so every reader gets the same weights, to the last bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float16, UInt8
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.formats.contract import Encoded, Grid, Layout, Packing, Params, Projector, UsualMethods, Weight
from tersor.formats.packing import grouped, pack, packed_width, ungrouped, unpack
from tersor.formats.trainable import Trainable, half

# Suffixes: o output row, g block, k column within the block.

SUPER_BLOCK = 256


class Kind(NamedTuple):
    """The layout in which the formats differ, beside the bits of a code."""

    block_size: int
    scale_bits: int
    symmetric: bool


KINDS = {
    6: Kind(block_size=16, scale_bits=8, symmetric=True),
    5: Kind(block_size=32, scale_bits=6, symmetric=False),
    4: Kind(block_size=32, scale_bits=6, symmetric=False),
    3: Kind(block_size=16, scale_bits=6, symmetric=True),
    2: Kind(block_size=16, scale_bits=4, symmetric=False),
}


@dataclass(frozen=True)
class KQuant(Grid):
    """`bits`-bit codes in super-blocks of 256 columns; `in` is a multiple of that.

    Parts:
        codes: packed unsigned codes `[out, in * bits / 8]` uint8.
        scale: `[out, in / 256]` fp16.
        block_scale: packed codes, one per block, `[out, in / block_size * scale_bits / 8]` uint8. In `q3_k` 32 stands
            for zero; `q6_k` has plain signed bytes, int8.
        minimum, block_minimum: as the scales, in `q2_k`, `q4_k` and `q5_k`.

    >>> weight = torch.linspace(-1, 1, 256).view(1, 256)
    >>> q4_k = KQuant(bits=4)
    >>> q4_k.fake_quantize(weight, q4_k.fit(weight))[0, [0, 20, 255]]
    tensor([-0.9998, -0.8664,  1.0004])
    """

    bits: int
    rows_independent = True
    usual_methods = UsualMethods("nearest", "mse", "gptq")
    learnable_range = None
    refits_every_range = True
    search_range = (0.6, 1.2)

    @property
    def name(self) -> str:
        return f"q{self.bits}_k"

    @property
    def kind(self) -> Kind:
        return KINDS[self.bits]

    @property
    def asymmetric_range(self) -> bool:
        return self.kind.symmetric

    @property
    def trainable_parts(self) -> Mapping[str, Trainable]:
        return {name: Trainable(half) for name in (("scale",) if self.kind.symmetric else ("scale", "minimum"))}

    def why_not(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % SUPER_BLOCK == 0:
            return None
        instead = f"int{self.bits}-g32" + ("" if self.kind.symmetric else "-asym")
        return f"has in={shape[1]} columns, not a multiple of {SUPER_BLOCK}; use {instead}"

    def layout(self, shape: tuple[int, int]) -> Layout:
        num_rows, num_columns = shape
        super_blocks = (num_rows, num_columns // SUPER_BLOCK)
        width = packed_width(num_columns // self.kind.block_size, self.kind.scale_bits)
        layout: Layout = {
            "codes": (torch.uint8, (num_rows, packed_width(num_columns, self.bits))),
            "scale": (torch.float16, super_blocks),
            "block_scale": (torch.int8 if self.kind.scale_bits == 8 else torch.uint8, (num_rows, width)),
        }
        if not self.kind.symmetric:
            layout |= {"minimum": (torch.float16, super_blocks), "block_minimum": (torch.uint8, (num_rows, width))}
        return layout

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {}

    def as_integers(self, encoded: Encoded) -> None:
        return None

    def as_floats(self, encoded: Encoded) -> None:
        return None

    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params:
        """The grid that spans a block's range, or `shrink` times it: a number, or one per block `[out, blocks]`.

        The super-block's numbers follow from the weights alone, so that `shrink` of one block leaves the others as they
        are. Raises FormatError where one overflows fp16.
        """
        w_ogk = self.grouped(weight)
        highest, lowest = w_ogk.amax(-1), w_ogk.amin(-1)
        if self.kind.symmetric:
            scale = torch.where(highest > -lowest, highest, lowest) / -(2 ** (self.bits - 1))
            return self.in_units("scale", self.unit("scale", scale), scale * shrink)
        # Zero stays inside the range, as a minimum is stored without a sign.
        num_steps, highest, depth = 2**self.bits - 1, highest.clamp(min=0), (-lowest).clamp(min=0)
        minimum = self.in_units("minimum", self.unit("minimum", depth), depth * shrink)
        span = self.of_blocks("minimum", minimum) + highest * shrink
        return self.in_units("scale", self.unit("scale", (depth + highest) / num_steps), span / num_steps) | minimum

    def refit(self, weight: Weight, params: Params, importance: Float[Tensor, " in"]) -> Params:
        """The scale and minimum of each block that fit its weights best, by weighted least squares, to the codes they
        have now; those of the super-blocks stay. A block keeps what it has where rounding would make that better."""
        w_ogk, h_ogk = self.grouped(weight), self.grouped(importance.expand_as(weight))
        q_ogk = self.grouped(self.quantize(weight, params)) - self.zero_point

        def total(*factors: Tensor) -> Float[Tensor, "o g"]:
            product = h_ogk
            for factor in factors:
                product = product * factor
            return product.sum(-1)

        def error(tried: Params) -> Float[Tensor, "o g"]:
            return total((self.grouped(self.fake_quantize(weight, tried)) - w_ogk).square_())

        found, q_q = dict(params), total(q_ogk, q_ogk)
        if not self.kind.symmetric:
            # Where all codes are equal, or there is no weight to the block, the minimum stays.
            all_, q, w = total(), total(q_ogk), total(w_ogk)
            spread = all_ * q_q - q * q
            depth = (q * total(q_ogk, w_ogk) - q_q * w) / spread
            depth = torch.where(spread > 1e-6 * all_ * q_q, depth, self.minimum(params))
            found |= self.in_units("minimum", params["minimum"], depth)
        scale = total(q_ogk, w_ogk + self.minimum(found).unsqueeze(-1)) / q_q
        scale = torch.where(q_q > 0, scale, self.of_blocks("scale", params))
        found |= self.in_units("scale", params["scale"], scale)
        return self.chosen(error(found) < error(params), found, params)

    def chosen(self, first: Bool[Tensor, "o g"], ours: Params, others: Params) -> Params:
        """Parameters `ours` where `first` is true for the block, else `others`; both have the same super-blocks."""
        names = ("scale",) if self.kind.symmetric else ("scale", "minimum")
        picked = {n: torch.where(first, self.of_blocks(n, ours), self.of_blocks(n, others)) for n in names}
        return {key: part for n in names for key, part in self.in_units(n, ours[n], picked[n]).items()}

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        return self.dequantize(self.quantize(weight, params), params)

    def encode(self, weight: Weight, params: Params) -> Encoded:
        codes = pack(self.quantize(weight, params).to(torch.uint8), self.bits)
        return Encoded(self, (weight.shape[0], weight.shape[1]), {"codes": codes, **params})

    def decode(self, encoded: Encoded) -> Weight:
        return self.dequantize(unpack(encoded.parts["codes"], self.bits, encoded.shape[1]).float(), encoded.parts)

    def grouped(self, weight: Weight) -> Float[Tensor, "o g k"]:
        return grouped(weight, self.kind.block_size)

    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        scale_go = self.of_blocks("scale", params).t().contiguous()
        divisor_go, minimum_go = divisor(scale_go), self.minimum(params).t().contiguous()
        zero = self.zero_point

        def project(values: Float[Tensor, " out"], j: int) -> Float[Tensor, " out"]:
            g = j // self.kind.block_size
            codes = ((values + minimum_go[g]) / divisor_go[g]).add_(zero).clamp_(0, 2**self.bits - 1).round_()
            return codes.sub_(zero).mul_(scale_go[g]).sub_(minimum_go[g])

        return project

    def quantize(self, weight: Weight, params: Params) -> Float[Tensor, "out in"]:
        """The nearest codes, as floats."""
        scale, minimum = self.of_blocks("scale", params).unsqueeze(-1), self.minimum(params).unsqueeze(-1)
        codes = ((self.grouped(weight) + minimum) / divisor(scale)).add_(self.zero_point)
        return ungrouped(codes.clamp_(0, 2**self.bits - 1).round_(), weight.shape[1])

    def dequantize(self, codes: Float[Tensor, "out in"], params: Params) -> Weight:
        scale, minimum = self.of_blocks("scale", params).unsqueeze(-1), self.minimum(params).unsqueeze(-1)
        return ungrouped((self.grouped(codes) - self.zero_point).mul_(scale).sub_(minimum), codes.shape[1])

    @property
    def zero_point(self) -> int:
        """The code that stands for zero, for formats without a minimum."""
        return 2 ** (self.bits - 1) if self.kind.symmetric else 0

    def minimum(self, params: Params) -> Float[Tensor, "o g"]:
        """The minimum of each block, which decoding subtracts."""
        scale = params["scale"]
        num_blocks = scale.shape[1] * (SUPER_BLOCK // self.kind.block_size)
        return scale.new_zeros(1, num_blocks).float() if self.kind.symmetric else self.of_blocks("minimum", params)

    # A number for each block, as a code in units of the super-block's.

    def unit(self, name: str, values: Float[Tensor, "o g"]) -> Float16[Tensor, "o s"]:
        """The unit of each super-block: with it, the largest block code is the largest of the blocks' values."""
        unit = values.abs().unflatten(1, (-1, SUPER_BLOCK // self.kind.block_size)).amax(-1) / self.highest_block_code
        if not unit.max() <= torch.finfo(torch.float16).max:
            raise FormatError(f"{self.name}: a {name} of {unit.max():.3g} overflows fp16; keep this weight in bf16")
        return unit.half()

    def in_units(self, name: str, unit: Float16[Tensor, "o s"], values: Float[Tensor, "o g"]) -> Params:
        """Each value rounded to the nearest multiple of its unit that a block's code can store."""
        bits, most = self.kind.scale_bits, self.highest_block_code
        codes = values.unflatten(1, (unit.shape[1], -1)) / divisor(unit.float()).unsqueeze(-1)
        codes = codes.round_().clamp_(-most - 1 if self.kind.symmetric else 0, most).flatten(1)
        if bits == 8:
            return {name: unit, f"block_{name}": codes.to(torch.int8)}
        return {name: unit, f"block_{name}": pack((codes + self.zero_of(bits)).to(torch.uint8), bits)}

    def of_blocks(self, name: str, params: Params) -> Float[Tensor, "o g"]:
        """The decoded scale or minimum of each block, `[out, blocks]`."""
        bits, unit, codes = self.kind.scale_bits, params[name].float(), params[f"block_{name}"]
        signed = codes.float() if bits == 8 else self.block_codes(codes, unit.shape[1]).float() - self.zero_of(bits)
        return (signed.unflatten(1, (unit.shape[1], -1)) * unit.unsqueeze(-1)).flatten(1)

    def block_codes(self, packed: Tensor, num_super_blocks: int) -> UInt8[Tensor, "o g"]:
        """The stored codes of all blocks, unpacked."""
        return unpack(packed, self.kind.scale_bits, num_super_blocks * SUPER_BLOCK // self.kind.block_size)

    @property
    def highest_block_code(self) -> int:
        return 2 ** (self.kind.scale_bits - 1) - 1 if self.kind.symmetric else 2**self.kind.scale_bits - 1

    def zero_of(self, bits: int) -> int:
        """The code that stands for zero in blocks of signed codes of this many bits."""
        return 2 ** (bits - 1) if self.kind.symmetric else 0


def divisor(scale: Tensor) -> Tensor:
    """The scale to divide by; where it is zero, infinity: then every code is that of zero."""
    return torch.where(scale == 0, torch.inf, scale)
