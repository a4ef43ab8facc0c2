"""The observers, in one table. A new one is a file beside this and a line in `ROWS`."""

from tersor.observers.contract import Observer
from tersor.observers.entropy import Entropy
from tersor.observers.least_error import CubedError, LeastSquares
from tersor.observers.min_max import MinMax
from tersor.observers.moving_average import MovingAverage
from tersor.observers.percentile import Percentile

ROWS: list[type[Observer]] = [CubedError, LeastSquares, MinMax, MovingAverage, Percentile, Entropy]
OBSERVERS = {str(row.name): row for row in ROWS}
