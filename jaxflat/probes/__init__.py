"""Measure what a model has learned: linear probes, ridge regression and fine-tuning."""
