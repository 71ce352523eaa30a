"""Where the host waits for the device: at the places on the list below, and nowhere else.

On the meta device nothing can be read, so `.item()`, a condition, `tolist`, `nonzero`, indexing by a boolean mask and
`.cpu()` raise, in a backward pass, too. What does not raise there and would wait on a GPU is caught by a dispatch mode:
assignment by a boolean mask, and a copy to the device that does not go through `to_device`, which pins it.

The list: one `on_host` for the ids, mask and labels of a batch. A generated token has none. With offload the host also
waits for the features of the frames, of those before a gradient horizon and of the others, for the embeddings of the
words, which it puts in their places, and for the gradient of both at the end of the backward pass; its two parts then
go to the device from pageable memory, when nothing is at work there any more. All other copies are between the device
and pinned memory, on streams, which are stand-ins here: that they wait for each other only a GPU can tell
(`test_on_device.py`).
"""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from video_ma2mba.modeling import (
    checkpointing,
    head_loss,
    host_copies,
    interleaved_inputs,
    mamba2,
    modeling_video_ma2mba,
    visual_features,
)
from video_ma2mba.modeling.host_copies import on_host

from ..tiny import tiny_config

FRAMES, TEXT, PER_FRAME = 3, 9, 4
USERS = (checkpointing, head_loss, interleaved_inputs, mamba2, modeling_video_ma2mba, visual_features)
MODES = [
    {"layer_interval": 1, "sequence_interval": 7, "order": "layer_major"},
    {"layer_interval": 1, "sequence_interval": 7, "order": "sequence_major"},
    {"axes": ("layer",)},
    {"axes": ("sequence",), "sequence_interval": 6},
    {"gradient_horizon": 8, "sequence_interval": 5},
]


class NoHiddenWaits(TorchDispatchMode):
    """Refuses what waits on a GPU and passes on the meta device."""

    sending, num_returned = False, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        if name == "aten::copy_" and args[1].is_meta and not args[0].is_meta:
            assert args[2:] == (True,) or kwargs.get("non_blocking"), "a copy to the host that waits"
            return args[0]
        if name == "aten::_to_copy" and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            assert kwargs.get("non_blocking"), "a copy to the host that waits"
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = func(*args, **kwargs)
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta and name.startswith("aten::index"):
            indices = args[1] if isinstance(args[1], (list, tuple)) else ()
            assert not any(index is not None and index.dtype == torch.bool for index in indices), "a boolean mask"
        if name in ("aten::_to_copy", "aten::copy_"):
            source, target = (args[0], out) if name == "aten::_to_copy" else (args[1], args[0])
            if source.device.type == "cpu" and target.is_meta and source.numel() > 1 and not self.sending:
                assert self.num_returned is not None, "a copy to the device that is not pinned"
                self.num_returned += 1
        return out


class Waits:
    """Stands in for `on_host`: gives out what the batch holds, and counts."""

    def __init__(self):
        self.count, self.held, self.for_copies = 0, (), 0

    def wait_for(self, device):
        assert device.type == "meta"
        self.for_copies += 1

    def __call__(self, *tensors):
        if not any(tensor is not None and tensor.is_meta for tensor in tensors):
            return on_host(*tensors)
        self.count += 1
        return [None if t is None else held for t, held in zip(tensors, self.held, strict=True)]


@pytest.fixture
def device_mode():
    return NoHiddenWaits()


@pytest.fixture
def waits(monkeypatch, device_mode):
    waits = Waits()

    def sending(send):
        def run(*args):
            device_mode.sending = True
            try:
                return send(*args)
            finally:
                device_mode.sending = False

        return run

    class HostStore(checkpointing.HostStore):
        """As on a GPU: with streams, from memory that would be pinned there."""

        def __init__(self, *args):
            super().__init__(*args)
            self.leaving = self.coming = mock.Mock()
            self.get = sending(self.get)

    for module in USERS:
        stand_ins = {"on_host": waits, "to_device": sending(host_copies.to_device), "wait_for": waits.wait_for}
        for name, stand_in in {**stand_ins, "HostStore": HostStore}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.Tensor, "record_stream", mock.Mock())
    with device_mode:
        yield waits


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return modeling_video_ma2mba.VideoMa2mbaForConditionalGeneration(tiny_config())


