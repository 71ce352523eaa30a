"""The keywords of every processor of Transformers: obeyed, or refused by their public names."""

import numpy as np
import pytest
import torch

from video_ma2mba.processing import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor

from .conftest import make_tokenizer

EOS, PAD = 0, 1
TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "(A)"}]


def clip(num_frames=3, value=9):
    return np.full((num_frames, 28, 28, 3), value, np.uint8)


def watching(video, text="Q?", **entry):
    return [{"role": "user", "content": [{"type": "video", "video": video, **entry}, {"type": "text", "text": text}]}]


def encode(processor, chat, **options):
    return processor.apply_chat_template(chat, tokenize=True, **options)


# ---- flat and nested ----


def test_flat_nested_and_common_options_say_the_same(processor):
    rows = [watching(clip()), watching(clip(2))]
    wanted = encode(processor, rows, padding_side="right", pad_to_multiple_of=8, do_rescale=True, return_tensors="np")
    ways = [
        {"text_kwargs": {"padding_side": "right", "pad_to_multiple_of": 8}, "videos_kwargs": {"do_rescale": True},
         "common_kwargs": {"return_tensors": "np"}},
        {"processor_kwargs": {"padding_side": "right", "pad_to_multiple_of": 8, "return_tensors": "np"},
         "videos_kwargs": {"do_rescale": True}},
        {"common_kwargs": {"padding_side": "left", "return_tensors": "np", "do_rescale": True},  # the weakest voice
         "text_kwargs": {"padding_side": "right"}, "pad_to_multiple_of": 8},
    ]  # fmt: skip
    assert wanted["pixel_values_videos"].dtype == np.float32
    assert wanted["input_ids"].shape[1] % 8 == 0
    for options in ways:
        batch = encode(processor, rows, **options)
        assert batch.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(batch[name], wanted[name])


def test_images_and_videos_are_told_apart(processor):
    batch = processor(
        text="<video><image>", videos=clip(), images=clip()[0], images_kwargs={"do_rescale": True, "rescale_factor": 1}
    )
    assert batch["pixel_values_videos"].dtype == torch.uint8
    assert batch["pixel_values"].unique().tolist() == [9.0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nonsense": 1}, TypeError, "no option 'nonsense'"),
        ({"text_kwargs": {"fps": 1}}, TypeError, "no option 'fps' in text_kwargs"),
        ({"audio_kwargs": {"sampling_rate": 16000}}, ValueError, "hears nothing"),
        ({"audio": [0.0]}, ValueError, "hears nothing"),
        ({"text_kwargs": {"padding": False}, "padding": True}, ValueError, "padding is given twice"),
        ({"text_pair": "x"}, ValueError, "text_pair='x' cannot be honoured"),
        ({"is_split_into_words": True}, ValueError, "is_split_into_words=True"),
        ({"stride": 3}, ValueError, "stride=3"),
        ({"return_token_type_ids": True}, ValueError, "return_mm_token_type_ids"),
        ({"return_overflowing_tokens": True}, ValueError, "return_overflowing_tokens=True"),
        ({"return_special_tokens_mask": True}, ValueError, "return_special_tokens_mask=True"),
        ({"return_length": True}, ValueError, "return_length=True"),
        ({"return_labels": True}, ValueError, "return_labels needs the conversation"),
        ({"sanitize_control_tokens": True}, ValueError, "sanitize_control_tokens needs the conversation"),
        ({"do_resize": False}, ValueError, "do_resize=False"),
        ({"do_convert_rgb": False}, ValueError, "do_convert_rgb=False"),
        ({"size": {"shortest_edge": 28}}, ValueError, "size="),
        ({"crop_size": 14}, ValueError, "crop_size=14"),
        ({"resample": 0}, ValueError, "resample=0"),
        ({"do_center_crop": False}, ValueError, "resize_mode"),
        ({"do_pad": True}, ValueError, "resize_mode"),
        ({"data_format": "channels_last"}, ValueError, "data_format"),
        ({"images_kwargs": {"image_seq_length": 7}}, ValueError, "image_seq_length=7"),
        ({"fps": -5}, ValueError, "fps must be a positive"),  # checked also where there is no video
        ({"num_frames": 0}, ValueError, "num_frames must be at least 1"),
        ({"num_frames": 2.5}, ValueError, "num_frames must be a whole number, got 2.5"),
        ({"max_frames": "8"}, ValueError, "max_frames must be a whole number, got '8'"),
        ({"fps": "1"}, ValueError, "fps must be a number, got '1'"),
        ({"fps": [1.0]}, ValueError, r"fps must be a number, got \[1.0\]"),
        ({"start_s": "0:10"}, ValueError, "start_s must be a number"),
        ({"num_frames": 2, "fps": 1.0}, ValueError, "num_frames and fps both"),
        ({"end_s": 1.0, "start_s": 2.0}, ValueError, "end_s must lie after start_s"),
        ({"truncation": "only_second", "max_length": 3}, ValueError, "truncation must be"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1"),
        ({"max_length": 1}, ValueError, "truncation=True to cut"),
    ],
)
def test_what_cannot_be_honoured_is_named(processor, options, error, message):
    with pytest.raises(error, match=message) as raised:
        processor(text="Q?", **options)
    assert "_encode" not in str(raised.value)


