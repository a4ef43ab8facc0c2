"""The house rules: tables are whole, files are small and say what they do, and the arrows point down."""

import ast
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import tersor
from golden.write import golden
from tersor.activations.observers import OBSERVERS
from tersor.formats import FORMATS
from tersor.methods import METHODS
from tersor.methods.stats import Stats

SRC = Path(tersor.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(SRC.rglob("*.py"))
FLOORS = {"__init__", "contract"}  # what a table's folder holds beside its entries
PLUMBING = {
    "formats": {"overflow", "packing", "four_bit", "trainable", "trellis", "views"},
    "methods": {"filling", "solver", "stats", "viterbi"},
}


def module_name(file):
    parts = file.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


@cache
def tree(file):
    return ast.parse(file.read_text())


def names(files):
    return [str(file.relative_to(SRC)) for file in files]


# Tables.


def entries(folder):
    return [file for file in sorted((SRC / folder).glob("*.py")) if file.stem not in FLOORS | PLUMBING[folder]]


@pytest.mark.parametrize("file", entries("methods"), ids=lambda file: file.stem)
def test_every_method_is_listed_tested_and_says_its_paper(file):
    listed = [method for method in METHODS.values() if method.__module__ == f"tersor.methods.{file.stem}"]
    assert listed, f"methods/{file.name} has no line in METHODS"
    assert (TESTS / "methods" / f"test_{file.stem}.py").exists(), f"write tests/methods/test_{file.stem}.py"
    assert "http" in (ast.get_docstring(tree(file)) or ""), f"methods/{file.name}: link the paper at the top"
    assert all(method.needs <= {field.name for field in fields(Stats)} for method in listed), "needs names no statistic"


@pytest.mark.parametrize("file", entries("formats"), ids=lambda file: file.stem)
def test_every_format_is_listed_and_has_golden_bytes(file):
    listed = [name for name, format in FORMATS.items() if type(format).__module__ == f"tersor.formats.{file.stem}"]
    assert listed, f"formats/{file.name} has no line in FORMATS"
    for name in listed:
        assert golden(name).exists(), "run `python tests/golden/write.py`"


OBSERVER_FILES = [file for file in sorted((SRC / "activations" / "observers").glob("*.py")) if file.stem not in FLOORS]


@pytest.mark.parametrize("file", OBSERVER_FILES, ids=lambda file: file.stem)
def test_every_observer_is_listed_tested_and_says_its_paper(file):
    listed = [each for each in OBSERVERS.values() if each.__module__ == f"tersor.activations.observers.{file.stem}"]
    assert listed, f"observers/{file.name} has no line in OBSERVERS"
    test = TESTS / "activations" / "observers" / f"test_{file.stem}.py"
    assert test.exists(), f"write {test.relative_to(TESTS.parent)}"
    assert "http" in (ast.get_docstring(tree(file)) or ""), f"observers/{file.name}: link the paper at the top"
    assert all(each.needs <= {field.name for field in fields(Stats)} for each in listed), "needs names no statistic"


# Arrows.


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


@cache
def imports(file):
    """The tersor modules a file imports, by whether it does so when called only: [False] at the top, [True] lazily.

    What stands under `if TYPE_CHECKING` counts as lazy: it is not imported when the file is.
    """
    found = {False: set(), True: set()}

    def look(node, lazy):
        if isinstance(node, ast.Import):
            found[lazy] |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: write imports in full"
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found[lazy] |= parts
            found[lazy] |= {node.module} if len(parts) < len(node.names) else set()
        for child in ast.iter_child_nodes(node):
            look(child, lazy or isinstance(node, FUNCTIONS) or is_type_checking(node))

    look(tree(file), False)
    return {lazy: modules & MODULES.keys() for lazy, modules in found.items()}


def all_imports(file):
    return imports(file)[False] | imports(file)[True]


def packages_of(module):
    """The packages below tersor whose __init__ runs on the way to a module."""
    parts = module.split(".")
    return {".".join(parts[:n]) for n in range(2, len(parts))} & MODULES.keys()


@cache
def arrows():
    """Module to modules, the packages passed through included."""
    graph = {}
    for module, file in MODULES.items():
        targets = imports(file)[False]
        passed = {package for target in targets for package in packages_of(target)} - packages_of(module) - {module}
        graph[module] = targets | passed
    return graph


def circles(graph):
    """Sets of modules that import one another, directly or by way of others in the set."""
    reached = {module: {module} for module in graph}
    grown = True
    while grown:
        grown = False
        for module, targets in graph.items():
            before = len(reached[module])
            reached[module] |= set().union(*(reached[target] for target in targets))
            grown |= len(reached[module]) > before
    rings = {frozenset(other for other in reached[module] if module in reached[other]) for module in graph}
    return [sorted(ring) for ring in rings if len(ring) > 1]


def test_no_import_circle():
    """Imports inside functions and for type checkers count: a circle is no better for being hidden."""
    assert not circles(arrows()), "import circle"
    assert not circles({module: all_imports(file) for module, file in MODULES.items()}), "hidden import circle"


# Why a module imports tersor's own modules inside functions.
LAZY = {
    "tersor": "its names are imported on first use: PyTorch takes seconds, and the command line's help needs none",
    "tersor.codecs.loops": "numba takes half a second to import, and only coding needs it",
    "tersor.exporters.executorch": "executorch is optional",
    "tersor.exporters.onnx": "onnx is optional",
    "tersor.exporters.openvino": "openvino and onnx are optional",
    "tersor.kernels.dot": "numba takes half a second to import, and only packed layers need it",
    "tersor.kernels.recurrence": "numba takes half a second to import, and only packed layers need it",
    "tersor.kernels.unpack": "numba takes half a second to import, and only packed layers need it",
    "tersor.methods.waterfill": "the loops of viterbi.py are compiled when it is imported",
}


def test_lazy_imports_have_a_reason():
    lazy = {module for module, file in MODULES.items() if imports(file)[True]}
    assert not lazy - LAZY.keys(), f"import at the top of the file: {', '.join(sorted(lazy - LAZY.keys()))}"
    assert not LAZY.keys() - lazy, f"no lazy import any more: take {', '.join(sorted(LAZY.keys() - lazy))} off the list"


GROUND = {"tersor.core.compiled", "tersor.core.errors", "tersor.core.threads", "tersor.methods.stats"}


@pytest.mark.parametrize(("folder", "may"), [("formats", {"formats"}), ("methods", {"formats", "methods"})])
def test_formats_and_methods_stay_pure(folder, may):
    """Formats know formats, methods know formats and methods, and neither knows a model."""
    for file in (SRC / folder).glob("*.py"):
        others = {m for m in all_imports(file) if m not in GROUND and m.split(".")[1] not in may}
        assert not others, f"{folder}/{file.name} imports {', '.join(sorted(others))}"


# Files.


def test_files_are_nouns_of_the_field():
    vague = {"util", "utils", "helper", "helpers", "common", "base", "manager", "misc"}
    assert not names(file for file in FILES if file.stem in vague or file.parent.name in vague)


MOST_LINES, MOST_PARAMETERS = 60, 7
# Functions beyond these limits today. The list may only get shorter.
BEYOND = {
    "cli/bench.py: bench",
    "cli/compare.py: compare",
    "cli/compress.py: compress",
    "cli/evaluate.py: evaluate",
    "cli/explain.py: explain",
    "cli/export.py: export",
    "cli/finetune.py: finetune",
    "cli/inspect.py: inspect",
    "cli/merge.py: merge",
    "cli/student.py: student",
    "codecs/chunk.py: decode_chunk",
    "codecs/rans.py: decode",
    "codecs/rans_numba.py: decode",
    "codecs/rans_numba.py: decode_block",
    "codecs/rans_numba.py: decode_paths",
    "codecs/rans_numba.py: encode",
    "exporters/onnx/blocks.py: attention",
    "exporters/openvino_language.py: extensions",
    "measure/latency.py: measure_calls",
    "methods/viterbi.py: best_paths",
    "search/plan.py: plan",
    "steps/keep_float.py: automatic",
    "tasks/__init__.py: open_task",
    "tasks/classification.py: open_classification",
    "tasks/split.py: split_rows",
    "tasks/unlabelled.py: open_fidelity",
    "tasks/windows.py: open_windows",
    "training/loop.py: __init__",
    "training/loop.py: train",
}


def size_of_function(node):
    """Lines of a function, and parameters but for self and cls."""
    names = [each.arg for each in [*node.args.posonlyargs, *node.args.args]]
    own = names[1:] if names[:1] in (["self"], ["cls"]) else names
    return node.end_lineno - node.lineno + 1, len(own) + len(node.args.kwonlyargs)


def functions_beyond():
    found = set()
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef):
                num_lines, num_parameters = size_of_function(node)
                if num_lines > MOST_LINES or num_parameters > MOST_PARAMETERS:
                    found.add(f"{file.relative_to(SRC)}: {node.name}")
    return found


