"""The files beside the weights that a new folder takes over: config, tokenizer, pooling.

What else lies in a model's folder, such as the same weights for other frameworks, exports, logs and code, would make of
a smaller model a larger folder.
"""

import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from tersor.checkpoint.guards import check_links
from tersor.checkpoint.notice import NO_WEIGHTS
from tersor.checkpoint.seal import MANIFEST, RECORDS, SEAL
from tersor.checkpoint.source import weight_files
from tersor.core.modules_json import module_folders
from tersor.core.pickled import PICKLES

OWN_FILES = {MANIFEST, SEAL, NO_WEIGHTS, "README.md", ".gitattributes"}
WEIGHTS, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
LEFT = (  # by their names, whatever folder they lie in
    *("*.safetensors", "*.tersor", "*.index.json", "*.gguf", "*.ggml", "*.npz", "*.npy", *(f"*{s}" for s in PICKLES)),
    *("*.h5", "*.hdf5", "*.keras", "*.msgpack", "*.ot", "*.tflite", "*.pb", "*.mlmodel", "*.mlpackage", "*.joblib"),
    *("*.onnx", "*.onnx_data", "*.onnx_data_*", "*.onnx.data", "*.ort", "openvino_*", "*.pte", "*.ptl", "*.engine"),
    *("*.py", "*.ipynb", "*.so", "*.dll", "*.sh", "events.out.tfevents*", "*.log", "*.wandb", "*.jsonl.gz"),
    *("*.part", "*.tmp", "*.incomplete", "*.lock", "*.zip", "*.tar", "*.gz", "*.tgz", "*.7z", "*.zst", "*.parquet"),
)
LEFT_FOLDERS = ("*.mlpackage", "*.mlmodelc", "checkpoint-*", "global_step*", "__pycache__")
LARGEST = 2**27  # bytes; the largest tokenizers take a quarter


def copy_side_files(source: Path, folder: Path) -> None:
    """Config, tokenizer and pooling files as they came, and the weights of the modules that follow the transformer of a
    sentence encoder; other weights, code and logs stay behind, and so do folders that tersor wrote."""
    check_links(source)
    for path, taken in files_of(source):
        if taken:
            place = folder / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def left_behind(source: Path | None) -> list[str]:
    """A note that names what `copy_side_files` leaves, but for the weights that are written anew; none for nothing."""
    if source is None:
        return []
    anew = {*weight_files(source), *(source / name for name in (*OWN_FILES, INDEX, f"{PICKLED}.index.json"))}
    names = [path.relative_to(source).as_posix() for path, taken in files_of(source) if not taken and path not in anew]
    if not names:
        return []
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
    return [f"not copied, for it is no part of the smaller model: {listed}"]


def files_of(source: Path) -> Iterator[tuple[Path, bool]]:
    """The files of a model's folder that are not hidden, and whether a new one takes them over."""
    outputs = {record.parent for name in RECORDS for record in source.rglob(name)} - {source}
    modules = module_folders(source)
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            written = not outputs.isdisjoint(path.parents)
            alone = path.name == PICKLED and not path.with_name(WEIGHTS).exists()
            of_module = (path.name == WEIGHTS or alone) and relative.parent in modules
            yield path, not written and str(relative) not in OWN_FILES and (of_module or is_side_file(path, relative))


def is_side_file(path: Path, relative: Path) -> bool:
    """True if a file belongs to any model of its kind, whatever its weights."""
    aside = any(fnmatchcase(part.lower(), pattern) for part in relative.parts[:-1] for pattern in LEFT_FOLDERS)
    named = any(fnmatchcase(path.name.lower(), pattern) for pattern in LEFT)
    return not aside and not named and path.stat().st_size <= LARGEST
