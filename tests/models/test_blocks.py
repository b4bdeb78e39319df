"""Every parameter of every model has its block and its kind."""

import jax
import numpy as np
import pytest

from jaxflat.models.bert import Bert
from jaxflat.models.blocks import block_of, is_stacked, kind_of
from jaxflat.models.causal import CausalTransformer
from jaxflat.models.language_model import make_language_model
from jaxflat.models.lstm import Lstm
from jaxflat.models.transformer import Transformer

V, P, D, F, L = 5, 4, 6, 10, 3
TOKENS_BxT, LENGTHS_B = np.zeros((2, P - 1), np.int32), np.full(2, P - 1, np.int32)
EMBEDDINGS = {"token_embedding", "position_embedding"}
MODELS = {
    "Transformer": (
        Transformer(V, P, D, L, num_heads=2, tied_decoder=False),
        {0: "layer_0", 1: "layer_1", None: "layer_last"},
        EMBEDDINGS | {"final_norm", "decoder", "decoder_bias"},
    ),
    "CausalTransformer": (
        CausalTransformer(V, P, D, L, 2, F, "gelu"),
        {0: "layer_0", 1: "layer_1", 2: "layer_2"},
        EMBEDDINGS | {"final_norm"},
    ),
    "Bert": (
        Bert(V, P, D, L, 2, F, "exact_gelu", num_types=2, epsilon=1e-12),
        {0: "layer_0", 1: "layer_1", 2: "layer_2"},
        EMBEDDINGS
        | {"type_embedding", "embedding_norm", "head_dense", "head_norm", "decoder_bias"},
    ),
}


def leaves_of(model) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its path; stacked layers are listed one by one."""
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BxT, LENGTHS_B)["params"]
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if is_stacked(name):
            leaves |= {f"{name}/{i}": leaf.shape[1:] for i in range(leaf.shape[0])}
        else:
            leaves[name] = leaf.shape
    return leaves


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_the_parts_of_layers_and_what_is_outside_of_them(name):
    model, layers, outside = MODELS[name]
    parts = {
        f"{layer}.{part}" for layer in layers.values() for part in ("attention", "mlp", "norm")
    }
    assert {block_of(path) for path in leaves_of(model)} == parts | outside


@pytest.mark.parametrize("name", MODELS)
def test_no_block_has_the_name_of_a_kind(name):
    """Measures of both stand side by side, as hessian_trace/NAME."""
    paths = leaves_of(MODELS[name][0])
    assert not {block_of(path) for path in paths} & {kind_of(path) for path in paths}


@pytest.mark.parametrize("name", MODELS)
def test_kinds_have_the_sizes_of_their_parts(name):
    model, layers, _ = MODELS[name]
    mlp_width = 4 * D if name == "Transformer" else F
    num_norms = 2 * len(layers) + (2 if name == "Bert" else 1)
    found: dict[str, int] = {}
    for path, shape in leaves_of(model).items():
        found[kind_of(path)] = found.get(kind_of(path), 0) + int(np.prod(shape))
    assert found == {
        "attention": L * 4 * D * D,
        "mlp": L * 2 * D * mlp_width,
        "norm": num_norms * D,
        **{
            "Transformer": {
                "embedding": (V + 3 + P) * D,  # pad, mask, CLS
                "bias": L * (4 * D + mlp_width + D) + num_norms * D + V,
                "head": D * V,
            },
            "CausalTransformer": {
                "embedding": (V + P) * D,
                "bias": L * (4 * D + mlp_width + D) + num_norms * D,
            },
            "Bert": {
                "embedding": (V + P + 2) * D,
                "bias": L * (4 * D + mlp_width + D) + num_norms * D + D + V,
                "head": D * D,
            },
        }[name],
    }


def test_a_stacked_parameter_is_of_the_kind_of_its_layers():
    paths = {path: path.rpartition("/")[0] for path in leaves_of(MODELS["Bert"][0])}
    assert all(kind_of(path) == kind_of(whole) for path, whole in paths.items() if is_stacked(path))


def test_a_gated_transformer_without_biases_and_learned_positions_has_four_kinds():
    changes = {"norm": "rms_norm", "rotary_base": 1e4, "use_bias": False}
    leaves = leaves_of(CausalTransformer(V, P, D, L, 3, F, "swiglu", **changes))
    found: dict[str, int] = {}
    for path, shape in leaves.items():
        found[kind_of(path)] = found.get(kind_of(path), 0) + int(np.prod(shape))
    assert found == {
        "attention": L * 4 * D * D,
        "mlp": L * 3 * D * F,
        "norm": (2 * L + 1) * D,
        "embedding": V * D,
    }
    assert block_of("stack/mlp_gate/kernel/1") == "layer_1.mlp"


@pytest.mark.parametrize(("block", "bias"), [("gpt", True), ("modern", False)])
def test_an_untied_causal_model_has_a_head(block, bias):
    how = {"width": D, "num_layers": L, "head_size": 2, "tied_decoder": False}
    leaves = leaves_of(make_language_model(V, P, name="causal", block=block, **how))
    layers = {f"layer_{i}.{part}" for i in range(L) for part in ("attention", "mlp", "norm")}
    outside = {"token_embedding", "final_norm", "decoder"} | (
        {"position_embedding"} if bias else set()
    )
    assert {block_of(path) for path in leaves} == layers | outside
    kinds = {kind_of(path) for path in leaves}
    assert kinds == {"attention", "mlp", "norm", "embedding", "head"} | (
        {"bias"} if bias else set()
    )
    assert kind_of("decoder") == "head"
    assert leaves["decoder"] == (D, V + 1)


def test_an_lstms_parameters_are_of_its_directions_and_what_joins_them():
    leaves = leaves_of(Lstm(V, D, L, tied_decoder=False))
    layers = ("layer_0", "layer_1", "layer_last")
    parts = {f"{layer}.{x}" for layer in layers for x in ("forward", "backward", "join", "norm")}
    outside = {"token_embedding", "final_norm", "decoder", "decoder_bias"}
    assert {block_of(path) for path in leaves} == parts | outside
    assert not {block_of(path) for path in leaves} & {kind_of(path) for path in leaves}
    found: dict[str, int] = {}
    for path, shape in leaves.items():
        found[kind_of(path)] = found.get(kind_of(path), 0) + int(np.prod(shape))
    assert found == {
        "recurrent": L * 2 * 2 * 4 * D * D,
        "projection": L * 2 * D * D,
        "norm": (L + 1) * D,
        "embedding": (V + 3) * D,  # pad, mask, CLS
        "bias": L * (2 * 4 * D + D) + (L + 1) * D + V,
        "head": D * V,
    }
