"""Make the public classes known to transformers' Auto classes, here and on the Hub.

`register` serves processes in which this package is installed. `register_for_auto_class` serves those in which it is
not: `save_pretrained` then copies the code beside the weights, and `trust_remote_code=True` loads it from there.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.utils import is_torchvision_available

from .modeling.checkpoint_plan import CheckpointPlan, InfeasibleMemoryBudget, plan_checkpoints
from .modeling.configuration_video_ma2mba import VideoMa2mbaConfig
from .modeling.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaModel
from .modeling.video_memory import VideoMemory
from .processing.processing_video_ma2mba import VideoMa2mbaProcessor
from .processing.video_processing_video_ma2mba import VideoMa2mbaVideoProcessor

__all__ = [
    "CheckpointPlan",
    "InfeasibleMemoryBudget",
    "VideoMa2mbaConfig",
    "VideoMa2mbaForConditionalGeneration",
    "VideoMa2mbaModel",
    "VideoMa2mbaProcessor",
    "VideoMa2mbaVideoProcessor",
    "VideoMemory",
    "plan_checkpoints",
]

AutoConfig.register(VideoMa2mbaConfig.model_type, VideoMa2mbaConfig, exist_ok=True)
AutoModel.register(VideoMa2mbaConfig, VideoMa2mbaModel, exist_ok=True)
AutoModelForImageTextToText.register(VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VideoMa2mbaConfig, VideoMa2mbaProcessor, exist_ok=True)
if is_torchvision_available():  # without it, AutoVideoProcessor is a stand-in that cannot register anything
    from transformers import AutoVideoProcessor

    AutoVideoProcessor.register(VideoMa2mbaConfig, VideoMa2mbaVideoProcessor, exist_ok=True)

VideoMa2mbaConfig.register_for_auto_class()
VideoMa2mbaModel.register_for_auto_class("AutoModel")
VideoMa2mbaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
VideoMa2mbaProcessor.register_for_auto_class()
VideoMa2mbaVideoProcessor.register_for_auto_class()
