"""A page that runs the model in the browser, by onnxruntime-web (https://onnxruntime.ai/docs/tutorials/web):
`--to web` writes a folder that any web server can serve as it is.

    model.onnx           as `--to onnx` writes it
    index.html, app.js   run it on the examples, compare, and time it (the folder `page` holds both)
    examples.bin         the example inputs, and the outputs that ONNX Runtime gave for them
    tersor-export.json   the sites, and where each array lies in examples.bin
    ort/                 the runtime's files, from the npm package onnxruntime-web

No browser runs here: the same file is checked and timed in ONNX Runtime, and the page compares and times itself.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import ArtifactError, InputError, ModelError
from tersor.core.files import sha256
from tersor.exporters.check import DTYPES, as_arrays
from tersor.exporters.contract import Checkpoint, Misfit, PackedSite, Written
from tersor.exporters.folder import PROVENANCE
from tersor.exporters.onnx import Onnx
from tersor.runtimes import runtime_named

PACKAGE = "onnxruntime-web"
FOUND = Path("node_modules") / PACKAGE
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")  # in its folder dist
NPM = f"npm install {PACKAGE}"
INSTALL = f"{NPM} && mkdir -p ort && cp {' '.join(f'node_modules/{PACKAGE}/dist/{file}' for file in FILES)} ort/"
PAGE = Path(__file__).parent / "page"
MODEL, EXAMPLES, RUNTIME = "model.onnx", "examples.bin", "ort"
NUM_KEPT = 2**20  # values of one expected output, at most


@dataclass(frozen=True)
class Web:
    """A folder with a static page.

    Attributes:
        dtype, per_token, float_outputs, decode, cpu: of the ONNX file (`Onnx`).
        runtime_path: folder of the npm package onnxruntime-web; None takes `node_modules/onnxruntime-web` where it is
            there, and else leaves `ort` out of the page, which then says what to install.
    """

    dtype: str = "fp32"
    per_token: bool = False
    float_outputs: bool = False
    decode: bool = False
    runtime_path: str | Path | None = None
    cpu: str = "any"
    name = "web"
    suffix = ""
    readers = "browsers, by onnxruntime-web; checked in ONNX Runtime"
    runtime = "onnx"
    extra = "onnx"
    holds = Onnx.holds

    @property
    def onnx(self) -> Onnx:
        """The exporter that writes the ONNX file."""
        return Onnx(self.dtype, self.per_token, self.float_outputs, self.decode, cache=False, cpu=self.cpu)

    def why_not(self, packed: PackedSite) -> Misfit | None:
        return self.onnx.why_not(packed)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises as `Onnx.check`, and InputError where `runtime_path` is no onnxruntime-web."""
        self.onnx.check(checkpoint)
        found_runtime(self.runtime_path)

    def write(self, checkpoint: Checkpoint, output: Path, scratch: Path) -> Written:
        """Raises ModelError for what ONNX cannot express, and for weights beyond 2 GB."""
        written = self.onnx.write(checkpoint, output / MODEL, scratch)
        if len(list(output.iterdir())) > 1:
            raise ModelError("web: the weights exceed 2 GB, more than a page can load; compress the model further")
        session = runtime_named(self.runtime)
        examples = checkpoint.need_examples().cast(DTYPES[self.dtype])
        feeds = as_arrays(examples)
        inputs, outputs, data = lay_out(feeds, session.open(output / MODEL).run(feeds))
        rows = {name: "batch" in axes.values() for name, axes in examples.axes.items()}
        package = found_runtime(self.runtime_path)
        about = {
            "to": self.name,
            "formats": described(checkpoint.sites),
            "notes": written.notes,
            "sites": {packed.site.name: packed.scheme for packed in checkpoint.sites},
            "model": {"file": MODEL, "sha256": sha256(output / MODEL)},
            "runtime": {
                "package": PACKAGE,
                "version": version_of(package) if package else None,
                "files": FILES,
                "install": INSTALL,
            },
            "expected_from": session.version(),
            "inputs": [each | {"any_number_of_rows": rows[each["name"]]} for each in inputs],
            "outputs": outputs,
        }
        try:
            (output / EXAMPLES).write_bytes(data)
            (output / PROVENANCE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            for file in ("index.html", "app.js"):
                shutil.copyfile(PAGE / file, output / file)
            if package:
                copy_runtime(package, output / RUNTIME)
        except OSError as error:
            raise ArtifactError(f"{output}: cannot be written: {error}") from None
        num_rows = len(next(iter(feeds.values())))
        notes = (
            *written.notes,
            f"checked and timed in {session.version()} here, in no browser: the page compares and times itself",
            f"{EXAMPLES} holds the {num_rows} example inputs: whoever opens the page can read them",
            f"{RUNTIME}/ is {PACKAGE} {version_of(package)}" if package else f"{PACKAGE} is missing; in OUT: {INSTALL}",
            "serve it: python -m http.server --directory OUT",
        )
        return written._replace(notes=notes, file=output / MODEL)


def found_runtime(path: str | Path | None) -> Path | None:
    """The folder of the npm package: the one given, or that of `node_modules` here, or none.

    Raises InputError for a folder without the package's files.
    """
    if path is None and not FOUND.exists():
        return None
    package = Path(path) if path is not None else FOUND
    missing = [file for file in ("package.json", *(f"dist/{file}" for file in FILES)) if not (package / file).is_file()]
    if missing or version_of(package) is None:
        lacks = f"has no {missing[0]}" if missing else "is another package"
        raise InputError(f"{package} {lacks}; run `{NPM}`, then --runtime-path node_modules/{PACKAGE}")
    return package


def version_of(package: Path) -> str | None:
    """The version in package.json; None for another package."""
    try:
        about = json.loads((package / "package.json").read_text(encoding="utf-8"))
    except ValueError:
        return None
    return str(about.get("version")) if isinstance(about, dict) and about.get("name") == PACKAGE else None


def copy_runtime(package: Path, folder: Path) -> None:
    """The files that the page loads, and package.json, which names their version and licence."""
    folder.mkdir()
    for file in FILES:
        shutil.copyfile(package / "dist" / file, folder / file)
    shutil.copyfile(package / "package.json", folder / "package.json")


Place = dict[str, Any]


def lay_out(feeds: Mapping[str, np.ndarray], made: Mapping[str, np.ndarray]) -> tuple[list[Place], list[Place], bytes]:
    """All arrays in one run of bytes, little-endian, and where each lies: inputs as they are; outputs as float32, every
    `stride`-th value of the flattened array."""
    inputs, outputs, data = list[Place](), list[Place](), bytearray()

    def place(name: str, dims: Sequence[int], values: np.ndarray) -> Place:
        stored = values.astype(values.dtype.newbyteorder("<")).tobytes()
        about = {"name": name, "type": str(values.dtype), "dims": list(dims), "offset": len(data), "bytes": len(stored)}
        data.extend(stored)
        return about

    for name, array in feeds.items():
        inputs.append(place(name, array.shape, array))
    for name, array in made.items():
        stride = stride_of(array.shape)
        kept = array.reshape(-1)[::stride].astype(np.float32)
        outputs.append(place(name, array.shape, kept) | {"stride": stride})
    return inputs, outputs, bytes(data)


def stride_of(shape: Sequence[int]) -> int:
    """1 where an output has few values; else one that visits every column.

    >>> stride_of((4, 60, 384)), stride_of((4, 60, 49152))
    (1, 13)
    """
    stride = max(1, math.ceil(math.prod(shape) / NUM_KEPT))
    while shape and math.gcd(stride, shape[-1]) != 1:
        stride += 1
    return stride


def described(sites: Sequence[PackedSite]) -> str:
    """The schemes of a model in words: `36 sites int8/int8-dynamic, 1 site int8`."""
    counts = Counter(packed.scheme for packed in sites).most_common()
    parts = [f"{number} {'site' if number == 1 else 'sites'} {scheme}" for scheme, number in counts]
    return ", ".join(parts) or "not quantized"
