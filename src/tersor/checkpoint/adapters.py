"""Adapters in peft's layers and files (https://github.com/huggingface/peft), over weights that may be packed.

peft chooses the layer that adapts another by its class. What it does not know is `PackedLinear`; `custom_modules` tells
it. An nf4 base may also run on bitsandbytes (https://github.com/bitsandbytes-foundation/bitsandbytes), on the same
codes and scales.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.adapter_config import read_settings
from tersor.checkpoint.guards import check_links
from tersor.checkpoint.nf4_module import is_nf4, module_tensors
from tersor.core.errors import InputError, MissingExtra, ModelError
from tersor.core.messages import first_line
from tersor.core.weights_file import check_finite, read_weights, write_weights
from tersor.formats.nf4 import Nf4
from tersor.nn.packed import PackedLinear
from tersor.nn.sites import find_sites

ADAPTER = "default"  # peft's name of an only adapter
UNFIT = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError)
PREFIX = "base_model.model."  # of all names in its files
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """Trained factors, as peft keeps them: its config, and the tensors by their names in the adapted model."""

    config: Any
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Adapted:
    """A model with adapters in it.

    Attributes:
        model: the model itself; its adapted layers are peft's.
        peft: peft's wrapper around it, which saves.
        packed: the packed layers that bitsandbytes stands in for, by their name in the model.
        start: the adapter before training, where it took something of the weights (PiSSA).
        flags: what of the model's own parameters was trainable before.
    """

    model: nn.Module
    peft: Any
    packed: Mapping[str, PackedLinear]
    start: dict[str, Tensor] | None = None
    flags: list[tuple[nn.Parameter, bool]] = field(default_factory=list)

    @property
    def adapter(self) -> Adapter:
        """The trained factors, for the weights as they were before training."""
        state, config = state_of(self.peft), self.peft.peft_config[ADAPTER]
        return Adapter(config, state) if self.start is None else difference(config, state, self.start)

    def without(self) -> nn.Module:
        """The model with its own layers again. PiSSA's weights get back what the factors took; the adapters are
        gone."""
        if self.start is not None:
            self.take_back()
        model = self.peft.unload()
        for name, layer in self.packed.items():
            replace_module(model, name, layer)
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        return model

    @torch.no_grad()
    def take_back(self) -> None:
        """Add the factors of the start to the weights they were taken from."""
        fill(self.peft, self.start or {})
        for layer in adapted_layers(self.model).values():
            layer.get_base_layer().weight.data += layer.get_delta_weight(ADAPTER)


def put_in(model: nn.Module, config: Any, *, tensors: dict[str, Tensor] | None = None, seed: int = 0) -> Adapted:
    """Put adapters into a model, in place, and freeze the rest: new ones, drawn from `seed`, or those of `tensors`.

    Raises ModelError where the tensors are not of this model.
    """
    peft = import_peft()
    config = deepcopy(config)
    config.base_model_name_or_path = None  # whatever the base was called where the adapter was trained
    config._register_custom_module(custom_modules())
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    cuda = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cuda), quiet_peft():
        torch.manual_seed(seed)
        try:
            wrapped = peft.get_peft_model(model, config)
        except UNFIT as error:  # target modules that are not there, or cannot be adapted so
            raise ModelError(f"the adapter does not fit {type(model).__name__}: {first_line(error)}") from None
    if tensors is not None:
        fill(wrapped, tensors)
    return Adapted(model, wrapped, {}, None, flags)


def fill(wrapped: Any, tensors: dict[str, Tensor]) -> None:
    """Fill the adapters from `tensors`. Raises ModelError unless both have exactly the same names."""
    own = state_of(wrapped)
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if wrong:
        what = f"lacks {wrong[0]}" if wrong[0] not in tensors else f"holds {wrong[0]} {list(tensors[wrong[0]].shape)}"
        kind = type(wrapped.get_base_model()).__name__
        raise ModelError(f"the adapter {what}, which does not go with {kind}; give the base it was trained on")
    try:
        import_peft().set_peft_model_state_dict(wrapped, tensors)
    except UNFIT as error:
        raise ModelError(f"the adapter does not fit: {first_line(error)}") from None


def state_of(wrapped: Any) -> dict[str, Tensor]:
    """The adapter's tensors as its file names them, copied."""
    state = import_peft().get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def save_adapter(adapter: Adapter, folder: Path, base: str) -> None:
    """Write what `PeftModel.from_pretrained(model, folder)` reads; `base` is the name of the model it belongs to."""
    config = deepcopy(adapter.config)
    config.base_model_name_or_path, config.inference_mode = base, True
    for name, value in vars(config).items():
        if isinstance(value, set):  # which peft writes in the order of hashes
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder))
    write_weights(adapter.tensors, folder / TENSORS)


def load_adapter(folder: Path) -> Adapter:
    """Read peft's files. Raises ModelError for damaged files, NaN, and adapters other than LoRA."""
    peft = import_peft()
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder}: no {CONFIG}, so no adapter of peft; tersor finetune --lora writes one")
    check_links(folder)
    pickled = folder / "adapter_model.bin"
    file = pickled if pickled.exists() and not (folder / TENSORS).exists() else folder / TENSORS
    tensors = read_weights(file)
    check_finite(tensors, str(file))
    settings = read_settings(folder / CONFIG, tensors)
    try:
        config = peft.LoraConfig(**settings)
    except (ValueError, TypeError, ImportError) as error:  # fields that do not go together
        raise ModelError(f"{folder / CONFIG}: {first_line(error)}") from None
    return Adapter(config, tensors)


