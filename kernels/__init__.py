"""Attention primitives: one operation per folder, a reference for any device in each."""

from .lse import attention_with_lse, merge_attention

__all__ = ["attention_with_lse", "merge_attention"]
