"""Measure this package against naive baselines and well-known packages."""
