"""Two runs over the same questions side by side: before and after a fine-tuning, for instance."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import read_lines
from .metrics import clustered_mean
from .questions import Question
from .report import by_group, flat
from .run import ANSWERS, read_found

NUM_SHOWN = 5  # questions of each kind


def compare(before: Path, after: Path) -> dict[str, Any]:
    """What changed between two outputs of `video-ma2mba eval`, over the questions that both were scored on.

    The interval of a difference is that of the same questions asked twice: what both get right or wrong cancels out.

    Raises:
        ValueError: One of them is no output, is scored by a judge alone, or they share no question.
    """
    runs = [_read(folder) for folder in (before, after)]
    shared = [identity for identity in runs[0]["right"] if identity in runs[1]["right"]]
    if not shared:
        raise ValueError(f"{before} and {after} share no question with an answer to compare with")
    questions = {identity: runs[1]["questions"][identity] for identity in shared}
    scores = [{identity: float(run["right"][identity]) for identity in shared} for run in runs]

    def row(pairs: Sequence[tuple[Question, str]]) -> dict[str, Any]:
        values = [[score[question.id] for question, _ in pairs] for score in scores]
        videos = [video for _, video in pairs]
        difference = clustered_mean([b - a for a, b in zip(*values, strict=True)], videos)
        means = {name: sum(one) / len(one) for name, one in zip(("before", "after"), values, strict=True)}
        return {**difference, **means}

    changed = {
        name: [
            {
                "id": identity,
                "video": questions[identity][1],
                "question": questions[identity][0].asked or questions[identity][0].prompt,
                "right": questions[identity][0].answer,
                "before": runs[0]["raw"][identity],
                "after": runs[1]["raw"][identity],
            }
            for identity in shared
            if [score[identity] for score in scores] == values
        ]
        for name, values in (("now_right", [0.0, 1.0]), ("now_wrong", [1.0, 0.0]))
    }
    return {
        "before": runs[0]["settings"],
        "after": runs[1]["settings"],
        "num_questions": len(shared),
        "num_in_one_alone": sum(len(run["right"]) for run in runs) - 2 * len(shared),
        "scores": by_group(list(questions.values()), row),
        **changed,
    }


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "report.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no finished output of `video-ma2mba eval`: there is no report.json")
    report = json.loads(file.read_text(encoding="utf-8"))
    if report.get("metric") != "accuracy":
        raise ValueError(f"{folder}: its answers are scored by a judge alone; compare the two reports by eye")
    found = read_found(folder)
    questions = {q.id: (q, video) for video, asked in found.by_video.items() for q in asked}
    said = {line["id"]: line for line in read_lines(folder / ANSWERS) if line.get("id") in questions}
    right = {
        identity: line["parsed"] == questions[identity][0].answer
        for identity, line in said.items()
        if questions[identity][0].answer and line["parsed"] is not None
    }
    settings = {name: report.get(name) for name in ("task", "model", "adapter", "data")}
    return {
        "settings": settings,
        "questions": questions,
        "right": right,
        "raw": {identity: line["raw"] for identity, line in said.items()},
    }


def markdown(report: dict[str, Any]) -> str:
    """The comparison as a page."""
    names = [
        f"{of['model']} with {of['adapter']}" if of.get("adapter") else str(of["model"])
        for of in (report["before"], report["after"])
    ]
    lines = [f"# {names[0]} and {names[1]}, {report['num_questions']} questions", ""]
    if report["num_in_one_alone"]:
        lines += [f"{report['num_in_one_alone']} questions stand in one of the two alone and are left out.", ""]
    lines += ["| accuracy | before | after | difference | 95 % interval | questions |", "|---|---|---|---|---|---|"]
    for name, one in flat(report["scores"]):
        interval = "" if one["low"] is None else f"{one['low']:+.3f} to {one['high']:+.3f}"
        lines.append(
            f"| {name} | {one['before']:.3f} | {one['after']:.3f} | {one['mean']:+.3f} | {interval} "
            f"| {one['num_questions']} |"
        )
    for title, key in (("Right now, and wrong before", "now_right"), ("Wrong now, and right before", "now_wrong")):
        changed = report[key]
        lines += ["", f"{title}: {len(changed)}"]
        for one in changed[:NUM_SHOWN]:
            said = f'"{one["before"]}", then "{one["after"]}"; right is "{one["right"]}"'
            lines.append(f'- {one["video"]}, "{one["question"]}": {said}')
    return "\n".join(lines) + "\n"
