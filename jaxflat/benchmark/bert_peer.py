"""Training steps of Hugging Face's BERT in PyTorch; `benchmark --peers=PYTHON` runs it there.

    python bert_peer.py WIDTH LAYERS HEADS BATCH LENGTH SENTENCES

SENTENCES is a .npy file of words, one sentence a row, with -1 after its end. Each step takes the
next BATCH sentences, pads them to the longest of them, and masks one word of each. The last line
has the rate as "N sentences/s".
"""

import statistics
import sys
import time

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

PAD, MASK, SPECIAL = 0, 4, 5
WARM_UP, STEPS = 3, 9


def masked_batch(words_BxT: Tensor) -> dict[str, Tensor]:
    """Return the arguments of the model: inputs, attention mask and labels."""
    lengths_B = (words_BxT >= 0).sum(1)
    words_BxT = words_BxT[:, : int(lengths_B.max())]
    inputs_BxT = torch.where(words_BxT >= 0, words_BxT + SPECIAL, PAD)
    sentences_B = torch.arange(len(words_BxT))
    positions_B = (torch.rand(len(words_BxT)) * lengths_B).long()
    labels_BxT = torch.full_like(inputs_BxT, -100)
    labels_BxT[sentences_B, positions_B] = inputs_BxT[sentences_B, positions_B]
    inputs_BxT[sentences_B, positions_B] = MASK
    mask_BxT = (words_BxT >= 0).long()
    return {"input_ids": inputs_BxT, "attention_mask": mask_BxT, "labels": labels_BxT}


def main() -> None:
    width, layers, heads, batch, length = map(int, sys.argv[1:6])
    words_NxT = torch.from_numpy(np.load(sys.argv[6]).astype(np.int64))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=int(words_NxT.max()) + 1 + SPECIAL,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    model = BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    times = []
    for i in range(WARM_UP + STEPS):
        chosen_B = (i * batch + torch.arange(batch)) % len(words_NxT)
        arguments = masked_batch(words_NxT[chosen_B])
        start = time.perf_counter()
        loss = model(**arguments).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        times.append(time.perf_counter() - start)
    print(f"BERT: {batch / statistics.median(times[WARM_UP:]):.1f} sentences/s")


if __name__ == "__main__":
    main()
