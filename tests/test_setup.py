"""What is installed: exact versions for the tests, bounds for everybody else, and no failure by others' warnings."""

import re
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    Requirement(line) for line in PROJECT["dependencies"] + [line for all in EXTRAS.values() for line in all]
]


def pins():
    """Name to version, as constraints.txt has them; every line must be plain `name==version`."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [re.fullmatch(r"([a-z0-9][a-z0-9.-]*)==([0-9][0-9a-z.]*)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return dict(match.groups() for match in found if match)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: str(requirement))
def test_what_is_required_is_pinned_within_its_bounds(requirement):
    version = pins().get(requirement.name.lower().replace("_", "-"))
    assert version is not None, f"{requirement.name} is not in constraints.txt; run `make constraints`"
    assert requirement.specifier.contains(version), "run `make constraints`"


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: str(requirement))
def test_bounds_on_both_sides(requirement):
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators in ({">=", "<"}, {"=="}), "state the lowest version that was tested, and the next that may break"


def test_the_makefile_installs_what_is_pinned():
    makefile = (ROOT / "Makefile").read_text()
    torch = re.search(r"^TORCH := (.*)$", makefile, re.M)
    assert torch is not None
    assert torch.group(1) == f"torch=={pins()['torch']}"
    assert "--constraint constraints.txt" in makefile
    assert f"pip install {torch.group(1)}" in (ROOT / "README.md").read_text()


def test_warnings_of_others_do_not_fail_a_test():
    warnings.warn_explicit("soon gone", FutureWarning, "modeling.py", 1, module="transformers.models")
    warnings.warn_explicit("soon gone", DeprecationWarning, "tersorial.py", 1, module="tersorial")


@pytest.mark.parametrize("module", ["tersor", "tersor.exporters.decoder"])
def test_warnings_raised_from_tersor_do(module):
    with pytest.raises(FutureWarning):
        warnings.warn_explicit("soon gone", FutureWarning, "decoder.py", 1, module=module)
