"""Look at what a model does; change nothing."""

from .heatmap import HeatMap
from .token_maps import TokenMaps
from .token_mass import token_mass
from .word_maps import Heatmaps, heatmaps
from .word_masks import Masks, masks

__all__ = ["HeatMap", "Heatmaps", "Masks", "TokenMaps", "heatmaps", "masks", "token_mass"]
