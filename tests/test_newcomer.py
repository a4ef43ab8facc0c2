"""The newcomer's promise: a new format, method, task or exporter is one file and a line in a table.

The source tree is copied, the four files of tests/newcomer are put in their rooms, and each table gets its line and the
import for it. Nothing else is touched; then the laws run, and a model is compressed, saved, loaded and exported with
all four. The same walk runs the code that chooses a usual method, trains scales, writes reports and reads schemes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tersor

SRC = Path(tersor.__file__).parent
TOYS = Path(__file__).parent / "newcomer"
# room: the file, the import, the place in the table before which the line goes, and the line.
ENTRIES = {
    "formats": ("ternary", "from tersor.formats.ternary import Ternary", "    LowRank(),", "    Ternary(),"),
    "methods": ("median", "from tersor.methods.median import Median", "    Nearest,", "    Median,"),
    "tasks": (
        "states",
        "from tersor.tasks.states import open_states",
        '    "fidelity": open_fidelity,',
        '    "states": open_states,',
    ),
    "exporters": ("halves", "from tersor.exporters.halves import Halves", "    Gguf(),", "    Halves(),"),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The source tree with the four entries."""
    home = tmp_path_factory.mktemp("house")
    shutil.copytree(SRC, home / "tersor", ignore=shutil.ignore_patterns("__pycache__"))
    for room, (name, imported, before, line) in ENTRIES.items():
        shutil.copyfile(TOYS / f"{name}.py", home / "tersor" / room / f"{name}.py")
        table = home / "tersor" / room / "__init__.py"
        text = table.read_text(encoding="utf-8")
        assert text.count(f"\n{before}\n") == 1
        first = text.index("\nfrom tersor.") + 1
        text = text[:first] + f"{imported}\n" + text[first:].replace(f"{before}\n", f"{line}\n{before}\n", 1)
        table.write_text(text, encoding="utf-8")
    return home


@pytest.mark.parametrize("room", ENTRIES)
def test_one_file_and_a_line_in_a_table(room, house):
    """Of all files of the house one is new, and one has two lines more: an import and an entry."""
    changed = {}
    for file in (house / "tersor" / room).rglob("*.py"):
        before = SRC / file.relative_to(house / "tersor")
        lines = len(file.read_text(encoding="utf-8").splitlines())
        known = len(before.read_text(encoding="utf-8").splitlines()) if before.exists() else 0
        if lines != known:
            changed[file.name] = lines - known
    name = f"{ENTRIES[room][0]}.py"
    assert changed == {name: changed[name], "__init__.py": 2}
    assert changed[name] <= 80


def test_nothing_else_need_be_known_of_them(house, tmp_path):
    """The laws, and the way of a model through all four."""
    environment = {**os.environ, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, TOYS / "walk.py", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "every law is kept" in done.stdout
