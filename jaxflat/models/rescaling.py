"""The rescalings of a model that change no output, and the flattest of them.

A rescaling is a linear map T of the parameters with model(T theta) = model(theta). The model in the
coordinates theta' = T^-1 theta is the same function, and its Hessian and Gauss-Newton matrix are
T' H T and T' G T. So a trace depends on the units of the parameters; its minimum over all T does
not. These are the rescalings of a block of Transformer, Lstm or CausalTransformer that normalises
its input by layer norms or RMS norms:

  gains    a channel of a norm times a, and the rows that read it over a
  queries  the queries of a head times A, and its keys times A^-T, for any invertible A
  values   the values of a head times B, and the rows that read them times B^-1
  neurons  the input of a gated neuron times u, and its output over u; the gate is fixed
  stream   everything that is written to the residual stream times c; if the decoder is tied to the
           embedding, the final norm over c

A GELU and the gates of an LSTM allow none. Rotary positions turn each pair (x_i, x_{i + E/2}) of a
query and a key. So A must commute with these turns: it turns and scales each pair, as a complex
number does. The trace depends on the scales alone, not on the turns. Models without a position
embedding are taken to have rotary positions.

The stream's rescaling is exact only for norms without epsilon. A change of coordinates moves no
model, so epsilon plays no part in the traces. A model that is itself moved changes a little: its
epsilon stays. On a trained Transformer of width 16, a stream scaled by 1/4 changes logits of -4.6
to 6.2 by at most 8e-4, and one scaled by 4 by 5e-5.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

NUM_UPDATES = 10  # of each scale; 3 already give 5 digits of the minimum
LARGEST = 1e6  # of a squared scale, and 1 / LARGEST the least: where a minimum is at infinity
FLOOR = 1e-6  # of a head's mean moment: directions without a sampled gradient count as this small

Tree = dict[str, Any]


def rescale(rescaling: Tree, vector: Tree) -> Tree:
    """Return T v for a vector v that is shaped like the parameters."""
    gain_D, stream = rescaling["final_norm_D"], rescaling["stream"]
    moved = {**vector, "final_norm": _times(gain_D, vector["final_norm"])}
    for name in ("token_embedding", "position_embedding"):
        if name in vector:
            moved[name] = stream * vector[name]
    if "decoder" in vector:
        moved["decoder"] = vector["decoder"] / gain_D[:, None]
    layers = jax.vmap(_rescale_layer, in_axes=(0, None, 0))(
        rescaling["layers"], stream, _layers(vector)
    )
    if "last" not in vector:
        return moved | {"stack": layers}
    moved["last"] = jax.tree.map(lambda leaf: leaf[-1], layers)
    if "stack" in vector:
        moved["stack"] = jax.tree.map(lambda leaf: leaf[:-1], layers)
    return moved


def no_rescaling(params: Tree, head_size: int) -> Tree:
    """Return the rescaling T = 1 of a model with these parameters."""
    layers = jax.eval_shape(moment_function(head_size), params)["layers"]
    return _initial(layers, params["final_norm"]["scale"].shape[0], jnp.ones(()))


@partial(jax.jit, static_argnums=2)
def random_rescaling(params: Tree, key: jax.Array, head_size: int, largest: float) -> Tree:
    """Return a random rescaling, all of whose scales lie between 1 / largest and largest.

    Logarithms of scales are uniform. The matrices of a head are U diag(s) V' with scales s and
    random orthogonal U and V. With rotary positions A turns and scales each pair at random. An
    Lstm ignores head_size.
    """
    log = jnp.log(largest)
    scale_key, left_key, right_key, value_key = jax.random.split(key, 4)

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.exp(jax.random.uniform(key, shape, minval=-log, maxval=log))

    one, structure = jax.tree.flatten(no_rescaling(params, head_size))
    keys = jax.random.split(scale_key, len(one))
    scales = structure.unflatten([draw(k, x.shape) for k, x in zip(keys, one, strict=True)])
    layers = scales["layers"]
    if "written_HxExE" in layers:
        shape = (2, *layers["written_HxExE"].shape[:-1])  # two matrices for every head
        left, right = (
            jax.random.orthogonal(k, shape[-1], shape[:-1]) for k in (left_key, right_key)
        )
        values = draw(value_key, shape)
        if _is_rotary(params):
            left = left.at[0].set(_random_turns(jax.random.fold_in(left_key, 1), shape[1:]))
            right = right.at[0].set(jnp.broadcast_to(jnp.eye(head_size), right.shape[1:]))
            values = values.at[0].set(jnp.tile(values[0, ..., : head_size // 2], 2))
        values = values[..., None, :]
        (a, b), (inverse_of_a, inverse_of_b) = (left * values) @ right, (left / values) @ right
        layers["read_CxHxExE"] = jnp.stack([a, inverse_of_a, b], axis=1)
        layers["written_HxExE"] = inverse_of_b.swapaxes(-1, -2)
    if "decoder" not in params:
        scales["final_norm_D"] = jnp.ones_like(scales["final_norm_D"]) / scales["stream"]
    return scales


def _is_rotary(tree: Tree) -> bool:
    """Say whether the model of a tree of parameters has rotary positions, if it has attention."""
    return "position_embedding" not in tree


def _random_turns(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return a matrix for each vector of this shape; it turns each pair by a random angle."""
    angles = jax.random.uniform(key, (*shape[:-1], shape[-1] // 2), maxval=2 * jnp.pi)
    identity = jnp.eye(angles.shape[-1])
    cos, sin = (jnp.einsum("...i,ij->...ij", f(angles), identity) for f in (jnp.cos, jnp.sin))
    return jnp.concatenate(
        [jnp.concatenate([cos, sin], axis=-1), jnp.concatenate([-sin, cos], axis=-1)], axis=-2
    )


@cache
def moment_function(head_size: int) -> Callable[[Tree], Tree]:
    """Return a function of gradients: the products whose means `flattest_rescaling` needs.

    The means give tr T' G T for every T. An Lstm has no heads, so its head_size is ignored.
    """
    return partial(_moments, head_size)


def rescaled_trace(moments: Tree, rescaling: Tree) -> jax.Array:
    """Return tr T' G T from moments of gradients with E[g g'] = G."""
    stream, layers, scales = rescaling["stream"], moments["layers"], rescaling["layers"]
    gain_D = rescaling["final_norm_D"]
    total = moments["fixed"] + stream**2 * _written(moments, scales)
    total += (gain_D**2 * moments["final_norm_D"]).sum()
    total += (moments["decoder_D"] / gain_D**2).sum()
    for norm in _norms(layers):
        squared_LxD = scales[f"{norm}_D"] ** 2
        total += (squared_LxD * layers[f"{norm}_D"]).sum()
        total += (_read(layers, scales, norm) / squared_LxD).sum()
    if "qkv_DxCxHxExE" in layers:
        total += (layers["qkv_bias_CxHxExE"] * _squared_matrices(scales)[0]).sum()
    if "mlp_in_DxF" in layers:
        total += (layers["mlp_in_bias_F"] * scales["mlp_in_F"] ** 2).sum()
    return total


def _written(moments: Tree, scales: Tree) -> jax.Array:
    """Return the moments of all that is written to the stream, given the layers' scales."""
    layers = moments["layers"]
    written = moments["embeddings"] + layers["written"].sum()
    if "qkv_DxCxHxExE" in layers:
        written += (layers["out_HxExE"] * _squared_matrices(scales)[1]).sum()
    if "mlp_in_DxF" in layers:
        written += (layers["mlp_out_F"] / scales["mlp_in_F"] ** 2).sum()
    return written


@jax.jit
def flattest_rescaling(moments: Tree, params: Tree) -> Tree:
    """Return the rescaling that minimises tr T' G T.

    Each scale in turn takes its best value given the others. A gain a has the moments n and its
    rows w: a^2 n + w / a^2 is least at a^2 = sqrt(w / n). A head has the moments M of its queries
    and N of its keys: tr M P + tr N P^-1 is least at P = M^-1/2 (M^1/2 N M^1/2)^1/2 M^-1/2. The
    trace is geodesically convex in all scales together, so this ends at its minimum (Bhatia,
    Positive Definite Matrices, chapter 6).

    An untied decoder leaves the stream's scale free: the smaller, the smaller the trace. The stream
    then gets the units in which entries of the token embedding have mean square 1. Where no
    gradient constrains a scale it is 1.
    """
    layers, tied = moments["layers"], "decoder" not in params
    embedding_rms = jnp.sqrt(jnp.mean(params["token_embedding"] ** 2))
    initial = _initial(layers, len(moments["final_norm_D"]), 1.0 if tied else embedding_rms)

    def update(_: Any, state: tuple[Tree, jax.Array]) -> tuple[Tree, jax.Array]:
        scales, stream = state
        if "qkv_DxCxHxExE" in layers:
            scales = _update_heads(layers, scales, stream)
        if "mlp_in_DxF" in layers:
            scales = _update_neurons(layers, scales, stream)
        scales = scales | {
            f"{norm}_D": _balance(layers[f"{norm}_D"], _read(layers, scales, norm))
            for norm in _norms(layers)
        }
        if tied:
            stream = _balance(_written(moments, scales), moments["final_norm_D"].sum())
        return scales, stream

    state = initial["layers"], initial["stream"]
    scales, stream = jax.lax.fori_loop(0, NUM_UPDATES, update, state)
    gain_D = _balance(moments["final_norm_D"], moments["decoder_D"])
    final_norm_D = jnp.full_like(gain_D, 1 / stream) if tied else gain_D
    return {"stream": stream, "final_norm_D": final_norm_D, "layers": scales}


def _initial(layers: Tree, width: int, stream: float | jax.Array) -> Tree:
    """Return the rescaling that changes the stream alone."""
    num_layers = layers["written"].shape[0]
    scales = {f"{norm}_D": jnp.ones((num_layers, width)) for norm in _norms(layers)}
    if "qkv_DxCxHxExE" in layers:
        for name, like in (("read_CxHxExE", "qkv_bias_CxHxExE"), ("written_HxExE", "out_HxExE")):
            shape = layers[like].shape
            scales[name] = jnp.broadcast_to(jnp.eye(shape[-1]), shape)
    if "mlp_in_DxF" in layers:
        scales["mlp_in_F"] = jnp.ones(layers["mlp_out_F"].shape)
    stream = jnp.asarray(stream, jnp.result_type(float))
    return {"stream": stream, "final_norm_D": jnp.ones(width), "layers": scales}


def _update_heads(layers: Tree, scales: Tree, stream: jax.Array) -> Tree:
    """Return the scales with the best A and B of every head, given the gains and the stream."""
    gain_LxD = scales["attention_norm_D"]
    moments_LxCxHxExE = jnp.einsum("ldchij,ld->lchij", layers["qkv_DxCxHxExE"], gain_LxD**-2.0)
    moments_LxCxHxExE += layers["qkv_bias_CxHxExE"]
    queries, keys, values = (moments_LxCxHxExE[:, part] for part in range(3))
    a, inverse_of_a = _balance_matrices(queries, keys)
    b, inverse_of_b = _balance_matrices(values, stream**2 * layers["out_HxExE"])
    read = jnp.stack([a, inverse_of_a, b], axis=1)
    return scales | {"read_CxHxExE": read, "written_HxExE": inverse_of_b}


def _update_neurons(layers: Tree, scales: Tree, stream: jax.Array) -> Tree:
    """Return the scales with the best u of every gated neuron, given the gains and the stream."""
    read_LxF = jnp.einsum("ldf,ld->lf", layers["mlp_in_DxF"], scales["mlp_norm_D"] ** -2.0)
    read_LxF += layers["mlp_in_bias_F"]
    return scales | {"mlp_in_F": _balance(read_LxF, stream**2 * layers["mlp_out_F"])}


def _read(layers: Tree, scales: Tree, norm: str) -> jax.Array:
    """Return the moments LxD of the rows that read each channel of a norm."""
    if norm == "attention_norm":
        read = _squared_matrices(scales)[0]
        return jnp.einsum("ldchij,lchij->ld", layers["qkv_DxCxHxExE"], read)
    if norm == "mlp_norm" and "mlp_in_DxF" in layers:
        neurons_LxF = scales["mlp_in_F"] ** 2
        read_LxD = jnp.einsum("ldf,lf->ld", layers["mlp_in_DxF"], neurons_LxF)
        return read_LxD + layers["mlp_norm_read_D"]
    return layers[f"{norm}_read_D"]


def _squared_matrices(scales: Tree) -> tuple[jax.Array, jax.Array]:
    """Return R' R for the matrices R of queries, keys and values; W W' for W of written rows."""
    read, written = scales["read_CxHxExE"], scales["written_HxExE"]
    return read.swapaxes(-1, -2) @ read, written @ written.swapaxes(-1, -2)


def _balance(times: jax.Array, over: jax.Array) -> jax.Array:
    """Return the s that minimises s^2 times + over / s^2; 1 where both are 0."""
    tiny = jnp.finfo(times.dtype).tiny
    squared = jnp.sqrt((over + tiny) / (times + tiny))
    return jnp.sqrt(jnp.clip(squared, 1 / LARGEST, LARGEST))


def _balance_matrices(times: jax.Array, over: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return P^1/2 and P^-1/2 for the P that minimises tr(times P) + tr(over P^-1)."""
    root, inverse_root = _powers(_floored(times))
    over_root, _ = _powers(_floored(over))
    # The singular values of a product of roots: to square it would lose half of the digits.
    _, values, vectors = _each(jnp.linalg.svd, "(n,n)->(n,n),(n),(n,n)", over_root @ root)
    middle = (vectors.swapaxes(-1, -2) * values[..., None, :]) @ vectors
    return _powers(inverse_root @ middle @ inverse_root, 1 / LARGEST, LARGEST)


def _floored(matrix: jax.Array) -> jax.Array:
    """Add FLOOR of its mean eigenvalue to a matrix, or a tiny number if that is 0."""
    mean = jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None] / matrix.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(matrix.shape[-1]), matrix.shape)
    return matrix + jnp.maximum(FLOOR * mean, jnp.finfo(matrix.dtype).tiny ** 0.5) * identity


def _each(decompose: Callable[..., Any], signature: str, matrices: jax.Array) -> Any:
    """Decompose matrices; on CPUs one at a time.

    On CPUs a batch waits for other threads of the pool that runs it. Two batches at once can take
    them all, and then wait forever (jaxlib 0.10.2, ParallelBatchMap).
    """
    one_at_a_time = jax.custom_batching.sequential_vmap(lambda matrix: tuple(decompose(matrix)))
    return jax.lax.platform_dependent(
        matrices,
        cpu=jnp.vectorize(one_at_a_time, signature=signature),
        default=lambda matrices: tuple(decompose(matrices)),
    )


def _powers(
    matrix: jax.Array, least: float = 0.0, largest: float = float("inf")
) -> tuple[jax.Array, jax.Array]:
    """Return the square root of positive definite matrices and its inverse; clip eigenvalues."""
    symmetric = (matrix + matrix.swapaxes(-1, -2)) / 2
    values, vectors = _each(jnp.linalg.eigh, "(n,n)->(n),(n,n)", symmetric)
    values = jnp.clip(values, max(least, float(jnp.finfo(values.dtype).tiny)), largest)
    roots, transposed = jnp.sqrt(values)[..., None, :], vectors.swapaxes(-1, -2)
    return (vectors * roots) @ transposed, (vectors / roots) @ transposed


def _layers(tree: Tree) -> Tree:
    """Return the layers of a model's parameters, stacked on axis 0, the last one included."""
    if "last" not in tree:
        return tree["stack"]
    last = jax.tree.map(lambda leaf: leaf[None], tree["last"])
    if "stack" not in tree:
        return last
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), tree["stack"], last)


def _norms(layer: Tree) -> tuple[str, ...]:
    return ("attention_norm", "mlp_norm") if "qkv_DxCxHxExE" in layer else ("norm",)


def _times(factor: jax.Array, tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: factor * leaf, tree)


def _rescale_layer(scales: Tree, stream: jax.Array, layer: Tree) -> Tree:
    moved = dict(layer)
    if "attention" not in layer:
        gain_D = scales["norm_D"]
        moved["norm"] = _times(gain_D, layer["norm"])
        for direction in ("forward", "backward"):
            kernel_Dx4xE = layer[direction]["input_kernel"] / gain_D[:, None, None]
            moved[direction] = {**layer[direction], "input_kernel": kernel_Dx4xE}
        return moved | {"join": _times(stream, layer["join"])}
    moved["attention"] = _rescale_attention(scales, stream, layer["attention"])
    moved["attention_norm"] = _times(scales["attention_norm_D"], layer["attention_norm"])
    moved["mlp_norm"] = _times(scales["mlp_norm_D"], layer["mlp_norm"])
    moved["mlp_out"] = _times(stream, layer["mlp_out"])
    for name in {"mlp_in", "mlp_gate"} & layer.keys():
        kernel_DxF = layer[name]["kernel"] / scales["mlp_norm_D"][:, None]
        moved[name] = {**layer[name], "kernel": kernel_DxF}
    if "mlp_gate" in layer:
        moved["mlp_in"] = jax.tree.map(
            lambda leaf: jnp.einsum("...f,f->...f", leaf, scales["mlp_in_F"]), moved["mlp_in"]
        )
        moved["mlp_out"]["kernel"] = moved["mlp_out"]["kernel"] / scales["mlp_in_F"][:, None]
    return moved


def _rescale_attention(scales: Tree, stream: jax.Array, attention: Tree) -> Tree:
    read_CxHxExE, gain_D = scales["read_CxHxExE"], scales["attention_norm_D"]
    qkv, out = attention["qkv"], attention["out"]
    read = qkv | {"kernel": qkv["kernel"] / gain_D[:, None, None]}

    def rescale_read(leaf: jax.Array) -> jax.Array:  # a kernel has D rows, a bias is one
        rows_NxCxHxE = leaf.reshape(-1, *read_CxHxExE.shape[:-1])
        return jnp.einsum("nche,chef->nchf", rows_NxCxHxE, read_CxHxExE).reshape(leaf.shape)

    kernel_HxExD = out["kernel"].reshape(*read_CxHxExE.shape[1:-1], -1)
    kernel_HxExD = jnp.einsum("hfe,hed->hfd", scales["written_HxExE"], kernel_HxExD)
    written = out | {"kernel": kernel_HxExD.reshape(out["kernel"].shape)}
    return {"qkv": jax.tree.map(rescale_read, read), "out": _times(stream, written)}


def _moments(head_size: int, gradient: Tree) -> Tree:
    """Return the products of a gradient; an axis L of layers comes first in "layers"."""
    of_layer = partial(_layer_moments, head_size, _is_rotary(gradient))
    layers = jax.vmap(of_layer)(_layers(gradient))
    positions = gradient.get("position_embedding", jnp.zeros(()))
    bias = gradient.get("decoder_bias", jnp.zeros(()))
    norm_D = _by_channel(gradient["final_norm"])
    decoder = gradient.get("decoder")
    return {
        "fixed": _sum_of_squares(bias) + layers.pop("fixed").sum(),
        "embeddings": _sum_of_squares([gradient["token_embedding"], positions]),
        "final_norm_D": norm_D,
        "decoder_D": jnp.zeros_like(norm_D) if decoder is None else (decoder**2).sum(1),
        "layers": layers,
    }


def _layer_moments(head_size: int, rotary: bool, layer: Tree) -> Tree:
    if "attention" not in layer:
        directions = layer["forward"], layer["backward"]
        return {
            "norm_D": _by_channel(layer["norm"]),
            "norm_read_D": sum((d["input_kernel"] ** 2).sum((1, 2)) for d in directions),
            "written": _sum_of_squares(layer["join"]),
            "fixed": _sum_of_squares([(d["recurrent_kernel"], d["bias"]) for d in directions]),
        }
    out = layer["attention"]["out"]
    out_HxExD = out["kernel"].reshape(-1, head_size, out["kernel"].shape[-1])
    return {
        "attention_norm_D": _by_channel(layer["attention_norm"]),
        "mlp_norm_D": _by_channel(layer["mlp_norm"]),
        "out_HxExE": jnp.einsum("hid,hjd->hij", out_HxExD, out_HxExD),
        **_qkv_moments(head_size, rotary, layer["attention"]["qkv"]),
        **(_gated_moments if "mlp_gate" in layer else _mlp_moments)(layer, _bias(out)),
    }


def _qkv_moments(head_size: int, rotary: bool, qkv: Tree) -> Tree:
    width = qkv["kernel"].shape[0]
    kernel_DxCxHxE = qkv["kernel"].reshape(width, 3, -1, head_size)
    bias_CxHxE = jnp.broadcast_to(_bias(qkv), qkv["kernel"].shape[1:]).reshape(3, -1, head_size)
    kernel_DxCxHxExE = jnp.einsum("dchi,dchj->dchij", kernel_DxCxHxE, kernel_DxCxHxE)
    bias_CxHxExE = jnp.einsum("chi,chj->chij", bias_CxHxE, bias_CxHxE)
    moments = {"qkv_DxCxHxExE": kernel_DxCxHxExE, "qkv_bias_CxHxExE": bias_CxHxExE}
    return jax.tree.map(_mean_over_turns, moments) if rotary else moments


def _mean_over_turns(moments_xCxHxExE: jax.Array) -> jax.Array:
    """Replace the moments M of queries and keys by the mean of R' M R over all turns R of pairs.

    tr M P stays for each P that turns commute with. The best P of all, given these means, is such.
    """
    moments_xQxHxExE, values_x1xHxExE = jnp.split(moments_xCxHxExE, [2], axis=-4)
    squares_xQxHxE = jnp.diagonal(moments_xQxHxExE, axis1=-2, axis2=-1)
    pairs_xQxHx2xP = squares_xQxHxE.reshape(*squares_xQxHxE.shape[:-1], 2, -1)
    means_xQxHxE = jnp.broadcast_to(
        pairs_xQxHx2xP.mean(-2, keepdims=True), pairs_xQxHx2xP.shape
    ).reshape(squares_xQxHxE.shape)
    identity_ExE = jnp.eye(means_xQxHxE.shape[-1], dtype=means_xQxHxE.dtype)
    mean_xQxHxExE = jnp.einsum("...i,ij->...ij", means_xQxHxE, identity_ExE)
    return jnp.concatenate([mean_xQxHxExE, values_x1xHxExE], axis=-4)


def _mlp_moments(layer: Tree, attention_bias: jax.Array) -> Tree:
    return {
        "mlp_norm_read_D": (layer["mlp_in"]["kernel"] ** 2).sum(1),
        "written": _sum_of_squares([attention_bias, layer["mlp_out"]]),
        "fixed": _sum_of_squares(_bias(layer["mlp_in"])),
    }


def _gated_moments(layer: Tree, attention_bias: jax.Array) -> Tree:
    kernel_DxF, kernel_FxD = layer["mlp_in"]["kernel"], layer["mlp_out"]["kernel"]
    return {
        "mlp_norm_read_D": (layer["mlp_gate"]["kernel"] ** 2).sum(1),
        "mlp_in_DxF": kernel_DxF**2,
        "mlp_in_bias_F": jnp.broadcast_to(_bias(layer["mlp_in"]) ** 2, kernel_FxD.shape[:1]),
        "mlp_out_F": (kernel_FxD**2).sum(1),
        "written": _sum_of_squares([attention_bias, _bias(layer["mlp_out"])]),
        "fixed": _sum_of_squares(_bias(layer["mlp_gate"])),
    }


def _bias(module: Tree) -> jax.Array:
    return module.get("bias", jnp.zeros((), module["kernel"].dtype))


def _by_channel(norm: Tree) -> jax.Array:
    squares_D = norm["scale"] ** 2
    return squares_D + norm["bias"] ** 2 if "bias" in norm else squares_D


def _sum_of_squares(tree: Any) -> jax.Array:
    return jnp.stack([(leaf**2).sum() for leaf in jax.tree.leaves(tree)]).sum()
