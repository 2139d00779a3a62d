"""Look at what a model does; change nothing."""

from .answer_map import AnswerMap
from .answer_words import AnswerMaps, answer_maps
from .heatmap import HeatMap
from .token_maps import TokenMaps
from .token_mass import token_mass
from .word_maps import Heatmaps, heatmaps
from .word_masks import Masks, masks

__all__ = [
    "AnswerMap",
    "AnswerMaps",
    "HeatMap",
    "Heatmaps",
    "Masks",
    "TokenMaps",
    "answer_maps",
    "heatmaps",
    "masks",
    "token_mass",
]
