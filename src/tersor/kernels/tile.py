"""The innermost loop of products of bytes, for numba: some tokens times some panels of a weight, scaled, to floats.

What each step does is one of `instructions.py`; sums stay in registers from the first column to the last. This follows
Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication", https://doi.org/10.1145/1356052.1356053.
"""
# mypy: disable-error-code="union-attr"

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tersor.kernels.instructions import (
    FLOAT,
    INT32,
    INT64,
    PANEL,
    Builder,
    Instruction,
    call,
    features,
    load,
    name_of,
    num_accumulators,
    num_panels,
    shuffled,
    splat,
    store,
    sums_of,
    vector,
)

BYTES = 4 * PANEL  # of four columns in a panel; and of a float for each of its rows


class Tile(NamedTuple):
    """Addresses of what a tile takes and gives, and the bytes from one token or panel to the next.

    Attributes:
        num_steps: number of steps, of four columns each.
        codes: codes of the inputs, each `input_bytes / 4` bytes.
        weight: panels of codes.
        offset: what is taken off every sum, int32, by row of the weight.
        token_scale: float32, by token.
        scale: float32, by row of the weight.
        addend: float32, what is added to the result, by row of the weight (and by token, if the stride is not 0).
        out: float32.
    """

    num_steps: int
    codes: int
    codes_stride: int
    weight: int
    weight_stride: int
    offset: int
    token_scale: int
    scale: int
    addend: int
    addend_stride: int
    out: int
    out_stride: int


@intrinsic
def run_tile(typingctx: Any, instruction: Any, num_rows: Any, num_panels: Any, tile: Any) -> Any:
    """`addend + (codes @ weight - offset) * token_scale * scale` for a number of tokens and of panels: 1, or as many
    as `most_panels` says for `tile_rows` tokens."""
    signature = types.void(instruction, types.int64, types.int64, tile)
    kind = instruction.instance_class()

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        addresses = [builder.extract_value(args[3], i) for i in range(len(Tile._fields))]
        after = builder.append_basic_block("after")
        switch = builder.switch(builder.add(builder.mul(args[1], INT64(8)), args[2]), after)
        for rows, panels in shapes(kind):
            case = builder.append_basic_block("case")
            with builder.goto_block(case):
                builder.call(tile_function(builder.module, kind, rows, panels), addresses)
                builder.branch(after)
            switch.add_case(INT64(8 * rows + panels), case)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def most_panels(typingctx: Any, instruction: Any, num_rows: Any) -> Any:
    """The number of panels that a tile of so many tokens takes at once."""
    kind = instruction.instance_class()

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
        most = INT64(1)
        for rows, panels in shapes(kind):
            if panels > 1:
                most = builder.select(builder.icmp_signed("==", args[1], INT64(rows)), INT64(panels), most)
        return most

    return types.int64(instruction, types.int64), codegen


def shapes(kind: Instruction) -> list[tuple[int, int]]:
    """The numbers of tokens and of panels that tiles are compiled for."""
    each_rows = sorted({1, 2, 4, kind.most_rows})
    return sorted({(rows, panels) for rows in each_rows for panels in (1, num_panels(kind, rows))})


