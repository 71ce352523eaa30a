"""How frames become square, and which frames in memory are accepted."""

import numpy as np
import PIL.Image
import pytest
import torch

from video_ma2mba.processing import VideoMa2mbaVideoProcessor, VideoReadError, read_frames

from .videos import frame_number


def _gradient(height, width, num_frames=2):
    """(frames, height, width, 3) uint8: red grows downwards, green to the right, blue with time."""
    pixels = np.zeros((num_frames, height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, height)[:, None].astype(np.uint8)
    pixels[..., 1] = np.linspace(0, 255, width).astype(np.uint8)
    pixels[..., 2] = np.arange(num_frames)[:, None, None]
    return pixels


def _square(pixels, mode="crop", size=16):
    return VideoMa2mbaVideoProcessor(size=size, resize_mode=mode).load(pixels).frames


def test_default_output_is_uint8_and_channels_first(video):
    batch = VideoMa2mbaVideoProcessor(size=28)(str(video), return_timestamps=True)
    assert batch["pixel_values_videos"].shape == (1, 4, 3, 28, 28)
    assert batch["pixel_values_videos"].dtype == torch.uint8
    assert batch["video_timestamps"] == [[0, 1, 2, 3]]


def test_frames_of_the_right_size_stay_as_they_are():
    pixels = _gradient(16, 16)
    for mode in ("crop", "squash", "pad"):
        np.testing.assert_array_equal(_square(pixels, mode).permute(0, 2, 3, 1), pixels)


@pytest.mark.parametrize(("height", "width"), [(16, 40), (40, 16), (16, 17)])
def test_crop_keeps_the_middle(height, width):
    pixels = _gradient(height, width)
    top, left = (height - 16) // 2, (width - 16) // 2
    np.testing.assert_array_equal(_square(pixels).permute(0, 2, 3, 1), pixels[:, top : top + 16, left : left + 16])


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 8), (3, 16)])
def test_pad_surrounds_with_the_mean_colour(height, width):
    pixels = _gradient(height, width)
    padded = _square(pixels, "pad").permute(0, 2, 3, 1).numpy()
    top, left = (16 - height) // 2, (16 - width) // 2
    np.testing.assert_array_equal(padded[:, top : top + height, left : left + width], pixels)
    padded[:, top : top + height, left : left + width] = 0
    outside = padded[padded.any(axis=-1)]
    assert len(outside) == 2 * (16 * 16 - height * width)
    assert (outside == [123, 117, 104]).all()  # 255 times CLIP's mean: 122.8, 116.7, 104.1


