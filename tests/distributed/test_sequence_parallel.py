"""One sample shared by several processes: that they work at the same time, and what each of them holds."""

from itertools import pairwise

import pytest

from video_ma2mba.modeling.checkpoint_plan import CheckpointPlan, pipeline_idle

from .launch import fork, lines
from .spans import LAYERS


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slice), 4])
def spans(request):
    """One long sample shared by so many ranks: what was found of each order."""
    done = fork("tests.distributed.spans", "layer_major", "sequence_major", processes=request.param)
    assert done.returncode == 0, done.stderr[-3000:]
    return lines(done, "SPANS")


def test_ranks_work_at_the_same_time(spans):
    """A rank begins a layer block when the one before has handed it on, which is at the next one by then."""
    found, ranks = spans[0], len(spans[0]["ranks_bytes"])
    times = {(rank, what, block): (start, end) for rank, what, block, start, end in found["trace"]}
    assert len(times) == 2 * ranks * LAYERS
    last = LAYERS - 1
    for left, right in pairwise(range(ranks)):
        for block in range(LAYERS):  # never before what it needs
            assert times[right, "forward", block][0] >= times[left, "forward", block][1]
            assert times[left, "backward", block][0] >= times[right, "backward", block][1]
        assert times[right, "forward", 0][0] < times[left, "forward", last][1]
        assert times[left, "backward", last][0] < times[right, "backward", 0][1]
    assert found["idle_of_equal_turns"] == pipeline_idle(CheckpointPlan("layer_major", 1, 8, False), LAYERS, ranks)
    print(f"{ranks} ranks were idle for {found['idle']:.1%}, with equal turns {found['idle_of_equal_turns']:.1%}")


def test_a_rank_holds_what_one_process_does_for_its_share_alone(spans):
    for found in spans:
        print(found["order"], {key: value for key, value in found.items() if key.endswith("_bytes")})
        assert max(found["ranks_bytes"]) < 1.1 * found["share_bytes"] < 0.9 * found["alone_bytes"]
