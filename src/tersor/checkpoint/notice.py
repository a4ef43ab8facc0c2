"""What an artifact's `config.json` tells transformers: that it cannot read the weights.

transformers takes parameters that a checkpoint lacks for new ones and draws them at random, with a warning. Its key
`transformers_weights` names the file to read instead of `model.safetensors`; one that is no safetensors file is an
error that shows it. So `AutoModel.from_pretrained`, `pipeline` and `SentenceTransformer` stop, and say why.
"""

import json
from pathlib import Path
from typing import Any

KEY = "transformers_weights"
NOTICE = (
    "no file; the weights are packed by tersor: open this folder with tersor.load(folder), or write plain weights that "
    "transformers reads with `tersor unpack`"
)


def post(folder: Path) -> None:
    """Put the notice into the folder's `config.json`, if there is one."""
    path = folder / "config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(as_text(config | {KEY: NOTICE}), encoding="utf-8")


def withdraw(folder: Path) -> None:
    """Take it out again, where plain weights were written."""
    path = folder / "config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        if has_notice(config):
            path.write_text(as_text(without(config)), encoding="utf-8")


def has_notice(config: Any) -> bool:
    """True if a configuration holds the notice."""
    return isinstance(config, dict) and config.get(KEY) == NOTICE


def without(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration less the notice."""
    return {key: value for key, value in config.items() if (key, value) != (KEY, NOTICE)}


def as_text(config: dict[str, Any]) -> str:
    """A configuration as JSON, written as transformers writes it."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
