"""Attention that treats a few groups of keys differently: masses, parts, factors, edited rows."""

from .api import Shared, codes_call, edit_rows, edited_row, rows_fit
from .edit import Edit, Rows
from .redistribution import reads_image, redistribution
from .reference import (
    group_attention,
    group_masses,
    merge_groups,
    regrouped_attention,
    row_probabilities,
)

__all__ = [
    "Edit",
    "Rows",
    "Shared",
    "codes_call",
    "edit_rows",
    "edited_row",
    "group_attention",
    "group_masses",
    "merge_groups",
    "reads_image",
    "redistribution",
    "regrouped_attention",
    "row_probabilities",
    "rows_fit",
]
