"""Every published format: a fixture in its shape, converted, read back, rendered."""

import csv
import json

import pytest

from video_ma2mba.data.formats import FORMATS, detect
from video_ma2mba.data.prepare import prepare

SYSTEM = "<|system|>You are a helpful assistant.<|endoftext|>"


def run(source, media_root, tmp_path, **options):
    """Prepare and return the folder and the report."""
    return tmp_path / "out", prepare(source, media_root, tmp_path / "out", **options)


def write_csv(path, header, *rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return path


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def pair(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def places(report):
    return [(problem["where"], problem["reason"]) for problem in report["problems"]]


def test_llava_pretrain(tmp_path, media, rendered):
    source = write_json(
        tmp_path / "blip_laion_cc_sbu_558k.json",
        [
            {
                "id": "009990001",
                "image": "00999/009990001.jpg",
                "conversations": pair("Describe the photo in a few words.\n<image>", "a blue teapot on a shelf"),
            },
            {"id": "009990002", "image": "00999/009990001.jpg", "conversations": "none"},
        ],
    )
    assert detect(source) == "llava"
    folder, report = run(source, media("images/00999/009990001.jpg"), tmp_path)
    assert rendered(folder) == {
        "009990001": SYSTEM + "<|user|><image>\nDescribe the photo in a few words.<|endoftext|>"
        "<|assistant|>a blue teapot on a shelf<|endoftext|>"
    }
    assert places(report) == [("blip_laion_cc_sbu_558k.json:16", "malformed")]


def test_webvid(tmp_path, media, rendered):
    source = write_csv(
        tmp_path / "results_2M_train.csv",
        "videoid,contentUrl,duration,page_dir,name",
        ["5550", "https://host.example/5550.mp4", "PT00H00M14S", "055501_055550", 'Old windmill, clouds "behind"'],
        ["5551", "https://host.example/5551.mp4", "PT00H00M14S", "055501_055550", ""],
        ["5552", "https://host.example/5552.mp4", "PT00H00M14S", "055501_055550", "Withdrawn by its provider"],
    )
    assert detect(source) == "webvid"
    folder, report = run(source, media("videos/055501_055550/5550.mp4"), tmp_path)
    assert rendered(folder) == {
        "5550": SYSTEM + "<|user|><video>\nDescribe the video.<|endoftext|>"
        '<|assistant|>Old windmill, clouds "behind"<|endoftext|>'
    }
    assert places(report) == [("results_2M_train.csv:3", "malformed"), ("results_2M_train.csv:4", "missing medium")]


def clip_row(number, start, end, caption):
    return {
        "id": f"qz1Ab_clip_{number:04d}",
        "url": "https://video.example/watch?v=qz1Ab",
        "time_stamp": {
            "duration": 6, "start_time": "00:00:00.000", "end_time": "00:00:00.000",
            "start_frame": 30 * start, "end_frame": 30 * end, "start_fps": 30, "end_fps": 30,
        },
        "v2t_score": [0.3, 0.2],
        "t2t_score": [0.5, 1.0],
        "conversations": pair("<video>\nDescribe this scene in detail.", caption),
    }  # fmt: skip


def test_scenewalk_clips_are_interleaved_in_time_order(tmp_path, media, rendered):
    import pyarrow
    import pyarrow.parquet

    rows = [
        clip_row(1, 2, 5, "A potter centres the clay."),
        clip_row(0, 0, 2, "A wheel turns."),
        clip_row(2, 5, 4, "x"),
    ]
    source = tmp_path / "train-00000.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    assert detect(source) == "scenewalk-clips"
    folder, report = run(source, media("qz1Ab.mp4"), tmp_path)
    assert list(rendered(folder).values()) == [
        SYSTEM + "<|user|><video><|endoftext|><|assistant|>A wheel turns.<|endoftext|>"
        "<|user|><video><|endoftext|><|assistant|>A potter centres the clay.<|endoftext|>"
    ]
    assert places(report) == [("train-00000.parquet, row 3", "malformed")]
    (line,) = (folder / "manifest.jsonl").read_text().splitlines()
    clips = [entry for message in json.loads(line)["messages"] for entry in message["content"] if "path" in entry]
    assert [(clip["start_s"], clip["end_s"]) for clip in clips] == [(0.0, 2.0), (2.0, 5.0)]


def test_scenewalk(tmp_path, media, rendered):
    def scene(start, end):
        return {"start_frame": start, "end_frame": end, "start_fps": 25, "end_fps": 25}

    describe = "<image>\nDescribe the scene."
    source = write_lines(
        tmp_path / "train.jsonl",
        {
            "id": "yt_03_0a1b", "video": "yt_03/0a1b.mp4", "total_time": 6.0, "clip_num": 3,
            "scenes": [scene(0, 50), scene(50, 900), scene(1000, 1100)],  # the second ends late, the third is not there
            "conversations": [*pair(describe, "Sand."), *pair(describe, "Sea."), *pair(describe, "Nothing.")],
        },
        {
            "id": "yt_03_0a1c", "video": "yt_03/0a1c.mp4", "clip_num": 2, "scenes": [scene(0, 50), scene(50, 100)],
            "conversations": pair("<image>\nWhat is sold?", "Fish."),
        },
        {"id": "yt_03_0a1d", "video": "yt_03/0a1d.mp4", "scenes": [{}], "conversations": pair("<image>", "Fish.")},
    )  # fmt: skip
    assert detect(source) == "scenewalk"
    folder, report = run(source, media("videos/yt_03/0a1b.mp4", "yt_03/0a1c.mp4"), tmp_path)
    assert rendered(folder) == {
        "yt_03_0a1b": SYSTEM + "<|user|><video><|endoftext|><|assistant|>Sand.<|endoftext|>"
        "<|user|><video><|endoftext|><|assistant|>Sea.<|endoftext|>",
        "yt_03_0a1c": SYSTEM + "<|user|><video>\nWhat is sold?<|endoftext|><|assistant|>Fish.<|endoftext|>",
    }
    assert places(report) == [("train.jsonl:3", "malformed")]
    assert report["notes"] == {"scenes beyond the end of their video": 1}


def test_llava_video_groups_all_questions_of_a_video(tmp_path, media, rendered):
    folder, name = tmp_path / "source", "0_30_s_academic_v0_1"
    folder.mkdir()
    video = {"data_source": name, "video": "academic_source/Charades/ZZ0A1.mp4"}
    letter = "\nA. Oil\nB. Water\nPlease respond with only the letter of the correct answer."
    oe_turns = [*pair("<image>\nWho pours?", "A cook."), *pair("Why?", "To fry. QA_GT_caption_based_noisy")]
    write_json(folder / "0_30_s_academic_mc_v0_1_qa_processed.json", [
        {"id": "7", "conversations": pair("<image>\nWhat is poured first?" + letter, "B."), **video},
        {"id": "7", "conversations": pair("<image>\nWhat is poured first?" + letter, "B."), **video},
    ])  # fmt: skip
    write_json(folder / "0_30_s_academic_oe_v0_1_qa_processed.json", [{"id": 7, "conversations": oe_turns, **video}])
    caption = pair("<image>\nDescribe the clip.", "A kitchen.")
    write_json(folder / f"{name}_cap_processed.json", [{"id": "ZZ0A1", "conversations": caption, **video}])
    out, report = run(folder, media(f"{name}/academic_source/Charades/ZZ0A1.mp4"), tmp_path)
    assert list(rendered(out).values()) == [
        SYSTEM + "<|user|><video>\nDescribe the clip.<|endoftext|><|assistant|>A kitchen.<|endoftext|>"
        "<|user|>Who pours?<|endoftext|><|assistant|>A cook.<|endoftext|>"
        "<|user|>Why?<|endoftext|><|assistant|>To fry.<|endoftext|>"
        f"<|user|>What is poured first?{letter}<|endoftext|><|assistant|>B.<|endoftext|>"
    ]
    assert places(report) == [("0_30_s_academic_mc_v0_1_qa_processed.json:17", "duplicate")]


def test_nextqa_multiple_choice(tmp_path, media, rendered):
    write_json(tmp_path / "map_vid_vidorID.json", {"4011": "1202/4011"})
    source = write_csv(
        tmp_path / "train.csv",
        "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4",
        ["4011", 512, 640, 480, "why did the dog stop", 3, 2, "CW", "to sleep", "to eat", "to bark", "saw a ball", "x"],
        ["4011", 512, 640, 480, "why did the dog run", 9, 3, "CW", "to sleep", "to eat", "to bark", "saw a ball", "x"],
    )
    assert detect(source) == "nextqa"
    folder, report = run(source, media("NExTVideo/1202/4011.mp4"), tmp_path)
    assert rendered(folder) == {
        "4011_2": SYSTEM + "<|user|><video>\nWhy did the dog stop?\nA. to sleep\nB. to eat\nC. to bark\nD. saw a ball\n"
        "E. x\nPlease respond with only the letter of the correct answer.<|endoftext|><|assistant|>D.<|endoftext|>"
    }
    assert places(report) == [("train.csv:3", "malformed")]


def test_nextqa_open_ended(tmp_path, media, rendered):
    source = write_csv(
        tmp_path / "train.csv",
        "video,frame_count,width,height,question,answer,qid,type",
        ["4011", 512, 640, 480, "what does the dog chase", "a ball", 2, "DO"],
    )
    folder, _ = run(source, media("4011.mp4"), tmp_path)
    assert rendered(folder) == {
        "4011_2": SYSTEM + "<|user|><video>\nWhat does the dog chase?\nAnswer the question using a single word or "
        "phrase.<|endoftext|><|assistant|>a ball<|endoftext|>"
    }


def test_activitynet_qa(tmp_path, media, rendered):
    asked = {"video_name": "_B3xY", "question": "is the girl outdoors", "question_id": "v__B3xY_4"}
    unanswered = {"video_name": "_B3xY", "question": "is it day", "question_id": "v__B3xY_5"}
    source = write_json(tmp_path / "train_q.json", [asked, unanswered])
    write_json(tmp_path / "train_a.json", [{"answer": "yes", "type": 3, "question_id": "v__B3xY_4"}])
    assert detect(source) == "activitynet-qa"
    folder, report = run(source, media("videos/v__B3xY.mkv"), tmp_path)
    assert rendered(folder) == {
        "v__B3xY_4": SYSTEM
        + "<|user|><video>\nIs the girl outdoors? Answer the question using a single word or phrase."
        "<|endoftext|><|assistant|>yes<|endoftext|>"
    }
    assert places(report) == [("train_q.json:7", "malformed")]


def test_perception_test_stops_before_the_cups_are_lifted(tmp_path, media, rendered):
    question = {"id": 0, "question": "Where is the ball?", "options": ["left", "middle", "right"], "answer_id": 1}
    source = write_json(
        tmp_path / "mc_question_train.json",
        {
            "video_77": {"metadata": {"frame_rate": 30.0, "num_frames": 180}, "mc_question": [question]},
            "video_78": {"metadata": {"frame_rate": 30.0}, "mc_question": [{"id": 1}]},
        },
    )
    write_json(tmp_path / "cut_frame_mapping_train.json", {"video_77": 90})
    assert detect(source) == "perception-test"
    folder, report = run(source, media("videos/video_77.mp4"), tmp_path)
    assert rendered(folder) == {
        "video_77_0": SYSTEM + "<|user|><video>\nWhere is the ball?\nA. left\nB. middle\nC. right\n"
        "Please respond with only the letter of the correct answer.<|endoftext|><|assistant|>B.<|endoftext|>"
    }
    assert json.loads((folder / "manifest.jsonl").read_text())["messages"][0]["content"][0]["end_s"] == 3.0
    assert [where.partition(":")[0] for where, _ in places(report)] == ["mc_question_train.json"]


def test_share_gpt_roles_and_several_images(tmp_path, media, rendered):
    source = write_lines(
        tmp_path / "plain.jsonl",
        {"id": "a", "image": ["1.png", "2.png"], "conversations": pair("<image><image>\nWhich is red?", "Both.")},
        {"id": "b", "conversations": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]},
        {"id": "c", "conversations": pair("<video>\nWhat?", "No video is named.")},
        {"id": "d", "conversations": [{"from": "robot", "value": "Beep."}]},
    )
    folder, report = run(source, media("1.png", "2.png"), tmp_path)
    assert rendered(folder) == {
        "a": SYSTEM + "<|user|><image><image>\nWhich is red?<|endoftext|><|assistant|>Both.<|endoftext|>",
        "b": SYSTEM + "<|user|>Hello.<|endoftext|><|assistant|>Yes?<|endoftext|>",
    }
    assert places(report) == [("plain.jsonl:3", "malformed"), ("plain.jsonl:4", "malformed")]


def test_messages(tmp_path, media, rendered):
    content = [{"type": "video", "path": "my.mp4", "start_s": 1, "end_s": 3}, {"type": "text", "text": "Who?"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Anna."},
    ]
    source = tmp_path / "mine.jsonl"
    source.write_text(json.dumps({"id": "x", "messages": messages}) + "\n{not json\n" + json.dumps({"messages": [{}]}))
    assert detect(source) == "messages"
    folder, report = run(source, media("my.mp4"), tmp_path)
    assert rendered(folder) == {
        "x": "<|system|>Be brief.<|endoftext|><|user|><video>\nWho?<|endoftext|><|assistant|>Anna.<|endoftext|>"
    }
    assert places(report) == [("mine.jsonl:2", "malformed"), ("mine.jsonl:3", "malformed")]


@pytest.mark.parametrize("text", ["[1, 2", '[{"conversations": []}, {"broken": ', "3", '{"a" 1}'])
def test_a_file_that_breaks_off_is_reported_with_its_line(tmp_path, media, text):
    source = tmp_path / "broken.json"
    source.write_text(text)
    _, report = run(source, media(), tmp_path, name="llava")
    assert report["samples"] == 0
    assert report["problems"][-1]["where"] == "broken.json:1"
    assert sum(report["records"]["left_out"].values()) == report["records"]["read"]


def test_an_unknown_format_is_refused(tmp_path, media):
    source = write_json(tmp_path / "odd.json", [{"text": "nothing of ours"}])
    with pytest.raises(ValueError, match=r"none of the known formats.*keys text.*--format"):
        run(source, media(), tmp_path)


def test_plain_questions_and_answers(tmp_path, media, rendered):
    source = write_lines(
        tmp_path / "questions.jsonl",
        {"video": "a.mp4", "question": "What is this?", "answer": "a blue cross"},
        {"question": "What is this?", "answer": "It does not say which video"},
    )
    assert detect(source) == "plain"
    folder, report = run(source, media("a.mp4"), tmp_path)
    assert list(rendered(folder).values()) == [
        SYSTEM + "<|user|><video>\nWhat is this?<|endoftext|><|assistant|>a blue cross<|endoftext|>"
    ]
    assert places(report) == [("questions.jsonl:2", "malformed")]


SCENE = {"start_frame": 0, "end_frame": 50, "start_fps": 25, "end_fps": 25}
OPTIONS = {f"a{i}": str(i) for i in range(5)}


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("llava", ["no object"], "a record must be an object"),
        ("llava", {"id": 1}, "needs a list under 'conversations'"),
        ("llava", {"video": "a", "image": "b", "conversations": []}, "either a video or images"),
        ("llava", {"video": ["a", "b"], "conversations": []}, "'video' must be a path"),
        ("llava", {"image": [3], "conversations": []}, "'image' must be a path"),
        ("llava", {"image": ["1", "2"], "conversations": pair("<image> Which?", "1")}, "1 placeholder(s) for 2 images"),
        ("llava", {"conversations": ["Hello"]}, "a turn must be an object"),
        ("llava", {"conversations": [{"from": "human", "value": 3}]}, "the text of a turn must be a string"),
        ("llava", {"conversations": [{"from": ["human"], "value": "?"}]}, "a value of another kind"),
        ("messages", {"messages": "Hello"}, "needs a list under 'messages'"),
        ("messages", {"messages": [{"role": "judge", "content": ""}]}, "a message needs a role"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, "a content must be a text or a list"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "a text, a video or an image"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "needs one path"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "video", "path": "a", "start_s": 1}]}]},
            "needs both start_s and end_s",
        ),
        ("plain", {"question": "?", "answer": "a", "video": "v", "image": "i"}, "either a 'video' or an 'image'"),
        ("scenewalk", {"id": 1}, "lists under 'scenes' and 'conversations'"),
        ("scenewalk", {"video": "v", "scenes": ["x"], "conversations": pair("?", "a")}, "a scene must be an object"),
        ("scenewalk", {"video": "v", "scenes": [{}], "conversations": pair("?", "a")}, "needs start_frame"),
        ("scenewalk", {"video": "v", "scenes": [SCENE], "conversations": [3, 4]}, "no caption"),
        ("scenewalk", {"video": "v", "scenes": [SCENE], "conversations": pair("?", "<image>")}, "no caption"),
        ("scenewalk", {"video": "v", "scenes": [], "conversations": ["x"]}, "neither a pair of turns"),
        ("nextqa", {"video": "v", "question": "q", "qid": "1", "answer": "x", **OPTIONS}, "the number of an option"),
        ("nextqa", {"video": "v", "question": "q", "qid": "1", "answer": 5, **OPTIONS}, "answer 5 of 5 options"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(tmp_path, form, record, message):
    (problem,) = FORMATS[form](write_lines(tmp_path / "records.jsonl", record))
    assert (problem.where, problem.reason) == ("records.jsonl:1", "malformed")
    assert message in problem.message


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mc_question": 3}, "needs a list under 'mc_question'"),
        ({"mc_question": [{"question": "?"}]}, "a question needs 'options'"),
        (
            {"metadata": {}, "mc_question": [{"question": "?", "options": ["a", "b"], "answer_id": 0}]},
            "needs its frame_rate",
        ),
    ],
)
def test_perception_test_says_what_is_wrong(tmp_path, entry, message):
    write_json(tmp_path / "cut_frame_mapping_train.json", {"video_7": 90})
    (problem,) = FORMATS["perception-test"](write_json(tmp_path / "questions.json", {"video_7": entry}))
    assert message in problem.message


