"""Where the states of a training sample begin (Ruiz and Gu, arXiv 2507.02782).

Trained from zeros alone, a model knows only the states that its training length leads to, and is lost beyond it. So a
sample may begin with the states that another one left ("passed"), or with noise of their mean and spread ("noise").
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

KINDS = ("zeros", "passed", "noise")
MEMORY = 0.99  # of the running mean and variance, per batch


@dataclass(frozen=True)
class InitialStatesOptions:
    """What a recipe says of where states begin.

    Attributes:
        kind: "zeros"; "passed", with the states that another sample left; or "noise", of their mean and spread.
        share: Of the samples that begin so; the others have zeros.
    """

    kind: str = "zeros"
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"initial_states.kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"initial_states.share must lie in (0, 1], got {self.share}")


class InitialStates:
    """Gives each batch its first states and takes its last ones.

    What a batch begins with follows from the seed, the process, the number of batches before, and what those left: all
    that a checkpoint holds, so a resumed run goes on bit for bit. Every process has its own, of its own samples.

    Args:
        options: See there.
        seed: Of the noise, and of who begins with zeros.
        rank: Of the process.
    """

    def __init__(self, options: InitialStatesOptions, seed: int = 0, rank: int = 0):
        self.options, self.seed, self.rank = options, seed, rank
        self.num_batches = 0
        self._kept: list[tuple[torch.Tensor, ...]] = []  # per layer: "passed", the states; "noise", means and variances

    def begin(self, cache: Any) -> Any:
        """Put the first states of the next batch into a fresh `Mamba2Cache` of zeros; returns it."""
        entropy = np.random.SeedSequence([self.seed, self.rank, self.num_batches]).generate_state(1, np.uint64)
        draw = torch.Generator().manual_seed(int(entropy[0]))
        batch = cache.layers[0].ssm_state.shape[0]
        begins_so = torch.rand(batch, generator=draw) < self.options.share
        if not self._kept or not begins_so.any():
            return cache
        for layer, kept in enumerate(self._kept):
            zeros = cache.layers[layer]
            states = []
            for number, zero in enumerate(zeros):
                if self.options.kind == "passed":
                    one = kept[number][torch.arange(batch) % len(kept[number])]
                else:
                    mean, variance = kept[2 * number], kept[2 * number + 1]
                    one = mean + variance.sqrt() * torch.randn(zero.shape, generator=draw).to(mean.device)
                where = begins_so.to(zero.device).view(-1, *[1] * (zero.ndim - 1))
                states.append(torch.where(where, one.to(zero), zero))
            cache.layers[layer] = type(zeros)(*states)
        return cache

    def end(self, cache: Any) -> None:
        """Take what a batch left: the `Mamba2Cache` that `begin` gave, moved on by the model."""
        self.num_batches += 1
        if self.options.kind == "passed":
            self._kept = [tuple(state.detach() for state in layer) for layer in cache.layers]
        elif self.options.kind == "noise":
            found = [tuple(one for state in layer for one in _fit(state.detach())) for layer in cache.layers]
            if self._kept:
                found = [
                    tuple(torch.lerp(now, before, MEMORY) for before, now in zip(*layer, strict=True))
                    for layer in zip(self._kept, found, strict=True)
                ]
            self._kept = found

    # --- in a checkpoint ---------------------------------------------------------------------------------------------

    def _file(self, folder: Path) -> Path:
        return folder / f"initial_states_{self.rank}.safetensors"

    def save(self, folder: Path) -> None:
        tensors = {
            f"{layer}.{number}": tensor.contiguous().cpu()
            for layer, kept in enumerate(self._kept)
            for number, tensor in enumerate(kept)
        }
        save_file(tensors | {"num_batches": torch.tensor(self.num_batches)}, self._file(folder))

    def load(self, folder: Path) -> None:
        """
        Raises:
            ValueError: The checkpoint has no states of this process: it was written by fewer, or by another recipe.
        """
        if not self._file(folder).is_file():
            raise ValueError(
                f"{folder} holds no initial states of process {self.rank}: resume with as many processes as before, "
                "and with the same initial_states"
            )
        tensors = load_file(self._file(folder))
        self.num_batches = int(tensors.pop("num_batches"))
        layers: dict[int, dict[int, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            layer, number = map(int, name.split("."))
            layers.setdefault(layer, {})[number] = tensor
        self._kept = [tuple(layers[i][n] for n in sorted(layers[i])) for i in sorted(layers)]


def _fit(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over a batch: per head of (batch, heads, head_dim, state), over all of (batch, k, conv_dim)."""
    over = tuple(i for i in range(state.ndim) if state.ndim == 3 or i != 1)
    return state.mean(over, keepdim=True)[0], state.var(over, keepdim=True, unbiased=False)[0]
