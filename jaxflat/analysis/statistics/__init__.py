"""Intervals, tests and correlations over seeds."""
