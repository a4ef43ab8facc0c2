"""Merge an adapter into the weights it was trained beside.

Into float weights by adding: `W + alpha / rank * B A` (Hu et al. 2021, https://arxiv.org/abs/2106.09685; DoRA as peft
does it). A packed weight has no room for the sum. Decoding it, adding and rounding to the nearest throws away most of
what is smaller than a step of its grid, which is most of the adapter. So the sum is rounded as a weight is when it is
compressed: anew, column by column, with the inputs it meets in view (GPTQ, Frantar et al. 2022,
https://arxiv.org/abs/2210.17323), in the format that the base has there.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.adapters import PREFIX, Adapter, adapted_names, put_in, replace_module
from tersor.core.errors import InputError, ModelError
from tersor.core.progress import Progress, silent
from tersor.formats.contract import Format
from tersor.nn.packed import PackedEmbedding, PackedLinear, Stored
from tersor.nn.sites import Site, find_sites
from tersor.schemes.scheme import KEEP, usual_method
from tersor.steps.step_visitor import Calibration
from tersor.steps.weights import WeightsStep
from tersor.steps.weights_run import WeightsRun
from tersor.tasks.contract import Task
from tersor.tasks.fidelity import kl_divergence
from tersor.tasks.inputs import scoring

Method = Callable[[Format], str]  # how a format is filled: a method's name


def resolving(format: Format) -> str:
    """The method that sees the inputs, for each kind of format."""
    return usual_method(format, sees_inputs=True)


def naive(format: Format) -> str:
    """The simplest method of each format, which for most rounds to nearest."""
    return format.usual_methods.plain


def merge(
    model: nn.Module,
    adapter: Adapter,
    task: Task | None = None,
    *,
    method: Method = resolving,
    seed: int = 0,
    progress: Progress = silent,
) -> nn.Module:
    """A copy of `model` with the adapter in its weights; every weight in the format and dtype it had.

    Args:
        model: float, packed or both; the adapter's base.
        task: its calibration split is what re-solving sees; without it all inputs weigh the same.
        method: how a packed weight is filled again: `resolving`, or `naive` to compare with.

    Raises:
        ModelError: the adapter is not this model's, or changes a weight that another layer has, too.
    """
    check_untied(model, adapter)
    adapter = without_base(model, adapter)
    target = merged_float(model, adapter)
    packed = packed_adapted(model, adapter)
    if packed:
        rules = {site.name: scheme_of(layer, method) for site, layer in packed.items()}
        WeightsRun(target, WeightsStep(scheme=KEEP, rules=rules), Calibration(task, seed=seed, progress=progress)).run()
    return with_types_of(target, model)


def scheme_of(layer: PackedLinear | PackedEmbedding, method: Method) -> str:
    """The scheme of the layer's format, filled by a method, as recipes spell it."""
    quantizer = layer.input_quantizer if isinstance(layer, PackedLinear) else None
    activation = f"/{quantizer.format}" if quantizer is not None else ""
    return f"{method(layer.packed.format)}:{layer.packed.format.name}{activation}"


def check_untied(model: nn.Module, adapter: Adapter) -> None:
    """Raises ModelError where an adapted weight is shared: merged, it would change the other layer as well."""
    names = set(adapted_names(adapter))
    for site in find_sites(model):
        paths = [place.module for place in site.owners]
        changed = [path for path in paths if path in names]
        if changed and len(paths) > 1:
            other = next(path for path in paths if path != changed[0])
            raise ModelError(
                f"the adapter changes {changed[0]}, whose weight is also that of {other} (tied): merged, it would "
                f"change both; train it without {changed[0]}, or on a base saved with tie_word_embeddings=False"
            )


