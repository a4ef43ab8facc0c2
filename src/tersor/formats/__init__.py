"""The table of formats. A new one is a file in this folder and a line here."""

from tersor.core.errors import UnknownName
from tersor.formats.bitmask import Bitmask
from tersor.formats.codebook import Codebook
from tersor.formats.coded import Coded
from tersor.formats.contract import Format
from tersor.formats.float_cast import FloatCast
from tersor.formats.fp8 import Fp8
from tersor.formats.int_group import IntGroup
from tersor.formats.k_quant import KQuant
from tersor.formats.lowrank import Corrected, LowRank
from tersor.formats.mx import Mxfp4, Nvfp4
from tersor.formats.nf4 import Nf4, Nf4Double
from tersor.formats.semi_structured import SemiStructured
from tersor.formats.sparse_int import SparseInt

ROWS: list[Format] = [
    FloatCast("fp16"),
    FloatCast("bf16"),
    *(
        IntGroup(bits, group_size, symmetric)
        for bits in (8, 6, 5, 4, 3, 2)
        for group_size in (None, 128, 64, 32)
        for symmetric in (True, False)
    ),
    Nf4(),
    Nf4Double(),
    *(Fp8(kind, per_tensor) for kind in ("e4m3", "e5m2") for per_tensor in (False, True)),
    Mxfp4(),
    Nvfp4(),
    *(KQuant(bits) for bits in (6, 5, 4, 3, 2)),
    *(Codebook(num_values, per_tensor) for num_values in (256, 16, 8, 4) for per_tensor in (False, True)),
    Bitmask(),
    SemiStructured(2, 4),
    SemiStructured(4, 8),
    *(
        SparseInt(pattern, IntGroup(bits, group_size))
        for pattern in (Bitmask(), SemiStructured(2, 4))
        for bits, group_size in ((8, None), (4, 64), (3, 64))
    ),
    *(SparseInt(Bitmask(), IntGroup(bits)) for bits in (6, 5)),
    LowRank(),
    Coded(),
    *(Corrected(IntGroup(bits, group_size=64)) for bits in (4, 3, 2)),
]
FORMATS = {format.name: format for format in ROWS}


def format_named(name: str) -> Format:
    """The format a recipe or an artifact names.

    >>> format_named("int4-g64-asym")
    IntGroup(bits=4, group_size=64, symmetric=False)
    >>> format_named("int4-g63")
    Traceback (most recent call last):
    tersor.core.errors.UnknownName: unknown format 'int4-g63': did you mean 'int4-g64'? list them with `tersor formats`
    """
    if name not in FORMATS:
        raise UnknownName("format", name, FORMATS, see="list them with `tersor formats`")
    return FORMATS[name]
