"""A memory server whose answers an attention model writes: `bench serve` runs it beside `video-ma2mba serve`.

Server, loop and clients are the same; where ours goes on from the state of a video, a Llama of equal size with random
weights goes on from keys and values of the same frames. It knows one video, and takes every question to be about that:
python -m video_ma2mba.benchmark.serve_attention VIDEO MODEL MEMORIES SLOTS.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache

from .. import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory
from ..serving.app import Settings, build_app, serve
from ..serving.chat import Prompt
from ..serving.engine import Engine
from ..serving.media import MediaRules
from .memory_of_video import attention_cache, attention_of_size


class KeysAndValues:
    """The past of some rows, with those parts of a `Mamba2Cache` that the loop calls.

    Args:
        layers: (keys, values) of each layer: (rows, heads, tokens, head_dim). Rows of other lengths begin with zeros.
        mask: (rows, tokens), 0 for these.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], mask: torch.Tensor):
        self.past: Any = DynamicCache()
        self.mask = mask
        for number, (keys, values) in enumerate(layers):
            self.past.update(keys, values, number)

    @property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(layer.keys, layer.values) for layer in self.past.layers]

    @property
    def num_tokens(self) -> int:
        return self.mask.shape[1]

    def copy(self) -> "KeysAndValues":
        return KeysAndValues(self.layers, self.mask)

    def own(self) -> None:
        """Nothing is written in place here."""

    @staticmethod
    def joined(caches: list["KeysAndValues"]) -> "KeysAndValues":
        longest, pad = max(cache.num_tokens for cache in caches), torch.nn.functional.pad
        mask = torch.cat([pad(cache.mask, (longest - cache.num_tokens, 0)) for cache in caches])
        layers = []
        for layer in zip(*(cache.layers for cache in caches), strict=True):
            keys, values = (
                torch.cat([pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts])
                for parts in zip(*layer, strict=True)
            )
            layers.append((keys, values))
        return KeysAndValues(layers, mask)

    def reorder_cache(self, places: torch.Tensor) -> None:
        self.past.reorder_cache(places)
        self.mask = self.mask[places]


class Attention:
    """A language model of transformers, called as the loop calls ours."""

    def __init__(self, model: Any):
        self.model, self.device, self.generation_config = model, model.device, model.generation_config

    def __call__(self, ids: torch.Tensor, attention_mask: Any, cache: KeysAndValues, **options: Any) -> Any:
        new = torch.ones_like(ids) if attention_mask is None else attention_mask
        cache.mask = mask = torch.cat([cache.mask, new], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        outputs = self.model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache.past, **options
        )  # fmt: skip
        return SimpleNamespace(logits=outputs.logits, cache=cache)


def main(video: str, name: str, memories: str, slots: str) -> None:
    """Serve until the process is told to end; the first line says where."""
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(name).eval()
    processor = VideoMa2mbaProcessor.from_pretrained(name)
    settings = Settings("attention", Path(memories), MediaRules((Path(video).parent,)), num_slots=int(slots))
    app: Any = build_app(model, processor, settings)
    app.engine.close()
    chat, past = app.chat, past_of_video(model, processor, video)
    chat.engine = Engine(Attention(attention_of_size(model)), int(slots), settings.max_waiting, chat.deliveries.notify)
    prompt = chat.prompt

    async def of_attention(request: Any) -> Prompt:
        return Prompt(past, (await prompt(request)).ids, past.num_tokens)  # type: ignore[arg-type]

    chat.prompt = of_attention
    serve(app, "127.0.0.1", 0, lambda url: print(url, flush=True))


def past_of_video(model: Any, processor: Any, video: str | Path) -> KeysAndValues:
    """What the attention model keeps of a video."""
    memory = VideoMemory(model, processor)
    memory.watch(video)
    cache, num_tokens = attention_cache(attention_of_size(model), model, processor, memory, Path(video))
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return KeysAndValues(layers, torch.ones(1, num_tokens, dtype=torch.long))


if __name__ == "__main__":
    main(*sys.argv[1:])
