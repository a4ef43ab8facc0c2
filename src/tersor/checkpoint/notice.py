"""The notice in an artifact's `config.json` that tells transformers that only tersor can read the weights.

`quantization_config` names the quantizer that `import tersor` registers (tersor/integrations/transformers.py). Where it
is not registered, transformers only warns of an unknown method, takes parameters that a checkpoint lacks for new ones,
and draws them at random. Its key `transformers_weights` names the file to read instead of `model.safetensors`; one that
is no safetensors file is an error that shows it. So without tersor `AutoModel.from_pretrained`, `pipeline` and
`SentenceTransformer` stop, and say why; the quantizer puts the name of a file without tensors in its place.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

KEY, QUANTIZATION = "transformers_weights", "quantization_config"
METHOD = "tersor"  # the quant_method
NO_WEIGHTS = "tersor.safetensors"  # transformers wants a file to read; this one holds no tensor
SAID = "no file; the weights are packed by tersor: "  # how every version's notice begins
NOTICE = (
    f"{SAID}open this folder with tersor.load(folder), or `import tersor` and transformers opens it, or write plain "
    f"weights that transformers reads alone with `tersor unpack`"
)


def post(folder: Path) -> None:
    """Put the notice into the folder's `config.json`, if there is one, and the file without tensors beside it."""
    path = folder / "config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(as_text(config | {KEY: NOTICE, QUANTIZATION: {"quant_method": METHOD}}), encoding="utf-8")
        save_file({}, folder / NO_WEIGHTS, {"format": "pt", "weights": "packed by tersor, in the file beside this one"})


def withdraw(folder: Path) -> None:
    """Remove the notice from a folder's `config.json`, because plain weights were written."""
    path = folder / "config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        if has_notice(config):
            path.write_text(as_text(without(config)), encoding="utf-8")
    (folder / NO_WEIGHTS).unlink(missing_ok=True)


def has_notice(config: Any) -> bool:
    """True if a configuration holds the notice, of this or an earlier version."""
    return isinstance(config, dict) and str(config.get(KEY)).startswith(SAID)


def without(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the notice."""
    return {key: value for key, value in config.items() if not belongs(key, value)}


def remove(config: Any) -> None:
    """Take the notice out of a configuration that transformers has read."""
    for key in (KEY, QUANTIZATION):
        if belongs(key, getattr(config, key, None)):
            delattr(config, key)


def belongs(key: str, value: Any) -> bool:
    """True if an entry of a configuration is a part of the notice."""
    if key == QUANTIZATION:
        return (value.get("quant_method") if isinstance(value, dict) else getattr(value, "quant_method", "")) == METHOD
    return key == KEY and str(value).startswith(SAID)


def as_text(config: dict[str, Any]) -> str:
    """A configuration as JSON, written as transformers writes it."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
