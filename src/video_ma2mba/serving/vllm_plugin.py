"""The plugin that vLLM finds by its entry point: it tells vLLM of the model. Written for vLLM 0.32.

Imports of vLLM stay inside `register`: every process of an engine calls it, also that which has not set vLLM up yet.
"""

from dataclasses import replace
from typing import Any

from ..modeling.configuration_video_ma2mba import VideoMa2mbaConfig
from ..processing.processing_video_ma2mba import VideoMa2mbaProcessor
from .vllm_frames import frame_folder, placed

ARCHITECTURE = "VideoMa2mbaForConditionalGeneration"


class ServedConfig(VideoMa2mbaConfig):
    """The model's configuration; vLLM wants to know of attention heads, and there are none."""

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        self.text_config.num_attention_heads = 0


def register() -> None:
    """Make the model, its configuration and its processor known to vLLM and to transformers."""
    from transformers import AutoConfig, AutoProcessor
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig
    from vllm.transformers_utils.processor import VIDEO_PROCESSOR_MAPPING_NAMES
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    from . import vllm_videos  # noqa: F401 - registers how videos are read

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    AutoProcessor.register(ServedConfig, VideoMa2mbaProcessor, exist_ok=True)
    # by this name its server finds `vllm_videos.Undecoded`; it does not look into processor_config.json
    VIDEO_PROCESSOR_MAPPING_NAMES[ServedConfig.model_type] = "VideoMa2mbaVideoProcessor"
    ModelRegistry.register_model(ARCHITECTURE, "video_ma2mba.serving.vllm_model:VideoMa2mbaServed")

    class StatesInFloat32(MambaModelConfig):
        """States stay float32 in a model of any dtype."""

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            vllm_config.cache_config.mamba_ssm_cache_dtype = "float32"
            super().verify_and_update_config(vllm_config)

    MODELS_CONFIG_MAP[ARCHITECTURE] = StatesInFloat32
    if not hasattr(Scheduler, "_without_video_ma2mba"):
        Scheduler._without_video_ma2mba = Scheduler._mamba_block_aligned_split
        Scheduler._mamba_block_aligned_split = _split_where_media_end
        EngineCore._without_video_ma2mba = EngineCore.preprocess_add_request
        EngineCore.preprocess_add_request = _hold_frames
    _without_states_inside_a_chunk()


def _split_where_media_end(self: Any, request: Any, num_new_tokens: int, *computed: int, **named: int) -> int:
    """Keep the states at the last block before the text that follows a medium, for other questions about the same.

    vLLM keeps states where it has seen that prompts part ways, and at the end of a prompt, which no other question
    shares: without this the second question about a video reads all of it again, and the third does not.
    """
    start = request.num_computed_tokens + sum(computed) + sum(named.values())
    if request.shared_prefix_boundary <= start:
        block, places = self.cache_config.block_size, [one.mm_position for one in request.mm_features]
        # a long video is several items, one right behind another
        ends = {one.offset + one.length for one in places} - {one.offset for one in places}
        ahead = [end // block * block for end in ends if end // block * block > start]
        request.shared_prefix_boundary = min(ahead, default=request.shared_prefix_boundary)
    return self._without_video_ma2mba(request, num_new_tokens, *computed, **named)


def _hold_frames(self: Any, request: Any) -> Any:
    """The frames of a request stay where they are for as long as the engine has it."""
    added, wave = self._without_video_ma2mba(request)
    items = [one.data for one in added.mm_features or () if one.data is not None and "frames_at" in one.data]
    names = {placed(item["frames_at"].data)[0] for item in items}
    added.video_ma2mba_frames = [frame_folder().hold(name) for name in names]
    return added, wave


def _without_states_inside_a_chunk() -> None:
    """A fault of the CPU build: its operator gives no states from inside a chunk, which vLLM 0.32 asks it for.

    Without them the scheduler ends a chunk where it wants states, as it does for other models.
    """
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or hasattr(MambaMixer2, "_spec_without_video_ma2mba"):
        return
    MambaMixer2._spec_without_video_ma2mba = MambaMixer2.get_kv_cache_spec

    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = self._spec_without_video_ma2mba(vllm_config)
        return spec and replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)

    MambaMixer2.get_kv_cache_spec = get_kv_cache_spec
