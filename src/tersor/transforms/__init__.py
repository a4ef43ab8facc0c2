"""The table of transforms. A new one is a file in this folder and a line here."""

from tersor.transforms.awq import Awq
from tersor.transforms.contract import Transform
from tersor.transforms.equalize import Equalize
from tersor.transforms.fold_bn import FoldBn
from tersor.transforms.hadamard import Hadamard, HadamardHeads
from tersor.transforms.smooth import Smooth

ROWS: list[type[Transform]] = [FoldBn, Equalize, Smooth, Awq, Hadamard, HadamardHeads]
TRANSFORMS = {transform.name: transform for transform in ROWS}
