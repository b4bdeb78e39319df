"""Loss and Hessian of downloaded models, by transformers and PyTorch's automatic derivatives."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.distributed import preemption
from jaxflat.flatness import hessian_trace, mean_loss
from jaxflat.measure import __main__ as measure
from jaxflat.measure.texts import text_subject
from tests.support.tiny_checkpoints import BERT, GPT2, OPT, write_tokenizer

SMALL = {
    "gpt2": {**GPT2, "n_layer": 1},
    "opt": {**OPT, "num_hidden_layers": 1},
    "bert": {**BERT, "num_hidden_layers": 1},
}
SETTINGS = {"num_microbatches": 12, "microbatch_size": 2, "num_probes": 16, "by_block": False}


def build(torch, transformers, name, folder):
    """Save a model of transformers with random parameters, and texts for it."""
    config_class, model_class = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "opt": (transformers.OPTConfig, transformers.OPTForCausalLM),
        "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
    }[name]
    keywords = {key: value for key, value in SMALL[name].items() if key != "model_type"}
    torch.manual_seed(0)
    theirs = model_class(config_class(**keywords)).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # it would drop part of the gradient of one token
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    write_tokenizer(folder)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 13, rng.integers(2, 8)).tolist() for _ in range(24)]
    (folder / "texts.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    return theirs


def their_inputs(torch, name, batches):
    """Return the inputs of transformers: tokens, the attention mask, and labels or -100."""
    flat = [np.asarray(x, np.int64).reshape(-1, x.shape[-1]) for x in batches]
    tokens_NxT, lengths_N = flat[0], flat[1].ravel()
    real_NxT = np.arange(tokens_NxT.shape[1])[None] < lengths_N[:, None]
    labels_NxT = np.where(real_NxT, tokens_NxT, -100)
    if name == "bert":
        labels_NxT[:] = -100
        np.put_along_axis(labels_NxT, flat[2], flat[3], axis=1)
    named = {"input_ids": tokens_NxT, "attention_mask": real_NxT, "labels": labels_NxT}
    return {key: torch.tensor(value.astype(np.int64)) for key, value in named.items()}


def their_hessian(torch, theirs, name, inputs):
    """Return the dense Hessian over all parameters, by double backward."""
    parameters = list(theirs.parameters())  # tied parameters appear once

    def flat(gradients):
        pairs = zip(gradients, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).ravel() for g, p in pairs])

    # The model's own loss would round the logits to float32.
    labels_NxT = inputs["labels"]
    # "eager" attention rounds to float32 too, and fused attention has no second derivatives.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits_NxTxV = theirs(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    if name != "bert":
        labels_NxT, logits_NxTxV = labels_NxT[:, 1:], logits_NxTxV[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits_NxTxV.flatten(0, 1), labels_NxT.flatten())
    slopes_P = flat(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))
    directions_PxP = torch.eye(len(slopes_P), dtype=slopes_P.dtype)
    rows = torch.autograd.grad(
        slopes_P, parameters, directions_PxP, is_grads_batched=True, allow_unused=True
    )
    P = len(slopes_P)
    zeros_P = torch.zeros(P, dtype=slopes_P.dtype)
    blocks = [
        zeros_P[:, None].expand(P, p.numel()) if x is None else x.flatten(1)
        for x, p in zip(rows, parameters, strict=True)
    ]
    return torch.cat(blocks, 1).numpy()


@jax.enable_x64(True)
def our_hessian(problem):
    batches = problem.sample(0)
    flat_P, unravel = ravel_pytree(
        jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), problem.params)
    )

    @jax.jit
    def dense(flat_P):
        return jax.hessian(lambda p: mean_loss(problem.loss_fn, unravel(p), batches).mean)(flat_P)

    hessian_PxP = dense(flat_P)
    assert hessian_PxP.dtype == np.float64
    return np.asarray(hessian_PxP)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_loss_and_curvature_are_those_of_transformers(tmp_path, name, monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = build(torch, transformers, name, tmp_path)
    overrides = {f"flatness.{key}": value for key, value in SETTINGS.items()}
    problem = text_subject(tmp_path, tmp_path / "texts.jsonl", 64, 0, overrides).problem
    batches = problem.sample(0)
    inputs = their_inputs(torch, name, batches)
    assert len(inputs["input_ids"]) == 24

    with torch.no_grad():
        expected = float(theirs(**inputs).loss)
    loss = mean_loss(problem.loss_fn, problem.params, batches).mean
    assert abs(float(loss) - expected) < 1e-4

    theirs_PxP, ours_PxP = their_hessian(torch, theirs.double(), name, inputs), our_hessian(problem)
    trace = np.trace(theirs_PxP)
    assert np.trace(ours_PxP) == pytest.approx(trace, rel=1e-9)
    # The order of entries differs; these two sums do not depend on it.
    assert (ours_PxP**2).sum() == pytest.approx((theirs_PxP**2).sum(), rel=1e-9)

    # With fixed sentences the error is small enough for a comparison.
    how = {"num_probes": 1024, "over": "probes", "probes_per_pass": 64}
    fixed = hessian_trace(problem.loss_fn, problem.params, batches, problem.key, **how)
    assert abs(fixed.mean - trace) < 4 * fixed.sem < 0.4 * abs(trace)

    monkeypatch.setattr(preemption, "install_handlers", lambda: None)
    flags = [f"--config.flatness.{key}={value}" for key, value in SETTINGS.items()]
    where = [f"--checkpoint={tmp_path}", f"--data={tmp_path / 'texts.jsonl'}"]
    out = tmp_path / "out.json"
    assert measure.main([*where, *flags, "--measures=hessian_trace", f"--json={out}"]) == 0
    estimate = json.loads(out.read_text())["measured"]["hessian_trace"]
    print(
        f"{name}: {len(ours_PxP)} parameters here, {len(theirs_PxP)} there, loss {expected:.6f} "
        f"(ours {float(loss):.6f}), trace {trace:.9f} (ours {np.trace(ours_PxP):.9f}), "
        f"of the same sentences {fixed.mean:.3f} ± {fixed.sem:.3f}, "
        f"estimate {estimate['mean']:.3f} ± {estimate['sem']:.3f}"
    )
    assert abs(estimate["mean"] - trace) < 4 * estimate["sem"]
