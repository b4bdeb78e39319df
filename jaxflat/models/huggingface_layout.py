"""How GPT-2, OPT and BERT checkpoints describe, name and store what our models have."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxflat.models.bert import Bert
from jaxflat.models.causal import CausalTransformer


class Layout(NamedTuple):
    """A family of checkpoints.

    Modules are (their name, our name, and 0, 1, 2 where queries, keys, values stand apart).
    """

    sizes: tuple[str, ...]  # config keys in the order of our models' first fields
    activation: tuple[str, str]  # its config key, and what is meant where there is none
    supported: dict[str, Any]  # the only values we compute; absence means them too
    renamed: tuple[tuple[str, str], ...]  # regular expressions in tensors' names, what they become
    arrays: tuple[tuple[str, str], ...]  # (their name, our name) of parameters in no module
    unused_positions: int  # rows before that of position 0
    modules: tuple[tuple[str, str, int | None], ...]  # outside the layers
    layer: str
    layer_modules: tuple[tuple[str, str, int | None], ...]
    transposed: bool  # kernels are [out, in]
    tied: dict[str, str]  # other names of arrays; one name is enough, under two they have to agree
    ignored: str  # tensors that are no parameters of ours; a regular expression


class Place(NamedTuple):
    """The shape of a stored tensor and where it goes: leaf[layer][..., part, :]."""

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
    # The names of TensorFlow's layer norms are still in many files.
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


def places(model: CausalTransformer | Bert, layout: Layout) -> Iterator[tuple[str, Place]]:
    """Yield every parameter's name, as `renamed` leaves it, and its place; layer by layer."""
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