def without_base(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter less the weights of its base: peft writes those of embeddings and heads beside their factors.

    Raises ModelError where they are not this model's own. Packed ones are near them, and are not held against them.
    """
    kept, modules = {}, dict(model.named_modules())
    changed = set(adapted_names(adapter))
    for name, tensor in adapter.tensors.items():
        path, _, last = name.removeprefix(PREFIX).rpartition(".")
        layer, beside = path.removesuffix(".base_layer"), path.endswith(".base_layer")
        module: Any = modules.get(layer)
        if last != "weight" or not ((beside or layer not in changed) and isinstance(module, LAYERS)):
            kept[name] = tensor
        elif not isinstance(module, PackedEmbedding | PackedLinear) and not is_same(tensor, module.weight):
            raise ModelError(
                f"the adapter comes with its own weight for {layer}, {list(tensor.shape)}, which is not that of the "
                f"base, {list(module.weight.shape)}; give the base it was trained on, with the tokens that were added"
            )
    return Adapter(adapter.config, kept)


LAYERS = (nn.Embedding, nn.Linear, PackedEmbedding, PackedLinear)  # embeddings and heads


def is_same(tensor: Tensor, base: Tensor) -> bool:
    """True if two weights differ by no more than the coarser of their types rounds."""
    eps = max(torch.finfo(each.dtype).eps for each in (tensor, base))
    return tensor.shape == base.shape and torch.allclose(tensor.float(), base.float().cpu(), rtol=2 * eps, atol=1e-7)


def packed_adapted(model: nn.Module, adapter: Adapter) -> dict[Site, PackedLinear | PackedEmbedding]:
    """The packed layers that the adapter stands beside, or takes the place of, by site."""
    sites = {site.owners[0].module: site for site in find_sites(model)}
    modules = dict(model.named_modules())
    layers = {name: modules.get(name) for name in adapted_names(adapter)}
    return {sites[name]: layer for name, layer in layers.items() if isinstance(layer, PackedLinear | PackedEmbedding)}


def merged_float(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A float32 copy of `model` with the adapter added; layers that were packed and adapted are float in it."""
    target = own_float_copy(model)
    for site, layer in packed_adapted(target, adapter).items():
        replace_module(target, site.owners[0].module, unpacked(layer))
    adapted = put_in(target, adapter.config, tensors=adapter.tensors)
    try:
        merged = adapted.peft.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InputError(f"the adapter cannot be merged: {error}") from None
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged


def own_float_copy(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with `model`, computing in float32."""
    return copy.deepcopy(model).float()


def unpacked(layer: PackedLinear | PackedEmbedding) -> nn.Module:
    """The float layer that a packed one stands for, without its input quantizer."""
    if isinstance(layer, PackedEmbedding):
        return nn.Embedding.from_pretrained(layer.packed().detach().float()).train(layer.training)
    (num_out, num_in), bias = layer.packed.shape, layer.bias
    linear: nn.Module
    if layer.packed.fold.view == "transposed":
        from transformers.pytorch_utils import Conv1D

        linear = Conv1D(num_out, num_in)
    else:
        linear = nn.Linear(num_in, num_out, bias=bias is not None)
    linear.weight = nn.Parameter(layer.packed().detach().float())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().float().clone())
    return linear.train(layer.training)


def with_types_of(merged: nn.Module, model: nn.Module) -> nn.Module:
    """`merged`, with every tensor, and what packed weights are decoded to, in the dtype it has in `model`."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modules = dict(model.named_modules())
    for name, module in merged.named_modules():
        before = modules.get(name)
        if isinstance(module, Stored) and isinstance(before, Stored):
            module.dtype = before.dtype
    for name, parameter in merged.named_parameters():
        if name in tensors:
            parameter.data = parameter.data.to(tensors[name].dtype)
            parameter.requires_grad_(tensors[name].requires_grad)
    for name, buffer in merged.named_buffers():
        if name in tensors and tensors[name].dtype != buffer.dtype:
            buffer.data = buffer.data.to(tensors[name].dtype)
    return merged.train(model.training)


def unmerged(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A float32 copy of `model` with the adapter beside its weights: what a merged model is judged against."""
    adapter = without_base(model, adapter)
    copied, whole = own_float_copy(model), set(getattr(adapter.config, "modules_to_save", None) or ())
    for site, layer in packed_adapted(copied, adapter).items():  # peft adapts packed linear layers alone
        name = site.owners[0].module
        if isinstance(layer, PackedEmbedding) or name.rpartition(".")[2] in whole:
            replace_module(copied, name, unpacked(layer))
    return put_in(copied, adapter.config, tensors=adapter.tensors).model


@torch.no_grad()
def divergences(
    reference: nn.Module, models: Mapping[str, nn.Module], task: Task, split: str = "eval"
) -> dict[str, float]:
    """The distance of each model's outputs from the reference's.

    That is the mean KL divergence in nats per prediction, or, where the task's output is no logits, the mean squared
    distance of an example.
    """
    sums, count = dict.fromkeys(models, 0.0), 0
    for batch in task.batches(split):  # type: ignore[arg-type]
        with scoring(reference):
            expected = predictions(task, reference, batch)
        count += len(expected)
        for name, model in models.items():
            with scoring(model):
                found = predictions(task, model, batch)
            if task.output == "logits":
                sums[name] += kl_divergence(expected, found)
            else:
                sums[name] += (expected - found).double().square().sum().item()
    return {name: total / max(1, count) for name, total in sums.items()}


def predictions(task: Task, model: nn.Module, batch: object) -> Tensor:
    """The outputs of a batch that count, `[prediction, ...]`, float32: no padding."""
    output = task.forward(model, batch).float()
    if task.output != "logits" or output.ndim < 3:
        return output
    attention = getattr(batch, "inputs", {}).get("attention_mask")
    if attention is not None and attention.shape == output.shape[:2]:
        return output[attention.bool().to(output.device)]
    return output.flatten(0, -2)
