"""The adapter in lmms-eval's own evaluator; skipped where lmms-eval is not installed (`make test-lmms-eval`)."""

import json

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval import evaluator
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from video_ma2mba import VideoMemory

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {output_type}
doc_to_visual: !function fixture.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
{more}
"""
GENERATED = """
generation_kwargs:
  max_new_tokens: 5
  until: ["\\n"]
process_results: !function fixture.score
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
CODE = """
def visual(doc):
    return [doc["video"]]


def score(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""
QUESTIONS = ("What is there?", "What comes then?")


@pytest.fixture
def fixture(tmp_path, video, model, processor):
    """A task of two questions about one video, the first with the model's own answer as its truth."""
    memory = VideoMemory(model, processor)
    memory.watch(video)
    truths = [memory.ask(question, max_new_tokens=5).split("\n")[0].strip() for question in QUESTIONS]
    rows = [{"question": q, "video": video, "answer": a} for q, a in zip(QUESTIONS, (truths[0], "no"), strict=True)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    (tmp_path / "fixture.py").write_text(CODE)
    (tmp_path / "task.yaml").write_text(
        TASK.format(name="fixture_task", data=data, output_type="generate_until", more=GENERATED)
    )
    return tmp_path, truths


@pytest.mark.parametrize("force_simple", [False, True])
def test_two_items_through_the_evaluator(fixture, model_folder, monkeypatch, force_simple):
    folder, truths = fixture
    watched = []
    watch = VideoMemory.watch
    monkeypatch.setattr(VideoMemory, "watch", lambda self, path, *a, **k: (watched.append(path), watch(self, path, *a, **k)))  # noqa: E501 # fmt: skip
    results = evaluator.simple_evaluate(
        model="video_ma2mba", model_args=f"pretrained={model_folder},fps=1", tasks=["fixture_task"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        force_simple=force_simple, device="cpu", batch_size=1,
    )  # fmt: skip
    samples = sorted(results["samples"]["fixture_task"], key=lambda sample: sample["doc_id"])
    said = [sample["filtered_resps"][0] for sample in samples]
    assert said == truths
    (score,) = [value for key, value in results["results"]["fixture_task"].items() if key.startswith("exact,")]
    assert score == 0.5
    assert len(watched) == 1  # both questions are about one video


def test_the_entry_point_is_found():
    assert get_model("video_ma2mba").__name__ == "Chat"
    assert get_model("video_ma2mba", force_simple=True).__name__ == "Simple"


def test_an_unknown_argument_is_refused(model_folder):
    with pytest.raises(ValueError, match="knows no colour"):
        get_model("video_ma2mba")(pretrained=model_folder, colour="red")


def test_likelihoods_are_those_of_the_memory(model_folder, video, model, processor):
    simple = get_model("video_ma2mba", force_simple=True)(pretrained=model_folder, device="cpu")
    simple.task_dict = {"task": {"test": [{"video": video}]}}

    class Request:
        args = ("What?", " yes", lambda doc: [doc["video"]], 0, "task", "test")

    ((score, greedy),) = simple.loglikelihood([Request])
    memory = VideoMemory(model, processor)
    memory.watch(video)
    assert score == pytest.approx(memory.log_likelihoods("What?", ["yes"]).item(), abs=1e-4)
    assert greedy is False