def test_what_changes_nothing_is_taken(processor):
    neutral = {
        "padding": "longest", "truncation": False, "max_length": None, "stride": 0, "is_split_into_words": False,
        "pad_to_multiple_of": None, "return_token_type_ids": False, "return_attention_mask": True, "verbose": False,
        "return_overflowing_tokens": False, "add_special_tokens": True, "padding_side": None, "text_pair": None,
        "do_convert_rgb": True, "do_resize": True, "size": {"height": 28, "width": 28}, "crop_size": 28, "resample": 3,
        "default_to_square": True, "do_center_crop": True, "do_pad": False, "data_format": "channels_first",
        "device": "cpu", "do_sample_frames": None, "num_frames": None, "fps": None, "video_metadata": None,
        "return_metadata": False, "audio_kwargs": {}, "audio": None, "disable_grouping": True,
    }  # fmt: skip
    wanted = processor(text="<video>Q?", videos=clip())
    batch = processor(text="<video>Q?", videos=clip(), **neutral)
    assert batch.keys() == wanted.keys()
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_special_tokens_that_the_tokenizer_would_add_are_not_promised(processor, monkeypatch):
    monkeypatch.setattr(type(processor.tokenizer), "num_special_tokens_to_add", lambda self, pair=False: 1)
    processor(text="Q?", add_special_tokens=False)
    with pytest.raises(ValueError, match="add_special_tokens=True"):
        processor(text="Q?", add_special_tokens=True)


# ---- rows ----


def test_the_tokenizers_padding_side_is_obeyed(tmp_path, processor):
    texts = ["Long?", "Q?"]

    def side_of(processor):
        mask = processor(text=texts)["attention_mask"][1].tolist()
        return "left" if mask[0] == 0 else "right"

    assert (processor.tokenizer.padding_side, side_of(processor)) == ("left", "left")
    processor.tokenizer.padding_side = "right"
    assert side_of(processor) == "right"
    processor.save_pretrained(tmp_path)
    assert side_of(VideoMa2mbaProcessor.from_pretrained(tmp_path)) == "right"
    assert side_of(VideoMa2mbaProcessor.from_pretrained(tmp_path, padding_side="left")) == "left"
    given = VideoMa2mbaProcessor(make_tokenizer(padding_side="right"), VideoMa2mbaVideoProcessor(size=28))
    assert side_of(given) == "right"


def test_max_length_pads_and_truncation_cuts(processor):
    ids = processor.tokenizer("abcdef")["input_ids"]
    assert len(ids) == 6
    padded = processor(text="abcdef", padding="max_length", max_length=8)["input_ids"]
    assert padded.tolist() == [[PAD, PAD, *ids]]
    assert processor(text="abcdef", truncation=True, max_length=4)["input_ids"].tolist() == [ids[:4]]
    processor.tokenizer.truncation_side = "left"
    assert processor(text="abcdef", truncation="longest_first", max_length=4)["input_ids"].tolist() == [ids[2:]]
    kept = processor(text="abcdef", truncation=False, max_length=4)["input_ids"]
    assert kept.tolist() == [ids]
    processor.tokenizer.model_max_length = 5
    assert processor(text="abcdef", truncation=True)["input_ids"].shape == (1, 5)


def test_all_that_goes_with_the_ids_is_cut_and_padded_alike(processor):
    options = {"return_labels": True, "return_assistant_tokens_mask": True, "return_mm_token_type_ids": True}
    whole = encode(processor, [TALK], **options)
    cut = encode(processor, [TALK], truncation=True, max_length=55, padding_side="right", **options)
    assert whole["input_ids"].shape[1] > 55
    for name in whole:
        assert torch.equal(cut[name], whole[name][:, :55])