def tile_function(module: Any, kind: Instruction, num_rows: int, panels: int) -> Any:
    """A tile as a function of its own, in as many passes over the columns as registers ask for."""
    name = f"tile_{name_of(kind)}_{num_rows}_{panels}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [INT64] * len(Tile._fields)), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    places = [(panel, row) for panel in range(panels) for row in range(0, PANEL, kind.lanes)]
    at_once = max(1, num_accumulators() // num_rows)
    for first in range(0, len(places), at_once):
        Pass(b, kind, Tile(*function.args), num_rows, places[first : first + at_once]).write()
    b.ret_void()
    return function


class Pass(NamedTuple):
    """Code for some tokens and some vectors of weights: `places` are their panels and first rows."""

    b: Builder
    kind: Instruction
    tile: Any
    num_rows: int
    places: list[tuple[int, int]]

    def at(self, base: Any, *steps: tuple[Any, int]) -> Any:
        """The address that lies a number of strides after a base."""
        for stride, count in steps:
            base = self.b.add(base, self.b.mul(stride, INT64(count)))
        return base

    def write(self) -> None:
        b, sums = self.b, self.start() * self.num_rows
        loop, done, before = b.append_basic_block("loop"), b.append_basic_block("done"), b.block
        b.branch(loop)
        b.position_at_end(loop)
        step, totals = b.phi(INT64), [b.phi(each.type) for each in sums]
        added = self.step(step, totals)
        next_step = b.add(step, INT64(1))
        for phi, first, then in zip([step, *totals], [INT64(0), *sums], [next_step, *added], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, b.block)
        b.cbranch(b.icmp_signed("<", next_step, self.tile.num_steps), loop, done)
        b.position_at_end(done)
        for row in range(self.num_rows):
            self.finish(row, added[row * len(self.places) :][: len(self.places)])

    def start(self) -> list[Any]:
        """The initial sums, which subtract the offsets of the inputs."""
        b, kind, zeros, started = self.b, self.kind, sums_of(self.kind) - 1, []
        for panel, first in self.places:
            offset = load(b, self.at(self.tile.offset, (INT64(4), PANEL * panel + first)), vector(INT32, kind.lanes))
            negative = b.sub(ir.Constant(offset.type, [0] * kind.lanes), offset)
            if zeros:
                lanes = [lane for i in range(kind.lanes) for lane in (i, kind.lanes)]
                indices = ir.Constant(vector(INT32, len(lanes)), lanes)
                negative = b.shuffle_vector(negative, ir.Constant(offset.type, [0] * kind.lanes), indices)
            started.append(negative)
        return started

    def step(self, step: Any, totals: list[Any]) -> list[Any]:
        """Add the products of four more columns to the sums."""
        b, kind, tile = self.b, self.kind, self.tile
        at_weight, at_codes = b.mul(step, INT64(BYTES)), b.mul(step, INT64(kind.input_bytes))
        weights = [
            kind.weights(b, b.add(self.at(tile.weight, (tile.weight_stride, panel), (INT64(4), first)), at_weight))
            for panel, first in self.places
        ]
        added = []
        for row in range(self.num_rows):
            x = kind.inputs(b, b.add(self.at(tile.codes, (tile.codes_stride, row)), at_codes))
            for i, w in enumerate(weights):
                added.append(kind.add(b, totals[row * len(weights) + i], x, w))
        return added

    def finish(self, row: int, sums: list[Any]) -> None:
        """Scale the sums of a token, add to them and store them."""
        b, kind, tile, floats = self.b, self.kind, self.tile, vector(FLOAT, self.kind.lanes)
        token_scale = splat(b, load(b, self.at(tile.token_scale, (INT64(4), row)), FLOAT), kind.lanes)
        for (panel, first), total in zip(self.places, sums, strict=True):
            if sums_of(kind) == 2:
                halves = (shuffled(b, total, list(range(half, 2 * kind.lanes, 2))) for half in (0, 1))
                total = b.add(*halves)
            place = (INT64(4), PANEL * panel + first)
            y = b.fmul(b.sitofp(total, floats), token_scale)
            scale = load(b, self.at(tile.scale, place), floats)
            addend = load(b, self.at(tile.addend, (tile.addend_stride, row), place), floats)
            store(b, multiply_add(b, y, scale, addend), self.at(tile.out, (tile.out_stride, row), place))


def multiply_add(b: Builder, x: Any, y: Any, z: Any) -> Any:
    """`x * y + z`, rounded once where the processor can: as `torch.addcmul` does."""
    if features() & {"+fma", "+neon"}:
        return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)
    return b.fadd(b.fmul(x, y), z)
