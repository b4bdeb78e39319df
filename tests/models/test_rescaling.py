"""Rescalings change no output, and the least trace over them is the same for every moved model."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

from jaxflat import flatness
from jaxflat.flatness.sampling import draw_probe, signed_score_sampler
from jaxflat.flatness.trace import fisher_moments
from jaxflat.models import enlarge, rescaling, transformer
from jaxflat.models.language_model import make_language_model
from jaxflat.models.lstm import Lstm
from jaxflat.models.transformer import Transformer
from tests.support import tiny_masked_lm as lm
from tests.support.counts import in_full

make_transformer = partial(Transformer, lm.V, lm.T, width=4, num_heads=2)


def make_causal(block, num_layers, tied, head_size=4, width=4):
    """The masked model's tokens: its last word is the causal model's stop symbol."""
    how = {"width": width, "num_layers": num_layers, "head_size": head_size, "tied_decoder": tied}
    return make_language_model(lm.V - 1, lm.T, name="causal", block=block, **how).clone(epsilon=0.0)


MODELS = {
    "one layer, tied": make_transformer(num_layers=1, tied_decoder=True),
    "transformer, tied": make_transformer(num_layers=3, tied_decoder=True),
    "transformer, untied": make_transformer(num_layers=3, tied_decoder=False),
    "lstm, tied": Lstm(lm.V, width=4, num_layers=2, tied_decoder=True),
    "lstm, untied": Lstm(lm.V, width=4, num_layers=1, tied_decoder=False),
    "gpt, tied": make_causal("gpt", 2, tied=True, head_size=2),
    "modern, untied": make_causal("modern", 2, tied=False),
    "modern, tied": make_causal("modern", 1, tied=True),
}


def head_size():
    """Return the size of the model's heads; an LSTM has none."""
    return lm.MODEL.width // getattr(lm.MODEL, "num_heads", 2)


SOME = ("transformer, tied", "lstm, untied", "gpt, tied", "modern, untied")


@pytest.fixture(params=[*SOME, *in_full(*MODELS)])
def model(request, monkeypatch):
    """Replace the tiny language model's; its norms have no epsilon, so rescalings are exact."""
    with jax.enable_x64(True):
        monkeypatch.setitem(transformer.NORM, "epsilon", 0.0)
        monkeypatch.setattr(lm, "MODEL", MODELS[request.param])
        jax.clear_caches()
        yield lm.MODEL
    jax.clear_caches()


def float64(tree):
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def params_and_batches():
    return float64(lm.make_params()), float64(lm.make_batches(2, 4))


def exact_moments(params, batches):
    """Return G, and the moments of vectors g with sum g g' = G."""
    matrix = lm.dense_gauss_newton(params, batches)
    values, vectors = np.linalg.eigh(matrix)
    unravel = ravel_pytree(params)[1]
    roots = jnp.asarray((vectors * np.sqrt(np.maximum(values, 0))).T)
    moments = jax.vmap(lambda g: rescaling.moment_function(head_size())(unravel(g)))(roots)
    return matrix, jax.tree.map(lambda x: x.sum(0), moments)


def random_rescaling(params, seed, largest=4.0):
    return rescaling.random_rescaling(params, jax.random.key(seed), head_size(), largest)


def dense(scales, params):
    """Return T as a matrix."""
    flat, unravel = ravel_pytree(params)
    columns = jax.vmap(lambda e: ravel_pytree(rescaling.rescale(scales, unravel(e)))[0])
    return columns(jnp.eye(flat.size)).T


@pytest.mark.slow
def test_a_rescaling_changes_no_output(model):
    params, batches = params_and_batches()
    batch = jax.tree.map(lambda x: x[0], batches)
    moved = rescaling.rescale(random_rescaling(params, 1), params)
    assert jnp.abs(ravel_pytree(moved)[0] - ravel_pytree(params)[0]).max() > 0.1
    np.testing.assert_allclose(
        lm.logits_fn(moved, batch), lm.logits_fn(params, batch), rtol=1e-10, atol=1e-10
    )
    same = rescaling.rescale(rescaling.no_rescaling(params, head_size()), params)
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("block", ["gpt", "modern"])
@pytest.mark.slow
def test_a_rescaling_of_several_heads_changes_no_causal_prediction(block, monkeypatch):
    monkeypatch.setattr(lm, "MODEL", make_causal(block, 2, tied=False, width=8))
    with jax.enable_x64(True):
        params, batches = params_and_batches()
        batch = jax.tree.map(lambda x: x[0], batches)
        for seed in range(3):
            moved = rescaling.rescale(random_rescaling(params, seed), params)
            assert jnp.abs(ravel_pytree(moved)[0] - ravel_pytree(params)[0]).max() > 0.1
            np.testing.assert_allclose(
                lm.logits_fn(moved, batch), lm.logits_fn(params, batch), atol=1e-10
            )
    jax.clear_caches()