def adapted_names(adapter: Adapter) -> list[str]:
    """The modules that have factors, or are replaced as a whole (`modules_to_save`), by their name in the model.

    >>> adapted_names(Adapter(None, {"base_model.model.layers.0.up.lora_A.weight": torch.zeros(0)}))
    ['layers.0.up']
    """
    whole = set(getattr(adapter.config, "modules_to_save", None) or ())
    found: dict[str, None] = {}
    for name in adapter.tensors:
        path = name.removeprefix(PREFIX)
        module, factor, _ = path.partition(".lora_embedding_A" if ".lora_embedding_A" in path else ".lora_A.")
        owner = path.rpartition(".")[0]
        if factor:
            found[module] = None
        elif not owner.endswith(".base_layer") and owner.rpartition(".")[2] in whole:
            found[owner] = None
    return list(found)


def import_peft() -> Any:
    """The module peft. Raises MissingExtra if it is not installed."""
    try:
        import peft
    except ImportError:
        raise MissingExtra("train", "LoRA") from None
    return peft


@contextmanager
def quiet_peft() -> Iterator[None]:
    """peft warns of layers it does not know, and asks transformers in ways that it warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


# Packed layers under peft.


@cache
def packed_adapter() -> type[nn.Module]:
    """peft's LoRA layer around a `PackedLinear`. Its weight is decoded to be read and cannot be written."""
    from peft.tuners.lora.layer import Linear

    class PackedLora(Linear):
        """A packed linear layer with adapters. Only `tersor merge` can merge them."""

        def merge(self, *_: Any, **__: Any) -> None:
            raise InputError("a packed weight has no room for an adapter as it is; use tersor merge, which rounds anew")

        unmerge = merge

    return PackedLora


def custom_modules() -> dict[type[nn.Module], type[nn.Module]]:
    """The peft class that adapts each class of packed layer, by that class."""
    table: dict[type[nn.Module], type[nn.Module]] = {PackedLinear: packed_adapter()}
    bnb = import_bitsandbytes()
    if bnb is not None:
        from peft.tuners.lora.bnb import Linear4bit  # there only with bitsandbytes

        table[bnb.nn.Linear4bit] = Linear4bit
    return table


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """peft's LoRA layers by their name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module of this name by another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# bitsandbytes under nf4.


def import_bitsandbytes() -> Any:
    """The module, or None where it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


def to_bitsandbytes(model: nn.Module, runs_on: str) -> dict[str, PackedLinear]:
    """Let bitsandbytes run the packed layers whose format it has, on the very same codes and scales; the layers it
    stands in for, by name."""
    if runs_on == "tersor" or (runs_on == "auto" and not torch.cuda.is_available()):
        return {}
    bnb = import_bitsandbytes()
    if bnb is None:
        if runs_on == "bitsandbytes":
            raise MissingExtra("bitsandbytes", "lora: runs_on=bitsandbytes")
        return {}
    replaced = {}
    for site in find_sites(model):
        name = site.owners[0].module
        layer = model.get_submodule(name)
        if not isinstance(layer, PackedLinear) or len(site.owners) > 1 or not runs_there(layer):
            continue
        tensors = module_tensors(layer.packed.encoded, site.dtype)
        linear = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=layer.packed.dtype, device="meta"
        )
        stats = {name.removeprefix("weight."): t for name, t in tensors.items() if name != "weight"}
        device = tensors["weight"].device
        linear.weight = bnb.nn.Params4bit.from_prequantized(tensors["weight"], stats, device=device, module=linear)
        linear.bias = layer.bias
        linear.support_avx512bf16_for_cpu = False  # its kernel for evaluation gives no gradients ever after
        linear.train(layer.training)
        replace_module(model, name, linear)
        replaced[name] = layer
    if runs_on == "bitsandbytes" and not replaced:
        raise InputError(
            "lora: runs_on=bitsandbytes needs layers packed as nf4 or nf4-dq, and there are none; base=nf4"
        )
    return replaced


def runs_there(layer: PackedLinear) -> bool:
    """True if bitsandbytes can run the layer's format."""
    whole = layer.in_features % Nf4.group_size == 0 and layer.packed.fold.view == "rows"
    return is_nf4(layer.packed.encoded) and whole and layer.input_quantizer is None


def dequantized(layer: Any) -> Tensor:
    """The decoded weight of a bitsandbytes layer."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


# PiSSA.


def difference(config: Any, after: dict[str, Tensor], before: dict[str, Tensor]) -> Adapter:
    """An adapter of twice the rank for the weights that PiSSA started from: the trained product less the one taken out
    of them. `B A - B0 A0 = [B, -B0] [A; A0]`, with the scaling of the old rank."""
    config = deepcopy(config)
    config.lora_alpha = config.lora_alpha * 2
    config.r, config.init_lora_weights = config.r * 2, True
    tensors = {}
    for name, tensor in after.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([tensor, before[name]])
        elif ".lora_B." in name:
            tensors[name] = torch.cat([tensor, -before[name]], dim=1)
        else:
            tensors[name] = tensor
    return Adapter(config, tensors)
