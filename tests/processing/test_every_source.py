"""Files as cameras, phones, sites and recorders make them, and the ways to name them: right, or a clear word."""

import base64
import io
import os
import re
import socket
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest

from video_ma2mba.processing import (
    VideoReadError,
    media_location,
    probe_video,
    read_frames,
    video_container,
    video_source,
)

from .videos import clip_bytes, frame_number, numbered_frame, write_audio, write_clip

STREAMS = [("mpegts", "libx264"), ("mpegts", "mpeg2video"), ("mpeg", "mpeg2video"), ("avi", "mpeg4")]
DAMAGEABLE = [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx"), ("mpegts", "libx264"),
              ("avi", "mpeg4"), ("flv", "libx264")]  # fmt: skip


def numbers_of(source, fps=1.0, **options):
    return [frame_number(frame.pixels) for frame in read_frames(source, fps, **options)]


COLOURED = [("mp4", "libx264", "yuv420p"), ("webm", "libvpx-vp9", "yuv420p"), ("mkv", "ffv1", "yuv420p10le"),
            ("avi", "ffv1", "yuv420p")]  # fmt: skip
NAMES = ["2024-01-01T12:30:00.ts", "http:x.ts", "concat:a|b.ts", "a#1.ts", "q?x=1.ts", "50%25.ts", "%03d.ts",
         "data:,x.ts", "file:x.ts", "-i.ts", "a\nb.ts", "\u00fc.ts"]  # fmt: skip


# --- rules 1 and 2: time ---


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("form", "codec"), STREAMS)
def test_joined_recordings_go_on(form, codec):
    """Times begin anew in the middle, and once more: a picture of each part stands at its own time."""
    parts = [clip_bytes(range(first, first + 50), form, codec, b_frames=1) for first in (0, 100, 200)]
    joined = b"".join(parts)
    assert numbers_of(joined, 25) == [*range(50), *range(100, 150), *range(200, 250)]
    assert numbers_of(joined, 1) == [0, 25, 100, 125, 200, 225]
    assert numbers_of(joined, 1, start_s=3) == [125, 200, 225]
    assert numbers_of(joined, 25, max_frames=3) == [0, 100, 200]
    assert [frame.timestamp_s for frame in read_frames(joined)] == pytest.approx(range(6), abs=1e-3)
    assert probe_video(joined).duration_s == pytest.approx(6, abs=1e-3)
    assert probe_video(joined).keyframe_interval_s is None or form == "avi"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "libx265"])
