"""The floors of the house: a room imports only from rooms below it."""

import re
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

from test_house import MODULES, all_imports

# From the ground up. A room may import what stands before it in this list, and nothing that comes after.
FLOORS = (
    "core",  # errors, messages, files, progress: knows nothing of models
    "formats",  # a weight matrix as tensors, one file a format
    "tasks",  # data and scores, one file a task
    "codecs",  # entropy coding
    "methods",  # a weight and its statistics in, an encoded weight out, one file a method
    "activations",  # input quantizers and the observers that choose their range
    "kernels",  # faster ways to multiply with packed weights
    "nn",  # the sites of a model, and the modules that stand in their places
    "transforms",  # rewrites that keep what a model computes
    "schemes",  # format, method and input quantizer in a word; which site gets which
    "calibration",  # what data says about a model
    "structure",  # structured pruning
    "checkpoint",  # models from files and to files
    "steps",  # the steps of a recipe that compress
    "runtimes",  # PyTorch and the others, as sessions that run and are timed
    "training",  # the steps of a recipe that train
    "measure",  # latency, memory, size, verdict
    "recipe",  # the steps in order, to and from YAML
    "report",  # tables and cards
    "exporters",  # files of other programs, one file or folder a client
    "testing",  # the laws that every entry of a table keeps
    "pipeline",  # the one loop over the steps of a recipe
    "search",  # recipes that keep within a limit
    "analysis",  # where bytes, time and loss come from
    "integrations",  # tersor from inside other libraries
    "jobs",  # one function for each thing tersor does
    "cli",  # flags
    "__main__",  # python -m tersor
)
# Arrows upwards that are known today, each with what would cut it. The list may only get shorter.
UPWARD: dict[tuple[str, str], str] = {}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "tersor"


def test_every_module_has_a_room():
    strangers = {module for module in MODULES if module != "tersor" and room(module) not in FLOORS}
    assert not strangers, f"give them a room, or the house a floor: {', '.join(sorted(strangers))}"


@pytest.mark.parametrize("floor", FLOORS)
def test_a_room_imports_only_from_below(floor):
    below = set(FLOORS[: FLOORS.index(floor) + 1])
    upward = {
        (module, target)
        for module, file in MODULES.items()
        if room(module) == floor
        for target in all_imports(file)
        if room(target) not in below
    }
    said = ", ".join(f"{module} imports {target}" for module, target in sorted(upward - UPWARD.keys()))
    assert not upward - UPWARD.keys(), said


def test_upward_arrows_are_still_there():
    gone = {arrow for arrow in UPWARD if arrow[0] not in MODULES or arrow[1] not in all_imports(MODULES[arrow[0]])}
    assert not gone, f"no longer there: take {gone} off the list"


# docs/architecture.md says what stands here.

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_page_lists_the_rooms_in_order():
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.partition("## The rooms")[2].partition("\n## ")[0], re.MULTILINE)
    assert tuple(listed) == FLOORS


def test_functions_named_on_the_page_exist():
    named = re.findall(r"`([\w/]+)\.py: ([\w.]+)`", PAGE)
    assert len(named) > 20
    for path, name in named:
        module = import_module("tersor." + path.replace("/", "."))
        assert attrgetter(name)(module) is not None, f"docs/architecture.md: {path}.py has no {name}"
