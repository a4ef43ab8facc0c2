"""tersor: state a budget, get the best model that fits it, and the proof of what it cost.

>>> import tersor
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
>>> compressed = tersor.compress(model, tersor.Recipe.of("int4-g32"))
>>> [(site.name, site.bits_per_weight) for site in compressed.sites]
[('0', 4.5), ('2', 4.5)]
"""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tersor import integrations

if TYPE_CHECKING:
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
integrations.install()

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

# Where each name comes from. It is imported when it is first used: PyTorch alone takes seconds.
HOMES = {
    "load": "tersor.checkpoint.artifact",
    "save": "tersor.checkpoint.artifact",
    "TersorError": "tersor.core.errors",
    "Events": "tersor.core.progress",
    "EXPORTS": "tersor.exporters",
    "FORMATS": "tersor.formats",
    "bench": "tersor.jobs.api",
    "compare": "tersor.jobs.api",
    "compress": "tersor.jobs.api",
    "evaluate": "tersor.jobs.api",
    "export": "tersor.jobs.api",
    "finetune": "tersor.jobs.api",
    "inspect": "tersor.jobs.api",
    "pack": "tersor.jobs.api",
    "unpack": "tersor.jobs.api",
    "verify": "tersor.jobs.api",
    "Result": "tersor.jobs.compress",
    "Exported": "tersor.jobs.export",
    "Tolerance": "tersor.measure.verdict",
    "Verdict": "tersor.measure.verdict",
    "judge": "tersor.measure.verdict",
    "METHODS": "tersor.methods",
    "Site": "tersor.nn.sites",
    "find_sites": "tersor.nn.sites",
    "Compressed": "tersor.pipeline",
    "run": "tersor.pipeline",
    "Recipe": "tersor.recipe",
    "plan": "tersor.search.plan",
    "TASKS": "tersor.tasks",
    "open_task": "tersor.tasks",
    "METRICS": "tersor.tasks.scores",
    "Metric": "tersor.tasks.scores",
    "Scores": "tersor.tasks.scores",
}


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package, when it is first used (PEP 562)."""
    if name in HOMES:
        found = getattr(import_module(HOMES[name]), name)
    elif not name.startswith("_") and find_spec(f"tersor.{name}"):
        found = import_module(f"tersor.{name}")
    else:
        raise AttributeError(f"module 'tersor' has no attribute '{name}'")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
