"""The reader against a loop that decodes everything, and every kind of file that cannot be read."""

import gc
import math
import struct
import subprocess
import sys
import threading
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest

from video_ma2mba.processing import VideoReadError, probe_video, read_frames, video_reader, video_source

from .videos import decode_everything, frame_number, shown_at, write_audio, write_video

# Matroska stores milliseconds: times are off by half of one, and a frame counts as shown up to one early (rule 3).
_ROUNDING = Fraction(3, 2000)
# Presentation times in milliseconds of a clip with a varying frame rate: bursts and long pauses.
_UNEVEN_MS = [0, 40, 80, 700, 733, 1500, 1501, 1999, 2000, 2400, 3600, 3640, 3999, 4001, 4600, 4900]


def _write(path, kind):
    if kind == "uneven":
        return write_video(path, len(_UNEVEN_MS), times=[Fraction(ms, 1000) for ms in _UNEVEN_MS], gop=4)
    return write_video(path, 60, gop=5 if "dense" in kind else 250, fps=Fraction(30000, 1001) if "ntsc" in kind else 10)


@pytest.mark.parametrize("kind", ["sparse", "dense", "ntsc dense", "uneven"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_picks_the_frame_shown_at_every_time(tmp_path, kind, suffix):
    """By the list that the clip was written from: Matroska rounds 1001/30000 s to milliseconds."""
    path = _write(tmp_path / f"clip.{suffix}", kind)
    stored = decode_everything(path)
    assert len(stored) in (60, len(_UNEVEN_MS))
    if kind == "uneven":
        frames = [(Fraction(ms, 1000), number) for number, ms in enumerate(_UNEVEN_MS)]
    else:
        frames = [
            (number * (Fraction(1001, 30000) if "ntsc" in kind else Fraction(1, 10)), number) for number in range(60)
        ]
    for fps in (0.5, 1, 1.7, 2, 7, 29.97, 60):
        for start in (Fraction(0), Fraction(35, 100), Fraction(1237, 1000)):
            picked = list(read_frames(path, fps, start_s=float(start)))
            targets = [start + k / Fraction(str(fps)) for k in range(len(picked))]
            numbers = [frame_number(frame.pixels) for frame in picked]
            if (fps != 29.97 or start) and suffix == "mkv" and "ntsc" in kind:
                wanted = [{shown_at(frames, target), shown_at(frames, target + _ROUNDING)} for target in targets]
                assert all(number in one for number, one in zip(numbers, wanted, strict=True))
            else:
                assert numbers == [shown_at(frames, target) for target in targets]
            times = dict((number, time) for time, number in stored)
            assert [frame.timestamp_s for frame in picked] == [float(times[number]) for number in numbers]
            # Nothing is left out at the end: one more pick would lie beyond the last frame.
            assert start + len(picked) / Fraction(str(fps)) >= frames[-1][0]


def test_number_of_frames(video):
    def count(**options):
        frames = read_frames(video, **options)
        picked = list(frames)
        assert len(picked) == frames.num_frames
        return [frame.timestamp_s for frame in picked]

    assert count() == [0, 1, 2, 3]
    assert count(fps=0.25) == [0]
    assert count(fps=2, start_s=1, end_s=2) == [1, 1.5]
    assert count(fps=2, start_s=1, end_s=100) == [1, 1.5, 2, 2.5, 3, 3.5]
    assert count(end_s=2.0001) == [0, 1, 2]
    assert count(fps=10, max_frames=4) == [0, 1, 2, 3]
    assert count(fps=10, max_frames=3, start_s=1) == [1, 2, 3]
    assert count(fps=10, max_frames=8, start_s=2) == [2, 2.2, 2.5, 2.7, 3, 3.2, 3.5, 3.7]  # shown at 2, 2.25, 2.5, ...
    assert count(fps=1, max_frames=9) == [0, 1, 2, 3]
    assert count(fps=10, max_frames=1) == [0]
    assert count(fps=1e-9) == [0]


def test_a_tenth_of_a_frame_per_second_is_not_rounded_up(tmp_path):
    path = write_video(tmp_path / "ten.mp4", 100, gop=10)
    assert [frame.timestamp_s for frame in read_frames(path, 0.1)] == [0]
    assert [frame.timestamp_s for frame in read_frames(path, 0.3)] == [0, 3.3, 6.6]  # shown at 0, 3.33, 6.67


@pytest.mark.parametrize("num_frames", [1, 3, 9])
def test_a_clip_under_one_second_gives_one_frame(tmp_path, num_frames):
    path = write_video(tmp_path / "blink.mp4", num_frames)
    assert [frame_number(frame.pixels) for frame in read_frames(path)] == [0]


def test_timestamps_lead_back_to_their_frames(tmp_path):
    path = _write(tmp_path / "clip.mkv", "ntsc dense")
    for frame in read_frames(path, 7):
        again = next(read_frames(path, start_s=frame.timestamp_s))
        assert frame_number(again.pixels) == frame_number(frame.pixels)


def _count_decoded(monkeypatch):
    decoded = []
    original = video_source.VideoSource._frames_of

    def counting(self, packet):
        frames = original(self, packet)
        decoded.extend(frame.pts for frame in frames)
        return frames

    monkeypatch.setattr(video_source.VideoSource, "_frames_of", counting)
    return decoded


def test_seeks_only_where_keyframes_are_dense(tmp_path, monkeypatch):
    dense = write_video(tmp_path / "dense.mp4", 100, gop=10)
    sparse = write_video(tmp_path / "sparse.mp4", 100, gop=30)
    decoded = _count_decoded(monkeypatch)
    assert len(list(read_frames(dense))) == 10
    assert len(decoded) < 40
    decoded.clear()
    assert len(list(read_frames(dense, 5))) == 50
    assert 90 < len(decoded) < 130
    decoded.clear()
    assert len(list(read_frames(sparse))) == 10
    assert 90 < len(decoded) < 130


def test_stops_seeking_where_keyframes_become_rare(tmp_path, monkeypatch):
    """Dense where they are counted, rare afterwards: seeking for each pick would decode everything many times over."""
    path = write_video(tmp_path / "mixed.mp4", 250, gop=1000, keyframes=range(0, 60, 10))
    monkeypatch.setattr(video_source, "_KEYFRAME_WINDOW_S", 5)
    decoded = _count_decoded(monkeypatch)
    picked = [frame_number(frame.pixels) for frame in read_frames(path)]
    assert picked == list(range(0, 250, 10))
    assert len(decoded) < 400


def test_decodes_on_demand(tmp_path, monkeypatch):
    path = write_video(tmp_path / "long.mp4", 200)
    decoded = _count_decoded(monkeypatch)
    frames = read_frames(path, 1, resize=(8, 16))
    assert len(decoded) == 1  # the probe
    next(frames)
    assert len(decoded) < 50
    assert len(list(frames)) == 19
    assert len(decoded) > 190


def test_holds_few_frames(tmp_path):
    """Without the help of the garbage collector: a cycle would keep whole frames, at full size, until it runs."""
    path = write_video(tmp_path / "long.mp4", 200)

    def held():
        # the youngest generation: what was made since the collection below, as nothing grows older without another
        return sum(type(each) is av.VideoFrame for each in gc.get_objects(generation=0))

    gc.collect()
    gc.disable()
    try:
        for frame in read_frames(path, 5, resize=(8, 16)):
            assert frame.pixels.shape == (8, 16, 3)
            assert 0 < held() < 12
    finally:
        gc.enable()


def test_closing_stops_and_closes_the_file(video):
    frames = read_frames(video)
    next(frames)
    frames.close()
    assert list(frames) == []


def test_probe(tmp_path, video):
    info = probe_video(video)
    assert info == video_reader.VideoInfo(str(video), 4.0, 64, 32, 10.0, 40, None)
    assert probe_video(write_video(tmp_path / "dense.mp4", 60, gop=10)).keyframe_interval_s == 1
    assert read_frames(video).info == info


def test_paths_and_urls(video):
    assert " " in video.name
    for path in (video, str(video), video.as_uri()):
        assert probe_video(path).duration_s == 4


def test_a_live_stream_without_declared_duration(tmp_path):
    path = write_video(tmp_path / "live.mkv", 35, container_options={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None
    assert probe_video(path).duration_s == 3.5
    assert [frame_number(frame.pixels) for frame in read_frames(path, max_frames=2)] == [0, 17]


def test_resize(video):
    assert next(read_frames(video)).pixels.shape == (32, 64, 3)
    frame = next(read_frames(video, resize=(20, 30)))
    assert frame.pixels.shape == (20, 30, 3)
    assert frame.pixels.dtype == np.uint8
    seen = []

    def half(height, width):
        seen.append((height, width))
        return height // 2, width // 2

    assert next(read_frames(video, start_s=1, resize=half)).pixels.shape == (16, 32, 3)
    assert seen == [(32, 64)]


def _turn(path, turned, a, b, c, d):
    """Writes a copy of an mp4 with another display matrix."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd")
    matrix = header + 4 + 40  # version 0: after the type, 40 bytes come first
    assert struct.unpack(">9i", data[matrix : matrix + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    turned.write_bytes(data)
    return turned


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1)),  # clockwise, as portrait phones write it
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda pixels: pixels.swapaxes(0, 1)),
    ],
)
def test_rotation(tmp_path, video, matrix, turn):
    path = _turn(video, tmp_path / "turned.mp4", *matrix)
    upright = next(read_frames(video, start_s=1.3)).pixels
    turned = next(read_frames(path, start_s=1.3)).pixels
    np.testing.assert_array_equal(turned, turn(upright))
    info = probe_video(path)
    assert (info.height, info.width) == turned.shape[:2]
    resized = next(read_frames(path, resize=lambda height, width: (height // 2, width // 4))).pixels
    assert resized.shape[:2] == (turned.shape[0] // 2, turned.shape[1] // 4)


def test_rotation_agrees_with_ffmpeg(tmp_path, video):
    """FFmpeg counts degrees counter-clockwise; a clockwise turn is -90 for it."""
    path = _turn(video, tmp_path / "turned.mp4", 0, 1, -1, 0)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert frame.rotation == -90
    wanted = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    assert np.abs(next(read_frames(path)).pixels.astype(int) - wanted).max() <= 2


# ---- files that cannot be read ----


def _bad_files(tmp_path, video):
    text = tmp_path / "text.mp4"
    text.write_text("A text that calls itself a video.\n" * 20)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    lost_index = tmp_path / "lost_index.mp4"
    lost_index.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    codec = tmp_path / "codec.mp4"
    codec.write_bytes(video.read_bytes().replace(b"avc1", b"zzzz"))
    return {
        "missing": (tmp_path / "nowhere.mp4", "no such file"),
        "folder": (tmp_path, "folder"),
        "text": (text, "not a video"),
        "empty": (empty, "empty"),
        "audio": (write_audio(tmp_path / "song.mp4"), "no pictures"),
        "lost index": (lost_index, "cut off"),
        "codec": (codec, "format that this FFmpeg cannot decode"),
        "no times": (write_video(tmp_path / "raw.h264", 5), "no times"),
    }


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "audio", "lost index", "codec", "no times"])
def test_unreadable_files(tmp_path, video, kind):
    path, reason = _bad_files(tmp_path, video)[kind]
    for read in (probe_video, read_frames):  # at once, not with the first frame
        with pytest.raises(VideoReadError, match=reason) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_no_permission(video, monkeypatch):
    def refuse(path, *args, **kwargs):  # access rights do not bind every user who runs the tests
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(video_source.av, "open", refuse)
    with pytest.raises(VideoReadError, match="permission"):
        probe_video(video)


def test_a_cover_picture_is_not_a_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("png", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        sound = container.add_stream("aac", rate=16000)
        container.mux(cover.encode(av.VideoFrame(32, 32, "rgb24")))
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        frame.rate, frame.pts = 16000, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with av.open(str(path)) as container:
        assert container.streams.video
    with pytest.raises(VideoReadError, match="no pictures"):
        probe_video(path)


@pytest.mark.parametrize("fps", [0, -1, math.inf, -math.inf, math.nan])
def test_fps_must_be_positive_and_finite(video, fps):
    with pytest.raises(ValueError, match=r"fps must be a positive finite number, got .*Use fps=1\.0"):
        read_frames(video, fps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_frames": 0}, "max_frames must be at least 1"),
        ({"start_s": -1}, "start_s must be zero or a positive"),
        ({"start_s": math.nan}, "start_s must be zero or a positive"),
        ({"start_s": 2, "end_s": 2}, "end_s must lie after start_s"),
        ({"start_s": 2, "end_s": 1}, "end_s must lie after start_s"),
        ({"end_s": math.nan}, "end_s must lie after start_s"),
        ({"start_s": 4}, r"plain clip\.mp4.*a start at 4 s lies beyond the end of the video, which lasts 4\.000 s"),
    ],
)
def test_ranges_that_make_no_sense(video, options, message):
    with pytest.raises(ValueError, match=message):
        read_frames(video, **options)


# ---- files that break off ----


@pytest.fixture(params=[250, 10], ids=["in order", "by seeking"])
def truncated(request, tmp_path):
    """An mp4 with its index first, that declares 8 seconds and breaks off in the middle; and its whole self."""
    whole = write_video(tmp_path / "whole.mp4", 80, gop=request.param, container_options={"movflags": "faststart"})
    path = tmp_path / "truncated.mp4"
    data = whole.read_bytes()
    start = data.index(b"mdat")
    path.write_bytes(data[: start + (len(data) - start) // 2])
    return path


def test_truncated_gives_what_decodes_and_warns(truncated):
    frames = read_frames(truncated)
    with pytest.warns(UserWarning, match=r"truncated\.mp4.*last \d\.\d s of 8\.0 s are missing") as caught:
        picked = [frame_number(frame.pixels) for frame in frames]
    assert frames.num_frames == 8
    assert 2 <= len(picked) <= 6
    assert picked == list(range(0, 10 * len(picked), 10))
    missing_s = float(str(caught[0].message).split("last ")[1].split(" s")[0])
    # The frame after the last one picked is what was lost, so the break lies within the second after it.
    assert len(picked) - 1 < 8 - missing_s <= len(picked)


def test_truncated_strict_raises_after_what_decodes(truncated):
    frames = read_frames(truncated, strict=True)
    picked = []
    with pytest.raises(VideoReadError, match="missing"):
        picked.extend(frame_number(frame.pixels) for frame in frames)
    assert 2 <= len(picked) <= 6


@pytest.mark.filterwarnings("error")
def test_truncated_beyond_the_range_asked_for_does_not_matter(truncated):
    assert len(list(read_frames(truncated, end_s=2, strict=True))) == 2


def test_truncated_before_the_range_asked_for(truncated):
    with pytest.raises(VideoReadError, match="missing"):
        list(read_frames(truncated, start_s=7))


def test_damage_in_the_middle_costs_only_what_it_hits(tmp_path):
    path = write_video(tmp_path / "clip.mkv", 80, gop=10, b_frames=0)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    picked = [frame_number(frame.pixels) for frame in read_frames(path)]
    assert picked[0] == 0
    assert picked[-1] == 70


def test_without_pyav(video, monkeypatch):
    monkeypatch.setattr(video_source, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        read_frames(video)


def test_an_older_pyav_is_refused(video, monkeypatch):
    monkeypatch.setattr(video_source.av, "__version__", "16.1.0")
    with pytest.raises(ImportError, match=r"PyAV 17 or newer, and it is 16\.1\.0"):
        read_frames(video)


WITHOUT_PYAV = """
import sys
sys.modules["av"] = None  # importing it raises ImportError
import torch
from video_ma2mba.processing import VideoMa2mbaVideoProcessor
processor = VideoMa2mbaVideoProcessor(size=8)
assert processor.load(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).frames.shape == (2, 3, 8, 8)
try:
    processor.load(sys.argv[1])
except ImportError as error:
    print(error)
"""


def test_frames_in_memory_need_no_pyav(video):
    done = subprocess.run([sys.executable, "-c", WITHOUT_PYAV, video], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install av" in done.stdout


def test_pictures_that_are_noise(tmp_path):
    path = write_video(tmp_path / "noise.mp4", 60, gop=10)
    data = bytearray(path.read_bytes())
    first, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[first:end] = np.random.default_rng(0).bytes(end - first)
    path.write_bytes(data)
    with pytest.raises(VideoReadError, match="not one frame could be decoded"):
        probe_video(path)


def test_a_url_is_read_from_the_web(tmp_path, monkeypatch):
    """From a server that cannot begin in the middle of a file, so that seeking does not work either."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = write_video(tmp_path / "clip.mkv", 60, gop=10)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/clip.mkv"
        for options in ({}, {"start_s": 2.5}, {"fps": 7}):
            found, wanted = ([frame_number(f.pixels) for f in read_frames(one, **options)] for one in (url, path))
            assert found == wanted
    finally:
        server.shutdown()
        server.server_close()
