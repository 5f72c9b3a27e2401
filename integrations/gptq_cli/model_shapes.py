"""Shapes of models for benchmarks that need no checkpoint."""

from __future__ import annotations

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
# Arguments of LlamaConfig.
SHAPES = {
    name: dict(zip(_SIZES, sizes))
    for name, sizes in {
        "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
        "llama2-13b": (5120, 13824, 40, 40, 40, 32000),
        "llama2-70b": (8192, 28672, 80, 64, 8, 32000),
        "llama3-8b": (4096, 14336, 32, 32, 8, 128256),
        "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
        "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
        "tiny": (64, 128, 2, 4, 4, 128),
    }.items()
}


def layer_shapes(shape: dict[str, int]) -> list[tuple[int, int]]:
    """[N, K] of a block's linear layers, joined where they have the same input: q, k and v; gate and up."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys_and_values = 2 * hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    return [(hidden + keys_and_values, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]


LAYERS = {name: layer_shapes(shape) for name, shape in SHAPES.items() if name != "tiny"}
LAYERS["odd"] = [(4096, 10944), (4100, 4096)]  # no multiples of what kernels cut into tiles
