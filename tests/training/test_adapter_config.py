"""`adapter_config.json` is what a stranger wrote: it imports nothing, and ends in an adapter or in one message."""

import copy
import json
import random
import sys

import pytest
import torch
from torch import nn

from tersor.checkpoint.adapters import CONFIG, TENSORS, load_adapter, put_in, save_adapter
from tersor.core.errors import ModelError, TersorError
from tersor.training.lora import LoraStep, adapt
from tersor.training.merge import merge


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    adapted = adapt(net(), LoraStep(rank=2))
    save_adapter(adapted.adapter, folder, "base")
    return folder


@pytest.fixture
def write(folder, tmp_path):
    def written(**changed):
        config = json.loads((folder / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps(config | changed))
        (tmp_path / TENSORS).write_bytes((folder / TENSORS).read_bytes())
        return tmp_path

    return written


def test_what_is_known_is_handed_on(write):
    adapter = load_adapter(write(lora_alpha=3, use_rslora=True, target_modules="(a+)+$", auto_mapping={"x": "y"}))
    assert (adapter.config.r, adapter.config.lora_alpha, adapter.config.use_rslora) == (2, 3, True)
    assert adapter.config.target_modules == {"0", "1"}
    assert adapter.config.auto_mapping is None
    merge(net(), adapter)


def test_no_module_is_imported(write, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    adapter = load_adapter(write(megatron_core="evil_module", auto_mapping={"parent_library": "evil_module"}))
    put_in(net(), adapter.config, tensors=adapter.tensors)
    assert "evil_module" not in sys.modules
    with pytest.raises(ModelError, match="megatron_config is set"):
        load_adapter(write(megatron_core="evil_module", megatron_config={"a": 1}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 2**31}, "r: Input should be less than or equal to 65536"),
        ({"r": 1000}, "r is 1000, and the factors have a rank of 2 at most"),
        ({"r": "2"}, "r: Input should be a valid integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern"),
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"modules_to_save": [3]}, "modules_to_save.0: Input should be a valid string"),
        ({"task_type": "NO_SUCH"}, "task_type"),
        ({"peft_type": "IA3"}, "an adapter of type IA3, and only LORA"),
        ({"peft_type": None}, "an adapter of type None"),
        ({"layer_replication": [[0, 2**31]]}, "layer_replication is set"),
    ],
)
def test_what_is_wrong_is_said(write, changed, message):
    with pytest.raises(ModelError, match=message):
        load_adapter(write(**changed))


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", '{"peft_type": "LORA"', "[" * 100_000])
def test_what_is_no_config(folder, tmp_path, content):
    (tmp_path / CONFIG).write_text(content)
    (tmp_path / TENSORS).write_bytes((folder / TENSORS).read_bytes())
    with pytest.raises(ModelError, match=CONFIG):
        load_adapter(tmp_path)


ODD = [
    None,
    True,
    -1,
    0,
    2**31,
    1e300,
    "",
    "x",
    "(a+)+$",
    "os",
    [],
    [None],
    ["0"],
    {},
    {"0": 3},
    {"x": {"y": []}},
    "\0",
]


def test_a_thousand_mutations(folder, tmp_path):
    """Any value in any field, and any byte changed: an adapter that fits, or one message."""
    config, chance = json.loads((folder / CONFIG).read_text()), random.Random(0)
    (tmp_path / TENSORS).write_bytes((folder / TENSORS).read_bytes())
    opened, messages = 0, []
    for i in range(1000):
        changed = copy.deepcopy(config)
        for name in chance.sample(sorted(changed), chance.choice((1, 1, 1, 2))):
            changed[name] = chance.choice(ODD)
        text = bytearray(json.dumps(changed).encode())
        if i % 4 == 0:
            text[chance.randrange(len(text))] = chance.randrange(256)
        (tmp_path / CONFIG).write_bytes(text)
        try:
            adapter = load_adapter(tmp_path)
            if i % 10 == 0:
                merge(net(), adapter)
            opened += 1
        except TersorError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)
    assert 100 < opened < 900
    assert torch.isfinite(load_adapter(folder).tensors["base_model.model.0.lora_A.weight"]).all()
