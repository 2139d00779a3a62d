"""Attention that also returns the log-sum-exp of each row, the exact merge of parts, columns."""

from .columns import Columns, ColumnSums, column_sums, parts_of
from .reference import attention_with_lse, merge_attention

__all__ = [
    "ColumnSums",
    "Columns",
    "attention_with_lse",
    "column_sums",
    "merge_attention",
    "parts_of",
]
