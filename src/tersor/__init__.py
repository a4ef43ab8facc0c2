"""tersor: state a budget, get the best model that fits it, and the proof of what it cost.

>>> import tersor
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
>>> compressed = tersor.compress(model, tersor.Recipe.of("int4-g32"))
>>> [(site.name, site.bits_per_weight) for site in compressed.sites]
[('0', 4.5), ('2', 4.5)]
"""

from importlib.metadata import version

import tersor.integrations
from tersor.checkpoint.artifact import load, save
from tersor.core.errors import TersorError
from tersor.core.progress import Events
from tersor.exporters import EXPORTS
from tersor.formats import FORMATS
from tersor.jobs.api import (
    bench,
    compare,
    compress,
    evaluate,
    export,
    finetune,
    inspect,
    pack,
    unpack,
    verify,
)
from tersor.jobs.compress import Result
from tersor.jobs.export import Exported
from tersor.measure.verdict import Tolerance, Verdict, judge
from tersor.methods import METHODS
from tersor.nn.sites import Site, find_sites
from tersor.pipeline import Compressed, run
from tersor.recipe import Recipe
from tersor.search.plan import plan
from tersor.tasks import TASKS, open_task
from tersor.tasks.scores import METRICS, Metric, Scores

__version__ = version("tersor")
tersor.integrations.install()

__all__ = [
    "EXPORTS",
    "FORMATS",
    "METHODS",
    "METRICS",
    "TASKS",
    "Compressed",
    "Events",
    "Exported",
    "Metric",
    "Recipe",
    "Result",
    "Scores",
    "Site",
    "TersorError",
    "Tolerance",
    "Verdict",
    "bench",
    "compare",
    "compress",
    "evaluate",
    "export",
    "find_sites",
    "finetune",
    "inspect",
    "judge",
    "load",
    "open_task",
    "pack",
    "plan",
    "run",
    "save",
    "unpack",
    "verify",
]
