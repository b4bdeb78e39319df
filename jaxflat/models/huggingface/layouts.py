"""How GPT-2, OPT and BERT checkpoints describe a model, name its parameters and store them."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxflat.models.bert import Bert
from jaxflat.models.causal import CausalTransformer


class Layout(NamedTuple):
    """A family of checkpoints.

    A module is (its stored name, our name, part): part is 0, 1 or 2 for queries, keys or values
    that are stored separately, otherwise None.
    """

    sizes: tuple[str, ...]  # config keys, in the order of our models' first fields
    activation: tuple[str, str]  # its config key, and the default if the key is absent
    supported: dict[str, Any]  # the only values that our models compute; also the defaults
    renamed: tuple[tuple[str, str], ...]  # (regular expression, replacement) for tensor names
    arrays: tuple[tuple[str, str], ...]  # (stored name, our name) of parameters outside modules
    unused_positions: int  # position embeddings stored before position 0
    modules: tuple[tuple[str, str, int | None], ...]  # outside the layers
    layer: str
    layer_modules: tuple[tuple[str, str, int | None], ...]
    transposed: bool  # kernels are [out, in]
    tied: dict[str, str]  # second name of an array -> its first; if both are stored, they are equal
    ignored: str  # regular expression for tensors that our models do not have


class Place(NamedTuple):
    """A stored tensor's shape, and its place in our parameters: leaf[layer][..., part, :]."""

    shape: tuple[int, ...]
    leaf: str
    layer: int | None
    part: int | None


