"""The table of methods. A new one is a file in this folder and a line here."""

from tersor.methods.contract import Method
from tersor.methods.hqq import Hqq
from tersor.methods.magnitude import Magnitude
from tersor.methods.mse import Mse
from tersor.methods.nearest import Nearest

ROWS: list[type[Method]] = [Nearest, Mse, Hqq, Magnitude]
METHODS = {method.name: method for method in ROWS}
