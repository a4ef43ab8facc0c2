"""Is what was written the artifact? It is opened by the client that reads it, run, and compared.

The clients that transformers has for its folders and for GGUF files run here on any machine, where their packages are
installed; so does llama.cpp. A tensor that the client does not find, or finds in another shape, would be random there.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.core.errors import ModelError, TersorError
from tersor.core.messages import first_line
from tersor.exporters.check import ROUNDED, difference
from tersor.exporters.contract import Checkpoint, Export
from tersor.exporters.examples import Examples, from_config
from tersor.runtimes import runtime_named

LONGEST = 16  # tokens of a text
EXACT, HALF = 1e-2, 0.1  # relative difference that arithmetic in float32 and in 16 bits explains


def reopen(export: Export, checkpoint: Checkpoint, output: Path) -> str:
    """Open the file or folder in its client. Returns a sentence on the result, or that the client is not installed.

    Raises ModelError where the client cannot open it, or computes something else.
    """
    lacking = [package for package in export.packages if importlib.util.find_spec(package) is None]
    if lacking:
        named = " ".join(name.replace("_", "-") for name in lacking)
        return f"not opened: {', '.join(lacking)} not installed here; pip install {named}, and export again"
    import transformers

    model = checkpoint.model.float()
    client, lost = opened(export, checkpoint, output)
    if lost:
        raise ModelError(
            f"{export.name}: transformers does not find {lost[0]} of {type(model).__name__} in what was written"
            f"{others(lost)}; nothing was kept. {OTHERWISE}"
        )
    version = f"transformers {transformers.__version__}"
    longest = getattr(client.config, "max_position_embeddings", None) or LONGEST
    examples = from_config(model, min(longest, LONGEST))
    try:
        expected = examples.run(model) if examples is not None else {}
    except Exception:  # the model wants other inputs than the config tells
        examples, expected = None, {}
    if examples is None or not expected:
        return f"opened in {version}; not run, for its inputs are not known"
    dtypes = {parameter.dtype for parameter in client.parameters() if parameter.is_floating_point()}
    limit = EXACT if dtypes <= {torch.float32} else HALF
    if any(packed.activation for packed in checkpoint.sites):  # clients round inputs in their own way
        limit = ROUNDED
    found = difference({name: made.numpy() for name, made in examples.run(client).items()}, expected)
    hold(found, limit, export, version)
    results = [f"opened in {version}: outputs differ from the artifact's by {found:.2%}"]
    if export.suffix == ".gguf" and importlib.util.find_spec("llama_cpp") is not None:
        results.append(llama_cpp(export, output, examples, expected))
    return "; ".join(results)


OTHERWISE = "Export to onnx or openvino, which hold any model, or leave those layers float with --rule 'NAME=keep'"


def others(names: Sequence[str]) -> str:
    """The end of a message about several sites: how many there are besides the first."""
    return f", nor {len(names) - 1} others" if names[1:] else ""


def hold(found: float, limit: float, export: Export, client: str) -> None:
    """Raises ModelError where outputs differ by more than `limit`."""
    if not found <= limit:
        raise ModelError(
            f"{export.name}: {client} computes something else from what was written: outputs differ by {found:.2%} "
            f"where at most {limit:.0%} is explained by rounding; nothing was kept. {OTHERWISE}"
        )


def opened(export: Export, checkpoint: Checkpoint, output: Path) -> tuple[nn.Module, list[str]]:
    """The model as the client opened it, and the names of tensors it did not find."""
    kind = type(checkpoint.model).__name__
    with quiet():
        try:
            model, info = export.open(checkpoint, output)
        except TersorError:
            raise
        except Exception as error:  # whatever the client trips over
            raise ModelError(
                f"{export.name}: transformers cannot open what was written for {kind} ({first_line(error)}); "
                f"nothing was kept. {OTHERWISE}"
            ) from None
    mismatched = [name if isinstance(name, str) else name[0] for name in info.get("mismatched_keys", ())]
    tied = set(getattr(checkpoint.model, "_tied_weights_keys", None) or ())
    missing = [name for name in info.get("missing_keys", ()) if name not in tied]
    return model.eval(), sorted({*missing, *mismatched, *info.get("unexpected_keys", ())})


def llama_cpp(export: Export, file: Path, examples: Examples, expected: dict[str, torch.Tensor]) -> str:
    """The same in llama.cpp, which reads one text at a time and multiplies with inputs of 8 bits."""
    runtime = runtime_named("llama.cpp")
    text = examples.inputs["input_ids"][-1:]
    made = runtime.open(file).run({"input_ids": text.numpy()})
    found = difference(made, {"logits": expected["logits"][-1:]})
    hold(found, ROUNDED, export, runtime.version())
    return f"in {runtime.version()} by {found:.2%}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages of transformers while it loads."""
    from transformers.utils import logging

    log: Any = logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
