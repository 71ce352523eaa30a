"""Which frames are taken, against the numbers that the frames of a clip carry and the formula of Transformers."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from video_ma2mba.processing import VideoMa2mbaVideoProcessor

from .videos import write_video

SIDE = 28


@pytest.fixture
def video_processor():
    return VideoMa2mbaVideoProcessor(size=SIDE)


def numbered(num_frames):
    """Frames whose grey is their number."""
    return np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * np.ones((1, SIDE, SIDE, 3), np.uint8)


def taken(processor, frames, **options):
    return processor(frames, **options)["pixel_values_videos"][0, :, 0, 0, 0].tolist()


def spread(total, wanted):
    """As Transformers: every total / wanted frames, rounded down."""
    return np.arange(0, total, total / wanted).astype(int).tolist()


def times(processor, path, **options):
    return processor(path, return_timestamps=True, **options)["video_timestamps"][0]


@pytest.mark.parametrize("wanted", [1, 3, 7, 40])
def test_num_frames_of_a_file(video_processor, video, wanted):
    """40 frames at 10 FPS."""
    assert times(video_processor, video, num_frames=wanted) == [k / 10 for k in spread(40, wanted)]


def test_num_frames_of_a_part(video_processor, video):
    assert times(video_processor, video, num_frames=4, start_s=1.0, end_s=3.0) == [1.0, 1.5, 2.0, 2.5]
    with pytest.raises(ValueError, match="num_frames=21 is more than the 20 frames"):
        video_processor(video, num_frames=21, start_s=1.0, end_s=3.0)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])  # Matroska rounds its times to thousandths
@pytest.mark.parametrize("rate", ["10", "24000/1001", "25", "30", "30000/1001"])
def test_every_frame_of_a_file(video_processor, tmp_path, rate, suffix):
    """`fps` says nothing then, as in Transformers."""
    path = write_video(tmp_path / f"clip.{suffix}", 33, fps=Fraction(rate))
    for options in ({}, {"fps": 1.0}, {"num_frames": 3}):
        seconds = times(video_processor, path, do_sample_frames=False, **options)
        np.testing.assert_allclose(seconds, [float(k / Fraction(rate)) for k in range(33)], atol=1e-3)
    some = times(video_processor, path, do_sample_frames=False, start_s=10 / Fraction(rate), end_s=13 / Fraction(rate))
    np.testing.assert_allclose(some, [float(k / Fraction(rate)) for k in range(10, 13)], atol=1e-3)
    assert times(video_processor, path, num_frames=33) == seconds
    video_processor.do_sample_frames = False
    assert len(times(video_processor, path)) == 33


def test_frames_of_no_constant_rate_cannot_all_be_taken(video_processor, tmp_path):
    shown = [Fraction(k, 30) for k in range(10)] + [Fraction(k) for k in range(1, 5)]
    path = write_video(tmp_path / "clip.mp4", len(shown), times=shown)
    with pytest.raises(ValueError, match=r"constant rate.*Give fps"):
        video_processor(path, do_sample_frames=False)


def test_frames_in_memory(video_processor):
    frames = numbered(8)
    assert taken(video_processor, frames) == list(range(8))
    assert taken(video_processor, frames, fps=1.0) == list(range(8))  # of files alone, where nothing says their times
    for given in (frames, list(frames), torch.from_numpy(frames)):
        assert taken(video_processor, given, num_frames=3) == spread(8, 3)
    assert taken(video_processor, frames, num_frames=3, do_sample_frames=False) == list(range(8))
    with pytest.raises(ValueError, match="num_frames=9 is more than the 8 frames"):
        video_processor(frames, num_frames=9)
    with pytest.raises(ValueError, match="video_metadata"):
        video_processor(frames, do_sample_frames=True)


@pytest.mark.parametrize("metadata", [{"fps": 4.0}, VideoMetadata(total_num_frames=8, fps=4.0, duration=2.0)])
def test_metadata_say_when_frames_are_shown(video_processor, metadata):
    frames = numbered(8)
    assert taken(video_processor, frames, video_metadata=metadata, fps=3) == spread(8, 6)
    told = video_processor(frames, video_metadata=[[metadata]], fps=3, return_timestamps=True, return_metadata=True)
    assert told["video_timestamps"] == [[k / 4 for k in spread(8, 6)]]
    (shown,) = told["video_metadata"]
    assert (shown.fps, shown.total_num_frames, shown.frames_indices) == (4.0, 8, spread(8, 6))
    picked = {"fps": 10.0, "frames_indices": [0, 10, 30]}
    assert times(video_processor, numbered(3), video_metadata=picked) == [0.0, 1.0, 3.0]
    with pytest.raises(ValueError, match="names 3 frames_indices for 8"):
        video_processor(frames, video_metadata=picked)
    with pytest.raises(ValueError, match="2 entries for 1 videos"):
        video_processor(frames, video_metadata=[picked, picked])


def test_metadata_of_a_file(video_processor, video):
    told = video_processor(video, fps=2.0, return_metadata=True)["video_metadata"][0]
    assert (told.fps, told.width, told.height, told.total_num_frames, told.duration) == (10.0, 64, 32, 40, 4.0)
    assert told.frames_indices == list(range(0, 40, 5))
    with pytest.raises(ValueError, match="brings its own"):
        video_processor(video, video_metadata={"fps": 10.0})


def test_lists_of_the_files_of_frames(processor, tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    for path, frame in zip(paths, numbered(4), strict=True):
        Image.fromarray(frame).save(path)

    def of(**entry):
        chat = [{"role": "user", "content": [{"type": "video", "video": paths, **entry}]}]
        return processor.apply_chat_template(chat, tokenize=True)["pixel_values_videos"][0, :, 0, 0, 0].tolist()

    assert of() == [0, 1, 2, 3]
    assert of(num_frames=2) == [0, 2]
    assert of(max_frames=2) == [0, 2]
    assert of(do_sample_frames=False) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="do_sample_frames=False"):
        of(do_sample_frames=True)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"nframes": 4}, [0.0, 1.0, 2.0, 3.0]),
        ({"num_frames": 2}, [0.0, 2.0]),
        ({"video_start": 1.0, "video_end": 3.0}, [1.0, 2.0]),
        ({"start": 1, "end": 3, "fps": 2}, [1.0, 1.5, 2.0, 2.5]),
        ({"start_s": 2.0}, [2.0, 3.0]),
        ({"do_sample_frames": False, "end": 0.3}, [0.0, 0.1, 0.2]),
    ],
)
def test_an_entry_chooses_its_own_frames(processor, video, keys, wanted):
    chat = [{"role": "user", "content": [{"type": "video", "path": str(video), **keys}]}]
    for options in ({}, {"fps": 1.0}):
        batch = processor.apply_chat_template(chat, tokenize=True, return_timestamps=True, **options)
        if "fps" not in keys or options == {}:
            assert batch["video_timestamps"] == [[wanted]]


def test_a_call_may_ask_for_a_number_and_an_entry_for_a_rate(processor, video):
    entries = [{"type": "video", "path": str(video)}, {"type": "video", "path": str(video), "fps": 0.5}]
    chat = [{"role": "user", "content": entries}]
    batch = processor.apply_chat_template(chat, tokenize=True, num_frames=4, return_timestamps=True)
    assert batch["video_timestamps"] == [[[0.0, 1.0, 2.0, 3.0], [0.0, 2.0]]]


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_float_frames_are_the_same_as_bytes(mode):
    """Up to the rounding of the bytes: half a grey level, over the least deviation."""
    processor = VideoMa2mbaVideoProcessor(size=SIDE, resize_mode=mode)
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    wanted = processor(frames, do_normalize=True)["pixel_values_videos"]
    tolerance = 0.51 / 255 / min(processor.image_std)
    for floats in (frames / 255, torch.from_numpy(frames).permute(0, 3, 1, 2) / 255, list(frames / 255)):
        got = processor(floats, do_rescale=False)["pixel_values_videos"]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    both = processor([frames, frames / 255], do_rescale=False)["pixel_values_videos"]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=tolerance)
    normalised = (frames / 255 - 0.5) / 0.25
    kept = processor(normalised[:, :SIDE, :SIDE], do_rescale=False, do_normalize=False)["pixel_values_videos"][0]
    torch.testing.assert_close(kept.permute(0, 2, 3, 1).double(), torch.from_numpy(normalised[:, :SIDE, :SIDE]),
                               rtol=0, atol=1e-6)  # fmt: skip
    with pytest.raises(ValueError, match="do_rescale=False"):
        processor(frames / 255)
    with pytest.raises(ValueError, match=r"from 0 to 1, got 0 to 255"):
        processor(frames.astype(np.float32), do_rescale=False)


def test_the_order_of_channels_may_be_said(video_processor):
    square = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    wanted = video_processor(square)["pixel_values_videos"]
    first = np.moveaxis(square, -1, 1)
    assert torch.equal(video_processor(first, input_data_format="channels_first")["pixel_values_videos"], wanted)
    assert torch.equal(video_processor(square, input_data_format="channels_last")["pixel_values_videos"], wanted)
    with pytest.raises(ValueError, match="input_data_format"):
        video_processor(square, input_data_format="last")


def test_the_device_of_the_pixels(video_processor):
    assert video_processor(numbered(2), device="meta")["pixel_values_videos"].device.type == "meta"


def test_unknown_options_and_settings(video_processor):
    with pytest.raises(TypeError, match="no option nonsense"):
        video_processor(numbered(2), nonsense=1)
    with pytest.raises(ValueError, match="do_resize=False"):
        VideoMa2mbaVideoProcessor(do_resize=False)
    with pytest.raises(ValueError, match="num_frames=8"):
        VideoMa2mbaVideoProcessor(num_frames=8)