def test_activitynet_qa_without_its_answers(tmp_path):
    asked = [{"video_name": "a", "question": "is it", "question_id": "v_a_1"}]
    (problem,) = FORMATS["activitynet-qa"](write_json(tmp_path / "train_q.json", asked))
    assert problem.message == "its answers are not beside it: train_a.json"


def test_scenes_with_written_times(tmp_path):
    row = clip_row(0, 0, 2, "A wheel turns.")
    row["time_stamp"] = {"start_time": "00:00:01.500", "end_time": "01:02"}
    (record,) = FORMATS["scenewalk-clips"](write_lines(tmp_path / "train.jsonl", row))
    (entry,) = record.media()
    assert (entry["start_s"], entry["end_s"]) == (1.5, 62.0)


def test_an_answer_before_the_first_question_is_left_out(tmp_path):
    turns = [{"from": "gpt", "value": "Hello."}, *pair("Who?", "I.")]
    (record,) = FORMATS["llava"](write_lines(tmp_path / "a.jsonl", {"id": "x", "conversations": turns}))
    assert [message["role"] for message in record.messages] == ["user", "assistant"]


def test_a_parquet_file_that_is_none(tmp_path):
    source = tmp_path / "train.parquet"
    source.write_bytes(b"nothing of the kind")
    (problem,) = FORMATS["scenewalk-clips"](source)
    assert "not a Parquet file" in problem.message


def test_perception_test_without_cups(tmp_path):
    asked = {"id": 3, "question": "Who?", "options": ["a", "b"], "answer_id": 0}
    (record,) = FORMATS["perception-test"](write_json(tmp_path / "a.json", {"video_7": {"mc_question": [asked]}}))
    assert record.id == "video_7_3"
    assert "end_s" not in next(record.media())