def test_a_clock_that_is_set_or_wraps(codec):
    """The second part begins an hour later; and the clock of 33 bits ends within one."""
    parts = [clip_bytes(range(50), "mpegts", codec)]
    parts.append(clip_bytes(range(100, 150), "mpegts", codec, first=3600 * 25))
    assert numbers_of(b"".join(parts), 25) == [*range(50), *range(100, 150)]
    wraps = clip_bytes(range(100), "mpegts", codec, first=2**33 * 25 // 90000 - 50)
    assert numbers_of(wraps, 25) == list(range(100))
    assert numbers_of(wraps, 1, start_s=1) == [25, 50, 75]


@pytest.mark.filterwarnings("error")
def test_joined_fragments_go_on():
    """mp4 as it is sent, whose second index FFmpeg passes over and whose clock begins anew."""
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    parts = [
        clip_bytes(range(first, first + 50), "mp4", "libx264", b_frames=1, container_options=options)
        for first in (0, 100)
    ]
    assert numbers_of(b"".join(parts), 25) == [*range(50), *range(100, 150)]
    assert numbers_of(b"".join(parts), 1, start_s=1) == [25, 100, 125]


@pytest.mark.parametrize("form", ["matroska", "flv", "mp4", "mov", "faststart"])
def test_joined_files_that_cannot_be_read_whole_are_said(form, tmp_path):
    """Of Matroska FFmpeg reads two parts, and of FLV and mp4 one."""
    options = {"movflags": "faststart"} if form == "faststart" else {}
    parts = []
    for first in (0, 100, 200):
        path = tmp_path / f"{first}"
        numbers = range(first, first + 50)
        write_clip(path, numbers, "libx264", form=form.replace("faststart", "mp4"), container_options=options)
        parts.append(path.read_bytes())
    with pytest.warns(UserWarning, match=r"the last [\d,]+ bytes are not read"):
        numbers = numbers_of(b"".join(parts), 25)
    assert numbers == [*range(50), *(range(100, 150) if form == "matroska" else ())]
    with pytest.raises(VideoReadError, match="bytes are not read"):
        numbers_of(b"".join(parts), 25, strict=True)


@pytest.mark.parametrize("form", ["matroska", "mpegts", "mp4", "flv"])
def test_a_picture_with_a_wrong_time_is_said(form):
    """It says that it comes two seconds later: the pictures of these seconds come behind it, too late to be shown."""
    moved = io.BytesIO()
    with (
        av.open(io.BytesIO(clip_bytes(range(150), form, "libx264", b_frames=1))) as whole,
        av.open(moved, "w", format=form) as container,
    ):
        stream = container.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(whole.demux(video=0)):
            if packet.size:
                packet.pts += round(2 / packet.time_base) if number == 40 else 0
                packet.stream = stream
                container.mux(packet)
    with pytest.warns(UserWarning, match=r"[12]\.\d s of 6\.0 s are missing or damaged, at 1\.[5-7] s"):
        numbers = numbers_of(moved.getvalue(), 25)
    assert numbers[:38] == list(range(38))
    assert numbers[95:] == list(range(95, 150))
    with pytest.raises(VideoReadError, match="missing or damaged"):
        numbers_of(moved.getvalue(), 25, strict=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libx264"), ("mp4", "libx264"), ("webm", "libvpx")])
def test_a_gap_is_no_damage(tmp_path, suffix, codec):
    """A screen recorder writes nothing while nothing moves: the last picture is shown, and nobody is warned."""
    path = tmp_path / f"screen.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, ms in enumerate([0, 40, 80, 12_000, 12_040, 30_000]):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert numbers_of(path, 0.2, strict=True)[:7] == [0, 2, 2, 4, 4, 4, 5]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("form", "codec"), [("mpegts", "libx264"), ("mpegts", "mpeg2video"), ("mpegts", "libx265")])
def test_a_stream_that_begins_inside_a_group_of_pictures(form, codec):
    """The first keyframe that is there is the beginning; what came before it cannot be decoded."""
    data = clip_bytes(range(100), form, codec, gop=20)
    cut = len(data) // 3 // 188 * 188
    numbers = numbers_of(data[cut:], 25)
    assert numbers[0] in (20, 40, 60)
    assert numbers == list(range(numbers[0], 100))


# --- rule 5: damage ---


@pytest.mark.parametrize(("form", "codec"), DAMAGEABLE)
def test_damage_in_the_middle_is_said(form, codec):
    """Zeros in the middle: what is not wrong is where it belongs, what is missing is said, and raised when strict."""
    data = bytearray(clip_bytes(range(120), form, codec, gop=20))
    middle, length = len(data) // 2, len(data) // 15
    data[middle : middle + length] = bytes(length)
    with pytest.warns(UserWarning, match=r"missing or damaged, at \d.* the last good picture stands in") as caught:
        numbers = numbers_of(bytes(data), 25)
    assert len(caught) == 1
    assert len(numbers) == 120
    wrong = [place for place, number in enumerate(numbers) if number != place]
    assert wrong
    assert 9 < wrong[0] < 80
    assert wrong[-1] < 100
    assert {numbers[place] for place in wrong} <= {place - 1 for place in wrong}
    lost_s = float(re.search(r"([\d.]+) s of 4\.8 s", str(caught[0].message))[1])
    assert lost_s == pytest.approx(len(wrong) / 25, abs=0.09)
    before = []
    with pytest.raises(VideoReadError, match="missing or damaged"):
        before.extend(frame_number(frame.pixels) for frame in read_frames(bytes(data), 25, strict=True))
    assert before == list(range(wrong[0]))
    assert numbers_of(bytes(data), 25, end_s=0.3, strict=True) == list(range(8))


def test_a_program_stream_says_its_damage_too():
    """FFmpeg reckons most of its times, so that behind a loss they may be a frame off."""
    data = bytearray(clip_bytes(range(120), "mpeg", "mpeg2video", gop=20))
    data[len(data) // 5 : len(data) // 3] = bytes(len(data) // 3 - len(data) // 5)
    with pytest.warns(UserWarning, match=r"missing or damaged, at \d.* the last good picture stands in"):
        numbers = numbers_of(bytes(data), 25)
    assert numbers[:20] == list(range(20))
    assert all(number in (place, place - 1) for place, number in enumerate(numbers) if place > 100)
    with pytest.raises(VideoReadError, match="missing or damaged"):
        numbers_of(bytes(data), 25, strict=True)


# --- colours, sizes ---

_WEIGHTS = {5: (0.299, 0.114), 1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}  # by FFmpeg's number of the matrix
_COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (220, 220, 220), (20, 20, 20), (200, 180, 60)])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", _WEIGHTS)
@pytest.mark.parametrize(("suffix", "codec", "pixels"), COLOURED)
def test_colours_are_those_of_the_standard(tmp_path, suffix, codec, pixels, matrix, full):
    """Written as the standard has it, from RGB by its weights; read back within 6 of 255."""
    if suffix == "avi" and (matrix != 5 or full):
        pytest.skip("AVI names no matrix")
    red, blue = _WEIGHTS[matrix]
    scale = 4 if "10" in pixels else 1
    dtype = np.uint16 if scale == 4 else np.uint8
    with av.open(str(tmp_path / f"c.{suffix}"), "w") as container:
        stream = container.add_stream(codec, rate=5)
        stream.width, stream.height, stream.pix_fmt = 32 * len(_COLOURS), 32, pixels
        stream.options = {} if codec == "ffv1" else {"crf": "4", "b": "0"} if "vp9" in codec else {"crf": "4"}
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        r, g, b = (_COLOURS / 255).T
        y = red * r + (1 - red - blue) * g + blue * b
        chroma = (b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))
        top = 256 * scale - 1
        if full:
            planes = [y * top, *(part * top + 128 * scale for part in chroma)]
        else:
            planes = [(219 * y + 16) * scale, *((224 * part + 128) * scale for part in chroma)]
        frame = av.VideoFrame(stream.width, 32, pixels)
        for plane, values, block in zip(frame.planes, planes, (32, 16, 16), strict=True):
            rows = np.zeros((plane.height, plane.line_size // dtype().itemsize), dtype)
            rows[:, : block * len(_COLOURS)] = np.repeat(values.round().astype(dtype), block)
            plane.update(rows.tobytes())
        for index in range(3):
            frame.pts, frame.time_base = index, Fraction(1, 5)
            frame.colorspace, frame.color_range = matrix, 2 if full else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    pixels_read = next(read_frames(tmp_path / f"c.{suffix}")).pixels.astype(int)
    assert np.abs(pixels_read[16, 16::32] - _COLOURS).max() <= 6


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "mpeg4"), ("ts", "libx264")])
def test_pixels_that_are_not_square_become_square(tmp_path, suffix, codec):
    path = tmp_path / f"wide.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.sample_aspect_ratio = 64, 32, "yuv420p", Fraction(4, 3)
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    info = probe_video(path)
    assert (info.width, info.height) in ((85, 32), (86, 32))
    assert next(read_frames(path)).pixels.shape == (32, info.width, 3)
    assert numbers_of(path, 25) == list(range(10))


