"""Who tells whether a free answer is right: a language model behind an OpenAI-compatible address, or plain strings."""

import ast
import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..files import read_lines
from .questions import Question

KEY_VARIABLE = "OPENAI_API_KEY"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to whom it is not meant for."""

    def redirect_request(self, *args: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer.

    Attributes:
        score: 0 to 5.
        correct: Whether the answer matches; None where the benchmark asks only for a score.
        understood: False where the judge's reply could not be read: the answer then counts as wrong, as the benchmarks
            have it.
    """

    score: float
    correct: bool | None
    understood: bool = True


class Judge(Protocol):
    """Anything that tells how good an answer is."""

    name: str
    published: bool  # whether its figures may be set beside published ones

    def __call__(self, question: Question, answers: list[str]) -> Verdict: ...


# What each dimension looks at, in substance as in the prompts of Video-ChatGPT and ActivityNet-QA.
LOOKS_AT = {
    "correctness": "whether the facts in the prediction agree with the correct answer, without contradicting it",
    "detail": "whether the prediction covers all main points of the correct answer, and is specific where that is",
    "context": "whether the prediction understands what the video as a whole is about, as the correct answer does",
    "temporal": "whether the prediction has events in the order in which the correct answer has them",
    "consistency": "whether the two predictions, given to two wordings of one question, agree with each other and with "
    "the correct answer",
}


def judge_messages(question: Question, answers: list[str]) -> list[dict[str, str]]:
    """What the judge is asked: chat messages."""
    if question.dimension == "match":
        task = (
            "You compare a predicted answer to a question about a video with the correct answer. Look for a match in "
            "meaning; synonyms and paraphrases count."
        )
        form = "{'pred': 'yes', 'score': 4}, where pred is 'yes' or 'no' and score a whole number from 0 to 5"
    else:
        task = (
            "You rate a predicted answer to a question about a video. What counts is "
            f"{LOOKS_AT[question.dimension]}. Synonyms and paraphrases are fine."
        )
        form = "{'score': 4}, where the score is a whole number from 0 to 5, and 5 is best"
    predicted = [f"Predicted answer{'' if len(answers) == 1 else f' {i}'}: {a}" for i, a in enumerate(answers, 1)]
    asked = [f"Question: {question.asked}", f"Correct answer: {question.answer}", *predicted]
    return [
        {"role": "system", "content": task},
        {"role": "user", "content": "\n".join([*asked, f"Reply with nothing but a Python dictionary like {form}."])},
    ]


def read_verdict(reply: str, question: Question) -> Verdict | None:
    """The dictionary in a reply; None if there is none that says what was asked for."""
    found = re.search(r"\{[^{}]*\}", reply)
    if found is None:
        return None
    try:
        value = ast.literal_eval(found[0])
        score = int(float(value["score"]))
        said = str(value["pred"]).lower() if question.dimension == "match" else "none"
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        return None
    correct = {"yes": True, "no": False}.get(said)
    if not 0 <= score <= 5 or (question.dimension == "match" and correct is None):
        return None
    return Verdict(float(score), correct)


class ChatJudge:
    """A language model behind `base_url`/chat/completions.

    Every reply is appended to a file as it comes, and never asked for again. The key is read from the environment and
    goes into the request's header and nowhere else.

    Args:
        base_url: For instance "https://api.openai.com/v1".
        model: As the endpoint calls it.
        cache: The file of replies.
        tries: How often one question is put, over failures and replies that cannot be read.
        wait_s: Before the second try; twice as long before each further one.
    """

    published = True

    def __init__(
        self, base_url: str, model: str, cache: Path, *, timeout_s: float = 60.0, tries: int = 5, wait_s: float = 1.0
    ):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"the judge's address must begin with http:// or https://, got {base_url!r}")
        self.url, self.model, self.cache = f"{base_url.rstrip('/')}/chat/completions", model, cache
        self.timeout_s, self.tries, self.wait_s = timeout_s, tries, wait_s
        self.name = model
        self._key = os.environ.get(KEY_VARIABLE, "")
        lines = ((entry.get("request"), entry.get("reply")) for entry in read_lines(cache))
        self._replies = {asked: said for asked, said in lines if isinstance(asked, str) and isinstance(said, str)}

    def __call__(self, question: Question, answers: list[str]) -> Verdict:
        """The verdict; one that says `understood=False` after `tries` replies that could not be read.

        Raises:
            ValueError: The endpoint refuses: a wrong key, address or model.
            OSError: It fails or is busy even after `tries`; what was judged is kept.
        """
        messages = judge_messages(question, answers)
        request = hashlib.sha256(json.dumps([self.model, messages]).encode()).hexdigest()
        if request not in self._replies:
            self._keep(request, self._ask(messages, question))
        verdict = read_verdict(self._replies[request], question)
        wrong = Verdict(0.0, False if question.dimension == "match" else None, understood=False)
        return verdict or wrong

    def _ask(self, messages: list[dict[str, str]], question: Question) -> str:
        reply, wait_s, failure = None, self.wait_s, ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(wait_s)
                wait_s *= 2
            try:
                reply = self._send(messages)
                if read_verdict(reply, question) is not None:
                    return reply
            except urllib.error.HTTPError as error:
                failure = f"HTTP {error.code}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise ValueError(
                        f"the judge at {self.url} refuses: {failure} {error.reason}; check the address, the model's "
                        f"name {self.model!r} and the key in {KEY_VARIABLE}"
                    ) from None
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                # no connection, a time-out, or no JSON
                failure = type(error).__name__ if not isinstance(error, TimeoutError) else "time-out"
        if reply is None:
            raise OSError(
                f"the judge at {self.url} failed {self.tries} times, last with {failure}; {len(self._replies)} "
                f"replies are kept in {self.cache.name}: run the same command with --resume"
            )
        return reply

    def _send(self, messages: list[dict[str, str]]) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 64}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with _OPENER.open(request, timeout=self.timeout_s) as response:
            content = json.load(response)["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise ValueError("a reply without text")
        return content

    def _keep(self, request: str, reply: str) -> None:
        self._replies[request] = reply
        with self.cache.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"request": request, "reply": reply}) + "\n")


class StringJudge:
    """Compares words: right where the correct answer's words are the prediction's; the score is five times their F1.

    No published figure is made this way.
    """

    name, published = "words in common (not the published metric)", False

    def __call__(self, question: Question, answers: list[str]) -> Verdict:
        scores = [_f1(_words(answer), _words(question.answer)) for answer in answers]
        score = 5 * min(scores)
        return Verdict(score, score == 5 if question.dimension == "match" else None)


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]


def _f1(said: list[str], true: list[str]) -> float:
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true)) if common else 0.0
