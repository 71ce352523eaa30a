"""Whatever wraps or replaces a module acts in the loss, too: adapters, quantised layers, offload, hooks.

What is right comes from a plain pass: all logits, and cross-entropy over them in float64.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from ..tiny import tiny_model
from .test_loss import training_batch

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CHECKPOINTING = (None, {"layer_interval": 1, "sequence_interval": 7})


def small_batch():
    return training_batch(dtype=torch.float32)


def plain_loss(model, batch):
    """From the logits of all tokens, in float64."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).double(), batch["labels"][:, 1:].flatten())


def trained_gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    return found


def assert_loss_is_plain(model, batch, checkpointing=None):
    """Loss and every gradient; returns the gradients' names."""
    expected = plain_loss(model.train(), batch)
    expected.backward()
    right = trained_gradients(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(**checkpointing)
    loss = model(**batch).loss
    torch.testing.assert_close(loss.double(), expected, **CLOSE)
    loss.backward()
    found = trained_gradients(model)
    for name, gradient in right.items():
        if gradient is None:  # the plain pass does not use it
            continue
        assert found[name] is not None, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(1 + gradient.abs().max()))
    return {name for name, gradient in found.items() if gradient is not None and gradient.any()}


def with_noise(model, part):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_on_every_linear_layer_and_the_head(use_dora, checkpointing):
    linear = ["in_proj", "mixer.out_proj", "linear_1", "linear_2", "q_proj", "lm_head"]
    config = LoraConfig(r=2, target_modules=linear, use_dora=use_dora)
    model = with_noise(get_peft_model(tiny_model(loss_chunk_size=2), config), "lora_B")
    names = assert_loss_is_plain(model, small_batch(), checkpointing)
    parts = ["lm_head.lora_A", *(f"{name}.lora_B" for name in ("lm_head", "in_proj", "out_proj", "linear_2", "q_proj"))]
    assert all(any(part in name for name in names) for part in parts)


def test_adapter_of_the_head_drops_the_same_out_again():
    """Dropout draws once: the backward pass sees what the forward pass saw, whatever was drawn between."""
    config = LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5)
    model = with_noise(get_peft_model(tiny_model(loss_chunk_size=2), config), "lora_B").train()
    batch = small_batch()

    def loss_and_gradient(seed, draw_between):
        torch.manual_seed(seed)
        loss = model(**batch).loss
        torch.rand(draw_between)
        loss.backward()
        return loss.item(), trained_gradients(model)["base_model.model.lm_head.lora_A.default.weight"]

    loss, gradient = loss_and_gradient(0, 0)
    again, same = loss_and_gradient(0, 50)
    assert loss == again
    assert torch.equal(gradient, same)
    assert loss_and_gradient(1, 0)[0] != loss


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_norms_under_ln_tuning(checkpointing):
    config = LNTuningConfig(target_modules=["norm", "norm_f"])
    model = with_noise(get_peft_model(tiny_model(), config), "ln_tuning_layers")
    names = assert_loss_is_plain(model, small_batch(), checkpointing)
    assert {name.split("layers.", 1)[1] for name in names if "language_model.layers" in name} == {
        f"{layer}.{norm}.ln_tuning_layers.default.weight" for layer in (0, 1) for norm in ("norm", "mixer.norm")
    }
    assert any("norm_f" in name for name in names)
    # and it is the adapter's weight that is used
    batch = {name: value for name, value in small_batch().items() if name != "labels"}
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, merged.eval()(**batch).logits)
        assert not torch.allclose(model(**batch).logits, tiny_model()(**batch).logits)


