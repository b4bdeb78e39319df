"""The rescalings of a Transformer or an Lstm that change no output, and the flattest of them.

A rescaling is a linear map T of the parameters with model(T theta) = model(theta). The model in the
coordinates theta' = T^-1 theta is the same function, and its Hessian and Gauss-Newton matrix are
T' H T and T' G T. So a trace depends on the units of the parameters; its minimum over all T does
not. These are the rescalings of a pre-layer-norm block:

  gains    a channel of a norm times a, and the rows that read it over a
  queries  the queries of a head times A, and its keys times A^-T, for any invertible A
  values   the values of a head times B, and the rows that read them times B^-1
  stream   everything that is written to the residual stream times c; if the decoder is tied to the
           embedding, the final norm over c

A GELU and the gates of an LSTM allow none. The stream's rescaling is exact only for norms without
epsilon. A change of coordinates moves no model, so epsilon plays no part in the traces. A model
that is itself moved changes a little: its epsilon stays. On a trained Transformer of width 16, a
stream scaled by 1/4 changes logits of -4.6 to 6.2 by at most 8e-4, and one scaled by 4 by 5e-5.
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
    random orthogonal U and V. An Lstm ignores head_size.
    """
    log, (scale_key, left_key, right_key, value_key) = jnp.log(largest), jax.random.split(key, 4)

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
        values = draw(value_key, shape)[..., None, :]
        (a, b), (inverse_of_a, inverse_of_b) = (left * values) @ right, (left / values) @ right
        layers["read_CxHxExE"] = jnp.stack([a, inverse_of_a, b], axis=1)
        layers["written_HxExE"] = inverse_of_b.swapaxes(-1, -2)
    if "decoder" not in params:
        scales["final_norm_D"] = jnp.ones_like(scales["final_norm_D"]) / scales["stream"]
    return scales


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
    total = moments["fixed"] + stream**2 * (moments["embeddings"] + layers["written"].sum())
    total += (gain_D**2 * moments["final_norm_D"]).sum()
    total += (moments["decoder_D"] / gain_D**2).sum()
    for norm in _norms(layers):
        squared_LxD = scales[f"{norm}_D"] ** 2
        total += (squared_LxD * layers[f"{norm}_D"]).sum()
        total += (_read(layers, scales, norm) / squared_LxD).sum()
    if "qkv_DxCxHxExE" in layers:
        read, written = _squared_matrices(scales)
        total += (layers["qkv_bias_CxHxExE"] * read).sum()
        total += stream**2 * (layers["out_HxExE"] * written).sum()
    return total


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
        written = moments["embeddings"] + layers["written"].sum()
        if "qkv_DxCxHxExE" in layers:
            scales = _update_heads(layers, scales, stream)
            written += (layers["out_HxExE"] * _squared_matrices(scales)[1]).sum()
        scales = scales | {
            f"{norm}_D": _balance(layers[f"{norm}_D"], _read(layers, scales, norm))
            for norm in _norms(layers)
        }
        if tied:
            stream = _balance(written, moments["final_norm_D"].sum())
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


def _read(layers: Tree, scales: Tree, norm: str) -> jax.Array:
    """Return the moments LxD of the rows that read each channel of a norm."""
    if norm == "attention_norm":
        read = _squared_matrices(scales)[0]
        return jnp.einsum("ldchij,lchij->ld", layers["qkv_DxCxHxExE"], read)
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
    attention, read_CxHxExE = layer["attention"], scales["read_CxHxExE"]
    gain_D, shape = scales["attention_norm_D"], read_CxHxExE.shape[:-1]
    kernel_DxCxHxE = attention["qkv"]["kernel"].reshape(-1, *shape) / gain_D[:, None, None, None]
    qkv = {
        "kernel": jnp.einsum("dche,chef->dchf", kernel_DxCxHxE, read_CxHxExE),
        "bias": jnp.einsum("che,chef->chf", attention["qkv"]["bias"].reshape(shape), read_CxHxExE),
    }
    out_HxExD = attention["out"]["kernel"].reshape(*shape[1:], -1)
    out = {
        "kernel": stream * jnp.einsum("hfe,hed->hfd", scales["written_HxExE"], out_HxExD),
        "bias": stream * attention["out"]["bias"],
    }
    moved["attention"] = jax.tree.map(
        lambda new, old: new.reshape(old.shape), {"qkv": qkv, "out": out}, attention
    )
    moved["attention_norm"] = _times(gain_D, layer["attention_norm"])
    moved["mlp_norm"] = _times(scales["mlp_norm_D"], layer["mlp_norm"])
    mlp_in = layer["mlp_in"]
    moved["mlp_in"] = {**mlp_in, "kernel": mlp_in["kernel"] / scales["mlp_norm_D"][:, None]}
    return moved | {"mlp_out": _times(stream, layer["mlp_out"])}


def _moments(head_size: int, gradient: Tree) -> Tree:
    """Return the products of a gradient; an axis L of layers comes first in "layers"."""
    layers = jax.vmap(partial(_layer_moments, head_size))(_layers(gradient))
    positions = gradient.get("position_embedding", jnp.zeros(()))
    norm_D = _by_channel(gradient["final_norm"])
    decoder = gradient.get("decoder")
    return {
        "fixed": _sum_of_squares(gradient["decoder_bias"]) + layers.pop("fixed").sum(),
        "embeddings": _sum_of_squares([gradient["token_embedding"], positions]),
        "final_norm_D": norm_D,
        "decoder_D": jnp.zeros_like(norm_D) if decoder is None else (decoder**2).sum(1),
        "layers": layers,
    }


def _layer_moments(head_size: int, layer: Tree) -> Tree:
    if "attention" not in layer:
        directions = layer["forward"], layer["backward"]
        return {
            "norm_D": _by_channel(layer["norm"]),
            "norm_read_D": sum((d["input_kernel"] ** 2).sum((1, 2)) for d in directions),
            "written": _sum_of_squares(layer["join"]),
            "fixed": _sum_of_squares([(d["recurrent_kernel"], d["bias"]) for d in directions]),
        }
    qkv, out = layer["attention"]["qkv"], layer["attention"]["out"]
    kernel_DxCxHxE = qkv["kernel"].reshape(qkv["kernel"].shape[0], 3, -1, head_size)
    bias_CxHxE = qkv["bias"].reshape(3, -1, head_size)
    out_HxExD = out["kernel"].reshape(-1, head_size, out["kernel"].shape[-1])
    return {
        "attention_norm_D": _by_channel(layer["attention_norm"]),
        "qkv_DxCxHxExE": jnp.einsum("dchi,dchj->dchij", kernel_DxCxHxE, kernel_DxCxHxE),
        "qkv_bias_CxHxExE": jnp.einsum("chi,chj->chij", bias_CxHxE, bias_CxHxE),
        "out_HxExE": jnp.einsum("hid,hjd->hij", out_HxExD, out_HxExD),
        "mlp_norm_D": _by_channel(layer["mlp_norm"]),
        "mlp_norm_read_D": (layer["mlp_in"]["kernel"] ** 2).sum(1),
        "written": _sum_of_squares([out["bias"], layer["mlp_out"]]),
        "fixed": _sum_of_squares(layer["mlp_in"]["bias"]),
    }


def _by_channel(norm: Tree) -> jax.Array:
    return norm["scale"] ** 2 + norm["bias"] ** 2


def _sum_of_squares(tree: Any) -> jax.Array:
    return jnp.stack([(leaf**2).sum() for leaf in jax.tree.leaves(tree)]).sum()
