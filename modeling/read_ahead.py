"""Work that runs ahead in a thread of its own, a bounded way: decoding while the model reads."""

import queue
import threading

READ_AHEAD = 2  # items that may wait


def read_ahead(items):
    """What the iterator `items` yields, made in a thread at most `READ_AHEAD` items before it is asked for.

    An exception of the iterator is raised where its item would have come. Closing ends the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=READ_AHEAD)
    stopped = threading.Event()

    def put(item):
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        try:
            for item in items:
                put((item, None))
                if stopped.is_set():
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
