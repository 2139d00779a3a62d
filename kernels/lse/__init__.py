"""Attention that also returns the log-sum-exp of each row, and the exact merge of parts."""

from .reference import attention_with_lse, merge_attention

__all__ = ["attention_with_lse", "merge_attention"]