GPT2 = Layout(
    sizes=("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
    activation=("activation_function", "gelu_new"),
    supported={
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    renamed=((r"^transformer\.", ""),),
    arrays=(("wte.weight", "token_embedding"), ("wpe.weight", "position_embedding")),
    unused_positions=0,
    modules=(("ln_f", "final_norm", None),),
    layer="h",
    layer_modules=(
        ("ln_1", "attention_norm", None),
        ("attn.c_attn", "attention/qkv", None),
        ("attn.c_proj", "attention/out", None),
        ("ln_2", "mlp_norm", None),
        ("mlp.c_fc", "mlp_in", None),
        ("mlp.c_proj", "mlp_out", None),
    ),
    transposed=False,
    tied={"lm_head.weight": "wte.weight"},
    ignored=r"h\.\d+\.attn\.(masked_)?bias",
)
OPT = Layout(
    sizes=(
        *("vocab_size", "max_position_embeddings", "hidden_size"),
        *("num_hidden_layers", "num_attention_heads", "ffn_dim"),
    ),
    activation=("activation_function", "relu"),
    supported={
        "tie_word_embeddings": True,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "enable_bias": True,
    },
    renamed=((r"^(model\.)?decoder\.", ""),),
    arrays=(
        ("embed_tokens.weight", "token_embedding"),
        ("embed_positions.weight", "position_embedding"),
    ),
    unused_positions=2,
    modules=(("final_layer_norm", "final_norm", None),),
    layer="layers",
    layer_modules=(
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
    tied={"lm_head.weight": "embed_tokens.weight"},
    ignored=r"(?!)",
)
BERT = Layout(
    sizes=(
        *("vocab_size", "max_position_embeddings", "hidden_size"),
        *("num_hidden_layers", "num_attention_heads", "intermediate_size"),
    ),
    activation=("hidden_act", "gelu"),
    supported={
        "tie_word_embeddings": True,
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    },
    # Many files still use TensorFlow's names for the layer norms' parameters.
    renamed=((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    arrays=(
        ("embeddings.word_embeddings.weight", "token_embedding"),
        ("embeddings.position_embeddings.weight", "position_embedding"),
        ("embeddings.token_type_embeddings.weight", "type_embedding"),
        ("cls.predictions.bias", "decoder_bias"),
    ),
    unused_positions=0,
    modules=(
        ("embeddings.LayerNorm", "embedding_norm", None),
        ("cls.predictions.transform.dense", "head_dense", None),
        ("cls.predictions.transform.LayerNorm", "head_norm", None),
    ),
    layer="encoder.layer",
    layer_modules=(
        ("attention.self.query", "attention/qkv", 0),
        ("attention.self.key", "attention/qkv", 1),
        ("attention.self.value", "attention/qkv", 2),
        ("attention.output.dense", "attention/out", None),
        ("attention.output.LayerNorm", "attention_norm", None),
        ("intermediate.dense", "mlp_in", None),
        ("output.dense", "mlp_out", None),
        ("output.LayerNorm", "mlp_norm", None),
    ),
    transposed=True,
    tied={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    ignored=r"embeddings\.(position|token_type)_ids|pooler\..*|cls\.seq_relationship\..*",
)


CAUSAL = {"gpt2": GPT2, "opt": OPT}
FAMILIES = {**CAUSAL, "bert": BERT}
ACTIVATIONS = {  # stored name -> ours
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "exact_gelu",
    "relu": "relu",
}


def places(model: CausalTransformer | Bert, layout: Layout) -> Iterator[tuple[str, Place]]:
    """Yield each stored tensor's name, after layout.renamed, and its place, layer by layer."""
    width, mlp_width = model.width, model.mlp_width
    kernels = {
        "stack/attention/qkv": (width, 3 * width),
        "stack/attention/out": (width, width),
        "stack/mlp_in": (width, mlp_width),
        "stack/mlp_out": (mlp_width, width),
        "head_dense": (width, width),
    }
    arrays = {
        "token_embedding": (model.num_tokens, width),
        "position_embedding": (model.max_length + layout.unused_positions, width),
        "decoder_bias": (model.num_tokens,),
    }
    if isinstance(model, Bert):
        arrays["type_embedding"] = (model.num_types, width)

    def module(
        theirs: str, ours: str, layer: int | None, part: int | None
    ) -> Iterator[tuple[str, Place]]:
        shape = (width, width) if part is not None else kernels.get(ours, (width,))
        leaf = f"{ours}/{'kernel' if ours in kernels else 'scale'}"
        stored_shape = shape[::-1] if layout.transposed else shape
        yield f"{theirs}.weight", Place(stored_shape, leaf, layer, part)
        yield f"{theirs}.bias", Place(shape[-1:], f"{ours}/bias", layer, part)

    for theirs, ours in layout.arrays:
        yield theirs, Place(arrays[ours], ours, None, None)
    for theirs, ours, part in layout.modules:
        yield from module(theirs, ours, None, part)
    for layer in range(model.num_layers):
        for theirs, ours, part in layout.layer_modules:
            yield from module(f"{layout.layer}.{layer}.{theirs}", f"stack/{ours}", layer, part)


def read_config(
    config: Any, families: Mapping[str, Layout] = FAMILIES
) -> tuple[CausalTransformer | Bert, Layout]:
    """Return the model that a parsed config.json describes, and the layout of its checkpoint.

    families maps each accepted model_type to its layout. Raises ValueError that names the first
    key whose value is invalid or describes a model that ours do not compute.
    """
    if not isinstance(config, dict):
        raise ValueError("must hold one JSON object")
    layout = families[_choice(config, "model_type", families, None)]
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
            raise ValueError(f"{key}={shown} is not supported; it must be {supported}")
    activation = ACTIVATIONS[
        _choice(config, layout.activation[0], ACTIVATIONS, layout.activation[1])
    ]
    sizes = (num_tokens, max_length, width, num_layers, num_heads, mlp_width)
    if layout is not BERT:
        return CausalTransformer(*sizes, activation), layout
    num_types, epsilon = _size(config, "type_vocab_size"), _epsilon(config)
    return Bert(*sizes, activation, num_types, epsilon), layout


def special_token(config: dict[str, Any], key: str, num_tokens: int) -> int | None:
    """Return the config's token id under `key`, or None if it has none.

    Raises ValueError if the value is not a token of the vocabulary.
    """
    value = config.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < num_tokens):
        raise ValueError(f"{key}={_show(value)} must be null or a token, 0..{num_tokens - 1}")
    return value


def stored_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, by name, that a checkpoint with this config stores.

    Names have no prefix, and a tied tensor appears only under its first name. Raises ValueError
    as read_config does.
    """
    return {name: place.shape for name, place in places(*read_config(config))}


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{key}={_show(value)} must be a positive integer below 2^31")
    return value


def _epsilon(config: dict[str, Any]) -> float:
    value = config.get("layer_norm_eps", 1e-12)
    if type(value) is not float or not 0 < value < math.inf:
        raise ValueError(f"layer_norm_eps={_show(value)} must be a positive number, e.g. 1e-12")
    return value


def _choice(
    config: dict[str, Any], key: str, choices: Mapping[str, Any], default: str | None
) -> str:
    value = config.get(key, default)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{key}={_show(value)} must be one of {', '.join(choices)}")
    return value


def _show(value: Any) -> str:
    """Return the value as one line of JSON, cut to 60 characters."""
    return json.dumps(value)[:60]