@pytest.mark.slow
def test_random_scales_and_singular_values_fill_their_range(model):
    params, _ = params_and_batches()
    drawn = [random_rescaling(params, seed, largest=3.0) for seed in range(20)]
    for name in drawn[0]["layers"]:
        values = np.stack([scales["layers"][name] for scales in drawn])
        if name in ("read_CxHxExE", "written_HxExE"):
            values = np.linalg.svd(values, compute_uv=False)
        assert 1 / 3 - 1e-9 < values.min() < 0.5 < 2 < values.max() < 3 + 1e-9
    streams = [scales["stream"] for scales in drawn]
    assert 1 / 3 < min(streams) < 0.6 < 1.7 < max(streams) < 3


@pytest.mark.slow
def test_the_moments_give_the_trace_of_every_rescaling(model):
    params, batches = params_and_batches()
    matrix, moments = exact_moments(params, batches)
    for seed in range(3):
        scales = random_rescaling(params, seed)
        moved = dense(scales, params)
        expected = jnp.trace(moved.T @ matrix @ moved)
        np.testing.assert_allclose(rescaling.rescaled_trace(moments, scales), expected, rtol=1e-9)


@pytest.mark.slow
def test_the_least_trace_is_that_of_a_generic_optimiser(model):
    params, batches = params_and_batches()
    _, moments = exact_moments(params, batches)
    flattest = rescaling.flattest_rescaling(moments, params)
    logs, unravel = ravel_pytree(
        {
            "stream": jnp.zeros(()),
            "final_norm_D": jnp.zeros(4),
            "layers": {k: v for k, v in flattest["layers"].items() if k != "written_HxExE"},
        }
    )

    def scales_of(flat):
        """Exponentials of logarithms, and of symmetric matrices."""
        logs = unravel(flat)
        tied = "decoder" not in params
        stream = jnp.exp(logs["stream"]) if tied else flattest["stream"]
        layers = {k: jnp.exp(v) for k, v in logs["layers"].items() if k != "read_CxHxExE"}
        if "read_CxHxExE" in logs["layers"]:
            symmetric = logs["layers"]["read_CxHxExE"]
            symmetric = (symmetric + symmetric.swapaxes(-1, -2)) / 2
            if "position_embedding" not in params:  # rotary positions: A scales pairs
                scale_LxHx1xP = symmetric[:, 0, :, :1, : head_size() // 2]
                pairs_LxHxExE = jnp.eye(head_size())[None, None] * jnp.tile(scale_LxHx1xP, 2)
                symmetric = symmetric.at[:, 0].set(pairs_LxHxExE)
            a, b = jax.scipy.linalg.expm(symmetric[:, 0]), jax.scipy.linalg.expm(symmetric[:, 2])
            layers["read_CxHxExE"] = jnp.stack([a, jnp.linalg.inv(a), b], axis=1)
            layers["written_HxExE"] = jnp.linalg.inv(b)
        gain_D = jnp.full(4, 1 / stream) if tied else jnp.exp(logs["final_norm_D"])
        return {"stream": stream, "final_norm_D": gain_D, "layers": layers}

    objective = jax.jit(
        jax.value_and_grad(lambda flat: rescaling.rescaled_trace(moments, scales_of(flat)))
    )
    least = minimize(objective, np.zeros(logs.size), jac=True, method="L-BFGS-B", tol=1e-12)
    np.testing.assert_allclose(rescaling.rescaled_trace(moments, flattest), least.fun, rtol=1e-4)
    one = rescaling.no_rescaling(params, head_size())
    assert least.fun < 0.95 * rescaling.rescaled_trace(moments, one)


@pytest.mark.slow
def test_the_least_trace_of_a_moved_model_is_the_same(model):
    params, batches = params_and_batches()
    matrix, moments = exact_moments(params, batches)
    least = rescaling.rescaled_trace(moments, rescaling.flattest_rescaling(moments, params))
    hessian = lm.dense_hessian(params, batches)
    own = dense(rescaling.flattest_rescaling(moments, params), params)
    for seed in range(2):
        moved = rescaling.rescale(random_rescaling(params, seed), params)
        moved_matrix, moved_moments = exact_moments(moved, batches)
        flattest = rescaling.flattest_rescaling(moved_moments, moved)
        assert abs(jnp.log(jnp.trace(moved_matrix) / jnp.trace(matrix))) > 1e-3
        np.testing.assert_allclose(
            rescaling.rescaled_trace(moved_moments, flattest), least, rtol=1e-3
        )
        # The Hessian's trace, in the coordinates that the Gauss-Newton matrix chooses. It is a sum
        # of large terms of both signs, so the Gauss-Newton trace sets the scale of the error.
        there = dense(flattest, moved)
        np.testing.assert_allclose(
            jnp.trace(there.T @ lm.dense_hessian(moved, batches) @ there),
            jnp.trace(own.T @ hessian @ own),
            atol=1e-3 * least,
        )


@pytest.mark.parametrize("name", ["transformer, tied", "lstm, untied"])
@pytest.mark.slow
def test_epsilon_moves_the_logits_of_a_rescaled_stream(name, monkeypatch):
    """The stream's scale is exact only without epsilon: the logits of a moved model change."""
    monkeypatch.setattr(lm, "MODEL", MODELS[name])
    params, batch = lm.make_params(), jax.tree.map(lambda x: x[0], lm.make_batches(2, 8))
    one = rescaling.no_rescaling(params, head_size())
    stream = jnp.asarray(0.25)
    gain_D = jnp.full(4, 1.0 if "decoder" in params else 4.0)
    moved = rescaling.rescale(one | {"stream": stream, "final_norm_D": gain_D}, params)
    change = jnp.abs(lm.logits_fn(moved, batch) - lm.logits_fn(params, batch)).max()
    assert 1e-7 < change < 2e-3
    jax.clear_caches()


@pytest.mark.slow
def test_layers_of_zeros_are_left_as_they_are():
    """Only their output biases have a gradient, and those scale with the stream."""
    params, key = lm.make_params(), jax.random.key(0)
    larger = enlarge.enlarge(params, 1, extra_layers=2)
    model = lm.MODEL.clone(num_layers=lm.MODEL.num_layers + 2)

    def log_probs_fn(params, batch):
        inputs = batch["tokens"], batch["lengths"], batch["positions"]
        logits = model.apply({"params": params}, *inputs)[0]
        return jax.nn.log_softmax(logits), batch["weights"]

    moments_1 = fisher_moments(
        log_probs_fn,
        larger,
        lm.make_batches(2, 8),
        key,
        rescaling.moment_function(head_size()),
        num_samples=4,
        num_groups=1,
    )
    moments = jax.tree.map(lambda x: x[0], moments_1)
    flattest = rescaling.flattest_rescaling(moments, larger)["layers"]
    one = rescaling.no_rescaling(larger, head_size())["layers"]
    for name, scales in flattest.items():
        np.testing.assert_allclose(scales[-2:], one[name][-2:], atol=1e-5)
        assert jnp.abs(scales[:-2] - one[name][:-2]).max() > 0.1


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e9])
def test_matrices_of_any_condition_balance_in_float32(condition):
    """tr M P + tr N P^-1 at the returned P, against 2 tr (M^1/2 N M^1/2)^1/2 in float64."""
    random = np.random.default_rng(0)
    turns = [np.linalg.qr(random.normal(size=(8, 8)))[0] for _ in range(2)]
    values = np.geomspace(1, 1 / condition, 8)
    for other in turns:  # the same small directions, and others
        first, second = ((turn * values) @ turn.T for turn in (turns[0], other))
        root, inverse = rescaling._balance_matrices(jnp.float32(first), jnp.float32(second))
        p, inverse_of_p = (np.float64(x) @ np.float64(x) for x in (root, inverse))
        reached = np.trace(first @ p) + np.trace(second @ inverse_of_p)
        square = np.linalg.svd(scipy.linalg.sqrtm(second) @ scipy.linalg.sqrtm(first))[1]
        assert reached < 1.01 * 2 * square.sum()


