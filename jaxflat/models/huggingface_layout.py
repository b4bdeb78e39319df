"""How GPT-2 and OPT checkpoints describe, name and store what a CausalTransformer has."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxflat.models.causal import CausalTransformer

ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}


class Layout(NamedTuple):
    """A family of checkpoints.

    Modules are (their name, our name, and 0, 1, 2 where queries, keys, values stand apart).
    """

    sizes: tuple[str, ...]  # config keys in the order of the CausalTransformer's fields
    activation: str  # meant where the config names none
    supported: dict[str, Any]  # the only values we compute; absence means them too
    prefix: str  # what may stand before a tensor's name; a regular expression
    embeddings: tuple[str, str]
    unused_positions: int  # rows before that of position 0
    final_norm: str
    layer: str
    modules: tuple[tuple[str, str, int | None], ...]
    transposed: bool  # kernels are [out, in]
    buffers: str  # tensors that are no parameters; a regular expression


class Place(NamedTuple):
    """The shape of a stored tensor and where it goes: leaf[layer][..., part, :]."""

    shape: tuple[int, ...]
    leaf: str
    layer: int | None
    part: int | None


GPT2 = Layout(
    sizes=("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
    activation="gelu_new",
    supported={
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    prefix=r"^(transformer\.)?",
    embeddings=("wte", "wpe"),
    unused_positions=0,
    final_norm="ln_f",
    layer="h",
    modules=(
        ("ln_1", "attention_norm", None),
        ("attn.c_attn", "attention/qkv", None),
        ("attn.c_proj", "attention/out", None),
        ("ln_2", "mlp_norm", None),
        ("mlp.c_fc", "mlp_in", None),
        ("mlp.c_proj", "mlp_out", None),
    ),
    transposed=False,
    buffers=r"h\.\d+\.attn\.(masked_)?bias",
)
OPT = Layout(
    sizes=(
        *("vocab_size", "max_position_embeddings", "hidden_size"),
        *("num_hidden_layers", "num_attention_heads", "ffn_dim"),
    ),
    activation="relu",
    supported={
        "tie_word_embeddings": True,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "enable_bias": True,
    },
    prefix=r"^((model\.)?decoder\.)?",
    embeddings=("embed_tokens", "embed_positions"),
    unused_positions=2,
    final_norm="final_layer_norm",
    layer="layers",
    modules=(
        ("self_attn_layer_norm", "attention_norm", None),
        ("self_attn.q_proj", "attention/qkv", 0),
        ("self_attn.k_proj", "attention/qkv", 1),
        ("self_attn.v_proj", "attention/qkv", 2),
        ("self_attn.out_proj", "attention/out", None),
        ("final_layer_norm", "mlp_norm", None),
        ("fc1", "mlp_in", None),
        ("fc2", "mlp_out", None),
    ),
    transposed=True,
    buffers=r"(?!)",
)
LAYOUTS = {"gpt2": GPT2, "opt": OPT}


def read_config(config: Any) -> tuple[CausalTransformer, Layout]:
    """Return the model a parsed config.json describes, and how its checkpoint is laid out.

    Raises ValueError naming the first key that is wrong or asks for what we do not compute.
    """
    if not isinstance(config, dict):
        raise ValueError("has to hold one JSON object")
    layout = LAYOUTS[_choice(config, "model_type", LAYOUTS, None)]
    *keys, mlp_key = layout.sizes
    num_tokens, max_length, width, num_layers, num_heads = (_size(config, key) for key in keys)
    if layout is GPT2 and config.get(mlp_key) is None:
        mlp_width = 4 * width
    else:
        mlp_width = _size(config, mlp_key)
    if width % num_heads:
        raise ValueError(f"{keys[2]}={width} is not divisible by {keys[4]}={num_heads}")
    for key, right in (layout.supported | {"word_embed_proj_dim": width}).items():
        value = config.get(key, right)
        if type(value) is not type(right) or value != right:
            shown, supported = _show(value), json.dumps(right)
            raise ValueError(f"{key}={shown} is not supported; it has to be {supported}")
    activation = _choice(config, "activation_function", ACTIVATIONS, layout.activation)
    return CausalTransformer(
        num_tokens, max_length, width, num_layers, num_heads, mlp_width, ACTIVATIONS[activation]
    ), layout


def special_token(config: dict[str, Any], key: str, num_tokens: int) -> int | None:
    """Return a token id of the config, None where it has none.

    Raises ValueError where it is no token of the vocabulary.
    """
    value = config.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < num_tokens):
        raise ValueError(f"{key}={_show(value)} has to be null or a token, 0..{num_tokens - 1}")
    return value


def places(model: CausalTransformer, layout: Layout) -> Iterator[tuple[str, Place]]:
    """Yield every parameter's stored name, without prefix, and its place; layer by layer."""
    width, mlp_width = model.width, model.mlp_width
    kernels = {
        "stack/attention/qkv": (width, 3 * width),
        "stack/attention/out": (width, width),
        "stack/mlp_in": (width, mlp_width),
        "stack/mlp_out": (mlp_width, width),
    }

    def module(
        theirs: str, ours: str, layer: int | None, part: int | None
    ) -> Iterator[tuple[str, Place]]:
        shape = (width, width) if part is not None else kernels.get(ours, (width,))
        leaf = f"{ours}/{'kernel' if ours in kernels else 'scale'}"
        stored_shape = shape[::-1] if layout.transposed else shape
        yield f"{theirs}.weight", Place(stored_shape, leaf, layer, part)
        yield f"{theirs}.bias", Place(shape[-1:], f"{ours}/bias", layer, part)

    tokens, positions = layout.embeddings
    num_positions = model.max_length + layout.unused_positions
    token_shape, position_shape = (model.num_tokens, width), (num_positions, width)
    yield f"{tokens}.weight", Place(token_shape, "token_embedding", None, None)
    yield f"{positions}.weight", Place(position_shape, "position_embedding", None, None)
    yield from module(layout.final_norm, "final_norm", None, None)
    for layer in range(model.num_layers):
        for theirs, ours, part in layout.modules:
            yield from module(f"{layout.layer}.{layer}.{theirs}", f"stack/{ours}", layer, part)


def causal_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter that a checkpoint with this config stores, by its name.

    Names are without prefix and the tied lm_head. Raises ValueError as read_config does.
    """
    return {name: place.shape for name, place in places(*read_config(config))}


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{key}={_show(value)} has to be a positive integer below 2^31")
    return value


def _choice(config: dict[str, Any], key: str, choices: dict[str, Any], default: str | None) -> str:
    value = config.get(key, default)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{key}={_show(value)} has to be one of {', '.join(choices)}")
    return value


def _show(value: Any) -> str:
    """Return at most 60 characters of JSON, which are one line."""
    return json.dumps(value)[:60]
