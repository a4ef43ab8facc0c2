"""The innermost loop of float inputs times packed weights, for numba: codes become floats in registers.

A panel holds 16 rows of a weight, column after column, as LLVM's vectors of 16, which are one, two or four registers.
A decoded weight is `(code - zero) * scale` in float32, as `IntGroup` decodes it. Many tokens are multiplied with panels
that are decoded; for few, the products of a group are added first, and multiplied with its scale then.
"""

from itertools import product
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tersor.kernels.instructions import (
    FLOAT,
    INT8,
    INT32,
    INT64,
    PANEL,
    Builder,
    call,
    features,
    load,
    splat,
    store,
    vector,
)

FLOATS = 32  # bits of a panel that is decoded already
ROW = vector(FLOAT, PANEL)


class Codes(NamedTuple):
    """Addresses of some tokens and of some panels of a weight.

    Attributes:
        weight: codes of 4 or 8 bits, `bits * 2` bytes for each column, or floats.
        weight_stride: bytes from one panel to the next.
        num_columns: columns of the weight.
        group_size: columns that share a scale.
        scale: float32 `[panel, group, 16]`.
        zero: float32 `[panel, group, 16]`.
        grid_stride: bytes from one panel's scales to the next's.
        x: float32, by token.
        addend: float32, what is added to the result.
        out: float32, by token; where a panel is decoded, floats `[column, 16]`.
    """

    weight: int
    weight_stride: int
    num_columns: int
    group_size: int
    scale: int
    zero: int
    grid_stride: int
    x: int
    x_stride: int
    addend: int
    out: int
    out_stride: int


def most_tokens() -> int:
    """The tokens that are multiplied at once: as many as registers hold sums of."""
    here = features()
    return 12 if "+avx512vl" in here else 6


def num_panels(num_tokens: int) -> int:
    """The number of panels that a tile of this many tokens takes at once: as many as registers hold sums of."""
    here = features()
    registers, free = (1, 24) if "+avx512vl" in here else (4, 24) if "+neon" in here else (2, 12)
    most = 4 if num_tokens < 4 else 2
    return next(panels for panels in (most, 2, 1) if panels * num_tokens * registers <= free or panels == 1)


def shapes() -> list[tuple[int, int]]:
    """The numbers of tokens and of panels that tiles are compiled for; those of 0 tokens decode a panel."""
    counts = sorted({1, 2, 4, 6, most_tokens()})
    return [(0, 1), *sorted({(tokens, panels) for tokens in counts for panels in (1, num_panels(tokens))})]


class Bits4(NamedTuple):
    """Two rows in a byte: row i in the low half of byte i, row i + 8 in the high half."""

    bits: int = 4


class Bits8(NamedTuple):
    """A row in a byte."""

    bits: int = 8


@intrinsic
def run_codes(typingctx: Any, kind: Any, bits: Any, num_tokens: Any, num_panels: Any, codes: Any) -> Any:
    """`addend + x @ weight` for so many tokens and panels, of `kind` (bits is that of `kind`) or of floats (32); for 0
    tokens, a panel as floats."""
    signature = types.void(kind, types.int64, types.int64, types.int64, codes)
    stored = kind.instance_class().bits

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        addresses = [builder.extract_value(args[4], i) for i in range(len(Codes._fields))]
        after = builder.append_basic_block("after")
        tokens_and_panels = builder.add(builder.mul(args[2], INT64(8)), args[3])
        switch = builder.switch(builder.add(builder.mul(args[1], INT64(256)), tokens_and_panels), after)
        for each_bits, (tokens, panels) in product((stored, FLOATS), shapes()):
            case = builder.append_basic_block("case")
            with builder.goto_block(case):
                builder.call(codes_function(builder.module, each_bits, tokens, panels), addresses)
                builder.branch(after)
            switch.add_case(INT64(256 * each_bits + 8 * tokens + panels), case)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def tokens_at_once(typingctx: Any) -> Any:
    """The tokens that a tile takes at most, for numba."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        return INT64(most_tokens())

    return types.int64(), codegen


@intrinsic
def panels_at_once(typingctx: Any, num_tokens: Any) -> Any:
    """`num_panels`, for numba."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        most = INT64(1)
        for tokens, panels in shapes():
            if panels > 1:
                most = builder.select(builder.icmp_signed("==", args[0], INT64(tokens)), INT64(panels), most)
        return most

    return types.int64(types.int64), codegen