def batch(model, waits, padded=False, frames=FRAMES):
    """Two rows on the meta device; what `on_host` may say of them stands in `waits`."""
    ids = torch.randint(2, 40, (2, TEXT + PER_FRAME * frames))
    ids[:, 3 : 3 + PER_FRAME * frames] = model.config.video_token_id
    mask = torch.ones_like(ids)
    mask[1, : 2 * padded] = 0
    labels = ids.masked_fill(ids == model.config.video_token_id, -100)
    waits.held = ids, mask, torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    pixels = torch.empty(2, frames, 3, 16, 16, dtype=torch.uint8, device="meta")
    on_device = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {
        **{name: torch.empty_like(t, device="meta") for name, t in on_device.items()},
        **({"pixel_values_videos": pixels} if frames else {}),
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", [None, *MODES], ids=str)
def test_a_training_step_waits_once(model, waits, mode, padded):
    model.train()
    if mode is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable(**mode)
    model(**batch(model, waits, padded)).loss.backward()
    assert (waits.count, waits.for_copies) == (1, 0)
    assert model.model.multi_modal_projector.linear_1.weight.grad is not None
    model.zero_grad()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("options", "num_features"), [(MODES[0], 1), (MODES[1], 1), (MODES[4], 2)], ids=str)
def test_a_step_with_offload_waits_where_the_list_says(model, device_mode, waits, options, num_features, padded):
    model.train()
    model.gradient_checkpointing_enable(**options, offload=True)
    device_mode.num_returned = 0
    loss = model(**batch(model, waits, padded)).loss
    assert (waits.count, waits.for_copies, device_mode.num_returned) == (1, num_features + 1, 0)
    loss.backward()
    assert (waits.count, waits.for_copies, device_mode.num_returned) == (1, num_features + 2, 2)
    assert model.model.multi_modal_projector.linear_1.weight.grad is not None
    model.zero_grad()


@pytest.mark.parametrize("frames", [0, FRAMES])
def test_prefill_waits_once_and_a_token_never(model, waits, frames):
    model.eval()
    inputs = batch(model, waits, padded=True, frames=frames)
    del inputs["labels"]
    waits.held = (*waits.held[:2], None)
    with torch.no_grad():
        cache = model(**inputs, logits_to_keep=1, prefill_chunk_size=5).cache
        assert waits.count == 1
        for _ in range(3):
            cache.own()
            model(torch.empty(2, 1, dtype=torch.int64, device="meta"), cache=cache, use_cache=True, logits_to_keep=1)
    assert waits.count == 1


def test_watching_frames_never_waits(model, waits):
    """As `VideoMemory` does, which has made the ids itself."""
    model.eval()
    ids = torch.full((1, PER_FRAME * FRAMES), model.config.video_token_id)
    with torch.no_grad():
        cache = model.model.language_model.new_cache(1, "meta", torch.float32)
        pixels = torch.empty(1, FRAMES, 3, 16, 16, dtype=torch.uint8, device="meta")
        on_device = torch.empty_like(ids, device="meta")
        model(on_device, ids_on_host=ids, pixel_values_videos=pixels, cache=cache, use_cache=True, logits_to_keep=1)
    assert waits.count == 0


@pytest.mark.parametrize("wait", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.nonzero, torch.Tensor.cpu, bool])
def test_the_device_refuses_what_waits(wait):
    with pytest.raises(Exception, match=r"[Mm]eta"):
        wait(torch.ones(1, device="meta"))


def test_the_mode_refuses_the_rest():
    x, mask = torch.ones(4, device="meta"), torch.ones(4, dtype=torch.bool, device="meta")
    with NoHiddenWaits(), pytest.raises(AssertionError, match="boolean"):
        x[mask] = 0
    with NoHiddenWaits(), pytest.raises(AssertionError, match="pinned"):
        torch.ones(4).to("meta")
