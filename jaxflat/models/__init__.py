"""Transformers and LSTMs, GPT-2, OPT and BERT from disk, and how small models embed in large."""