def codes_function(module: Any, bits: int, num_tokens: int, panels: int) -> Any:
    """A tile as a function of its own: groups of columns, and the columns of each."""
    name = f"codes_{bits}_{num_tokens}_{panels}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [INT64] * len(Codes._fields)), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b, a = ir.IRBuilder(function.append_basic_block("entry")), Codes(*function.args)
    zeros = [ir.Constant(ROW, [0.0] * PANEL)] * (num_tokens * panels)

    def each_group(first: Any, sums: list[Any]) -> list[Any]:
        end = b.add(first, a.group_size)
        end = b.select(b.icmp_signed("<", end, a.num_columns), end, a.num_columns)
        at = b.mul(b.sdiv(first, a.group_size), INT64(4 * PANEL))
        steps = [b.add(at, b.mul(a.grid_stride, INT64(panel))) for panel in range(panels if bits != FLOATS else 0)]
        grids = [(load(b, b.add(a.scale, step), ROW), load(b, b.add(a.zero, step), ROW)) for step in steps]
        columns = (first, end, INT64(1))
        if not grids or not num_tokens:
            return loop(b, *columns, sums, lambda column, sums: one_column(b, a, (bits, panels), grids, column, sums))
        of_group = loop(b, *columns, zeros, lambda column, sums: one_column(b, a, (bits, panels), grids, column, sums))
        return [fused(b, each, grids[i % panels][0], sums[i]) for i, each in enumerate(of_group)]

    sums = loop(b, INT64(0), a.num_columns, a.group_size, zeros, each_group)
    for i, total in enumerate(sums):
        token, panel = divmod(i, panels)
        y = b.fadd(total, load(b, b.add(a.addend, INT64(4 * PANEL * panel)), ROW))
        store(b, y, b.add(b.add(a.out, INT64(4 * PANEL * panel)), b.mul(a.out_stride, INT64(token))))
    b.ret_void()
    return function


def one_column(
    b: Builder, a: Codes, kind: tuple[int, int], grids: list[Any], column: Any, sums: list[Any]
) -> list[Any]:
    """Add a column's products to the sums of all tokens, or store it as floats where there are none. `kind` is the bits
    of a code, and the number of panels."""
    bits, panels = kind
    weights = []
    for panel in range(panels):
        at = b.add(b.add(a.weight, b.mul(a.weight_stride, INT64(panel))), b.mul(column, INT64(2 * bits)))
        values = load(b, at, ROW if bits == FLOATS else vector(INT8, 2 * bits))
        if grids:
            scale, zero = grids[panel]
            values = b.fsub(as_floats(b, values, bits), zero)
            values = values if sums else b.fmul(values, scale)  # that of a product comes once for a group
        weights.append(values)
    if not sums:
        store(b, weights[0], b.add(a.out, b.mul(column, INT64(4 * PANEL))))
    at, added = b.mul(column, INT64(4)), []
    for token in range(len(sums) // panels):
        x = splat(b, load(b, b.add(b.add(a.x, b.mul(a.x_stride, INT64(token))), at), FLOAT), PANEL)
        added += [fused(b, x, w, total) for w, total in zip(weights, sums[token * panels :], strict=False)]
    return added


def as_floats(b: Builder, values: Any, bits: int) -> Any:
    """Convert the codes of 16 rows to floats."""
    if bits == 4:
        low = b.and_(values, ir.Constant(values.type, [15] * 8))
        high = b.lshr(values, ir.Constant(values.type, [4] * 8))
        values = b.shuffle_vector(low, high, ir.Constant(vector(INT32, PANEL), list(range(PANEL))))
    return b.sitofp(b.zext(values, vector(INT32, PANEL)), ROW)


def fused(b: Builder, x: Any, y: Any, z: Any) -> Any:
    """`x * y + z`, rounded once where the processor can."""
    if features() & {"+fma", "+neon"}:
        return call(b, f"llvm.fma.v{PANEL}f32", ROW, x, y, z)
    return b.fadd(b.fmul(x, y), z)


def loop(b: Builder, first: Any, end: Any, step: Any, values: list[Any], body: Any) -> list[Any]:
    """`for i in range(first, end, step): values = body(i, values)`, at least once."""
    block, done, before = b.append_basic_block("loop"), b.append_basic_block("done"), b.block
    b.branch(block)
    b.position_at_end(block)
    place, phis = b.phi(INT64), [b.phi(value.type) for value in values]
    after = body(place, phis)
    following = b.add(place, step)
    for phi, start, then in zip([place, *phis], [first, *values], [following, *after], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(then, b.block)
    b.cbranch(b.icmp_signed("<", following, end), block, done)
    b.position_at_end(done)
    return after
