"""One engine for all tests of the plugin, in this process: starting one takes a minute.

Where vLLM is not installed, and so in `make test`, the tests are not collected: `make test-vllm` runs them.
"""

import importlib.util
import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_PLUGINS": "video_ma2mba",
}  # fmt: skip

import numpy as np
import pytest
import torch

from tests.tiny import byte_tokenizer, tiny_config
from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
from video_ma2mba.data.synthetic import make_story

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

NEW_TOKENS = 12
BLOCK = 16
CHUNK = 80  # tokens of a step: prompts are cut at places that have to do with nothing else


@pytest.fixture(scope="session")
def processor():
    return VideoMa2mbaProcessor(byte_tokenizer(), VideoMa2mbaVideoProcessor(size=56), patch_size=14)


@pytest.fixture(scope="session")
def model(processor):
    """Random weights that depend visibly on all frames; four tokens a frame."""
    torch.manual_seed(0)
    config = tiny_config(
        text={
            "vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id,
            "hidden_size": 64, "num_heads": 2, "head_dim": 64, "expand": 2, "state_size": 64, "num_hidden_layers": 3,
        },
        vision={"image_size": 56, "patch_size": 14},
        video_token_id=processor.video_token_id, image_token_id=processor.image_token_id, vision_chunk_size=8,
    )  # fmt: skip
    model = VideoMa2mbaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.normal_(mean=-3)
            elif "mixer" in name and parameter.ndim > 1:
                parameter.mul_(3)
            elif "vision_tower" in name or "projector" in name:
                parameter.normal_(std=0.3)
        model.get_input_embeddings().weight.normal_(std=0.3)
    return model


@pytest.fixture(scope="session")
def folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llm(folder):
    from vllm import LLM

    return LLM(
        str(folder), enforce_eager=True, dtype="float32", enable_prefix_caching=True, block_size=BLOCK,
        max_model_len=40_000, max_num_batched_tokens=CHUNK, max_num_seqs=8,
        limit_mm_per_prompt={"video": 4, "image": 4}, enable_lora=True, max_lora_rank=8,
    )  # fmt: skip


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    return [
        str(make_story(seed=seed, duration_s=seconds).render(folder / f"{seed}.mp4"))
        for seed, seconds in enumerate((7, 13, 40))
    ]


def talk(content, system=None):
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": content}]


def request(processor, content, system=None, fps=None):
    """A request to vLLM of the parts of a user's message."""
    files = [np.fromfile(part["path"], np.uint8) for part in content if part["type"] == "video"]
    images = [part["image"] for part in content if part["type"] == "image"]
    data = ({"video": [(file, {"fps": fps}) for file in files]} if files else {}) | (
        {"image": images} if images else {}
    )
    text = processor.apply_chat_template(talk(content, system), add_generation_prompt=True)
    return {"prompt": text, "multi_modal_data": data}


def expected(model, processor, content, system=None):
    """Ids of the prompt and of the answer, from `generate`."""
    inputs = processor.apply_chat_template(
        talk(content, system), add_generation_prompt=True, tokenize=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)[0]
    start = inputs["input_ids"].shape[1]
    return ids[:start].tolist(), ids[start:].tolist()


def answers(llm, requests, **options):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    return llm.generate(requests, sampling, use_tqdm=False, **options)
