"""No path leaves the allowed folders, no URL reaches private addresses, no playlist is followed, sizes are bounded."""

import base64
import http.server
import os
import socket
import threading
from contextlib import contextmanager

import pytest
from PIL import Image

from video_ma2mba.data.synthetic import make_story
from video_ma2mba.serving import media
from video_ma2mba.serving.media import Forbidden, MediaRules, TooLarge, check, is_public


@pytest.fixture
def place(tmp_path):
    """An allowed folder with a video in it, and a secret beside it."""
    for name in ("allowed", "kept"):
        (tmp_path / name).mkdir()
    make_story(seed=1, duration_s=4).render(tmp_path / "allowed" / "clip.mp4")
    (tmp_path / "secret.mp4").write_bytes((tmp_path / "allowed" / "clip.mp4").read_bytes())
    return tmp_path


def test_a_path_is_read_under_an_allowed_folder_alone(place):
    rules, kept = MediaRules((place / "allowed",)), place / "kept"
    for name in (str(place / "allowed" / "clip.mp4"), f"file://{place}/allowed/clip.mp4"):
        medium = rules.bring(name, kept)
        assert medium.path.read_bytes() == (place / "secret.mp4").read_bytes()
        medium.discard()
    assert (place / "allowed" / "clip.mp4").exists()
    os.symlink(place / "secret.mp4", place / "allowed" / "link.mp4")
    os.symlink(place, place / "allowed" / "up")
    os.mkfifo(place / "allowed" / "pipe")
    os.symlink("/dev/zero", place / "allowed" / "device")
    (place / "allowed-too").mkdir()
    (place / "allowed-too" / "clip.mp4").write_bytes(b"")
    for name in (
        "secret.mp4", "allowed/../secret.mp4", "allowed/link.mp4", "allowed/up/secret.mp4", "allowed/pipe",
        "allowed/device", "allowed", "allowed/missing.mp4", "allowed-too/clip.mp4", "allowed/%2e%2e/secret.mp4",
    ):  # fmt: skip
        for url in (f"{place}/{name}", f"file://{place}/{name}"):
            with pytest.raises(Forbidden, match="--allow-media"):
                rules.bring(url, kept)
    for url in (
        "clip.mp4",
        "file://elsewhere/clip.mp4",
        "ftp://127.0.0.1/x",
        "concat:/etc/passwd",
        f"{place}/a\0b",
        "",
    ):
        with pytest.raises(Forbidden):
            rules.bring(url, kept)
    with pytest.raises(Forbidden):
        MediaRules().bring(str(place / "allowed" / "clip.mp4"), kept)


def test_a_link_that_changes_while_it_is_looked_at_leads_nowhere(place, monkeypatch):
    """The file that was opened is looked at, not the name."""
    target, real = place / "allowed" / "clip.mp4", os.open

    def swapped(path, flags, *rest):
        if str(path) == str(target):
            target.unlink()
            os.symlink(place / "secret.mp4", target)
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(Forbidden):
        MediaRules((place / "allowed",)).open(str(target))


def test_files_are_bounded(place):
    size = (place / "allowed" / "clip.mp4").stat().st_size
    rules = MediaRules((place / "allowed",), max_bytes=size - 1)
    body = base64.b64encode((place / "secret.mp4").read_bytes()).decode()
    for url in (str(place / "allowed" / "clip.mp4"), f"data:video/mp4;base64,{body}"):
        with pytest.raises(TooLarge):
            rules.bring(url, place / "kept")
    for url in ("data:video/mp4;base64", "data:video/mp4;base64,%%%"):
        with pytest.raises(ValueError, match="data URL"):
            rules.bring(url, place / "kept")
    assert list((place / "kept").iterdir()) == []


def playlists(folder):
    header = '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT4S">'
    adaptation = '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
    closing = "<BaseURL>clip.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>"
    return {
        "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nclip.mp4\n#EXT-X-ENDLIST\n",
        "mpd": f'<?xml version="1.0"?>{header}{adaptation}{closing}',
        "concat": f"ffconcat version 1.0\nfile '{folder}/clip.mp4'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }


@pytest.mark.parametrize("kind", ["m3u8", "mpd", "concat", "sdp"])
def test_playlists_are_refused(place, kind):
    path = place / "allowed" / f"list.{kind}"
    path.write_text(playlists(place / "allowed")[kind])
    for what in ("video", "image"):
        with pytest.raises(ValueError, match="not a"):
            check(path, what, 100)


def test_pictures_of_a_numbered_name_are_one_file(place):
    """FFmpeg would read x1.png, x2.png ... for x%d.png."""
    for number in (1, 2):
        Image.new("RGB", (16, 16)).save(place / "allowed" / f"x{number}.png")
    Image.new("RGB", (8, 8)).save(place / "allowed" / "x%d.png", "png")
    medium = MediaRules((place / "allowed",)).open(str(place / "allowed" / "x%d.png"))
    check(medium.path, "image", 1)
    medium.discard()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "tiff", "gif"])
