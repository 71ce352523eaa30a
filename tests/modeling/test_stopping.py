"""The repetition stop against a search by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, StoppingCriteriaList

from video_ma2mba.modeling import RepetitionStop

from ..tiny import tiny_model


def repeats(answer, run_length):
    """Whether the last run is found at any earlier place."""
    last = answer[-run_length:]
    return any(answer[i : i + run_length] == last for i in range(len(answer) - run_length))


@given(
    rows=st.integers(1, 3).flatmap(
        lambda n: st.integers(0, 14).flatmap(
            lambda length: st.lists(
                st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=n, max_size=n
            )
        )
    ),
    prompt=st.lists(st.integers(0, 2), max_size=8),
    run_length=st.integers(1, 5),
)
def test_is_the_search_by_hand(rows, prompt, run_length):
    ids = torch.tensor([prompt + row for row in rows], dtype=torch.int64).view(len(rows), -1)
    found = RepetitionStop(len(prompt), run_length)(ids, None)
    assert found.dtype == torch.bool
    assert found.tolist() == [repeats(row, run_length) for row in rows]


def test_five_tokens_are_the_papers_run():
    stop = RepetitionStop(prompt_length=2)
    assert stop(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 9, 3, 4, 5, 6, 7]]), None).tolist() == [True]
    assert stop(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 9, 3, 4, 5, 6, 8]]), None).tolist() == [False]
    # the same run in the prompt alone is no repetition
    assert stop(torch.tensor([[3, 4, 3, 4, 3, 4, 3]]), None).tolist() == [False]


def test_ends_each_row_at_its_first_repetition():
    periods = torch.tensor([7, 9])

    def in_circles(ids, scores):
        """Row 0 says the same seven tokens over and over, row 1 the same nine."""
        said = 10 + (ids.shape[1] - 6) % periods
        return torch.full_like(scores, -torch.inf).scatter(1, said[:, None], 0.0)

    out = tiny_model().generate(
        torch.randint(2, 40, (2, 6)),
        max_new_tokens=60,
        do_sample=False,
        logits_processor=LogitsProcessorList([in_circles]),
        stopping_criteria=StoppingCriteriaList([RepetitionStop(6)]),
    )
    said = [[10 + i % period for i in range(period + 5)] for period in periods.tolist()]
    assert out[:, 6:].tolist() == [said[0] + [1, 1], said[1]]  # the shorter row is padded


@pytest.mark.parametrize("wrong", [{"prompt_length": -1}, {"prompt_length": 0, "run_length": 0}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="at least"):
        RepetitionStop(**wrong)
