"""From answers to a report: scores by group with their intervals, as JSON, Markdown and a picture."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import new_figure, write_json, write_png, write_text
from .judge import Judge, Verdict
from .metrics import JudgedScore, MultipleChoiceAccuracy
from .questions import Question
from .run import Answer, Found, count_reasons
from .tasks import Task

ALL = "all"


def make_report(
    task: Task, found: Found, answers: Sequence[Answer], settings: dict[str, Any], judge: Judge | None = None
) -> dict[str, Any]:
    """Everything there is to say about a run.

    Args:
        answers: In the order of `found`.
        settings: Model, frames and so on, which are put at the top.
        judge: For free answers; where they are compared as texts without one, its scores stand beside those.
    """
    pairs = list(zip(found.questions, answers, strict=True))
    report: dict[str, Any] = {"task": task.name, **settings, "num_questions": len(pairs)}
    free = [(question, answer) for question, answer in pairs if question.dimension and question.answer]
    if task.read_answer is not None:
        known = [(q, a) for q, a in pairs if q.answer and a.parsed is not None]
        report["metric"], report["scores"] = "accuracy", by_group(known, _accuracy) if known else {}
        report["num_without_answer_key"] = sum(not q.answer for q, _ in pairs)
        report["num_left_out_of_score"] = sum(a.parsed is None for _, a in pairs)
    else:
        free, report["metric"] = pairs, "score"
        assert judge is not None
    if judge is not None:
        judged = _judged(free, judge)
        report["judge"] = {"name": judge.name, "published": judge.published}
        report["num_not_understood"] = sum(not verdict.understood for _, (_, verdict) in judged)
        scores = by_group(judged, _mean(lambda verdict: verdict.score)) if judged else {}
        report["scores" if task.read_answer is None else "judged_score"] = scores
        if any(verdict.correct is not None for _, (_, verdict) in judged):
            name = "accuracy" if task.read_answer is None else "judged_accuracy"
            report[name] = by_group(judged, _mean(lambda verdict: float(bool(verdict.correct))))
    videos = {answer.video: answer for answer in answers}
    report["num_videos"] = len(videos)
    report["num_problems"] = len(found.problems)
    report["problems"] = count_reasons(found.problems)
    report["first_problems"] = [f"{one.where}: {one.reason}: {one.message}" for one in found.problems[:20]]
    report["num_frames"] = sum(answer.num_frames for answer in videos.values())
    report["num_answer_tokens"] = sum(answer.num_tokens for answer in answers)
    report["watch_s"] = round(sum(answer.watch_s for answer in videos.values()), 2)
    report["answer_s"] = round(sum(answer.answer_s for answer in answers), 2)
    return report


def _judged(pairs: Sequence[tuple[Question, Answer]], judge: Judge) -> list[tuple[Question, tuple[Answer, Verdict]]]:
    """A verdict on every answer; of two wordings of one question, one verdict on both answers."""
    together: dict[Any, list[tuple[Question, Answer]]] = defaultdict(list)
    for question, answer in pairs:
        key = (answer.video, question.answer) if question.dimension == "consistency" else question.id
        together[key].append((question, answer))
    return [
        (group[0][0], (group[0][1], judge(group[0][0], [answer.raw for _, answer in group])))
        for group in together.values()
    ]


def by_group(pairs: Sequence[tuple[Question, Any]], score: Any) -> dict[str, Any]:
    """{"all": ..., "duration": {"short": ...}, ...}."""
    groups: dict[str, dict[str, list[tuple[Question, Any]]]] = defaultdict(lambda: defaultdict(list))
    for question, answer in pairs:
        for name, value in question.groups.items():
            groups[name][value].append((question, answer))
    return {
        ALL: score(pairs),
        **{name: {value: score(part) for value, part in sorted(parts.items())} for name, parts in groups.items()},
    }


def _accuracy(pairs: Sequence[tuple[Question, Answer]]) -> dict[str, Any]:
    return MultipleChoiceAccuracy().compute(
        predictions=[answer.parsed for _, answer in pairs],
        references=[question.answer for question, _ in pairs],
        clusters=[answer.video for _, answer in pairs],
    )


def _mean(of: Callable[[Verdict], float]) -> Callable[[Sequence[tuple[Question, tuple[Answer, Verdict]]]], Any]:
    return lambda pairs: JudgedScore().compute(
        predictions=[of(verdict) for _, (_, verdict) in pairs], clusters=[answer.video for _, (answer, _) in pairs]
    )


def write_report(report: dict[str, Any], folder: Path) -> None:
    """report.json, report.md and report.png, each whole or not at all."""
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", markdown(report))
    if report["scores"]:
        _draw(report, folder / "report.png")


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [f"# {report['task']}: {report['model']}", ""]
    lines += [f"{report['num_questions']} questions about {report['num_videos']} videos, {report['frames']}."]
    if judge := report.get("judge"):
        lines += ["", f"Judged by {judge['name']}." + ("" if judge["published"] else " Not to be set beside papers.")]
    for title, scores in tables(report):
        lines += ["", f"| {title} | | 95 % interval | questions | videos |", "|---|---|---|---|---|"]
        lines += [_row(name, one) for name, one in flat(scores)]
    if report["num_problems"]:
        lines += ["", f"{report['num_problems']} items were left out:", ""]
        lines += [f"- {reason}: {count}" for reason, count in report["problems"].items()]
    return "\n".join(lines) + "\n"


def tables(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(title, scores) of all there are in a report."""
    found = [(report["metric"], report["scores"])]
    found += [(name.replace("_", " "), report.get(name)) for name in ("accuracy", "judged_score", "judged_accuracy")]
    return [(title, scores) for title, scores in found if scores]


def flat(scores: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(label, score) of all and of every group."""
    rows = [(ALL, scores[ALL])]
    for name, values in scores.items():
        if name != ALL:
            rows += [(f"{name}: {value}", one) for value, one in values.items()]
    return rows


def _row(name: str, one: dict[str, Any]) -> str:
    interval = "" if one["low"] is None else f"{one['low']:.3f} to {one['high']:.3f}"
    return f"| {name} | {one['mean']:.3f} | {interval} | {one['num_questions']} | {one['num_videos']} |"


def _draw(report: dict[str, Any], path: Path) -> None:
    rows = flat(report["scores"])[::-1]
    figure, (axes,) = new_figure(8, 1.2 + 0.3 * len(rows), grid=False)
    for y, (_, one) in enumerate(rows):
        if one["low"] is not None:
            axes.plot([one["low"], one["high"]], [y, y], color="0.6", linewidth=2)
        axes.plot(one["mean"], y, "o", color="tab:blue")
    axes.set_yticks(range(len(rows)), [f"{name} ({one['num_questions']})" for name, one in rows])
    axes.set_xlim(0, 1 if report["metric"] == "accuracy" else 5)
    axes.set(xlabel=f"{report['metric']}, with 95 % intervals over videos")
    axes.set(title=f"{report['task']}: {report['model']}")
    axes.grid(axis="x", alpha=0.3)
    write_png(path, figure)
