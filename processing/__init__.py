"""All that turns a video and a chat into tensors. Travels to the Hub beside the weights."""

from .processing_video_ma2mba import VideoMa2mbaProcessor
from .video_processing_video_ma2mba import VideoMa2mbaVideoProcessor
from .video_reader import VideoFrame, VideoFrames, VideoInfo, VideoReadError, probe_video, read_frames

__all__ = [
    "VideoFrame",
    "VideoFrames",
    "VideoInfo",
    "VideoMa2mbaProcessor",
    "VideoMa2mbaVideoProcessor",
    "VideoReadError",
    "probe_video",
    "read_frames",
]
