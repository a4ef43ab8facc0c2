"""The table of methods. A new one is a file in this folder and a line here."""

from tersor.methods.autoround import AutoRound
from tersor.methods.contract import Method
from tersor.methods.gptq import Gptq
from tersor.methods.hqq import Hqq
from tersor.methods.kmeans import Kmeans
from tersor.methods.lqer import Lqer
from tersor.methods.magnitude import Magnitude
from tersor.methods.mse import Mse
from tersor.methods.nearest import Nearest
from tersor.methods.sparsegpt import SparseGpt
from tersor.methods.svd import Svd
from tersor.methods.wanda import Wanda
from tersor.methods.waterfill import Waterfill
from tersor.methods.zero_mask import ZeroMask

ROWS: list[type[Method]] = [
    Nearest,
    Mse,
    Hqq,
    Kmeans,
    Gptq,
    AutoRound,
    Magnitude,
    ZeroMask,
    Wanda,
    SparseGpt,
    Svd,
    Lqer,
    Waterfill,
]
METHODS = {method.name: method for method in ROWS}