def test_squash_ignores_the_aspect_ratio():
    squashed = _square(_gradient(64, 32), "squash")[0].int()
    ramp = torch.linspace(0, 255, 16)
    assert (squashed[0].float() - ramp[:, None]).abs().max() < 10
    assert (squashed[1].float() - ramp).abs().max() < 10


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize(("height", "width"), [(97, 53), (31, 200), (9, 9), (1, 50)])
def test_every_shape_becomes_square(mode, height, width):
    assert _square(_gradient(height, width, 1), mode).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_shrinking_is_like_pillows(mode):
    """PIL's bicubic filter is what CLIP was trained with."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 60, 90, 3), dtype=np.uint8)
    ours = _square(pixels, mode, 20)[0].permute(1, 2, 0).int().numpy()
    size = (30, 20) if mode == "crop" else (20, 20)  # width, height
    wanted = np.asarray(PIL.Image.fromarray(pixels[0]).resize(size, PIL.Image.Resampling.BICUBIC)).astype(int)
    wanted = wanted[:, 5:25] if mode == "crop" else wanted
    assert np.abs(ours - wanted).max() <= 1


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_files_and_memory_give_nearly_the_same(video, mode):
    processor = VideoMa2mbaVideoProcessor(size=20, resize_mode=mode)
    from_file = processor.load(video)
    full = np.stack([frame.pixels for frame in read_frames(video)])
    from_memory = processor.load(full)
    assert from_file.frames.shape == from_memory.frames.shape == (4, 3, 20, 20)
    difference = (from_file.frames.int() - from_memory.frames.int()).abs().float()
    # All of it at the sharp edges of the numbers, where colour is scaled before or after it becomes RGB.
    assert difference.mean() < 4
    assert difference.median() <= 1


def test_every_way_to_pass_frames_is_the_same():
    pixels = _gradient(24, 30, 3)
    channels_first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    wanted = _square(pixels)
    for same in (
        torch.from_numpy(pixels),
        channels_first,
        torch.from_numpy(channels_first),
        list(pixels),
        tuple(torch.from_numpy(channels_first)),
        [PIL.Image.fromarray(frame) for frame in pixels],
        pixels[::-1][::-1],
    ):
        torch.testing.assert_close(_square(same), wanted, rtol=0, atol=0)


def test_single_frames_may_differ_in_size():
    frames = [_gradient(20, 30, 1)[0], _gradient(40, 17, 1)[0]]
    together = _square(frames)
    torch.testing.assert_close(together, torch.cat([_square(frames[:1]), _square(frames[1:])]))


def test_grey_and_transparent_pictures_become_rgb():
    grey = _square([PIL.Image.new("L", (16, 16), 77)])
    assert (grey == 77).all()
    transparent = _square([PIL.Image.new("RGBA", (16, 16), (1, 2, 3, 4))])
    assert transparent[0, :, 0, 0].tolist() == [1, 2, 3]


def test_max_frames_spreads_frames_in_memory():
    processor = VideoMa2mbaVideoProcessor(size=16)
    loaded = processor.load(_gradient(16, 16, 10), max_frames=4, timestamps=range(10))
    assert loaded.frames[:, 2, 0, 0].tolist() == [0, 2, 5, 7]
    assert loaded.timestamps_s == [0, 2, 5, 7]
    mixed = processor.load([*_gradient(16, 16, 5), *_gradient(17, 16, 5)], max_frames=2)
    assert len(mixed.frames) == 2
    assert len(processor.load(_gradient(16, 16, 3), max_frames=4).frames) == 3


def test_rescale_and_normalize():
    processor = VideoMa2mbaVideoProcessor(size=16, image_mean=[0.5, 0.25, 0], image_std=[0.5, 0.25, 2])
    pixels = np.full((2, 16, 16, 3), 255, np.uint8)
    normalized = processor(pixels, do_normalize=True)["pixel_values_videos"]
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized[0, 0, :, 0, 0], torch.tensor([1.0, 3.0, 0.5]))
    rescaled = processor(pixels, do_rescale=True)["pixel_values_videos"]
    torch.testing.assert_close(rescaled, torch.ones(1, 2, 3, 16, 16))
    always = VideoMa2mbaVideoProcessor(size=16, do_normalize=True)
    assert always(pixels)["pixel_values_videos"].dtype == torch.float32


def test_several_videos_are_filled_with_zeros_at_the_end(video):
    pixels = _gradient(16, 16, 2) + 1
    batch = VideoMa2mbaVideoProcessor(size=16)([pixels, video], return_tensors="np", return_timestamps=True)
    assert isinstance(batch["pixel_values_videos"], np.ndarray)
    assert batch["pixel_values_videos"].shape == (2, 4, 3, 16, 16)
    assert (batch["pixel_values_videos"][0, 2:] == 0).all()
    np.testing.assert_array_equal(batch["pixel_values_videos"][0, :2].transpose(0, 2, 3, 1), pixels)
    assert batch["video_timestamps"] == [None, [0, 1, 2, 3]]


def test_images(tmp_path):
    processor = VideoMa2mbaVideoProcessor(size=16)
    pixels = _gradient(20, 30, 1)[0]
    path = tmp_path / "picture.png"
    PIL.Image.fromarray(pixels).save(path)
    wanted = processor.load(pixels[None]).frames
    for same in (pixels, torch.from_numpy(pixels).permute(2, 0, 1), PIL.Image.fromarray(pixels)):
        torch.testing.assert_close(processor.load_image(same), wanted, rtol=0, atol=0)
    for same in (path, str(path), path.as_uri()):
        assert (processor.load_image(same).int() - wanted.int()).abs().max() <= 3


def test_open_video_is_the_lazy_form_of_load(video):
    processor = VideoMa2mbaVideoProcessor(size=28)
    frames = processor.open_video(video, fps=2, start_s=1)
    assert frames.num_frames == 6
    pixels = np.stack([frame.pixels for frame in frames])
    assert pixels.shape == (6, 28, 28, 3)
    loaded = processor.load(video, fps=2, start_s=1)
    np.testing.assert_array_equal(loaded.frames.permute(0, 2, 3, 1), pixels)
    assert loaded.timestamps_s == [1, 1.5, 2, 2.5, 3, 3.5]


def test_the_rate_may_be_a_setting(video):
    assert len(VideoMa2mbaVideoProcessor(size=16, fps=2).load(video).frames) == 8
    assert len(VideoMa2mbaVideoProcessor(size=16, fps=2).load(video, fps=0.5).frames) == 2


def test_squash_keeps_what_crop_cuts_off(video):
    """The numbers span the whole width, so that only a squashed frame still shows them."""
    squashed = VideoMa2mbaVideoProcessor(size=64, resize_mode="squash").load(video).frames
    assert [frame_number(frame.permute(1, 2, 0).numpy()) for frame in squashed] == [0, 10, 20, 30]


def test_settings_survive_saving(tmp_path):
    processor = VideoMa2mbaVideoProcessor(size=28, resize_mode="pad", image_mean=(0.5, 0.5, 0.5), fps=0.5)
    processor.save_pretrained(tmp_path)
    loaded = VideoMa2mbaVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.side == 28
    assert loaded.resize_mode == "pad"
    assert loaded.fps == 0.5


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), r"must be uint8 .* got float32.*\(frames \* 255\)"),
        (torch.zeros(4, 3, 8, 8), r"must be uint8 .* got torch.float32"),
        ([np.zeros((8, 8, 3), np.int64)], "must be uint8 .* got int64"),
        (np.zeros((8, 8, 3), np.uint8), r"shape \(frames, height, width, 3\) or .*, got \(8, 8, 3\)"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"got \(2, 8, 8, 4\)"),
        (np.zeros((1, 2, 8, 8, 3), np.uint8), r"got \(1, 2, 8, 8, 3\)"),
        ([np.zeros((8, 8), np.uint8)], r"shape \(height, width, 3\) or .*, got \(8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one frame"),
        ([], "at least one frame"),
        (17, "must be a path, an array, a tensor or a list of frames, got int"),
    ],
)
def test_frames_that_make_no_sense(frames, message):
    with pytest.raises(ValueError, match=message):
        VideoMa2mbaVideoProcessor(size=16).load(frames)


def test_options_that_make_no_sense(video):
    processor = VideoMa2mbaVideoProcessor(size=16)
    frames = _gradient(16, 16, 3)
    with pytest.raises(ValueError, match="got 2 for 3 frames"):
        processor.load(frames, timestamps=[0, 1])
    with pytest.raises(ValueError, match="ascending"):
        processor.load(frames, timestamps=[0, 2, 1])
    with pytest.raises(ValueError, match="brings its own"):
        processor.load(video, timestamps=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="Slice frames"):
        processor.load(frames, start_s=1)
    with pytest.raises(ValueError, match="max_frames must be at least 1"):
        processor.load(frames, max_frames=0)
    with pytest.raises(VideoReadError, match="no such file"):
        processor.load("nowhere.mp4")
    with pytest.raises(ValueError, match="resize_mode must be one of crop, squash, pad"):
        VideoMa2mbaVideoProcessor(resize_mode="stretch")
    for size in ({"height": 20, "width": 30}, {"shortest_edge": 20}, 0):
        with pytest.raises(ValueError, match="size must be"):
            VideoMa2mbaVideoProcessor(size=size)
