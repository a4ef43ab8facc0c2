"""GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): one file, read by llama.cpp and what builds on it.

Holds decoder models of the Llama and Qwen families, weights in ggml's block types (see `gguf_blocks.py`) and the
tokenizer. Names and metadata are those of llama.cpp's converter, whose rotary embedding wants the rows of Llama's
query and key matrices in another order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import MissingExtra, ModelError
from tersor.exporters.contract import UNMARKED, Checkpoint, Misfit, PackedSite
from tersor.exporters.gguf_blocks import BLOCK, CODE_BITS, block_type, to_blocks
from tersor.exporters.gguf_tokenizer import tokenizer_metadata
from tersor.formats.contract import Encoded

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
WRITER = "tersor"
ELSEWHERE = "export to compressed-tensors or bitsandbytes instead"
UNREAD = ("head_dim", "attention_bias", "mlp_bias")  # of the config: in the file, and transformers does not look there
QWEN3_HEAD = 128  # what transformers takes
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
HOLDS = (
    f"q2_k to q6_k, mxfp4, and integer formats per row or in groups of a multiple of {BLOCK} columns, asymmetric ones "
    f"up to 5 bits, without activations, where the columns are a multiple of {BLOCK}"
)


@dataclass(frozen=True)
class Gguf:
    """Writes one `.gguf` file, for llama.cpp and others."""

    name = "gguf"
    suffix = ".gguf"
    readers = "llama.cpp, transformers"
    holds = HOLDS
    extra = "gguf"
    packages = ("gguf",)
    holds_floats = True  # a model in 16-bit floats is a GGUF model, too

    def foreign(self, output: Path) -> str | None:
        """A sentence if the file's key for who quantized it does not name tersor; else None."""
        try:
            field = gguf_package().GGUFReader(output).get_field("general.quantized_by")
            written = field is not None and field.contents() == WRITER
        except (ValueError, KeyError, IndexError, UnicodeError):  # what the reader trips over in another file
            written = False
        return None if written else UNMARKED

    def beside(self, output: Path) -> tuple[str, ...]:
        return ()

    def why_not(self, packed: PackedSite) -> Misfit | None:
        if packed.is_plain or (block_type(packed.encoded) and packed.activation is None):
            return None
        return Misfit(HOLDS, "int4-g32" if packed.site.shape[1] % BLOCK == 0 else "bf16")

    def check(self, checkpoint: Checkpoint) -> None:
        gguf_package()
        config = checkpoint.config
        check_architecture(checkpoint)
        names = tensor_names(checkpoint)
        unknown = [name for name in (*checkpoint.tensors, *parameters(checkpoint)) if names(name) is None]
        if unknown:
            raise ModelError(f"gguf has no name for {unknown[0]} in a {config.model_type} model")
        tokenizer_metadata(checkpoint.folder, config.vocab_size)

    def write(self, checkpoint: Checkpoint, output: Path) -> Iterable[str]:
        gguf = gguf_package()
        writer = gguf.GGUFWriter(output, ARCHITECTURES[checkpoint.config.model_type])
        for key, value in metadata(checkpoint).items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif value is not None:
                writer.add_key_value(key, value, value_type(gguf, value))
        names, rounding, wider = tensor_names(checkpoint), 0.0, {}
        for name, tensor in checkpoint.tensors.items():
            tensor = tensor if tensor.dim() > 1 else tensor.float()  # llama.cpp adds and multiplies vectors in float32
            rows = in_rotary_order(checkpoint, name, tensor)
            kind = gguf.GGMLQuantizationType[FLOATS[tensor.dtype]]
            data = rows.view(torch.uint8) if kind == gguf.GGMLQuantizationType.BF16 else rows
            writer.add_tensor(names(name), data.numpy(), raw_dtype=kind)
        for name, encoded in parameters(checkpoint).items():
            blocks = to_blocks(encoded)
            rows = in_rotary_order(checkpoint, name, blocks.rows)
            writer.add_tensor(names(name), rows.numpy(), raw_dtype=gguf.GGMLQuantizationType[blocks.type])
            rounding = max(rounding, blocks.rounding)
            if blocks.type in CODE_BITS and CODE_BITS[blocks.type] > encoded.format.bits:  # type: ignore[attr-defined]
                wider[encoded.format.name] = blocks.type
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        notes = [f"{format} is held exactly in the wider {kind}" for format, kind in wider.items()]
        if rounding:
            notes.append(f"minima of asymmetric blocks are rounded to fp16: values move by up to {rounding:.2g} steps")
        return notes + notes_on(checkpoint)

    def open(self, checkpoint: Checkpoint, output: Path) -> tuple[nn.Module, dict[str, Any]]:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(output.parent, gguf_file=output.name, trust_remote_code=False)
        for name in UNREAD:
            if hasattr(checkpoint.config, name):
                setattr(config, name, getattr(checkpoint.config, name))
        made: Any = AutoModelForCausalLM.from_pretrained(
            output.parent,
            gguf_file=output.name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
        return made


def check_architecture(checkpoint: Checkpoint) -> None:
    """Raises ModelError for what the file's architectures do not compute."""
    config, kind = checkpoint.config, type(checkpoint.model).__name__
    if config.model_type not in ARCHITECTURES or not kind.endswith("ForCausalLM"):
        raise ModelError(
            f"gguf export knows {', '.join(ARCHITECTURES)} with their language head, and this model is "
            f"{config.model_type} ({kind}); {ELSEWHERE}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ModelError(
            f"gguf export knows plain rotary embeddings, and this model scales them ({rope['rope_type']}); {ELSEWHERE}"
        )
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"gguf export turns whole heads, and this model {part:.0%} of each; {ELSEWHERE}")
    if config.hidden_act not in ("silu", "swish"):
        raise ModelError(
            f"gguf export: llama.cpp computes SiLU in {config.model_type} models, and this one has hidden_act "
            f"{config.hidden_act}; {ELSEWHERE}"
        )
    if config.model_type == "qwen2" and head_width(config) * config.num_attention_heads != config.hidden_size:
        raise ModelError(
            f"gguf export: llama.cpp has heads of hidden_size / num_attention_heads = "
            f"{config.hidden_size // config.num_attention_heads} in qwen2 models, and this one has head_dim "
            f"{config.head_dim}; {ELSEWHERE}"
        )
    if config.model_type == "qwen3" and getattr(config, "attention_bias", False):
        raise ModelError(f"gguf export: llama.cpp has no attention_bias in qwen3 models; {ELSEWHERE}")


