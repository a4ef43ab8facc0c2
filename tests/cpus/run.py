"""`make test-cpus`: what runs here runs the same on other processors, and installs on them.

Artifacts, exports and their outputs are made on this machine (check.py), and computed again as an AVX2 processor
without VNNI and as an ARM64 one (emulate.py). Then pip is asked whether every dependency has a wheel for ARM64 Linux
and for Macs; nothing is downloaded for that.

    python tests/cpus/run.py [haswell] [arm64] [wheels]       all three, if none is named
"""

import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from emulate import ROOT, emulate

CHECK = Path(__file__).with_name("check.py")
PROCESSORS = ("haswell", "arm64")
WHEELS = {
    "ARM64 Linux": (
        "manylinux_2_28_aarch64",
        "manylinux_2_27_aarch64",
        "manylinux_2_17_aarch64",
        "manylinux2014_aarch64",
    ),
    "macOS on ARM64": ("macosx_14_0_arm64", "macosx_12_0_arm64", "macosx_11_0_arm64", "macosx_10_9_universal2"),
}


def emulated(processor: str, folder: Path) -> bool:
    """Compare this machine's files as another processor; True if all are the same."""
    print(f"\n{processor}", flush=True)
    return emulate(processor, [str(CHECK), "compare", str(folder)]) == 0


def installs(system: str) -> bool:
    """True if every dependency of pyproject.toml has a wheel for a system."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--target", folder]
        words += ["--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"]
        words += [f"--platform={platform}" for platform in WHEELS[system]]
        done = subprocess.run([*words, *dependencies], capture_output=True, text=True, check=False)
    found = (
        "has wheels of all dependencies" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]
    )
    print(f"{system}: {found}", flush=True)
    return done.returncode == 0


def main() -> None:
    """Run what is named, or all; ends with 1 where something differs."""
    started, asked = time.perf_counter(), sys.argv[1:] or [*PROCESSORS, "wheels"]
    results = []
    processors = [processor for processor in PROCESSORS if processor in asked]
    if processors:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, str(CHECK), "write", folder],
                check=True,
                env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            )
            results += [emulated(processor, Path(folder)) for processor in processors]
    if "wheels" in asked:
        print(flush=True)
        results += [installs(system) for system in WHEELS]
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed in {time.perf_counter() - started:.0f} s")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
