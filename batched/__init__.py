"""Run torchio's transforms on a whole batch at once, on the model's device."""

from batched.batch import Batched

__all__ = ['Batched']
