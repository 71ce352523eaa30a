"""Frames that vLLM is to see: written once, bounded, and never gone while somebody needs them."""

import errno
import os
import tempfile
import time

import numpy as np
import pytest
import torch

from video_ma2mba.serving import vllm_frames
from video_ma2mba.serving.vllm_frames import FrameFolder, place, placed

SIDE = 4
FRAMES = np.random.default_rng(0).integers(0, 256, (10, 3, SIDE, SIDE), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return FrameFolder()


def made_old(folder, name):
    old = time.time() - 2 * vllm_frames.ON_THE_WAY_S
    os.utime(folder.path / name, (old, old))


def test_frames_are_written_once_and_read_in_parts(folder):
    assert folder.keep("a", iter(FRAMES)) == FRAMES.nbytes
    begun = []
    assert folder.keep("a", (begun.append(0) for _ in range(3))) == FRAMES.nbytes
    assert begun == []
    for start, stop in ((0, 10), (3, 7), (9, 10)):
        where = torch.from_numpy(place("a", start, stop, SIDE))
        assert placed(where) == ("a", start, stop, SIDE)
        read = folder.read(*placed(where))
        assert read.dtype == torch.uint8
        assert np.array_equal(read, FRAMES[start:stop])
    assert FrameFolder().keep("a", iter(())) == FRAMES.nbytes  # that of the next server


def test_what_was_not_looked_at_for_longest_goes_first(folder, monkeypatch):
    monkeypatch.setattr(vllm_frames, "MAX_BYTES", 2 * FRAMES.nbytes)
    for name in "abc":
        folder.keep(name, iter(FRAMES))
    assert sorted(os.listdir(folder.path)) == ["a", "b", "c"]  # all were asked for just now
    for name in "abc":
        made_old(folder, name)
    folder.read("a", 0, 1, SIDE)
    folder.keep("d", iter(FRAMES))
    assert sorted(os.listdir(folder.path)) == ["a", "d"]


def test_what_a_request_needs_stays(folder, monkeypatch):
    for name in "ab":
        folder.keep(name, iter(FRAMES))
        made_old(folder, name)
    monkeypatch.setattr(vllm_frames, "MAX_BYTES", 0)
    held = FrameFolder().hold("a")  # by another process, as far as the lock knows
    folder.keep("c", iter(FRAMES))
    assert sorted(os.listdir(folder.path)) == ["a", "c"]
    with pytest.raises(ValueError, match="send it again"):
        folder.hold("b")
    assert folder.hold("c") is folder.hold("c")
    del held
    folder.keep("d", iter(FRAMES))
    assert sorted(os.listdir(folder.path)) == ["c", "d"]  # asked for just now


def test_what_breaks_off_leaves_nothing(folder):
    def broken(error):
        yield FRAMES[0]
        raise error

    with pytest.raises(ValueError, match="no room for the frames"):
        folder.keep("a", broken(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(RuntimeError):
        folder.keep("a", broken(RuntimeError()))
    assert os.listdir(folder.path) == []
    with pytest.raises(FileNotFoundError):
        folder.read("a", 0, 1, SIDE)


@pytest.mark.parametrize("kind", ["link", "open to others", "file"])
def test_a_folder_that_others_made_is_not_used(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / f"video-ma2mba-{os.getuid()}"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        path.write_text("")
    else:
        path.mkdir()
        path.chmod(0o777)
    with pytest.raises(OSError, match="its user alone"):
        FrameFolder()