def rescale_all(scales, index, vector):
    del index
    return rescaling.rescale(scales, vector)


@pytest.mark.parametrize("estimator", ["hessian_trace_samples", "gauss", "hessian_trace_terms"])
@pytest.mark.slow
def test_a_sample_of_a_rescaled_trace_is_the_quadratic_form_of_the_rescaled_probe(estimator):
    params, batches, key = lm.make_params(), lm.make_batches(3, 4), jax.random.key(2)
    scales = random_rescaling(params, 2, largest=2.0)
    options = {"num_probes": 1, "rescale": jax.tree_util.Partial(rescale_all, scales)}
    if estimator == "gauss":
        matrix_of = lm.dense_gauss_newton
        terms = flatness.gauss_newton_trace_samples(
            lm.log_probs_fn, params, batches, key, **options
        )
    else:
        matrix_of = lm.dense_hessian
        terms = getattr(flatness, estimator)(lm.loss_fn, params, batches, key, **options)
    for i in range(3):
        batch = jax.tree.map(lambda x, i=i: x[i : i + 1], batches)
        probe = draw_probe(key, "probes+sentences", jnp.asarray(i), jnp.asarray(0), params)
        z = ravel_pytree(rescaling.rescale(scales, probe))[0]
        sample = sum(leaf[i].sum() for leaf in jax.tree.leaves(terms.terms)) / terms.weights_n[i]
        np.testing.assert_allclose(sample, z @ matrix_of(params, batch) @ z, rtol=2e-3)


