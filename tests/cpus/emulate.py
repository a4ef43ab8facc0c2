"""Run a Python program as another processor would, by qemu's user-mode emulation: right answers, not speeds.

    python tests/cpus/emulate.py haswell -m pytest tests/test_kernels.py
    python tests/cpus/emulate.py arm64 script.py ARGS

`haswell` (AVX2, no AVX-512, no VNNI), `nehalem` (SSE4.2, no AVX) and every other name of `qemu-x86_64 -cpu help`
run this very interpreter, with its packages. `arm64` is a Neoverse N1 (dot products of int8, no i8mm) with a Python and
packages of its own, which the first call puts into a folder: Debian's ARM64 Python and libraries, and the ARM64 wheels
of PyPI; 1.5 GB in `.venv/arm64`, or in the folder that TERSOR_ARM64 names. Nothing is installed into the system but
`qemu-user`, which takes root once.

Slow: importing torch takes 15 s as Haswell, importing tersor a minute as ARM64. qemu's own faults: PyTorch's float LSTM
crashes as Haswell, for which qemu 7 lacks an instruction.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.10.0"  # PyPI's later wheels for ARM64 are built with CUDA, and do not import without it
PACKAGES = (
    "numpy",
    "numba",
    "scipy",
    "safetensors",
    "transformers",
    "pydantic",
    "pyyaml",
    "typer",
    "rich",
    "jaxtyping",
)
NEEDED_BY_TORCH = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec")
EXPORTS = ("onnx", "onnxruntime", "openvino")
SYSTEM = ("python3-minimal", "libpython3-stdlib", "libgomp1", "libstdc++6")  # with what they depend on
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
PYTHON = "3.11"  # of the ARM64 packages
CPUINFO = """processor\t: {number}
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""


def command(processor: str, arguments: list[str]) -> list[str]:
    """The command that runs Python with these arguments as `processor`; sets up what is missing first."""
    need_qemu()
    if processor != "arm64":
        return ["qemu-x86_64", "-cpu", processor.capitalize(), sys.executable, *arguments]
    root = arm64_root()
    if not (root / "ready").exists():
        set_up_arm64(root)
    system = root / "system"
    libraries = f"{system}/lib/aarch64-linux-gnu:{system}/usr/lib/aarch64-linux-gnu"
    emulated = ["qemu-aarch64", "-cpu", "neoverse-n1", "-L", str(system), "-E", f"LD_LIBRARY_PATH={libraries}"]
    emulated += [f"{system}/usr/bin/python{PYTHON}", *arguments]
    # qemu 7 shows the host's /proc/cpuinfo, by which torch and ONNX Runtime choose their kernels
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    return [*alone, "sh", "-c", 'mount --bind "$0" /proc/cpuinfo && exec "$@"', f"{root}/cpuinfo", *emulated]


def environment(processor: str) -> dict[str, str]:
    """The variables that the command runs with: `src` on the path, and for ARM64 its packages."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    if processor != "arm64":
        return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TERSOR_NO_LSTM": "1"}  # check.py leaves it out
    root = arm64_root()
    own = {"PYTHONHOME": f"{root}/system/usr", "PYTHONDONTWRITEBYTECODE": "1"}
    return os.environ | own | {"PYTHONPATH": os.pathsep.join([str(root / "packages"), *paths])}


def arm64_root() -> Path:
    """The folder of the ARM64 Python and its packages."""
    return Path(os.environ.get("TERSOR_ARM64") or ROOT / ".venv" / "arm64").resolve()


def need_qemu() -> None:
    """Install qemu-user where it is missing. Ends the program with one line where it cannot."""
    if shutil.which("qemu-x86_64") and shutil.which("qemu-aarch64"):
        return
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    for step in (["update", "-qq"], ["install", "-y", "-qq", "qemu-user"]):
        done = subprocess.run([*root, "apt-get", *step], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit("emulate: qemu-user is missing and cannot be installed here; run: apt-get install qemu-user")


def set_up_arm64(root: Path) -> None:
    """Fetch the ARM64 Python, its libraries and packages into `root`, without a change to this system."""
    print(f"emulate: fetching Python and packages for ARM64 into {root}", file=sys.stderr)
    debs = fetch_debs(root)
    for deb in debs:
        run("dpkg-deb", "--extract", str(deb), str(root / "system"))
    wheels = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(root / "packages")]
    wheels += ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:", "--upgrade"]
    wheels += [f"--platform={platform}" for platform in PLATFORMS]
    run(*wheels, "--no-deps", TORCH)
    run(*wheels, *NEEDED_BY_TORCH, *PACKAGES, *EXPORTS)
    about = root / "packages" / "tersor-0.dist-info"  # the source tree is on the path, and knows its version from here
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tersor\nVersion: 0\n")
    (root / "cpuinfo").write_text("".join(CPUINFO.format(number=number) for number in range(2)))
    (root / "ready").touch()


def fetch_debs(root: Path) -> list[Path]:
    """Debian packages for ARM64, by an apt with lists and a cache of its own, which needs no root."""
    for folder in ("apt/state/lists/partial", "apt/cache/archives/partial", "system"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    settings = root / "apt.conf"
    settings.write_text(
        f'Dir::State "{root}/apt/state";\nDir::State::status "/dev/null";\nDir::Cache "{root}/apt/cache";\n'
        'APT::Architecture "arm64";\nAPT::Architectures { "arm64"; };\nDebug::NoLocking "true";\n'
        'APT::Sandbox::User "root";\n'
    )
    own = os.environ | {"APT_CONFIG": str(settings)}
    run("apt-get", "update", "-qq", env=own)
    install = ["install", "-y", "-qq", "--download-only", "--no-install-recommends"]
    run("apt-get", *install, *SYSTEM, f"python{PYTHON}-minimal", env=own)
    return sorted((root / "apt/cache/archives").glob("*.deb"))


def run(*words: str, env: dict[str, str] | None = None) -> None:
    """Run a program. Ends this one with one line where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        sys.exit(f"emulate: {' '.join(words[:4])} ... failed: {last}")


def emulate(processor: str, arguments: list[str]) -> int:
    """Run Python with these arguments as another processor. Returns its exit status; messages about instructions that
    qemu lacks are left out."""
    emulated = subprocess.Popen(
        command(processor, arguments), env=environment(processor), stderr=subprocess.PIPE, text=True
    )
    assert emulated.stderr is not None
    for line in emulated.stderr:
        if "TCG doesn't support" not in line:
            print(line, end="", file=sys.stderr)
    return emulated.wait()


def main() -> None:
    """Run what the command line says."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(emulate(sys.argv[1].lower(), sys.argv[2:]))


if __name__ == "__main__":
    main()
