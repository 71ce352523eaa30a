"""Means and intervals against counting by hand and a brute-force bootstrap over videos."""

import numpy as np
import pytest

from video_ma2mba.evaluation.metrics import JudgedScore, MultipleChoiceAccuracy, clustered_mean


@pytest.mark.parametrize(("num_videos", "shared"), [(40, 0.0), (60, 0.6), (150, 0.9)])
def test_interval_is_that_of_a_bootstrap_over_videos(num_videos, shared):
    rng = np.random.default_rng(num_videos)
    values, clusters = [], []
    for video in range(num_videos):
        chance = rng.uniform() if rng.uniform() < shared else 0.6  # a hard video is hard for all of its questions
        size = int(rng.integers(1, 12))
        values += (rng.uniform(size=size) < chance).astype(float).tolist()
        clusters += [video] * size
    sums = np.array([sum(v for v, c in zip(values, clusters, strict=True) if c == i) for i in range(num_videos)])
    sizes = np.array([clusters.count(i) for i in range(num_videos)])
    drawn = rng.integers(num_videos, size=(20_000, num_videos))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    result = clustered_mean(values, clusters)
    assert result["mean"] == pytest.approx(np.mean(values))
    width = high - low
    assert result["low"] == pytest.approx(low, abs=0.08 * width)
    assert result["high"] == pytest.approx(high, abs=0.08 * width)


def test_questions_of_one_video_are_no_independent_draws():
    values = [1.0] * 50 + [0.0] * 50
    together = clustered_mean(values, [i // 10 for i in range(100)])
    apart = clustered_mean(values, list(range(100)))
    assert together["high"] - together["low"] > 3 * (apart["high"] - apart["low"])
    # each on its own: the textbook's standard error, with n - 1
    assert apart["high"] == pytest.approx(0.5 + 1.959964 * np.std(values, ddof=1) / 10)


@pytest.mark.parametrize(("values", "clusters"), [([1.0, 0.0], ["a", "a"]), ([1.0, 1.0], ["a", "b"])])
def test_no_interval_where_none_can_be_told(values, clusters):
    result = clustered_mean(values, clusters)
    assert (result["low"], result["high"]) == (None, None)


def test_evaluate_metrics():
    accuracy = MultipleChoiceAccuracy().compute(
        predictions=["A", "", "C"], references=["A", "B", "C"], clusters=["x", "x", "y"]
    )
    assert accuracy["mean"] == pytest.approx(2 / 3)
    assert 0 <= accuracy["low"] < accuracy["mean"] < accuracy["high"] <= 1
    score = JudgedScore().compute(predictions=[4.0, 1.0], clusters=["x", "y"])
    assert (score["mean"], score["num_questions"], score["num_videos"]) == (2.5, 2, 2)
