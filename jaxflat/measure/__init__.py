"""Measures any checkpoint: `python -m jaxflat.measure`."""
