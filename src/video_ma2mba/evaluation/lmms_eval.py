"""Video-Ma²mba as a model of lmms-eval, which finds it by its entry point: `lmms-eval --model video_ma2mba`.

    lmms-eval --model video_ma2mba --model_args pretrained=DIR_OR_HUB_ID,fps=1 --tasks videomme

This module is imported by lmms-eval alone. Requests about one video that follow one another watch it once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from ..loading import choose_dtype, load, load_model
from ..modeling.video_memory import VideoMemory
from ..processing import VideoMa2mbaProcessor

NAME = "video_ma2mba"


def manifests() -> list[ModelManifest]:
    """What the entry point gives."""
    return [ModelManifest(NAME, simple_class_path=f"{__name__}.Simple", chat_class_path=f"{__name__}.Chat")]


class _Model(lmms):
    """Loading and answering, which the two kinds of requests share.

    Args:
        pretrained: Folder or Hub id.
        fps, max_num_frames: Which frames of a video; 0 takes as many as there are.
        device, dtype: "auto" takes CUDA and bfloat16 where there is a GPU.
        batch_size: Taken for the command line's sake; requests are answered one after another.
        unknown: Anything else is an error.
    """

    def __init__(
        self,
        pretrained: str,
        fps: float = 1.0,
        max_num_frames: int = 0,
        device: str | None = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"{NAME} knows no {', '.join(unknown)}; it takes pretrained, fps, max_num_frames, dtype")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device in (None, "auto") else torch.device(device)
        self.model = load_model(pretrained, choose_dtype(dtype, self.device), None).to(self.device)
        self.processor = load(VideoMa2mbaProcessor, pretrained)
        self.fps, self.max_num_frames = float(fps), int(max_num_frames) or None
        self._watched: tuple[str, VideoMemory] | None = None

    def watched(self, path: str) -> VideoMemory:
        """The memory of a video; of the one asked about before, without watching it again."""
        if self._watched is None or self._watched[0] != path:
            memory = VideoMemory(self.model, self.processor)
            memory.watch(path, None if self.max_num_frames else self.fps, max_frames=self.max_num_frames)
            self._watched = path, memory
        return self._watched[1]

    def answer(self, messages: list[dict[str, Any]], generation: dict[str, Any]) -> GenerationResult:
        """Answer a chat; one question about one video is asked of its memory, anything else goes in whole."""
        options = _options(generation)
        parts = [part for message in messages for part in message["content"]]
        if any(part["type"] == "audio" for part in parts):
            raise ValueError(f"{NAME} hears nothing: this task has audio")
        paths = [part["video"] for part in parts if part["type"] == "video"]
        only_texts = all(part["type"] in ("text", "video") for part in messages[0]["content"])
        if len(messages) == 1 and len(paths) == 1 and isinstance(paths[0], str) and only_texts:
            text = "".join(part["text"] for part in messages[0]["content"] if part["type"] == "text")
            (ids,) = self.watched(paths[0]).generate([text], **options)
        else:
            inputs = self.processor.apply_chat_template(
                messages, fps=self.fps, add_generation_prompt=True, tokenize=True
            ).to(self.device)
            ids = self.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        for stop in generation.get("until") or ():
            text = text.split(stop)[0] if stop else text
        return GenerationResult(text, TokenCounts(output_tokens=len(ids)))

    def answer_all(
        self, requests: list[Instance], chats: list[tuple[list[dict[str, Any]], dict[str, Any]]]
    ) -> list[GenerationResult]:
        """Answer (messages, generation_kwargs) in the order of the requests; each video is watched once."""
        results = {}
        for i in sorted(range(len(chats)), key=lambda i: _first_video(chats[i][0])):
            messages, generation = chats[i]
            results[i] = self.answer(messages, generation)
            self.cache_hook.add_partial("generate_until", (requests[i].args[0], generation), results[i].text)
        return [results[i] for i in range(len(requests))]


class Chat(_Model):
    """For tasks that hand over messages."""

    is_simple = False

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        chats = []
        for request in requests:
            _, to_messages, generation, doc_id, task, split = request.args
            chats.append((_messages(to_messages(self.task_dict[task][split][doc_id])), generation))
        return self.answer_all(requests, chats)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        results = []
        for request in requests:
            _, to_messages, generation, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            said: list[str] = []
            info, round_info = to_messages(document), None
            while True:
                messages, ended = info, False
                if isinstance(info, tuple):
                    messages, ended, said, round_info = info
                if ended or messages is None:
                    break
                said = [*said, self.answer(_messages(messages), generation).text]
                info = to_messages(document, round_idx=len(said), previous_output=said, previous_round_info=round_info)
                if not (isinstance(info, tuple) and len(info) == 4):
                    break
            results.append(said)
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks by likelihood run with --force_simple")


class Simple(_Model):
    """For tasks that hand over a text and the media before it; also by likelihood."""

    is_simple = True

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        chats = []
        for request in requests:
            context, generation, to_visual, doc_id, task, split = request.args
            visuals = to_visual(self.task_dict[task][split][doc_id])
            chats.append(([{"role": "user", "content": _media(visuals, context)}], generation))
        return self.answer_all(requests, chats)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        results = []
        for request in requests:
            context, target, to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            continuation = target if isinstance(target, str) else target(document)
            visuals = to_visual(document)
            if len(visuals) != 1 or not isinstance(visuals[0], str):
                raise NotImplementedError(f"{NAME} tells likelihoods of answers about one video")
            memory = self.watched(visuals[0])
            (score,) = memory.log_likelihoods(context, [continuation.strip()]).tolist()
            truth = self.processor.tokenizer(continuation.strip(), add_special_tokens=False)["input_ids"]
            (ids,) = memory.generate([context], max_new_tokens=len(truth), do_sample=False)
            results.append((score, ids.tolist() == truth))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        raise NotImplementedError("tasks of several rounds run with the chat model, without --force_simple")


def _messages(raw: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """lmms-eval's messages, media under "url", as those of transformers."""
    return [
        {
            "role": message["role"],
            "content": [
                part if part["type"] == "text" else {"type": part["type"], part["type"]: part["url"]}
                for part in message["content"]
            ],
        }
        for message in raw
    ]


def _media(visuals: Sequence[Any], text: str) -> list[dict[str, Any]]:
    """Pictures and paths of videos, then the text."""
    parts: list[dict[str, Any]] = [
        {"type": "video", "video": visual} if isinstance(visual, str | Path) else {"type": "image", "image": visual}
        for visual in visuals
    ]
    return [*parts, {"type": "text", "text": text}]


def _first_video(messages: list[dict[str, Any]]) -> str:
    """By which requests are brought into order: those about one video follow one another."""
    paths = [str(part["video"]) for message in messages for part in message["content"] if part["type"] == "video"]
    return paths[0] if paths else ""


def _options(generation: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate` among a task's generation_kwargs."""
    temperature = float(generation.get("temperature") or 0)
    options: dict[str, Any] = {
        "max_new_tokens": int(generation.get("max_new_tokens", 128)),
        "do_sample": bool(generation.get("do_sample", temperature > 0)) and temperature > 0,
        "num_beams": int(generation.get("num_beams") or 1),
    }
    if options["do_sample"]:
        options |= {"temperature": temperature, "top_p": float(generation.get("top_p") or 1.0)}
    return options
