"""Scores with confidence intervals, as `evaluate.Metric` modules; nothing is downloaded.

Questions about one video share their fate, so they are no independent draws: the standard error is that of a mean over
clusters, the videos (Cameron and Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015, section II).
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate

Z_95 = 1.959964  # of the standard normal distribution: 95 % lie within


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> dict[str, Any]:
    """The mean, and the 95 % interval about it that a new draw of videos would bring.

    Args:
        values: One number per question.
        clusters: Its video.

    Returns:
        mean, low, high, num_questions, num_videos. The bounds are None where they cannot be told: with one video, or
        where all values are equal.
    """
    count, mean = len(values), sum(values) / len(values)
    deviations: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        deviations[cluster] += value - mean
    num = len(deviations)
    result = {"mean": mean, "low": None, "high": None, "num_questions": count, "num_videos": num}
    if num > 1 and len(set(values)) > 1:
        variance = num / (num - 1) * sum(one**2 for one in deviations.values()) / count**2
        half = Z_95 * math.sqrt(variance)
        result |= {"low": mean - half, "high": mean + half}
    return result


class _Metric(evaluate.Metric):
    def __init__(self, **kwargs: Any):
        super().__init__(keep_in_memory=True, **kwargs)

    def _described(self, **columns: str) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()})
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="one entry per question", features=features
        )


class MultipleChoiceAccuracy(_Metric):
    """The share of questions whose letter is right: mean, low, high, num_questions, num_videos."""

    def _info(self) -> evaluate.MetricInfo:
        return self._described(predictions="string", references="string", clusters="string")

    def _compute(self, predictions: list[str], references: list[str], clusters: list[str]) -> dict[str, Any]:
        right = [float(said == true) for said, true in zip(predictions, references, strict=True)]
        scores = clustered_mean(right, clusters)
        for bound, limit in (("low", max), ("high", min)):
            if scores[bound] is not None:
                scores[bound] = limit(scores[bound], 0.0 if bound == "low" else 1.0)
        return scores


class JudgedScore(_Metric):
    """The mean of a judge's scores: mean, low, high, num_questions, num_videos."""

    def _info(self) -> evaluate.MetricInfo:
        return self._described(predictions="float64", clusters="string")

    def _compute(self, predictions: list[float], clusters: list[str]) -> dict[str, Any]:
        return clustered_mean(predictions, clusters)