@pytest.mark.slow
def test_moments_of_the_fisher_information_give_its_rescaled_traces():
    """The same draws of signs: the mean of |T' g|^2 is the trace, to rounding."""
    params, batches, key = lm.make_params(), lm.make_batches(4, 4), jax.random.key(2)
    batches["weights"] = jnp.ones_like(batches["weights"])  # groups then weigh the same
    moments_2 = fisher_moments(
        lm.log_probs_fn,
        params,
        batches,
        key,
        rescaling.moment_function(head_size()),
        num_samples=3,
        num_groups=2,
    )
    moments = jax.tree.map(lambda x: x.mean(0), moments_2)
    drawn, total = [], 0.0
    for i in range(4):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        score_fn, weight = signed_score_sampler(lm.log_probs_fn, params, jnp.asarray(i), batch)
        drawn += [score_fn(jax.random.fold_in(key, draw)) for draw in range(3)]
        total += 3 * weight
    for seed in range(2):
        scales = random_rescaling(params, seed, largest=2.0)
        transposed = jax.linear_transpose(partial(rescaling.rescale, scales), params)
        squares = [(ravel_pytree(transposed(g))[0] ** 2).sum() for g in drawn]
        trace = rescaling.rescaled_trace(moments, scales)
        np.testing.assert_allclose(trace, sum(squares) / total, rtol=1e-4)


def test_on_a_cpu_no_program_decomposes_a_batch_of_matrices():
    """Two batches at once can take all threads of XLA's pool, and wait for each other forever."""
    shapes = {"qkv_DxCxHxExE": (64, 3, 4, 16, 16), "qkv_bias_CxHxExE": (3, 4, 16, 16)}
    shapes |= {"out_HxExE": (4, 16, 16)}
    layers = {name: jnp.ones((2, 1, *shape), jnp.float32) for name, shape in shapes.items()}
    gains = {"attention_norm_D": jnp.ones((2, 1, 64), jnp.float32)}
    update = jax.vmap(lambda layers, gains: rescaling._update_heads(layers, gains, 1.0))
    program = jax.jit(update).trace(layers, gains).lower(lowering_platforms=("cpu",)).as_text()
    decomposed = re.findall(r"@lapack_\w+\(.*?: \((tensor<[^>]*>)", program)
    assert len(decomposed) >= 2
    assert {*decomposed} == {"tensor<16x16xf32>"}
