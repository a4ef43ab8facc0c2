"""The table of codecs. A new one is a file in this folder and a line here; whichever is smallest is used."""

from tersor.codecs.contract import Codec
from tersor.codecs.floats import Floats
from tersor.codecs.integers import Integers
from tersor.codecs.raw import Raw
from tersor.codecs.trellis import Trellis

ROWS: list[Codec] = [Raw(), Integers(), Trellis(), Floats()]
CODECS = {codec.name: codec for codec in ROWS}
