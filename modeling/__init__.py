"""All that a checkpoint needs to compute; these files travel to the Hub with the weights.

Everything long is a loop over one primitive, and below each loop stands what it serves:

    run_layers                   layers [i:j] on tokens [a:b], starting from states
        mamba2                   `Mamba2Backbone._chunks`: over chunks of tokens, at constant memory
            modeling_video_ma2mba    frames and text in, logits or a loss out; generation_video_ma2mba: `generate`
            video_memory             frames as they come; video_memory_answers asks, video_memory_files saves and loads
        checkpointing            `_Run.cell`: over the cells of a plan, which the backward pass computes again
            checkpoint_plan          which cells; checkpoint_costs: their bytes; multi_axis_checkpointing: the switch
            gradient_horizon         before it the chunks of mamba2, from it on cells
            sequence_parallel        cells of one video on several devices, which hand on the states
            head_loss                the loss: chunks of tokens through a block without a state

What these are made of:

    a layer      ssd: the recurrences in torch; ssd_kernels, step_kernels: on a GPU; scan_backends: which of both;
                 segment_sizes; recompute: what it keeps for the backward pass; mamba2_cache: its states
    the model    configuration_video_ma2mba, visual_features, interleaved_inputs, arguments, outputs, stopping
    engines      sharded_parameters: the one seam to FSDP2 and ZeRO-3
    the machine  host_copies, host_memory, autocast, read_ahead
"""

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
