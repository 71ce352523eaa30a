"""All that a checkpoint needs to compute; these files travel to the Hub with the weights."""

from .configuration_video_ma2mba import VideoMa2mbaConfig
from .mamba2 import Mamba2Cache
from .modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaModel, VideoMa2mbaOutput
from .stopping import RepetitionStop

__all__ = [
    "Mamba2Cache",
    "RepetitionStop",
    "VideoMa2mbaConfig",
    "VideoMa2mbaForConditionalGeneration",
    "VideoMa2mbaModel",
    "VideoMa2mbaOutput",
]
