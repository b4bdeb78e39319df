"""From a parsed config.json to the model it describes; what we do not compute is refused."""

import json
import math
from collections.abc import Mapping
from typing import Any

from jaxflat.models.bert import Bert
from jaxflat.models.causal import CausalTransformer
from jaxflat.models.huggingface_layout import BERT, GPT2, OPT, Layout, places

CAUSAL = {"gpt2": GPT2, "opt": OPT}
FAMILIES = {**CAUSAL, "bert": BERT}
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "exact_gelu",
    "relu": "relu",
}


def read_config(
    config: Any, families: Mapping[str, Layout] = FAMILIES
) -> tuple[CausalTransformer | Bert, Layout]:
    """Return the model a parsed config.json describes, and how its checkpoint is laid out.

    Raises ValueError naming the first key that is wrong or asks for what we do not compute;
    families has the values of model_type that will do.
    """
    if not isinstance(config, dict):
        raise ValueError("has to hold one JSON object")
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
            raise ValueError(f"{key}={shown} is not supported; it has to be {supported}")
    activation = ACTIVATIONS[
        _choice(config, layout.activation[0], ACTIVATIONS, layout.activation[1])
    ]
    sizes = (num_tokens, max_length, width, num_layers, num_heads, mlp_width)
    if layout is not BERT:
        return CausalTransformer(*sizes, activation), layout
    num_types, epsilon = _size(config, "type_vocab_size"), _epsilon(config)
    return Bert(*sizes, activation, num_types, epsilon), layout


def special_token(config: dict[str, Any], key: str, num_tokens: int) -> int | None:
    """Return a token id of the config, None where it has none.

    Raises ValueError where it is no token of the vocabulary.
    """
    value = config.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < num_tokens):
        raise ValueError(f"{key}={_show(value)} has to be null or a token, 0..{num_tokens - 1}")
    return value


def stored_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter that a checkpoint with this config stores, by its name.

    Names are without prefix and without second names. Raises ValueError as read_config does.
    """
    return {name: place.shape for name, place in places(*read_config(config))}


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{key}={_show(value)} has to be a positive integer below 2^31")
    return value


def _epsilon(config: dict[str, Any]) -> float:
    value = config.get("layer_norm_eps", 1e-12)
    if type(value) is not float or not 0 < value < math.inf:
        raise ValueError(f"layer_norm_eps={_show(value)} has to be a positive number, e.g. 1e-12")
    return value


def _choice(
    config: dict[str, Any], key: str, choices: Mapping[str, Any], default: str | None
) -> str:
    value = config.get(key, default)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{key}={_show(value)} has to be one of {', '.join(choices)}")
    return value


def _show(value: Any) -> str:
    """Return at most 60 characters of JSON, which are one line."""
    return json.dumps(value)[:60]
