"""Curvature of a BERT in PyTorch; python -m jaxflat.benchmark --torch=PYTHON runs it there.

    python torch_peer.py WIDTH LAYERS HEADS BATCH LENGTH WORDS SAMPLES ROUND FOLDER

times one gradient, one Hessian-vector product of curvlinops, and one sample of the trace. The
sample follows the code released with Liu, Xie, Li, Ma (ICML 2023): a Gaussian probe and a fresh
batch, differentiated twice from scratch. The model draws the labels, so the Hessian's expectation
is the Gauss-Newton matrix. Every round has the same model, saved in FOLDER, and new samples. The
last line is JSON: milliseconds, and the samples.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from curvlinops import HessianLinearOperator
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

SPECIAL, MASK, ROUNDS = 5, 4, 7


class AtMask(nn.Module):
    """The logits at the masked position of each sentence, given as (tokens, position)."""

    def __init__(self, bert: BertForMaskedLM):
        super().__init__()
        self.bert = bert

    def forward(self, inputs: Tensor) -> Tensor:
        tokens, positions = inputs[:, :-1], inputs[:, -1]
        return self.bert(input_ids=tokens).logits[torch.arange(len(tokens)), positions]


def make_model(width: int, layers: int, heads: int, length: int, words: int) -> AtMask:
    config = BertConfig(
        vocab_size=words + SPECIAL,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        attn_implementation="eager",
    )
    return AtMask(BertForMaskedLM(config)).eval()


def fresh_batch(model: AtMask, batch: int, length: int, words: int) -> tuple[Tensor, Tensor]:
    """Return random sentences with one masked word, and labels that the model draws."""
    tokens = torch.randint(SPECIAL, SPECIAL + words, (batch, length))
    positions = torch.randint(length, (batch,))
    tokens[torch.arange(batch), positions] = MASK
    inputs = torch.cat([tokens, positions[:, None]], dim=1)
    with torch.no_grad():
        labels = torch.distributions.Categorical(logits=model(inputs)).sample()
    return inputs, labels


def trace_sample(model: AtMask, params: list[Tensor], inputs: Tensor, labels: Tensor) -> float:
    loss = nn.functional.cross_entropy(model(inputs), labels)
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    probes = [torch.randn_like(p) for p in params]
    slope = sum((g * v).sum() for g, v in zip(gradients, probes, strict=True))
    products = torch.autograd.grad(slope, params)
    return float(sum((h * v).sum() for h, v in zip(products, probes, strict=True)))


def median_ms(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    width, layers, heads, batch, length, words, num_samples, number = map(int, sys.argv[1:9])
    torch.manual_seed(0)
    model = make_model(width, layers, heads, length, words)
    model.bert.save_pretrained(sys.argv[9])
    torch.manual_seed(1 + number)
    inputs, labels = fresh_batch(model, batch, length, words)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    everything = list(model.parameters())
    gradients = torch.autograd.grad(loss, everything, allow_unused=True)
    used = [p for p, g in zip(everything, gradients, strict=True) if g is not None]

    def gradient() -> object:
        return torch.autograd.grad(nn.functional.cross_entropy(model(inputs), labels), used)

    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), used, [(inputs, labels)], check_deterministic=False
    )
    vector = torch.randn(operator.shape[1])
    times = {
        "gradient_ms": median_ms(gradient),
        "product_ms": median_ms(lambda: operator @ vector),
        "sample_ms": median_ms(
            lambda: trace_sample(model, used, *fresh_batch(model, batch, length, words))
        ),
    }
    samples = [
        trace_sample(model, used, *fresh_batch(model, batch, length, words))
        for _ in range(num_samples)
    ]
    print(json.dumps({**times, "samples": samples}))


if __name__ == "__main__":
    main()
