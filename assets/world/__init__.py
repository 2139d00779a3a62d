"""The shape world: pictures whose content is known exactly, and the detector that judges them."""

from attnctl.assets.world.captions import caption, heldout_prompts, parse, trained_prompts
from attnctl.assets.world.detector import Detector, detector, exact, log_prob
from attnctl.assets.world.draw import draw
from attnctl.assets.world.heldout import heldout_combinations, is_heldout
from attnctl.assets.world.motion import MOTIONS, Motion, motion_caption, parse_motion
from attnctl.assets.world.moving import Moving, moving_prompts, sample_moving
from attnctl.assets.world.palette import COLOURS, PAIRS, SHAPES
from attnctl.assets.world.sampling import sample
from attnctl.assets.world.scenes import Object, Scene, Scenes
from attnctl.assets.world.watch import moved

__all__ = [
    "COLOURS",
    "MOTIONS",
    "PAIRS",
    "SHAPES",
    "Detector",
    "Motion",
    "Moving",
    "Object",
    "Scene",
    "Scenes",
    "caption",
    "detector",
    "draw",
    "exact",
    "heldout_combinations",
    "heldout_prompts",
    "is_heldout",
    "log_prob",
    "motion_caption",
    "moved",
    "moving_prompts",
    "parse",
    "parse_motion",
    "sample",
    "sample_moving",
    "trained_prompts",
]