def test_functions_are_short_and_take_few_parameters():
    beyond = functions_beyond()
    assert not beyond - BEYOND, f"more than {MOST_LINES} lines or {MOST_PARAMETERS} parameters"
    assert not BEYOND - beyond, "within the limits by now: take them off the list"


def test_public_names_have_docstrings():
    """Of modules, and of their public functions and classes; methods may speak for themselves."""
    silent = []
    for file in FILES:
        nodes = [node for node in tree(file).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        silent += [f"{names([file])[0]}: {n.name}" for n in nodes if n.name[0] != "_" and not ast.get_docstring(n)]
        silent += [] if ast.get_docstring(tree(file)) else names([file])
    assert not silent, "no docstring:\n" + "\n".join(silent)


# Names that several public classes may have, and why.
NAMESAKES: dict[str, str] = {}


def test_no_two_public_classes_share_a_name():
    """A traceback names the class and not its file."""
    places = {}
    for file in FILES:
        for node in tree(file).body:
            if isinstance(node, ast.ClassDef) and node.name[0] != "_" and node.name not in NAMESAKES:
                places.setdefault(node.name, []).append(names([file])[0])
    twice = [f"{name}: {', '.join(files)}" for name, files in sorted(places.items()) if len(files) > 1]
    assert not twice, "say in the name what it is of:\n" + "\n".join(twice)


NO_SENTENCE = {"As", "By", "From", "How", "In", "Of", "What", "Where", "Whether", "Which", "Why", "With", "Without"}


def test_docstrings_begin_with_what_comes_out():
    """A line that begins with one of these words is the end of a sentence whose beginning is in the writer's head.

    Say what a function does or returns ("Write ...", "The ...", "True if ..."), what a class is, what a file holds.
    """
    fragments = []
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if text.split(" ")[0].strip(",") in NO_SENTENCE:
                    name = getattr(node, "name", "the file")
                    fragments.append(f"{names([file])[0]}: {name}: {text.splitlines()[0]}")
    assert not fragments, "no sentences:\n" + "\n".join(fragments)


def test_public_face():
    """`__all__` is what tersor's __init__ imports for type checkers, and on first use: sorted as ruff sorts it."""
    face = next(node for node in tree(SRC / "__init__.py").body if is_type_checking(node)).body
    public = {alias.name: node.module for node in face for alias in node.names}
    assert public == tersor.HOMES
    constants_classes_functions = sorted(tersor.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert tersor.__all__ == constants_classes_functions
    assert set(tersor.__all__) == public.keys()
    assert all(hasattr(tersor, name) for name in tersor.__all__)
