"""The judge behind an address: a local server that answers well, badly, late, or not at all."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from video_ma2mba.cli import main
from video_ma2mba.evaluation.judge import ChatJudge, StringJudge, Verdict, judge_messages, read_verdict
from video_ma2mba.evaluation.questions import Question

from .conftest import write

KEY = "sk-this-is-a-secret"
MATCH = Question("1", "here", (), "prompt", "yes", asked="Is it red?", dimension="match")
RATED = Question("2", "here", (), "prompt", "a cat", asked="What is it?", dimension="detail")


@pytest.fixture
def server(monkeypatch):
    """A server that answers from a list; what it was asked is kept."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    script, asked, over = [], [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, dict(self.headers), json.loads(body)))
            answer = script.pop(0) if len(script) > 1 else script[0]
            if answer == "late":
                over.wait()  # until the test has ended: nobody waits for the answer any more
                return
            code, text = answer if isinstance(answer, tuple) else (200, answer)
            reply = json.dumps({"choices": [{"message": {"content": text}}]}) if code == 200 else f"key {KEY} is bad"
            self.send_response(code)
            if code == 302:
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
            self.end_headers()
            self.wfile.write(reply.encode() if text != "not json" else b"<html>")

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", script, asked
    over.set()
    httpd.shutdown()
    httpd.server_close()


def judge(address, tmp_path, **options):
    return ChatJudge(address, "some-model", tmp_path / "replies.jsonl", wait_s=0.01, **options)


def test_a_good_reply(server, tmp_path):
    address, script, asked = server
    script.append("Sure: {'pred': 'Yes', 'score': 4}")
    assert judge(address, tmp_path)(MATCH, ["it is red"]) == Verdict(4.0, True)
    path, headers, body = asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("some-model", 0)
    assert "Is it red?" in body["messages"][1]["content"]
    assert "it is red" in body["messages"][1]["content"]


@pytest.mark.parametrize(
    "trouble", [(429, ""), (500, ""), (503, ""), "gibberish", (200, "not json"), (200, None), "{'score': 'x'}"]
)
def test_trouble_that_passes(server, tmp_path, trouble):
    address, script, asked = server
    script += [trouble, trouble, "{'score': 5}"]
    assert judge(address, tmp_path)(RATED, ["a cat"]) == Verdict(5.0, None)
    assert len(asked) == 3


def test_a_time_out_that_passes(server, tmp_path):
    address, script, asked = server
    script += ["late", "{'pred': 'yes', 'score': 5}"]
    assert judge(address, tmp_path, timeout_s=0.2)(MATCH, ["yes"]).correct
    assert len(asked) == 2


def test_replies_that_stay_unreadable_count_as_wrong(server, tmp_path):
    address, script, asked = server
    script.append("I would rather not say")
    assert judge(address, tmp_path, tries=3)(MATCH, ["yes"]) == Verdict(0.0, False, understood=False)
    assert len(asked) == 3


@pytest.mark.parametrize("trouble", [(429, ""), (500, ""), "late"])
def test_trouble_that_stays_stops_with_what_to_do(server, tmp_path, trouble):
    address, script, asked = server
    script.append(trouble)
    with pytest.raises(OSError, match="run the same command with --resume") as error:
        judge(address, tmp_path, tries=2, timeout_s=0.2)(MATCH, ["yes"])
    assert len(asked) == 2
    assert KEY not in str(error.value)


@pytest.mark.parametrize("code", [401, 403, 404, 302])
def test_a_refusal_is_not_tried_again(server, tmp_path, code):
    address, script, asked = server
    script.append((code, ""))
    with pytest.raises(ValueError, match=f"HTTP {code}") as error:
        judge(address, tmp_path)(MATCH, ["yes"])
    assert [path for path, _, _ in asked] == ["/v1/chat/completions"]  # a redirect would take the key elsewhere
    assert KEY not in str(error.value)


def test_replies_are_kept_and_not_asked_for_again(server, tmp_path, capfd):
    address, script, asked = server
    script += ["{'pred': 'yes', 'score': 5}", "{'score': 2}"]
    first = judge(address, tmp_path)
    verdicts = [first(MATCH, ["yes"]), first(RATED, ["dog"])]
    with (tmp_path / "replies.jsonl").open("a") as file:
        file.write('{"request": "torn of')
    second = judge(address, tmp_path)
    assert [second(MATCH, ["yes"]), second(RATED, ["dog"])] == verdicts
    assert len(asked) == 2
    second(RATED, ["another answer"])
    assert len(asked) == 3
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())
    assert KEY not in "".join(capfd.readouterr())


def test_no_server_at_all(tmp_path):
    with pytest.raises(OSError, match="failed 2 times"):
        judge("http://127.0.0.1:9/v1", tmp_path, tries=2)(MATCH, ["yes"])
    with pytest.raises(ValueError, match="must begin with http"):
        judge("ftp://x", tmp_path)


def test_the_command_goes_on_after_the_judge_failed(server, clips, model_folder, tmp_path, capfd, monkeypatch):
    address, script, asked = server
    root, output = tmp_path / "data", tmp_path / "out"
    clips(root, "v_a.mp4")
    questions = [{"video_name": "a", "question": f"is it {i}", "question_id": str(i)} for i in range(3)]
    write(root / "test_q.json", questions)
    write(root / "test_a.json", [{"answer": "yes", "type": 3, "question_id": str(i)} for i in range(3)])
    monkeypatch.setattr(ChatJudge.__init__, "__kwdefaults__", {"timeout_s": 5.0, "tries": 2, "wait_s": 0.01})
    command = ["eval", model_folder, "--task", "activitynetqa", "--data", str(root), "-o", str(output)]
    command += ["--judge", address]
    script += ["{'pred': 'yes', 'score': 5}", (500, ""), (500, "")]
    assert main(command) == 2
    assert "1 replies are kept in judge_replies.jsonl: run the same command with --resume" in capfd.readouterr().err
    script[:] = ["{'pred': 'no', 'score': 1}"]
    assert main([*command, "--resume"]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["accuracy"]["all"]["mean"] == pytest.approx(1 / 3)
    assert report["scores"]["all"]["mean"] == pytest.approx((5 + 1 + 1) / 3)
    assert report["judge"] == {"name": "gpt-3.5-turbo-0125", "published": True}
    assert len(asked) == 1 + 2 + 2  # the first verdict was kept
    assert all(KEY.encode() not in file.read_bytes() for file in output.iterdir())
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "reply",
    ["", "{}", "{'pred': 'maybe', 'score': 3}", "{'pred': 'yes', 'score': 9}", "{'pred': 'yes'}", "{" * 5000,
     "{'score': __import__('os')}"],
)  # fmt: skip
def test_replies_that_cannot_be_read(reply):
    assert read_verdict(reply, MATCH) is None


def test_scores_are_cut_to_whole_numbers():
    assert read_verdict("{'score': 4.8}", RATED) == Verdict(4.0, None)


def test_two_answers_stand_in_one_request():
    text = judge_messages(RATED, ["a", "b"])[1]["content"]
    assert "Predicted answer 1: a\nPredicted answer 2: b" in text


def test_words_in_common():
    verdict = StringJudge()(MATCH, ["Yes!"])
    assert verdict == Verdict(5.0, True)
    assert StringJudge()(RATED, ["the black cat"]).score == pytest.approx(5 * 2 / 3)
