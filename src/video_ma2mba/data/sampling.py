"""In which order samples come: those of like length together, the same for any number of devices."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

BATCHES_SORTED = 50  # so many global batches are sorted by length together; more would wear the randomness thin


class LengthGroupedSampler(Sampler[int]):
    """Shuffles samples so that each global batch holds samples of like length.

    What comes follows from the seed and the epoch alone: a resumed run goes on in the same order, and several devices
    share the batches that one would have had. The batch with the longest sample comes first, so that a lack of memory
    shows at once.

    Args:
        lengths: Tokens of every sample.
        batch_size: The global one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(order), BATCHES_SORTED * self.batch_size):
            part = order[start : start + BATCHES_SORTED * self.batch_size]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]  # at most one: it ends the epoch
        longest = max(range(len(whole)), key=lambda i: self.lengths[whole[i][0]], default=None)
        shuffled = [whole[i] for i in rng.permutation(len(whole)) if i != longest]
        first = [] if longest is None else [whole[longest]]
        return (int(index) for batch in [*first, *shuffled, *rest] for index in batch)
