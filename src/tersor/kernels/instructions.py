"""Instructions of processors that multiply bytes and add the products, as LLVM writes them.

All of them read a weight in one order, `[panel of 16 rows, 4 columns, row, column]`: 64 bytes hold four columns of 16
rows. A vector of weights holds these four columns for as many rows as it has room for, a vector of inputs the same
four columns of one token for each of them. All are exact: a sum of products is what it is in 32 bits.

Each is a NamedTuple, which numba compiles for by its class: only what a processor uses is compiled.
"""
# mypy: disable-error-code="misc, call-arg"

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core.registry import cpu_target

INT8, INT16, INT32, INT64, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
PANEL = 16  # rows of a weight that lie together
Builder = Any


def vector(element: ir.Type, length: int) -> ir.VectorType:
    """The type of a vector."""
    return ir.VectorType(element, length)


def shuffled(b: Builder, value: ir.Value, lanes: list[int]) -> ir.Value:
    """A vector of some lanes of another, in this order."""
    indices = ir.Constant(vector(INT32, len(lanes)), lanes)
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), indices)


def splat(b: Builder, value: ir.Value, length: int) -> ir.Value:
    """A vector of one value."""
    first = b.insert_element(ir.Constant(vector(value.type, length), ir.Undefined), value, INT32(0))
    return shuffled(b, first, [0] * length)


def load(b: Builder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """Read a value from an address, which need not be a multiple of anything."""
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def store(b: Builder, value: ir.Value, address: ir.Value) -> None:
    """Store a value at an address, for `load` to read."""
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def call(b: Builder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an LLVM function by its name."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, args)


def features() -> frozenset[str]:
    """The features that numba compiles for, by the names of LLVM: `+avx2`, `+dotprod`."""
    triple, name, listed = cpu_target.target_context.codegen().magic_tuple()
    found = {each for each in listed.split(",") if each.startswith("+")}
    if triple.startswith(("aarch64", "arm64")):
        found.add("+neon")
        if name.startswith("apple-m"):  # LLVM lists nothing on macOS
            found.add("+dotprod")
    return frozenset(found)


class Vpdpbusd(NamedTuple):
    """AVX-512 VNNI: unsigned inputs times signed weights, four products to a sum, 16 sums at once."""

    lanes: int = 16
    input_bytes: int = 4
    unsigned: int = 1
    most_rows: int = 8

    needs = (frozenset({"+avx512vnni"}),)

    def weights(self, b: Builder, address: ir.Value) -> ir.Value:
        return load(b, address, vector(INT32, self.lanes))

    def inputs(self, b: Builder, address: ir.Value) -> ir.Value:
        return splat(b, load(b, address, INT32), self.lanes)

    def add(self, b: Builder, sums: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
        return call(b, f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", sums.type, sums, x, w)


class Vpdpbusd256(NamedTuple):
    """AVX-VNNI: the same, 8 sums at once, on processors that have no AVX-512."""

    lanes: int = 8
    input_bytes: int = 4
    unsigned: int = 1
    most_rows: int = 6

    needs = (frozenset({"+avxvnni"}), frozenset({"+avx512vnni", "+avx512vl"}))
    weights, inputs, add = Vpdpbusd.weights, Vpdpbusd.inputs, Vpdpbusd.add


class Vpmaddubsw(NamedTuple):
    """AVX2: two products of unsigned inputs and signed weights in 16 bits, which hold them only if no two neighbouring
    weights of one sign are over 128 together; then two such sums in 32."""

    lanes: int = 8
    input_bytes: int = 4
    unsigned: int = 1
    most_rows: int = 6

    needs = (frozenset({"+avx2"}),)

    def weights(self, b: Builder, address: ir.Value) -> ir.Value:
        return load(b, address, vector(INT8, 32))

    def inputs(self, b: Builder, address: ir.Value) -> ir.Value:
        return b.bitcast(splat(b, load(b, address, INT32), 8), vector(INT8, 32))

    def add(self, b: Builder, sums: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
        pairs, ones = vector(INT16, 16), ir.Constant(vector(INT16, 16), [1] * 16)
        products = call(b, "llvm.x86.avx2.pmadd.ub.sw", pairs, x, w)
        return b.add(sums, call(b, "llvm.x86.avx2.pmadd.wd", sums.type, products, ones))


class Vpmaddwd(NamedTuple):
    """AVX2: two products of 16-bit numbers in 32 bits, exact for all bytes. A row has two sums, added at the end."""

    lanes: int = 4
    input_bytes: int = 8
    unsigned: int = 0
    most_rows: int = 6

    needs = (frozenset({"+avx2"}),)

    def weights(self, b: Builder, address: ir.Value) -> ir.Value:
        return b.sext(load(b, address, vector(INT8, 16)), vector(INT16, 16))

    def inputs(self, b: Builder, address: ir.Value) -> ir.Value:
        return b.bitcast(splat(b, load(b, address, INT64), 4), vector(INT16, 16))

    def add(self, b: Builder, sums: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
        return b.add(sums, call(b, "llvm.x86.avx2.pmadd.wd", sums.type, x, w))


class Sdot(NamedTuple):
    """ARMv8.2: signed bytes times signed bytes, four products to a sum, 4 sums at once."""

    lanes: int = 4
    input_bytes: int = 4
    unsigned: int = 0
    most_rows: int = 6

    needs = (frozenset({"+dotprod"}),)

    def weights(self, b: Builder, address: ir.Value) -> ir.Value:
        return load(b, address, vector(INT8, 16))

    def inputs(self, b: Builder, address: ir.Value) -> ir.Value:
        return b.bitcast(splat(b, load(b, address, INT32), 4), vector(INT8, 16))

    def add(self, b: Builder, sums: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
        return call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums.type, sums, x, w)


class Widening(NamedTuple):
    """Any processor: products of 16-bit numbers in 32 bits (`smull` and `smlal` on ARM)."""

    lanes: int = 4
    input_bytes: int = 8
    unsigned: int = 0
    most_rows: int = 4

    needs = (frozenset[str](),)
    weights, inputs = Vpmaddwd.weights, Vpmaddwd.inputs

    def add(self, b: Builder, sums: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
        for first in (0, 1):
            halves = (b.sext(shuffled(b, each, list(range(first, 16, 2))), sums.type) for each in (x, w))
            sums = b.add(sums, b.mul(*halves))
        return sums


Instruction = Vpdpbusd | Vpdpbusd256 | Vpmaddubsw | Vpmaddwd | Sdot | Widening
INSTRUCTIONS: tuple[Instruction, ...] = (Vpdpbusd(), Vpdpbusd256(), Vpmaddubsw(), Vpmaddwd(), Sdot(), Widening())


def name_of(instruction: Instruction) -> str:
    """The name of an instruction in the manuals of processors."""
    return type(instruction).__name__.lower()


def sums_of(instruction: Instruction) -> int:
    """The number of sums that a row of the weight has in a vector."""
    return instruction.input_bytes // 4


def num_accumulators() -> int:
    """Vectors of sums that stay in registers, beside those that inputs and weights pass through."""
    return 24 if features() & {"+avx512vl", "+neon"} else 12


def num_panels(instruction: Instruction, num_rows: int) -> int:
    """The number of panels that a tile of this many tokens takes at once."""
    vectors = num_rows * PANEL // instruction.lanes
    return next(panels for panels in (4, 2, 1) if panels * vectors <= num_accumulators() or panels == 1)
