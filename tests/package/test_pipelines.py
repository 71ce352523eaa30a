"""The pipelines of Transformers on chats with pictures and with a video: the answer is that of generate."""

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline
from transformers.pipelines import any_to_any

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 28, 3), dtype=np.uint8))
NEW_TOKENS = 5


def answer(model, processor, chat, **options):
    """Token by token, without generate: each pass reads everything again."""
    inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, **options)
    ids = inputs["input_ids"]
    for _ in range(NEW_TOKENS):
        inputs["attention_mask"] = ids.new_ones(ids.shape)
        following = model(**{**inputs, "input_ids": ids}).logits[:, -1:].argmax(-1)
        ids = ids.new_tensor([[*ids[0].tolist(), int(following)]])
        if int(following) == processor.tokenizer.eos_token_id:
            break
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat_about(kind, video):
    entry = {"image": {"type": "image", "image": PICTURE}, "video": {"type": "video", "path": video}}[kind]
    return [{"role": "user", "content": [entry, {"type": "text", "text": "What is this?"}]}]


def build(name, model, processor, monkeypatch):
    # `any-to-any` asks for torchvision by name, and then never uses it for this model
    monkeypatch.setattr(any_to_any, "requires_backends", lambda *_: None)
    return pipeline(name, model=model, processor=processor)


@pytest.mark.parametrize("name", ["image-text-to-text", "any-to-any"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_an_answer_about_a_chat(model, processor, video, monkeypatch, name, kind):
    ask = build(name, model, processor, monkeypatch)
    chat = chat_about(kind, video)
    told = ask(chat, max_new_tokens=NEW_TOKENS, return_full_text=False)
    assert told[0]["generated_text"] == answer(model, processor, chat)
    whole = ask(chat, max_new_tokens=NEW_TOKENS, return_full_text=True)
    assert whole[0]["generated_text"][-1] == {"role": "assistant", "content": told[0]["generated_text"]}


def test_options_of_the_processor_go_through(model, processor, video, monkeypatch):
    ask = build("image-text-to-text", model, processor, monkeypatch)
    chat = chat_about("video", video)
    options = {"fps": 0.2}
    told = ask(chat, max_new_tokens=NEW_TOKENS, return_full_text=False, processor_kwargs=options)
    assert told[0]["generated_text"] == answer(model, processor, chat, **options)


def test_an_answer_that_was_begun_goes_on(model, processor, video, monkeypatch):
    ask = build("image-text-to-text", model, processor, monkeypatch)
    begun = [*chat_about("video", video), {"role": "assistant", "content": [{"type": "text", "text": "The"}]}]
    told = ask(begun, max_new_tokens=NEW_TOKENS, return_full_text=True)[0]["generated_text"]
    inputs = processor.apply_chat_template(begun[:1], tokenize=True, add_generation_prompt=True)
    ids = inputs["input_ids"].new_tensor([[*inputs["input_ids"][0].tolist(), *processor.tokenizer("The")["input_ids"]]])
    inputs |= {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}
    written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    said = processor.decode(written, skip_special_tokens=True)
    assert told[-1]["content"][0]["text"] == "The" + said
