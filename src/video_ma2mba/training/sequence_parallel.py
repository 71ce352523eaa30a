"""Training with each video shared by several processes: the recipe's `sequence_parallel`."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import distributed as dist
from torch.utils.data import Sampler

from ..data.collator import VideoChatCollator
from ..modeling.sequence_parallel import SequenceGroup, cut_span, set_sequence_group
from .trainer import VideoMa2mbaTrainer

PLACE = "sequence_span"


class SpanCollator:
    """The span of one rank of what `collator` makes of a row. Each rank decodes the whole sample."""

    def __init__(self, collator: VideoChatCollator, rank: int, size: int):
        self.collator, self.rank, self.size = collator, rank, size

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch, processor = self.collator(rows), self.collator.processor
        placeholders = {"pixel_values_videos": processor.video_token_id, "pixel_values": processor.image_token_id}
        span, place = cut_span(batch, self.rank, self.size, processor.tokens_per_frame, placeholders)
        others = {name: value for name, value in batch.items() if not torch.is_tensor(value)}
        return {**others, **span, PLACE: torch.tensor(place)}


class Repeated(Sampler[int]):
    """Each index of a sampler several times on end, so that processes side by side get the same."""

    def __init__(self, sampler: Any, times: int):
        self.sampler, self.times = sampler, times

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) * self.times

    def __iter__(self) -> Iterator[int]:
        return (index for index in self.sampler for _ in range(self.times))


class SequenceParallelTrainer(VideoMa2mbaTrainer):
    """`VideoMa2mbaTrainer` where groups of `sequence_parallel` processes share each sample; the rest is as ever.

    Evaluation needs no gradient, so no long memory: there each process watches videos of its own.

    Args:
        sequence_parallel: Processes that share a sample; they follow each other in rank.
        The others: as of `VideoMa2mbaTrainer`.

    Raises:
        ValueError: The number of processes is no multiple of it, or `label_smoothing_factor` is asked for.
    """

    def __init__(self, *args: Any, sequence_parallel: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            raise ValueError(
                "label_smoothing_factor needs the labels of whole samples, of which sequence_parallel leaves each "
                "process a part: let one of them be"
            )
        self.ranks, world = sequence_parallel, self.args.world_size
        if world % self.ranks:
            raise ValueError(f"sequence_parallel {self.ranks} does not divide the {world} process(es)")
        groups = [dist.new_group(range(first, first + self.ranks)) for first in range(0, world, self.ranks)]
        self.neighbours = SequenceGroup(groups[self.args.process_index // self.ranks])
        set_sequence_group(self.model, self.neighbours)

    def get_total_train_batch_size(self, args: Any) -> int:
        return super().get_total_train_batch_size(args) // self.ranks

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return Repeated(super()._get_train_sampler(train_dataset), self.ranks)

    def _train_collator(self) -> Any:
        return SpanCollator(super()._train_collator(), self.neighbours.rank, self.ranks)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        place = inputs.pop(PLACE, None)
        if place is not None:
            self._check_one_sample(place.to(self.args.device))
        return super()._prepare_inputs(inputs)

    def _check_one_sample(self, place: torch.Tensor) -> None:
        """All ranks of a group must hold spans of one sample; one of them may have failed to read it."""
        places = [torch.empty_like(place) for _ in range(self.ranks)]
        dist.all_gather(places, place, group=self.neighbours.group)
        spans = torch.stack(places).tolist()
        fits = all(one[1] == other[0] and one[2] == other[2] for one, other in pairwise(spans))
        if not fits:
            raise ValueError(
                f"the ranks that share a sample made different things of it: (first, end, all tokens) are {spans}; a "
                "file that one of them cannot read is the likely cause"
            )

    def _count(self, infos: list[dict[str, Any]]) -> None:
        if self.neighbours.rank == 0:  # one for all that share a sample
            super()._count(infos)