def head_width(config: Any) -> int:
    """Number of columns of one head of queries, keys or values."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_length(config: Any) -> int:
    """Tokens of a text that attention sees whole: llama.cpp has no sliding windows in these architectures, and within
    one window there is no difference."""
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else config.model_type == "mistral"
    window = getattr(config, "sliding_window", None) if slides else None
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def notes_on(checkpoint: Checkpoint) -> list[str]:
    """Notes on where clients compute something else than the model."""
    config, notes = checkpoint.config, []
    if (length := context_length(config)) < config.max_position_embeddings:
        notes.append(f"context_length is {length}, the sliding window, which llama.cpp does not have in this model")
    if config.model_type == "qwen3" and config.head_dim != QWEN3_HEAD:
        notes.append(
            f"transformers takes {QWEN3_HEAD} for the width of qwen3's heads, and here it is {config.head_dim}"
        )
    if any(getattr(config, name, False) for name in ("attention_bias", "mlp_bias")):
        notes.append("transformers leaves out the biases of llama's layers; llama.cpp reads them")
    return notes


def gguf_package() -> ModuleType:
    """The `gguf` package. Raises MissingExtra."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra("gguf", "writing GGUF files") from None
    return gguf


def parameters(checkpoint: Checkpoint) -> dict[str, Encoded]:
    """The encoded weight that is stored for each quantized parameter."""
    return {packed.site.parameter: packed.encoded for packed in checkpoint.quantized}


def tensor_names(checkpoint: Checkpoint) -> Any:
    """A function from the model's parameter names to GGUF's, or None."""
    gguf, config = gguf_package(), checkpoint.config
    wanted = ARCHITECTURES[config.model_type]
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    return lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))


def in_rotary_order(checkpoint: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    """Rows of Llama's queries and keys with the two halves of every head interleaved; others as they are."""
    config = checkpoint.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or ARCHITECTURES[config.model_type] != "llama":
        return tensor.contiguous()
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every key-value pair but the architecture, as llama.cpp's converter writes them. None values are left out."""
    config = checkpoint.config
    head_dim = head_width(config)
    about = {
        "block_count": config.num_hidden_layers,
        "context_length": context_length(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    architecture = ARCHITECTURES[config.model_type]
    return {
        "general.type": "model",
        "general.name": checkpoint.folder.name,
        "general.quantization_version": 2,
        "general.quantized_by": WRITER,
        **{f"{architecture}.{key}": value for key, value in about.items()},
        **tokenizer_metadata(checkpoint.folder, config.vocab_size),
    }


def value_type(gguf: ModuleType, value: object) -> Any:
    """GGUF's type of a single value."""
    names = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    return gguf.GGUFValueType[names[type(value)]]
