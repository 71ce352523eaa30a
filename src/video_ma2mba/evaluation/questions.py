"""What a benchmark asks, and how its publishers read an answer."""

import re
import zlib
from dataclasses import dataclass, field
from string import ascii_uppercase as LETTERS


@dataclass(frozen=True)
class Question:
    """One question about one video.

    Attributes:
        id: Unique in its task.
        where: File and line (or row), for reports.
        videos: Paths under the media root, tried in order.
        prompt: The whole text that the model is given.
        answer: The letter of the right option, or a text; empty where the publishers keep it to themselves.
        options: Texts of a multiple choice, in the order of the letters; none where the answer is free.
        groups: By which scores are broken down, for instance {"duration": "short"}.
        asked: The bare question, for a judge.
        dimension: By which a judge is to look at the answer.
    """

    id: str
    where: str
    videos: tuple[str, ...]
    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    groups: dict[str, str] = field(default_factory=dict, hash=False)
    asked: str = ""
    dimension: str = ""

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.options)]


def drawn(question: Question) -> str:
    """A letter by chance, as some benchmarks take where an answer has none; the same in every run."""
    return question.letters[zlib.crc32(question.id.encode()) % len(question.options)]


def marked_letter(text: str, question: Question) -> str:
    """The letter that stands out most, as lmms-eval reads Video-MME; empty if there is none.

    The stronger mark wins, and of equal ones the last: alone at the start, at the end, after "answer is", "(A)", "A.",
    "A:", "A)", alone anywhere, any capital of an option.
    """
    letters = question.letters
    text = text.strip().strip(",.!?;:'\"").strip()
    marks = (
        rf"^([{letters}])(?![A-Za-z])",
        rf"(?<![A-Za-z])([{letters}])$",
        rf"(?i:answer|option|choice)(?i:\s+is)?[\s:]*\(?([{letters}])(?![A-Za-z])",
        rf"\(([{letters}])\)",
        rf"(?<![A-Za-z])([{letters}])\.",
        rf"(?<![A-Za-z])([{letters}]):",
        rf"(?<![A-Za-z])([{letters}])\)",
        rf"(?<![A-Za-z])([{letters}])(?=\s)",
        rf"([{letters}])",
    )
    for mark in marks:
        if found := re.findall(mark, text):
            return found[-1]
    return ""


def first_capital(text: str, question: Question) -> str:
    """The first capital of A to E anywhere, as LongVideoBench reads: also that of "Dog"; without one, by chance."""
    text = re.sub(r"(?i)^\s*(the )?(best |correct )?(answer|option)( is)?\s*:?\s*", "", text)
    if len(text.split()) > 10 and not re.search(r"[A-E]", text):
        return drawn(question)
    found = re.search(r"[A-E]", text)
    return found[0] if found else drawn(question)


def leading_letter(text: str, question: Question) -> str | None:
    """As MVBench reads: "B. text", else the first letter that stands alone, in either case. None: not counted."""
    if not text.strip():
        return None
    if found := re.match(r"([A-E])\.\s*\S", text.strip()):
        return found[1]
    alone = re.search(r"\b([A-Ea-e])\b", re.sub(r"[^\w\s]", " ", text))
    return alone[1].upper() if alone else ""


def bracketed_letter(text: str, question: Question) -> str:
    """As NExT-QA is read: "(A)", else "A ", else "A.", else an option's own words, else by chance."""
    for form in ("({})", "{} ", "{}."):
        found = [letter for letter in question.letters if form.format(letter) in f"{text.strip()} "]
        if found:
            return found[0]
    if len(text.split()) > 5:
        for letter, option in zip(question.letters, question.options, strict=True):
            if option.lower() in text.lower():
                return letter
    return drawn(question)


def own_answer(text: str, question: Question) -> str:
    """One's own questions: the letter of an option, by its mark or by the option's own words; else the plain text."""
    if not question.options:
        return plain_text(text)
    for letter, option in zip(question.letters, question.options, strict=True):
        if plain_text(text) == plain_text(option):
            return letter
    return marked_letter(text, question)


def plain_text(text: str) -> str:
    """By which free answers are compared: without case, marks at either end, and spaces beyond one."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")
