"""What needs no model imports none of the large libraries: `import tersor`, the help, the version, a mistyped verb.

Modules are counted and not seconds, which depend on the machine.
"""

import subprocess
import sys
from importlib import import_module

import pytest

import tersor
from tersor.cli import VERBS

LARGE = ("torch", "transformers", "numpy", "scipy", "numba")
CALLED = """
import sys
{code}
print([name for name in {large} if name in sys.modules])
"""
MAIN = "sys.argv = ['tersor', *{arguments}]\ntry:\n    from tersor.cli import main; main()\nexcept SystemExit: pass"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import tersor; print(tersor.__version__)", tersor.__version__),
        (MAIN.format(arguments=["--help"]), "compress"),
        (MAIN.format(arguments=["--version"]), tersor.__version__),
        (MAIN.format(arguments=["comprss"]), "Did you mean 'compress'"),
    ],
)
def test_what_needs_no_model_imports_no_large_library(code, said):
    script = CALLED.format(code=code, large=LARGE)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "tersor", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"tersor {tersor.__version__}"


def test_shells_complete_verbs_and_flags(monkeypatch):
    def completed(words):
        environment = {"_TERSOR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        script = "import sys; sys.argv = ['tersor']; from tersor.cli import main; main()"
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split()

    assert completed("tersor com") == ["compress", "compare"]
    assert "--json" in completed("tersor verify --j")


def test_the_table_of_verbs_says_what_they_say():
    for name, line in VERBS.items():
        verb = getattr(import_module(f"tersor.cli.{name}"), name)
        assert line == " ".join(verb.__doc__.split("\n\n")[0].split()), name


def test_names_of_the_package():
    assert set(tersor.__all__) <= set(dir(tersor))
    assert tersor.recipe.Recipe is tersor.Recipe
    with pytest.raises(AttributeError, match="module 'tersor' has no attribute 'compres'"):
        tersor.compres  # noqa: B018
