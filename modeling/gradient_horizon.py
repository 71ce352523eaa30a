"""Where gradients stop: truncated backpropagation with carried states (Ruiz and Gu, arXiv 2507.02782, "TBPTT").

Counted from its own end, a row is cut into windows of `horizon` tokens. The states are handed from window to window as
they are, but no gradient crosses a border. The last window has a gradient, and so has every window with a supervised
token: all of them train, each on its own window. Where only the end is supervised, that is the last window alone, and
all that comes before is only watched.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GradientWindows:
    """The windows of a batch, from the first token on that has a gradient in any row.

    Attributes:
        first: the column of that token; all before are watched, without a graph.
        live: (batch, tokens - first) bool on the CPU: the token lies in a window with a gradient.
        starts: likewise: the token is the first of such a window, so the states that enter here are detached.
    """

    first: int
    live: torch.Tensor
    starts: torch.Tensor

    @property
    def cuts(self):
        """The columns, from `first`, where a time block must end: at the start of a window, and where all rows rest."""
        in_any = self.live.any(dim=0)
        changes = self.starts.any(dim=0)[1:] | (in_any[1:] != in_any[:-1])
        return (changes.nonzero()[:, 0] + 1).tolist()


def gradient_windows(lengths, supervised, horizon):
    """
    Args:
        lengths: (batch,) int64, the real tokens of each row, which come first.
        supervised: (batch, tokens) bool, the tokens with a loss.
        horizon: tokens of a window.

    Returns:
        `GradientWindows`, or None where no gradient stops anywhere: every row is one window.
    """
    if int(lengths.max()) <= horizon:
        return None
    columns = torch.arange(supervised.shape[1])
    number = (lengths[:, None] - 1 - columns).div(horizon, rounding_mode="floor")  # from the end; negative is padding
    real = number >= 0
    number = number.clamp(min=0)
    trains = torch.zeros(len(lengths), int(number.max()) + 1, dtype=torch.int64)
    trains[:, 0] = 1
    trains.scatter_add_(1, number, (supervised & real).long())
    live = real & trains.gather(1, number).bool()
    starts = torch.zeros_like(live)
    starts[:, 1:] = live[:, 1:] & (number[:, 1:] != number[:, :-1])
    first = int(live.any(dim=0).nonzero()[0])
    return GradientWindows(first, live[:, first:], starts[:, first:])
