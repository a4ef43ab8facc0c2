"""Names that people know from other tools, and the schemes that mean the same.

A name stands here only if the scheme holds the same numbers: bits, groups, scales and how inputs are rounded. The names
with a W are presets of compressed-tensors, those with a Q are types of GGUF. NVFP4 and MXFP4 name the weights; the
presets of that name round inputs as well, which tersor does not. Q4_1 and Q5_1 store a minimum for every block, and
Q4_K_M and its like mix several types, so neither has a scheme of its own.
"""

ALIASES = {
    "int8-dynamic": "int8/int8-dynamic",
    "int8-static": "int8/int8-static",
    "W8A16": "int8-g128",
    "W6A16": "int6-g128",
    "W5A16": "int5-g128",
    "W4A16": "int4-g128",
    "W3A16": "int3-g128",
    "W2A16": "int2-g128",
    "W8A8": "int8/int8-dynamic",
    "W8A8-static": "int8/int8-static",
    "W4A8": "int4-g128/int8-dynamic",
    "FP8": "fp8-e4m3-tensor/fp8-e4m3-static",
    "FP8_DYNAMIC": "fp8-e4m3/fp8-e4m3-dynamic",
    "NVFP4": "nvfp4",
    "NVFP4A16": "nvfp4",
    "MXFP4": "mxfp4",
    "MXFP4A16": "mxfp4",
    "Q8_0": "int8-g32",
    "Q5_0": "int5-g32",
    "Q4_0": "int4-g32",
    "Q6_K": "q6_k",
    "Q5_K": "q5_k",
    "Q4_K": "q4_k",
    "Q3_K": "q3_k",
    "Q2_K": "q2_k",
}


def plain(name: str) -> str:
    """The name in lower case and with hyphens, as names are compared: `FP8_DYNAMIC` is `fp8-dynamic`."""
    return name.lower().replace("_", "-")


BY_PLAIN_NAME = {plain(name): scheme for name, scheme in ALIASES.items()}


def unaliased(name: str) -> str:
    """The scheme that a name stands for; any other name as it is.

    >>> unaliased("W4A16"), unaliased("q8_0"), unaliased("fp8-dynamic"), unaliased("int4-g64")
    ('int4-g128', 'int8-g32', 'fp8-e4m3/fp8-e4m3-dynamic', 'int4-g64')
    """
    return BY_PLAIN_NAME.get(plain(name), name)
