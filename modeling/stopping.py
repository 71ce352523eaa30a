"""When to stop an answer that has begun to repeat itself (paper, section on inference)."""

import torch
from transformers import StoppingCriteria


class RepetitionStop(StoppingCriteria):
    """Ends a row once the last `run_length` tokens of its answer have already occurred as a run earlier in the answer.

    The two runs may overlap: five equal tokens and a sixth are a repetition.

    Args:
        prompt_length: tokens before the answer, `input_ids.shape[1]`; 0 where `inputs_embeds` were given.
        run_length: tokens of a run.
    """

    def __init__(self, prompt_length: int, run_length: int = 5):
        if prompt_length < 0 or run_length < 1:
            raise ValueError(
                f"prompt_length must be at least 0 and run_length at least 1, got {prompt_length} and {run_length}"
            )
        self.prompt_length, self.run_length = prompt_length, run_length

    def __call__(self, input_ids, scores, **kwargs):
        """(batch, tokens) int64 -> (batch,) bool, True where a row is to end."""
        answer = input_ids[:, self.prompt_length :]
        if answer.shape[1] <= self.run_length:
            return torch.zeros(answer.shape[0], dtype=torch.bool, device=answer.device)
        runs = answer.unfold(1, self.run_length, 1)  # (b, runs, run_length), a view
        return (runs[:, :-1] == runs[:, -1:]).all(dim=2).any(dim=1)
