"""The mark of our ONNX files: their producer, and the hash of the weights beside them."""

from pathlib import Path

from tersor.core.files import sha256
from tersor.exporters.contract import UNMARKED

PRODUCER, DATA = "tersor", "tersor.data.sha256"


def beside(path: Path) -> Path:
    """The file that holds weights beyond 2 GB."""
    return path.with_name(f"{path.name}.data")


def name_data(path: Path) -> None:
    """Have a model say which file belongs beside it."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    model.metadata_props.add(key=DATA, value=sha256(beside(path)))
    onnx.save(model, path)


def foreign(path: Path) -> str | None:
    """A sentence on why a file, or the one beside it, is not one that tersor wrote; None if both are."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return UNMARKED
    if model.producer_name != PRODUCER:
        return UNMARKED
    named = {entry.key: entry.value for entry in model.metadata_props}.get(DATA)
    if beside(path).exists() and sha256(beside(path)) != named:
        return f"{beside(path).name} beside it was not written with it"
    return None