def test_the_default_stream_of_several(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for default in (False, True):
            stream = container.add_stream("ffv1", rate=5)
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            stream.disposition = av.stream.Disposition.default if default else av.stream.Disposition(0)
            streams.append(stream)
        for number in range(5):
            for stream, first in zip(streams, (0, 100), strict=True):
                frame = av.VideoFrame.from_ndarray(numbered_frame(first + number), format="rgb24")
                frame = frame.reformat(format="yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, 5)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    assert numbers_of(path, 5) == [100, 101, 102, 103, 104]


# --- names and sources ---


@pytest.fixture(scope="module")
def clip():
    return clip_bytes(range(75), "mpegts", "libx264")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name(tmp_path, monkeypatch, clip, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(clip)
    for given in (name, tmp_path / name, f"file://{tmp_path}/{name}", (tmp_path / name).as_uri()):
        assert numbers_of(given) == [0, 25, 50], given
    (tmp_path / name).write_bytes(b"no video" * 9)
    with pytest.raises(VideoReadError) as caught:
        probe_video(name)
    assert "\n" not in str(caught.value)


class _Pipe:
    """An object with no more than `read`."""

    def __init__(self, data):
        self.read = io.BytesIO(data).read


def test_bytes_objects_and_data_urls(tmp_path, clip):
    (tmp_path / "clip.ts").write_bytes(clip)
    with open(tmp_path / "clip.ts", "rb") as file:
        for given in (clip, bytearray(clip), io.BytesIO(clip), file, _Pipe(clip),
                      "data:video/mp2t;base64," + base64.b64encode(clip).decode()):  # fmt: skip
            assert numbers_of(given) == [0, 25, 50]
        assert not file.closed
    read_end, write_end = os.pipe()

    def feed():
        with open(write_end, "wb") as pipe:
            pipe.write(clip)

    threading.Thread(target=feed, daemon=True).start()
    with open(read_end, "rb") as pipe:
        assert numbers_of(pipe) == [0, 25, 50]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"", "not one byte"),
        (b"no video" * 1000, "not a video"),
        (io.StringIO("text"), "gives text"),
        ("data:video/mp4;base64,AAAA" * 2000, "data: URL of 52,000 characters"),
        ("rtsp://camera/1", "begin with rtsp: are not read"),
        ("x" * 5000, "cannot be read"),
        ("a\0b", "cannot be read"),
        ("nowhere\n.mp4", "no such file"),
    ],
)
def test_what_is_no_video_is_said_in_one_short_line(given, said):
    for read in (probe_video, read_frames):
        with pytest.raises(VideoReadError, match=said) as caught:
            read(given)
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)


