"""How answers are read: each case as the benchmark's own reader has it."""

import pytest

from video_ma2mba.evaluation.questions import (
    Question,
    bracketed_letter,
    drawn,
    first_capital,
    leading_letter,
    marked_letter,
)


def question(identity="q", options=("one", "two", "three", "a very long option of words")):
    return Question(identity, "here", (), "?", "A", options)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("The correct answer is (C).", "C"), ("A. Black.", "A"), ("a", ""), ("", ""),
        ("Dog", "D"), ("I think it is B because", "B"),
        ("not A, but option B", "B"), ("E", ""), ("(A) or (D), so D", "D"),
    ],
)  # fmt: skip
def test_marked_letter(text, letter):
    assert marked_letter(text, question()) == letter


@pytest.mark.parametrize(
    ("text", "letter"), [("B", "B"), ("Answer: C", "C"), ("the Dog", "D"), ("The best answer is: B", "B")]
)
def test_first_capital(text, letter):
    assert first_capital(text, question()) == letter


def test_an_answer_without_a_letter_is_drawn_the_same_in_every_run():
    drawn_letters = [first_capital("nothing", question(str(i))) for i in range(400)]
    assert drawn_letters == [drawn(question(str(i))) for i in range(400)]
    assert all(70 < drawn_letters.count(letter) < 130 for letter in "ABCD")
    assert first_capital("no letter in these more than ten words, none at all here", question("x")) == drawn(
        question("x")
    )


@pytest.mark.parametrize(
    ("text", "letter"), [("B. two", "B"), ("(c)", "C"), ("it is a man", "A"), ("two", ""), ("  ", None), ("D", "D")]
)
def test_leading_letter(text, letter):
    assert leading_letter(text, question()) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [("(B) two", "B"), ("C", "C"), ("It is D.", "D"), ("i say it is a very long option of words", "D")],
)
def test_bracketed_letter(text, letter):
    assert bracketed_letter(text, question()) == letter
    for nothing in ("hm", "hm hm hm hm hm hm"):
        assert bracketed_letter(nothing, question("y")) == drawn(question("y"))