def test_images_are_taken_up_to_their_bound(place, kind, monkeypatch):
    path = place / "kept" / "picture"
    Image.new("RGB", (64, 48)).save(path, kind)
    check(path, "image", 1)
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(ValueError, match=r"pixels|not a"):
        check(path, "image", 1)


def test_a_video_is_bounded_by_its_length(place):
    check(place / "secret.mp4", "video", 4)
    with pytest.raises(TooLarge, match="lasts 4 s"):
        check(place / "secret.mp4", "video", 3)
    (place / "text").write_text("no video")
    with pytest.raises(ValueError, match="not a video"):
        check(place / "text", "video", 3)


def test_which_addresses_are_public():
    for address in (
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1",
        "2002:a00:1::", "::7f00:1",
    ):  # fmt: skip
        assert not is_public(address), address
    assert is_public("8.8.8.8")
    assert is_public("2606:4700::1111")


class Site(http.server.BaseHTTPRequestHandler):
    """Answers by path: a file, a redirect, more than was declared, less, and nothing for long."""

    files: dict = {}  # noqa: RUF012 - each test has its own class

    def do_GET(self):
        kind, _, rest = self.path.lstrip("/").partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest.replace("_", ":", 1) if "://" not in rest else rest)
            self.end_headers()
        elif kind == "short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"short")
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass
        elif kind in self.files:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.files[kind])
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


@contextmanager
def site(**files):
    handler = type("Handler", (Site,), {"files": files})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_urls_are_fetched_where_allowed_alone(place):
    kept = place / "kept"
    with site(clip=b"a video") as url:
        with pytest.raises(Forbidden, match="--allow-urls"):
            MediaRules().bring(f"{url}/clip", kept)
        with pytest.raises(Forbidden, match="not of the public internet"):
            MediaRules(urls=True).bring(f"{url}/clip", kept)
        rules = MediaRules(urls=True, private_urls=True, max_bytes=100_000)
        assert rules.bring(f"{url}/clip", kept).path.read_bytes() == b"a video"
        assert rules.bring(f"{url}/to/{url}/clip", kept).path.read_bytes() == b"a video"
        for path, said in (
            ("none", "answered 404"), ("short", "could not be fetched|broke off"), ("endless", "larger than"),
            (f"to/{url}/to/{url}/to/{url}/to/{url}/to/{url}/to/{url}/clip", "redirects"),
            ("to/file:///etc/passwd", "only http"), ("to/ftp://127.0.0.1/x", "only http"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=said):
                rules.bring(f"{url}/{path}", kept)
        assert len(list(kept.iterdir())) == 2
    for bad in ("http://", "http://user:secret@127.0.0.1/", "http://[::1", "http://127.0.0.1/a\nb", "http://x:99999/"):
        with pytest.raises(ValueError):  # noqa: PT011 - each says something else
            rules.bring(bad, kept)


def test_a_redirect_does_not_reach_a_private_address(place, monkeypatch):
    """The first host counts as public here; where it redirects to is looked at again."""
    with site(clip=b"inside") as inside, site(clip=b"outside") as outside:
        port = int(outside.rpartition(":")[2])
        real = socket.getaddrinfo

        def resolve(host, at, *args, **kwargs):
            monkeypatch.setattr(media, "is_public", lambda address: at == port)
            return real(host, at, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        rules = MediaRules(urls=True)
        assert rules.bring(f"{outside}/clip", place / "kept").path.read_bytes() == b"outside"
        with pytest.raises(Forbidden, match="not of the public internet"):
            rules.bring(f"{outside}/to/{inside}/clip", place / "kept")


def test_the_address_that_was_checked_is_connected_to(place, monkeypatch):
    """A name that leads to a public address when it is checked, and to a private one when it is looked up again."""
    with site(clip=b"inside") as inside:
        answers, connected = iter(["8.8.8.8", "127.0.0.1"]), []

        def resolve(host, port, *args, **kwargs):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

        def connect(address, *args, **kwargs):
            connected.append(address)
            raise OSError("not in a test")

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket, "create_connection", connect)
        with pytest.raises(ValueError, match="could not be fetched"):
            MediaRules(urls=True).bring(inside.replace("127.0.0.1", "rebound.example"), place / "kept")
        assert [address for address, _ in connected] == ["8.8.8.8"]


def test_one_private_address_of_several_is_enough_to_refuse(place, monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 80)) for one in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(Forbidden, match="not of the public internet"):
        MediaRules(urls=True).bring("http://both.example/", place / "kept")
