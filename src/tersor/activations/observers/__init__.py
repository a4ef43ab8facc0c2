"""The observers, in one table. A new one is a file beside this and a line in `ROWS`."""

from tersor.activations.observers.contract import Observer
from tersor.activations.observers.entropy import Entropy
from tersor.activations.observers.least_error import CubedError, LeastSquares
from tersor.activations.observers.min_max import MinMax
from tersor.activations.observers.moving_average import MovingAverage
from tersor.activations.observers.percentile import Percentile

ROWS: list[type[Observer]] = [CubedError, LeastSquares, MinMax, MovingAverage, Percentile, Entropy]
OBSERVERS = {str(row.name): row for row in ROWS}