class Int8Linear(nn.Module):
    """A linear layer of int8 weights with a scale per row, as quantisers put in the place of one."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("quantised", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, hidden_states):
        return F.linear(hidden_states, self.quantised * self.scale, self.bias)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_int8_layers_and_head(checkpointing):
    model = tiny_model(tie_word_embeddings=False, loss_chunk_size=2)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "vision_tower" not in name:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Int8Linear(module))
    assert isinstance(model.lm_head, Int8Linear)
    names = assert_loss_is_plain(model, small_batch(), checkpointing)
    assert {"model.language_model.embeddings.weight", "model.language_model.layers.0.mixer.A_log"} <= names


def offloaded(how, tmp_path):
    model = tiny_model(loss_chunk_size=2)
    if how == "cpu_offload":
        return cpu_offload(model, execution_device="cpu")
    if how == "disk_offload":
        return disk_offload(model, str(tmp_path), execution_device="cpu")
    parts = ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"]
    return dispatch_model(model, dict.fromkeys(parts, "disk"), main_device="cpu", offload_dir=str(tmp_path))


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_parts_give_the_same(how, tmp_path):
    batch = small_batch()
    plain = tiny_model()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        expected, loss = plain(**inputs).logits, plain_loss(plain, batch)
        model = offloaded(how, tmp_path)
        assert all(parameter.is_meta for parameter in model.parameters())
        real = batch["attention_mask"].bool()
        assert torch.equal(model(**inputs).logits[real], expected[real])
        torch.testing.assert_close(model(**batch).loss.double(), loss, **CLOSE)
        told = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **told), plain.generate(**inputs, **told))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_adapters_over_offloaded_weights(checkpointing):
    """The base waits on the host, the adapters do not: loss and their gradients are those of the logits path."""
    model = with_noise(
        get_peft_model(tiny_model(loss_chunk_size=2), LoraConfig(r=2, target_modules=["in_proj", "lm_head"])), "lora_B"
    )
    batch = small_batch()
    assert_loss_is_plain(model, batch)
    right = plain_loss(model, batch)
    right.backward()
    expected = trained_gradients(model)
    for name, module in model.named_modules():
        if name.endswith(("in_proj.base_layer", "out_proj", "conv1d", "norm", "norm_f", "linear_1", "linear_2")):
            cpu_offload(module, execution_device="cpu")
    assert any(parameter.is_meta for parameter in model.parameters())
    if checkpointing is not None:
        model.gradient_checkpointing_enable(**checkpointing)
    loss = model(**batch).loss
    torch.testing.assert_close(loss.double(), right, **CLOSE)
    loss.backward()
    for name, gradient in trained_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * float(1 + expected[name].max()))


def test_hooks_of_the_head_are_called_for_every_chunk():
    model, batch = tiny_model(loss_chunk_size=2).train(), small_batch()
    shapes, doubled = [], []
    model.lm_head.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[1]))
    plain = model(**batch).loss
    assert shapes == [2, 2, 2]  # six supervised tokens
    model.lm_head.register_forward_hook(lambda module, args, out: doubled.append(1) or 2 * out)
    hooked = model(**batch).loss
    assert len(doubled) == 3
    assert hooked != plain
    assert_loss_is_plain(model, batch)


def test_loss_can_be_gone_back_through_twice():
    """Without checkpointing, as for any loss."""
    model, batch = tiny_model(loss_chunk_size=2).train(), small_batch()
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    first = trained_gradients(model)
    loss.backward()
    for name, gradient in trained_gradients(model).items():
        assert (gradient is None) == (first[name] is None), name
        assert gradient is None or torch.equal(gradient, first[name]), name


def test_gradient_of_a_bfloat16_head_is_summed_in_float32():
    """A token in each chunk: no more is lost than rounding the sum once."""
    model = tiny_model(loss_chunk_size=1, text={"vocab_size": 200}).to(torch.bfloat16).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "model.language_model.embeddings.weight")
    head = nn.Linear(32, 200, bias=False, dtype=torch.bfloat16)
    model.lm_head = head
    hidden = []
    head.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach()))
    ids = torch.randint(2, 40, (1, 300), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    rows = torch.cat([one.flatten(0, 1) for one in hidden[:299]]).double()
    logits = F.linear(rows, head.weight.detach().double()).requires_grad_()
    F.cross_entropy(logits, ids[0, 1:]).backward()
    exact = logits.grad.T @ rows
    error = (head.weight.grad.double() - exact).norm() / exact.norm()
    assert error < 2**-8, error  # bfloat16 logits, and one rounding; summed in bfloat16 it is several times that


def test_adapters_on_the_convolution_are_refused():
    model = get_peft_model(tiny_model(), LoraConfig(r=80, target_modules=["conv1d"]))
    with pytest.raises(ValueError, match=r"conv1d.*modules_to_save"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))


def test_convolution_may_be_trained_whole():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["in_proj"], modules_to_save=["conv1d"]))
    names = assert_loss_is_plain(with_noise(model, "modules_to_save"), small_batch())
    assert any("conv1d.modules_to_save" in name for name in names)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_casts_spare_what_decides_the_decay(cast):
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    narrow = cast(model).dtype
    for name, parameter in model.named_parameters():
        spared = name.endswith(("mixer.A_log", "mixer.D", "mixer.dt_bias"))
        assert parameter.dtype == (torch.float32 if spared else narrow), name
        assert not spared or torch.equal(parameter, before[name]), name
    assert model.to("meta").model.language_model.layers[0].mixer.A_log.is_meta
    assert {p.dtype for p in tiny_model().double().parameters()} == {torch.float64}
    assert {p.dtype for p in tiny_model().double().float().parameters()} == {torch.float32}
