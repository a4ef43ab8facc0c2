"""Small models of the kinds that transforms know, and what calibration measures on them."""

import torch
import torch.nn.functional as F
from torch import nn

from tersor.methods.stats import Stats
from tersor.nn.sites import find_sites
from zoo import GQA, SIZES, SPECIAL, Case, pretrained, tokens

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2, **SPECIAL}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
BERT = {"vocab_size": 64, "max_position_embeddings": 32, **SIZES}
UNTIED = {**GQA, "tie_word_embeddings": False}
TRANSFORMERS = {
    "llama": pretrained("LlamaForCausalLM", **UNTIED),
    "llama tied": pretrained("LlamaForCausalLM", **{**GQA, "tie_word_embeddings": True}),
    "llama with biases": pretrained("LlamaForCausalLM", attention_bias=True, mlp_bias=True, **UNTIED),
    "mistral": pretrained("MistralForCausalLM", **UNTIED),
    "qwen2": pretrained("Qwen2ForCausalLM", **UNTIED),
    "qwen3": pretrained("Qwen3ForCausalLM", head_dim=8, **UNTIED),
    "smollm3": pretrained("SmolLM3ForCausalLM", **UNTIED),
    "mixtral": pretrained("MixtralForCausalLM", num_local_experts=4, experts_implementation="eager", **UNTIED),
    "phi3": pretrained("Phi3ForCausalLM", **UNTIED),
    "gemma": pretrained("GemmaForCausalLM", head_dim=8, **UNTIED),
    "gemma2": pretrained("Gemma2ForCausalLM", head_dim=8, **UNTIED),
    "gemma3": pretrained("Gemma3ForCausalLM", head_dim=8, **UNTIED),
    "gpt2": pretrained("GPT2LMHeadModel", **GPT2),
    "opt": pretrained("OPTForCausalLM", max_position_embeddings=64, init_std=0.2, **OPT, **SPECIAL),
    "opt, norms last": pretrained(
        "OPTForCausalLM", max_position_embeddings=64, do_layer_norm_before=False, **OPT, **SPECIAL
    ),
    "bert": pretrained("BertForSequenceClassification", **BERT),
    "roberta": pretrained("RobertaForMaskedLM", pad_token_id=1, **BERT),
    "distilbert": pretrained("DistilBertModel", vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
}


class Residual(nn.Module):
    """Two convolutions around a shortcut, as in a ResNet."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class TwoReaders(nn.Module):
    """Outputs that a layer and something else read: nothing may be moved."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.next = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        z = torch.relu(self.bn(y))
        return y + z + self.next(z)


def mobile(activation: type[nn.Module]) -> nn.Module:
    """An inverted residual: expand, depthwise, project."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), activation()),
        *(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), activation()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), activation()),
        *(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)),
        *(nn.Conv2d(8, 6, 3, groups=2), nn.ReLU()),
    )


def resnet() -> nn.Module:
    stem = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*stem, Residual(8), Residual(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


CONVS = {
    "resnet": resnet,
    "mobilenet": lambda: mobile(nn.ReLU),
    "mobilenet, relu6": lambda: mobile(nn.ReLU6),
    "two readers": TwoReaders,
    "plain": lambda: nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 16, 1, bias=False), nn.ReLU()),
        *(nn.Conv2d(16, 16, 1, groups=16), nn.Identity(), nn.Conv2d(16, 4, 1)),
    ),
}
DENSE = {
    "dense": lambda: nn.Sequential(
        *(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    )
}
MODELS = {
    **{name: Case(build, tokens) for name, build in TRANSFORMERS.items()},
    **{name: Case(build, lambda: (torch.randn(2, 3, 10, 10),)) for name, build in CONVS.items()},
    **{name: Case(build, lambda: (torch.randn(5, 6),)) for name, build in DENSE.items()},
}


def model_of(name: str) -> nn.Module:
    """In float64, with uneven channels and batch-norm statistics that are not the initial ones."""
    model = MODELS[name].model().double()
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.1, 5, generator=generator)
    return model


def in_float64(model: nn.Module) -> nn.Module:
    """Have Hugging Face's RMSNorm, which computes in float32 whatever it is given, compute in the type it is given."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            offset = 1.0 if name.startswith("Gemma") else 0.0
            eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None)

            def forward(x, module=module, offset=offset, eps=eps):
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + module.weight)

            module.forward = forward
    return model


def measured(model: nn.Module, name: str) -> dict[str, Stats]:
    """What the linear sites of a model see on its inputs."""
    stats, hooks = {}, []
    for site in find_sites(model):
        module = model.get_submodule(site.owners[0].module)

        def see(module, args, site=site):
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            stats[site.name] = Stats(
                sample=x,
                largest=x.abs().amax(0),
                mean=x.mean(0),
                second_moment=x.t() @ x / len(x),
                num_tokens=len(x),
                num_axes=args[0].ndim,
            )

        if site.kind == "linear":
            hooks.append(module.register_forward_pre_hook(see))
    MODELS[name].run(model)
    for hook in hooks:
        hook.remove()
    return stats
