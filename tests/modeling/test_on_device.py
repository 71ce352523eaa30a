"""The whole model on the best device at hand, against itself in float64 on the plain torch path.

`make gpu` runs these on a GPU, where they go over the kernels and past the lengths at which 32-bit offsets overflow;
elsewhere the same lines run on the CPU at a tiny size.
"""

import copy

import pytest
import torch

from ..tiny import tiny_model
from .reference import assert_gradients_match

pytestmark = pytest.mark.gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# on a GPU heads of 64 and two layers of the width of the smallest published backbone
TEXT = {"hidden_size": 1024, "num_heads": 32, "head_dim": 64, "state_size": 128} if ON_GPU else {"state_size": 16}
NUM_TOKENS = 700 if ON_GPU else 90


def model_on(dtype, **kwargs):
    """The same model on the device in `dtype`, and in float64 on the CPU, with tensors that bfloat16 can hold."""
    reference = tiny_model(text=TEXT, **kwargs).train()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.3 if parameter.ndim > 1 else 1.0).copy_(parameter.bfloat16().float())
    model = copy.deepcopy(reference).to(DEVICE)
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "mixer.D", "dt_bias")):
            parameter.data = parameter.data.to(dtype)
    return model, reference.double()


def batch(num_tokens=NUM_TOKENS, rows=2):
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 45, (rows, num_tokens), generator=draw)
    mask = torch.ones_like(ids)
    mask[1:, : num_tokens // 3] = 0  # left padding
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_and_gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    loss = model(**{name: value.to(model.device) for name, value in inputs.items()}).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "language_model" in name}
    return loss, {name: None if g is None else g.double().cpu() for name, g in gradients.items()}


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
def test_loss_and_gradients(dtype, rtol):
    model, reference = model_on(dtype)
    expected_loss, expected = loss_and_gradients(reference, batch())
    loss, found = loss_and_gradients(model, batch())
    assert abs(loss.item() - expected_loss.item()) < rtol * expected_loss.item()
    assert_gradients_match(list(found.values()), list(expected.values()), list(expected), rtol=rtol)


@pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])
@pytest.mark.parametrize("order", ["layer_major", "sequence_major"])
def test_checkpointed_is_plain(order, offload):
    model, _ = model_on(torch.float32)
    expected_loss, expected = loss_and_gradients(model, batch())
    interval = NUM_TOKENS // 3
    model.gradient_checkpointing_enable(order=order, offload=offload, layer_interval=1, sequence_interval=interval)
    loss, found = loss_and_gradients(model, batch())
    assert abs(loss.item() - expected_loss.item()) < 1e-5 * expected_loss.item()
    # a cut moves the blocks in which the scan adds up: float32's own rounding
    assert_gradients_match(list(found.values()), list(expected.values()), list(expected), rtol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_generates_what_the_whole_sequence_says(dtype):
    """Token by token through the decode kernels, each token the best of a forward pass over all before it."""
    model, _ = model_on(dtype)
    model.eval()
    prompt = batch(40, rows=1)["input_ids"].to(DEVICE)
    generated = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits = model(generated[:, :-1]).logits[0, prompt.shape[1] - 1 :].float()
    chosen = logits.gather(1, generated[0, prompt.shape[1] :, None])[:, 0]
    slack = 1e-3 if dtype == torch.float32 else 0.1
    config = model.config  # `generate` may choose none of these
    logits[:, [config.image_token_id, config.video_token_id, config.text_config.eos_token_id]] = -torch.inf
    assert (logits.max(-1).values - chosen <= slack).all()


def test_a_request_of_any_length_is_the_chunked_one():
    """Past 490,000 tokens a call of the kernels of this width would overflow its offsets."""
    model, _ = model_on(torch.float32)
    model.eval()
    ids = batch(2**19 if ON_GPU else 2**9, rows=1)["input_ids"].to(DEVICE)
    with torch.inference_mode():
        model.model.language_model.prefill_chunk_size = 4096 if ON_GPU else 100
        chunked = model(ids, use_cache=True, logits_to_keep=5)
        model.model.language_model.prefill_chunk_size = ids.shape[1]
        whole = model(ids, use_cache=True, logits_to_keep=5)
    torch.testing.assert_close(whole.logits, chunked.logits, rtol=1e-3, atol=1e-3)
    for mine, other in zip(whole.cache.layers, chunked.cache.layers, strict=True):
        torch.testing.assert_close(mine.ssm_state, other.ssm_state, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine.conv_state, other.conv_state, rtol=1e-3, atol=1e-3)
        assert mine.ssm_state.abs().max() > 0.01