def test_a_pipe_by_name_is_refused_as_one(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(VideoReadError, match="this is a pipe, which can be read only once"):
        probe_video(tmp_path / "fifo")
    with pytest.raises(VideoReadError, match="this is a device"):
        probe_video("/dev/null")


def test_no_other_file_is_opened_for_a_list(tmp_path, clip):
    """Lists of pieces, in a file or in bytes, and a list that calls itself a video."""
    (tmp_path / "piece.ts").write_bytes(clip)
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{tmp_path}/piece.ts\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile '{tmp_path}/piece.ts'\n"
    for name, text in (("a.m3u8", hls), ("b.mp4", hls), ("c.ffconcat", concat), ("d.mp4", concat)):
        (tmp_path / name).write_text(text)
        for given in (tmp_path / name, text.encode()):
            with pytest.raises(VideoReadError, match="a list of other files, which are not opened"):
                probe_video(given)


def test_a_list_in_the_web_leads_nowhere_else(tmp_path, clip, monkeypatch):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/away.ts":
                self.send_response(302)
                self.send_header("Location", (tmp_path / "piece.ts").as_uri())
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    (tmp_path / "piece.ts").write_bytes(clip)
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n"
    (tmp_path / "here.m3u8").write_text(f"{head}piece.ts\n#EXTINF:3,\npiece.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "away.m3u8").write_text(f"{head}file://{tmp_path}/piece.ts\n#EXT-X-ENDLIST\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert numbers_of(f"{address}/here.m3u8") == [0, 25, 50, 0, 25, 50]
        for name in ("away.m3u8", "away.ts"):
            with pytest.raises(VideoReadError):
                numbers_of(f"{address}/{name}")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("sends", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
def test_a_silent_server_is_given_up(monkeypatch, sends):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(video_container, "URL_TIMEOUT_S", 1.0)
    monkeypatch.setattr(media_location, "URL_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        waiting = []

        def serve():
            while True:
                waiting.append(server.accept()[0])
                waiting[-1].sendall(sends)

        threading.Thread(target=serve, daemon=True).start()
        for name in ("a.mp4", "a.png"):
            begin = time.monotonic()
            with pytest.raises(VideoReadError, match="the server has sent nothing for 1 s"):
                next(read_frames(f"http://127.0.0.1:{server.getsockname()[1]}/{name}"))
            assert time.monotonic() - begin < 30


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    opened, original = [], av.open
    monkeypatch.setattr(
        video_source.av, "open", lambda *args, **kwargs: opened.append(args) or original(*args, **kwargs)
    )
    for suffix, codec in (("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")):
        path = write_clip(tmp_path / f"clip.{suffix}", range(50), codec)
        for fps in (1, 25):
            opened.clear()
            list(read_frames(path, fps))
            assert len(opened) == 1, (suffix, fps)


def test_sound_alone_is_no_video(tmp_path):
    with pytest.raises(VideoReadError, match="no pictures in this file, only audio"):
        probe_video(write_audio(tmp_path / "song.mp4"))


def test_sound_that_begins_late_in_a_stream_without_a_head(tmp_path):
    """As a recorder of a live stream writes FLV: the head names no sound, and its first packet comes after 16 s."""
    path = write_clip(tmp_path / "clip.flv", range(750), "libx264", sound_s=30)
    whole = path.read_bytes()
    tags, place = [], 13  # of 11 bytes, the body, and 4 bytes that say the size again
    while place < len(whole):
        end = place + 15 + int.from_bytes(whole[place + 1 : place + 4])
        tags.append(whole[place:end])
        place = end
    pictures = [place for place, tag in enumerate(tags) if tag[0] == 9]
    early = [tag for tag in tags[: pictures[400]] if tag[0] == 9]  # nor what was said of the sound beforehand
    first_sound = [tag for tag in tags if tag[0] == 8][:1]
    path.write_bytes(b"FLV\x01\x01" + whole[5:13] + b"".join(early + first_sound + tags[pictures[400] :]))
    assert [frame_number(frame.pixels) for frame in read_frames(path, 1.0)] == [
        25 * second % 256 for second in range(30)
    ]