@pytest.mark.parametrize(("side", "max_length"), [("right", 50), ("right", 30), ("left", 4)])
def test_a_cut_never_takes_frames(processor, side, max_length):
    processor.tokenizer.truncation_side = side
    with pytest.raises(ValueError, match=r"cut frames out of row 0.*Raise max_length, or take fewer frames"):
        encode(processor, watching(clip(20)), truncation=True, max_length=max_length)


def test_tokenizer_settings_count_where_a_call_is_silent():
    processor = VideoMa2mbaProcessor(
        make_tokenizer(padding="max_length", max_length=9), VideoMa2mbaVideoProcessor(size=28)
    )
    assert processor(text="Q?")["input_ids"].shape == (1, 9)
    assert processor(text="Q?", padding=False)["input_ids"].shape == (1, 2)


# ---- what may be returned beside ----


def test_offsets_point_into_the_text_with_placeholders_repeated(processor):
    text = "a<video>(b)<image>c"
    batch = processor(
        text=[text, "a"], videos=clip(2), images=clip()[0], padding_side="right", return_offsets_mapping=True,
        return_text_replacement_offsets=True, return_mm_token_type_ids=True,
    )  # fmt: skip
    expanded = "a<video><video>(b)<image>c"
    spans = batch["offset_mapping"][0].tolist()
    assert [expanded[start:end] for start, end in spans] == ["a", "<video>", "<video>", "(", "b", ")", "<image>", "c"]
    assert batch["offset_mapping"][1].tolist() == [[0, 1]] + 7 * [[0, 0]]
    assert batch["mm_token_type_ids"].tolist() == [[0, 2, 2, 0, 0, 0, 1, 0], [0] * 8]
    video, image = batch["text_replacement_offsets"][0]
    assert (video["type"], video["span"], video["new_span"]) == ("video", (1, 8), (1, 15))
    assert (image["type"], image["span"], image["new_span"]) == ("image", (11, 18), (18, 25))
    for told in (video, image):
        assert text[slice(*told["span"])] == told["text"]
        assert expanded[slice(*told["new_span"])] == told["replacement"]
    assert batch["text_replacement_offsets"][1] == []


def test_the_mask_of_the_assistant_is_where_the_labels_are(processor):
    rows = [[*watching(clip(), "Q?"), *TALK[1:], *TALK], TALK]
    for side in ("left", "right"):
        batch = encode(processor, rows, return_labels=True, return_assistant_tokens_mask=True, padding_side=side)
        assert batch["assistant_masks"].dtype == torch.int64
        assert torch.equal(batch["assistant_masks"].bool(), batch["labels"] != -100)
    answer = [*processor.tokenizer("(A)")["input_ids"], EOS]
    assert batch["input_ids"][1][batch["assistant_masks"][1].bool()].tolist() == answer
    assert batch["input_ids"][0][batch["assistant_masks"][0].bool()].tolist() == answer * 2


def test_the_attention_mask_may_be_left_out(processor):
    assert list(processor(text="Q?", return_attention_mask=False)) == ["input_ids"]


def test_pixels_may_be_rescaled_and_normalised_in_a_call(processor):
    values = np.arange(256, dtype=np.uint8)[:, None, None, None] * np.ones((1, 28, 28, 3), np.uint8)
    got = processor(text="<video>", videos=values, do_normalize=True, image_mean=[0.1, 0.2, 0.3], image_std=0.5)
    pixels = got["pixel_values_videos"][0, :, :, 0, 0].double()
    wanted = (torch.arange(256, dtype=torch.float64)[:, None] / 255 - torch.tensor([0.1, 0.2, 0.3]).double()) / 0.5
    torch.testing.assert_close(pixels, wanted, rtol=0, atol=1e-6)
    assert got["pixel_values_videos"].dtype == torch.float32


def test_how_many_tokens_media_become(processor):
    told = processor._get_num_multimodal_tokens(image_sizes=[(9, 9)] * 2, video_sizes=[(7, 30, 40), (2, 9, 9)])
    assert (told["num_image_tokens"], told["num_video_tokens"]) == ([1, 1], [7, 2])
    with pytest.raises(TypeError, match="audio_lengths"):
        processor._get_num_multimodal_tokens(audio_lengths=[3])
