"""The documentation: its code runs, its tables and commands are those of the code, its links resolve.

    python tests/test_docs.py

writes the tables between `<!-- name: ... -->` and `<!-- end -->` anew.

Code blocks of one page share a namespace and a temporary folder, and run in the order they stand. A `python` block
that opens with `# name.py` is a file: it is written there instead. A `tersor` command in a `sh` block is parsed, and
also run if it names a file of the page.
"""

import importlib.util
import json
import re
import shlex
import sys
from dataclasses import fields
from itertools import groupby
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import laws
import tersor
from tersor.cli import app
from tersor.cli.formats import DATA, bits_per_weight
from tersor.cli.methods import about
from tersor.formats import FORMATS
from tersor.methods import METHODS
from tersor.schemes.aliases import ALIASES
from tersor.schemes.scheme import usual_method
from tersor.tasks import TASKS, task_options
from tersor.tasks.options import HELP

HOME = Path(__file__).parent.parent
PAGES = [HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, HOME / "CHANGELOG.md", *sorted((HOME / "docs" / "decisions").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\S+\.py)\n")
COMMANDS = {command.name: command for command in typer.main.get_command(app).commands.values()}  # type: ignore[attr-defined]


def name_of(page: Path) -> str:
    return str(page.relative_to(HOME))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and code of every fenced block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """The `tersor` command lines of a shell block, with or without a prompt."""
    lines = [line.removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tersor ")]


# The code runs.


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Each page's folder after its blocks ran, by name; every page runs once."""
    folders: dict[str, Path] = {}

    def run(page: Path) -> Path:
        if name_of(page) not in folders:
            folders[name_of(page)] = tmp_path_factory.mktemp("page")
            run_page(page, folders[name_of(page)])
        return folders[name_of(page)]

    return run


def run_page(page: Path, folder: Path) -> None:
    """Files first written, then imported; modules the page brought are forgotten afterwards."""
    modules, path, table = set(sys.modules), list(sys.path), dict(METHODS)
    files: list[str] = []
    namespace: dict = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        try:
            for number, (language, code) in enumerate(blocks(page), start=1):
                if language == "python" and (file := FILE.match(code)):
                    files.append(file[1])
                    add_file(folder / file[1], code, file[1])
                elif language == "python":
                    exec(compile(code, f"{name_of(page)}, block {number}", "exec"), namespace)
                elif language == "sh":
                    for arguments in commands(code):
                        if any(f"{Path(file).stem}:" in word for file in files for word in arguments):
                            run_command(arguments)
        finally:
            sys.path[:] = path
            for name in set(sys.modules) - modules:
                if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(folder):
                    del sys.modules[name]
            METHODS.clear()
            METHODS.update(table)


def add_file(path: Path, code: str, name: str) -> None:
    """Write a file; one of tersor's own is a module of that name, and its method is in the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    if not name.startswith("src/"):
        return
    module_name = name.removeprefix("src/").removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    METHODS.update(
        {item.name: item for item in vars(module).values() if getattr(item, "__module__", "") == module_name}
    )


def run_command(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    if result.exception:
        raise AssertionError(f"tersor {shlex.join(arguments)}\n{result.output}") from result.exception


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_runs(page, ran):
    ran(page)


def test_the_new_method_keeps_the_laws(ran):
    """The page's method, held against the same laws as the methods of the table."""
    module = load(ran(HOME / "docs/adding-a-method.md") / "src/tersor/methods/percentile.py")
    method = module.Percentile()
    for format in FORMATS.values():
        laws.refusal_names_what_is_accepted(method, format)
        if method.accepts(format) is not None:
            continue
        for weight, stats in laws.share(laws.cases_for(method, format), 4, format).values():
            for law in laws.METHOD_LAWS:
                law(method, format, weight, stats)


def test_the_new_methods_test_passes(ran, monkeypatch):
    folder = ran(HOME / "docs/adding-a-method.md")
    monkeypatch.setitem(sys.modules, "tersor.methods.percentile", load(folder / "src/tersor/methods/percentile.py"))
    module = load(folder / "tests/methods/test_percentile.py")
    module.test_an_outlier_no_longer_spoils_its_group()
    module.test_the_whole_range_is_nearest()
    for percentile in (0, -1, 101):
        module.test_impossible_percentiles_are_refused(percentile)


def load(path: Path):
    """A module from a file, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"page_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


# The byte layout is what the page says.


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The pure Python reader of docs/formats.md."""
    namespace: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reader"))
        for language, code in blocks(HOME / "docs/formats.md"):
            if language == "python":
                exec(code, namespace)
    return namespace


def scheme_for(format: str) -> str:
    """One that uses what the format can do: zeros, factors."""
    usual = {"magnitude": "magnitude(sparsity=0.7)", "svd": "svd(rank=2)", "lqer": "lqer(rank=2)"}
    return f"{usual.get(usual_method(FORMATS[format]), 'nearest')}:{format}"


@pytest.mark.parametrize("format", FORMATS)
def test_the_reader_decodes_every_format(format, reader, tmp_path):
    torch.manual_seed(1)
    columns = 256 if format.endswith("_k") else 128 if "-g" in format else 37
    model = nn.Sequential(nn.Linear(columns, 5), nn.LSTM(columns, 3))
    compressed = tersor.compress(model, tersor.Recipe.of(scheme_for(format), exclude=["1.weight_hh_l0"])).model
    tersor.save(compressed, tmp_path, coded=False)
    found = reader["read_sites"](tmp_path)
    assert found.keys() == {"0", "1.weight_ih_l0"}
    for site in tersor.find_sites(compressed):
        if site.name in found:
            assert torch.equal(torch.tensor(found[site.name]), site.matrix(compressed)), site.name


def test_tersor_packs_the_worked_examples():
    for format, scale, codes, packed in [
        ("int4", 0.5, [1, 15, 8, 5], "f158"),
        ("int3", -0.25, [1, 2, 3, 4, 5, 6, 7, 0], "d1581f"),
    ]:
        middle = 2 ** (int(format[3]) - 1)
        weight = torch.tensor([[(code - middle) * scale for code in codes]])
        encoded = FORMATS[format].encode(weight, {"scale": torch.tensor([[scale]], dtype=torch.float16)})
        assert bytes(encoded.parts["codes"].flatten().tolist()).hex() == packed
        assert torch.equal(encoded.decode(), weight)


def test_manifest_keys_are_all_described(ran):
    written = json.loads((ran(HOME / "docs/quickstart.md") / "my-small" / "tersor.json").read_text(encoding="utf-8"))
    section = (
        (HOME / "docs/formats.md").read_text(encoding="utf-8").partition("## tersor.json")[2].partition("\n## ")[0]
    )
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(written)


# Tables, commands and links are those of the code.


def methods_table() -> str:
    rows = ["| method | what it does | options | reads | formats |", "|---|---|---|---|---|"]
    for name, method in METHODS.items():
        options = ", ".join(f"`{f.name}={f.default}`" for f in fields(method)) or "none"  # type: ignore[arg-type]
        accepted = [format for format in FORMATS if method().accepts(FORMATS[format]) is None]
        families = list(dict.fromkeys(family(format) for format in accepted))
        asym = ", `-asym` only" if len(accepted) > 1 and all(format.endswith("-asym") for format in accepted) else ""
        listed = "all" if len(accepted) == len(FORMATS) else ", ".join(f"`{f}`" for f in families) + asym
        needs = ", ".join(sorted(method().needs)) or "no data"
        rows.append(f"| `{name}` | {about(method)} | {options} | {needs} | {listed} |")
    return "\n".join(rows)


def formats_table() -> str:
    rows = ["| formats | bits per weight | usual method without data | with calibration data |", "|---|---|---|---|"]
    for _, names in groupby(FORMATS, key=family):
        listed = list(names)
        bits = [found for name in listed if (found := bits_per_weight(FORMATS[name])) is not None]
        spread = " to ".join(f"{b:.3f}" for b in sorted({min(bits), max(bits)})) if bits else DATA
        usual = ["`, `".join(sorted({usual_method(FORMATS[name], sees) for name in listed})) for sees in (False, True)]
        rows.append(f"| {', '.join(f'`{name}`' for name in listed)} | {spread} | `{usual[0]}` | `{usual[1]}` |")
    return "\n".join(rows)


def family(format: str) -> str:
    """`int4` of `int4-g64`, `2:4+int4` of `2:4+int4-g64`."""
    return "+".join(part.partition("-")[0] for part in format.split("+"))


def options_table() -> str:
    rows = ["| option | meaning | tasks |", "|---|---|---|"]
    for option, meaning in HELP.items():
        tasks = [f"`{task}`" for task in TASKS if option in task_options(task)]
        rows.append(f"| `{option}` | {meaning} | {', '.join(tasks) if len(tasks) < len(TASKS) else 'all'} |")
    return "\n".join(rows)


def aliases_table() -> str:
    return "\n".join(["| name | scheme |", "|---|---|", *(f"| `{name}` | `{ALIASES[name]}` |" for name in ALIASES)])


TABLES = {"methods": methods_table, "formats": formats_table, "aliases": aliases_table, "options": options_table}
PLACES = {
    "methods": HOME / "docs/methods.md",
    "formats": HOME / "docs/formats.md",
    "aliases": HOME / "docs/formats.md",
    "options": HOME / "docs/quickstart.md",
}


def with_table(text: str, name: str) -> str:
    pattern = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end -->)", re.DOTALL)
    assert pattern.search(text), f"no place for the table {name}"
    return pattern.sub(lambda found: f"{found[1]}{TABLES[name]()}\n{found[2]}", text)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_code(name):
    text = PLACES[name].read_text(encoding="utf-8")
    assert with_table(text, name) == text, "run `python tests/test_docs.py`"


def result_rows() -> list[str]:
    """The rows of the README's two tables of numbers."""
    text = (HOME / "README.md").read_text(encoding="utf-8")
    tables = [text.partition(f"<!-- {name} -->\n")[2].partition("\n\n")[0] for name in ("results", "others")]
    return [row for table in tables for row in table.splitlines()[2:]]


@pytest.mark.parametrize("row", result_rows(), ids=lambda row: row.split("|")[1].strip())
def test_numbers_of_the_readme_stand_in_the_pages_it_links(row):
    """And each of these pages names the command that made it."""
    number = r"\d+(?:\.\d+)?"
    pages = [(HOME / path).read_text(encoding="utf-8") for path in re.findall(r"\]\((benchmarks/\w+\.md)\)", row)]
    assert pages
    assert all(re.search(r"`(?:PYTHONPATH=benchmarks )?python benchmarks/\w+\.py", page) for page in pages)
    claimed = set(re.findall(number, row.rpartition("|")[0].rpartition("|")[0]))
    assert claimed <= set(re.findall(number, "\n".join(pages))), row


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    for language, code in blocks(page):
        for arguments in commands(code) if language == "sh" else []:
            assert arguments[0] in COMMANDS, arguments
            COMMANDS[arguments[0]].make_context(arguments[0], arguments[1:])
    prose = BLOCK.sub("", text)
    for span in re.findall(r"`(tersor [^`]+)`", prose):
        _, verb, *rest = shlex.split(span)
        assert verb in COMMANDS, span
        assert {word for word in rest if word.startswith("--")} <= flags(verb), span
    of_all = {flag for parameter in typer.main.get_command(app).params for flag in parameter.opts}
    known = of_all.union(*map(flags, COMMANDS))
    unknown = set(re.findall(r"`(--[a-z][\w-]*)", prose)) - known
    assert not unknown


def flags(verb: str) -> set[str]:
    return {flag for parameter in COMMANDS[verb].params for flag in parameter.opts}


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_every_code_block_has_a_known_language(page):
    assert {language for language, _ in blocks(page)} <= {"python", "sh", "text", "yaml"}


def test_recipes_shown_are_recipes():
    for page in PAGES:
        for language, code in blocks(page):
            if language == "yaml":
                tersor.Recipe.from_yaml(code)


if __name__ == "__main__":
    for name, page in PLACES.items():
        page.write_text(with_table(page.read_text(encoding="utf-8"), name), encoding="utf-8")
