"""Pictures and animations, against PIL; frames in memory, the same from every door."""

import io
import struct
import tracemalloc
import warnings
from contextlib import suppress
from zlib import compress, crc32

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from video_ma2mba.processing import VideoMa2mbaVideoProcessor, VideoReadError, probe_video, read_frames

ANIMATIONS = [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("AVIF", {"quality": 95})]
COLOURS = [(30 * index, 250 - 30 * index, 60) for index in range(6)]


@pytest.fixture
def processor():
    return VideoMa2mbaVideoProcessor(size=16)


def quarters():
    """A picture that is another one however it is turned: red, blue, and black twice."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 255, 0, 0
    pixels[24:, 32:] = 0, 0, 255
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photos_are_upright(tmp_path, processor, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo"  # no suffix: the bytes tell
    Image.fromarray(quarters()).save(path, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    with Image.open(path) as image:
        wanted = processor.load_image(ImageOps.exif_transpose(image).convert("RGB"))
        for given in (path, str(path), path.as_uri(), path.read_bytes(), io.BytesIO(path.read_bytes()), image):
            torch.testing.assert_close(processor.load_image(given), wanted, rtol=0, atol=0)
    as_video = processor.load(path)
    assert as_video.timestamps_s == [0]
    assert (as_video.frames.float() - wanted.float()).abs().mean() < 1  # the filters of PIL and of torch
    info = probe_video(path)
    assert (info.width, info.height) == ((48, 64) if orientation > 4 else (64, 48))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_no_white(tmp_path, processor, form):
    ramp = (np.linspace(0, 65535, 64)[None] * np.ones((48, 1))).astype(np.uint16)
    path = tmp_path / "grey"
    Image.fromarray(ramp).save(path, form)
    wanted = processor.load_image(np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, -1))
    with Image.open(path) as image:
        for given in (path, image):
            torch.testing.assert_close(processor.load_image(given), wanted, rtol=0, atol=0)
    assert wanted.float().std() > 40


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_are_converted_as_pil_does(processor, mode):
    image = Image.fromarray(quarters()).convert(mode)
    wanted = processor.load_image(np.array(image.convert("RGB")))
    torch.testing.assert_close(processor.load_image(image), wanted, rtol=0, atol=0)


def test_values_without_a_range_are_refused(processor):
    with pytest.raises(ValueError, match="has no range that is known"):
        processor.load_image(Image.fromarray(np.full((8, 8), 1e6, np.float32)))
    grey = processor.load_image(Image.fromarray(np.full((8, 8), 77, np.int32)))
    assert (grey == 77).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("form", "options"), ANIMATIONS)
def test_a_video_takes_all_pictures_of_an_animation(tmp_path, form, options):
    durations = [200, 200, 600, 200, 200, 600]
    frames = [Image.new("RGB", (32, 24), colour) for colour in COLOURS]
    path = tmp_path / "moving"
    frames[0].save(path, form, save_all=True, append_images=frames[1:], duration=durations, **options)
    info = probe_video(path)
    assert (info.duration_s, info.num_frames, info.width, info.height) == (2.0, 6, 32, 24)
    for fps, wanted in ((5, [0, 1, 2, 2, 2, 3, 4, 5, 5, 5]), (1, [0, 3]), (2, [0, 2, 3, 5])):
        for given in (path, path.read_bytes()):
            picked = list(read_frames(given, fps))
            assert len(picked) == len(wanted)
            for frame, number in zip(picked, wanted, strict=True):
                assert np.abs(frame.pixels.astype(int) - COLOURS[number]).max() <= 6
                assert frame.timestamp_s == sum(durations[:number]) / 1000
    assert [f.timestamp_s for f in read_frames(path, 5, start_s=1.0, end_s=1.3)] == [1.0, 1.2]
    assert [f.timestamp_s for f in read_frames(path, 5, max_frames=2)] == [0, 1.0]


@pytest.mark.parametrize(("form", "options"), ANIMATIONS)
def test_an_image_takes_the_first_picture_and_says_so(tmp_path, processor, form, options):
    frames = [Image.new("RGB", (32, 24), colour) for colour in COLOURS]
    frames[0].save(tmp_path / "moving", form, save_all=True, append_images=frames[1:], duration=100, **options)
    with pytest.warns(UserWarning, match="this is an animation, of which an image is the first picture"):
        first = processor.load_image(tmp_path / "moving")
    assert (first[0].permute(1, 2, 0).int() - torch.tensor(COLOURS[0])).abs().max() <= 6


def test_an_image_of_a_video_is_its_first_picture(processor, video):
    with pytest.warns(UserWarning, match="this is a video, of which an image is the first picture"):
        first = processor.load_image(video)
    torch.testing.assert_close(first, processor.load(video, max_frames=1).frames, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", ["avi", "mkv", "mov"])
def test_the_mjpeg_of_a_camera(tmp_path, suffix):
    """Each frame a photo with EXIF, of which PyAV knows no name; a whole and its half as PIL has them."""
    exif = Image.Exif()
    exif[0x010F] = "A camera"
    path = tmp_path / f"camera.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        stream.codec_context.color_range = 2
        for number in range(5):
            buffer = io.BytesIO()
            Image.fromarray(np.full((48, 64, 3), 40 * number, np.uint8)).save(buffer, "JPEG", exif=exif, quality=95)
            packet = av.Packet(buffer.getvalue())
            packet.pts = packet.dts = number
            packet.duration, packet.time_base, packet.stream = 1, 1 / stream.codec_context.framerate, stream
            packet.is_keyframe = True
            container.mux(packet)
    picked = list(read_frames(path, 5))
    assert [round(frame.pixels.mean() / 40) for frame in picked] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_damaged_pictures_are_said(tmp_path, processor, form):
    path = tmp_path / "broken.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, form)
    path.write_bytes(path.read_bytes()[:200])
    for read in (processor.load_image, processor.load, probe_video):
        with pytest.raises(
            VideoReadError, match=r"broken\.jpg': this picture cannot be read \(.+\)\. Check that"
        ) as caught:
            read(path)
        assert "\n" not in str(caught.value)


# --- frames in memory ---


def test_cost_follows_the_result(processor, tmp_path):
    """A line of 2,000 pixels is cut before it is scaled: at 336 pixels it would become 677 MB."""
    line = np.random.default_rng(0).integers(0, 256, (4, 2000, 3), dtype=np.uint8)
    middle = line[:, 998:1002]
    large = VideoMa2mbaVideoProcessor(size=336)
    assert large.load_image(line).shape == (1, 3, 336, 336)
    assert large.load([line, line.transpose(1, 0, 2)]).frames.shape == (2, 3, 336, 336)
    wanted = processor.load_image(np.pad(middle, ((0, 0), (6, 6), (0, 0)), mode="wrap"))
    got = processor.load_image(line)
    assert (got[..., 6:10].float() - wanted[..., 6:10].float()).abs().mean() < 30
    path = tmp_path / "line.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 2000, 4, "yuv444p"
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(line, format="rgb24").reformat(format="yuv444p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    from_file = large.load(path, fps=5).frames
    assert from_file.shape == (3, 3, 336, 336)
    assert (from_file[0].float() - large.load_image(line)[0].float()).abs().mean() < 4


@pytest.mark.parametrize("shape", [(3, 0, 0, 3), (0, 8, 8, 3), (2, 8, 0, 3), (2, 3, 0, 8)])
def test_frames_without_a_pixel_are_refused(processor, shape):
    with pytest.raises(ValueError, match=r"Frames must have pixels|at least one frame"):
        processor.load(np.zeros(shape, np.uint8))


def test_no_room_is_made_for_a_declared_length(monkeypatch):
    """A file that says it lasts for a year gets room as its frames come."""
    frames = [np.full((8, 8, 3), number % 256, np.uint8) for number in range(600)]
    processor = VideoMa2mbaVideoProcessor(size=8)

    class Frames:
        num_frames = 10**12

        def __iter__(self):
            from video_ma2mba.processing import VideoFrame

            return (VideoFrame(float(number), frame) for number, frame in enumerate(frames))

    loaded = processor._collect(Frames())
    assert loaded.frames.shape == (600, 3, 8, 8)
    assert loaded.frames[:, 0, 0, 0].tolist() == [number % 256 for number in range(600)]
    assert loaded.timestamps_s == list(range(600))


def chunk(kind, data, length=None):
    """A piece of a PNG that says it is `length` bytes long."""
    return (
        struct.pack(">I", len(data) if length is None else length) + kind + data + struct.pack(">I", crc32(kind + data))
    )


def test_no_more_is_read_than_there_is(tmp_path, processor):
    """Python makes room for what it is asked to read; a PNG of some hundred bytes says that two gigabytes follow."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 8, 2, 0, 0, 0))
    pixels = compress(b"".join(b"\0" + bytes(3 * 64) for _ in range(48)))
    path = tmp_path / "long.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels, length=2**31 - 8))
    for door in (processor.load, processor.load_image):
        with open(path, "rb") as file:
            for given in (path, path.read_bytes(), file):
                tracemalloc.start()
                with suppress(VideoReadError):  # PIL may take it: all pixels are there
                    door(given)
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                assert peak < 50e6


def test_an_image_of_a_still_says_nothing(tmp_path, processor):
    Image.fromarray(quarters()).save(tmp_path / "still.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor.load_image(tmp_path / "still.png")


@pytest.mark.parametrize("resize", [None, (16, 24)])
def test_pixels_of_a_picture_may_be_written(tmp_path, resize):
    """As those of a video: torch warns of others, in the middle of a watch."""
    Image.fromarray(quarters()).save(tmp_path / "still.png")
    (frame,) = read_frames(tmp_path / "still.png", resize=resize)
    assert frame.pixels.flags.writeable
