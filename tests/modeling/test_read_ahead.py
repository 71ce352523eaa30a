"""Work that runs ahead in a thread: in order, with its errors, and ended when nobody asks for more."""

import threading

import pytest

from video_ma2mba.modeling.read_ahead import READ_AHEAD, read_ahead


def test_items_come_in_order():
    assert list(read_ahead(iter(range(50)))) == list(range(50))


def test_an_error_comes_where_its_item_would_have_come():
    def items():
        yield 1
        raise OSError("the disk is gone")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_closing_ends_the_thread_and_bounds_what_was_made():
    made, before, waits = [], threading.active_count(), threading.Event()

    def endless():
        while True:
            made.append(1)
            if len(made) > READ_AHEAD + 1:
                waits.set()  # for a place in the queue
            yield len(made)

    ahead = read_ahead(endless())
    assert next(ahead) == 1
    assert threading.active_count() == before + 1
    waits.wait()
    ahead.close()
    assert threading.active_count() == before
    assert len(made) <= READ_AHEAD + 2
