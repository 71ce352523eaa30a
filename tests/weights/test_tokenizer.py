"""The real GPT-NeoX tokenizer: placeholders inside the padded vocabulary, and the ids of a whole chat, listed by hand.

The file is that of the OLMo wheel (`allenai_eleuther-ai-gpt-neox-20b-pii-special.json`), which adds three tokens to
GPT-NeoX's; it is looked for in the folder VIDEO_MA2MBA_ASSETS, by default `../shared/assets` beside the repository.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
from video_ma2mba.weights import parts

ASSETS = os.environ.get("VIDEO_MA2MBA_ASSETS", Path(__file__).resolve().parents[3] / "shared" / "assets")
FILE = Path(ASSETS) / "gpt_neox_20b_pii.json"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"there is no {FILE}; set VIDEO_MA2MBA_ASSETS")

IMAGE, VIDEO = 50277, 50278
SYSTEM = [29, 93, 10394, 49651, 1394, 403, 247, 9371, 13372, 15, 0]  # <|system|>You are a helpful assistant.
USER, ASSISTANT = [29, 93, 4537, 49651], [29, 93, 515, 5567, 49651]


@pytest.fixture(scope="module")
def neox_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neox")
    tokenizer = json.loads(FILE.read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < 50277]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "add_prefix_space": False}))
    return folder


@pytest.fixture(scope="module")
def processor(neox_folder):
    return VideoMa2mbaProcessor(parts.load_tokenizer(None, neox_folder), VideoMa2mbaVideoProcessor())


def test_placeholders_lie_inside_the_padded_vocabulary(neox_folder, processor):
    assert len(PreTrainedTokenizerFast.from_pretrained(neox_folder)) == 50277
    assert (processor.image_token_id, processor.video_token_id) == (IMAGE, VIDEO)
    config = VideoMa2mbaConfig.from_preset("0.7b")
    assert (config.image_token_id, config.video_token_id) == (IMAGE, VIDEO)
    assert len(processor.tokenizer) == 50279 < config.text_config.vocab_size == 50288
    assert (processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id) == (0, 1)
    assert (config.text_config.eos_token_id, config.text_config.pad_token_id) == (0, 1)


def ids_of(processor, messages, **kwargs):
    return processor.apply_chat_template(messages, tokenize=True, padding=False, **kwargs)["input_ids"][0].tolist()


def test_chat_is_tokenised_to_these_ids(processor):
    frames = np.zeros((1, 336, 336, 3), np.uint8)
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "What happens?"}]
    question = {"role": "user", "content": content}
    expected = [*SYSTEM, *USER, *[VIDEO] * 144, 187, 1276, 6569, 32, 0, *ASSISTANT]
    assert ids_of(processor, [question], add_generation_prompt=True) == expected
    # an answer that would fuse with the tag before it, were both tokenised together
    answered = [question, {"role": "assistant", "content": "(A)"}]
    assert ids_of(processor, answered) == [*expected, 9, 34, 10, 0]


def test_published_prompt(processor):
    """The prompt of the authors' later code, from their text to their ids."""
    system = {"role": "system", "content": "You are a helpful AI assistant."}
    image = np.zeros((336, 336, 3), np.uint8)
    user = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What happens?"}]}
    expected = [29, 93, 10394, 49651, 1394, 403, 247, 9371, 14980, 13372, 15, 0]
    expected += [29, 93, 4537, 49651, *[IMAGE] * 144, 187, 1276, 6569, 32, 0]
    assert ids_of(processor, [system, user]) == expected


def test_runs_of_spaces_and_text_come_back(processor):
    text = "def f():\n        return   1  # naïve — 日本"
    ids = processor.tokenizer(text)["input_ids"]
    assert max(ids) >= 50254  # the runs of spaces are tokens of their own
    assert processor.tokenizer.decode(ids) == text


def test_save_and_load_keep_them(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = VideoMa2mbaProcessor.from_pretrained(tmp_path)
    assert (loaded.image_token_id, loaded.video_token_id, loaded.tokenizer.pad_token_id) == (IMAGE, VIDEO, 1)
    chat = [{"role": "user", "content": [{"type": "text", "text": "Why (A)?"}]}]
    assert torch.equal(loaded.apply_chat_template(chat, tokenize=True)["input_ids"],
                       processor.apply_chat_template(chat, tokenize=True)["input_ids"])  # fmt: skip
