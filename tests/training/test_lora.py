"""Adapters: they learn, also on out_proj; only they are saved; saved, loaded and merged they mean the same."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.cli import main
from video_ma2mba.training.lora import lora_config
from video_ma2mba.training.recipe import read_recipe
from video_ma2mba.training.run import make_trainable


def load(folder):
    return VideoMa2mbaForConditionalGeneration.from_pretrained(folder)


@pytest.fixture
def inputs(processor):
    frames = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "What is it?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "A square."}]
    return processor.apply_chat_template(chat, tokenize=True, return_labels=True)


def adapters(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def test_targets_are_the_mixers_and_the_projector_and_the_tower_where_asked(model_folder):
    names = {name.split(".lora_")[0] for name in adapters(get_peft_model(load(model_folder), lora_config()))}
    ends = {name.rpartition(".")[2] for name in names}
    assert ends == {"in_proj", "out_proj", "linear_1", "linear_2"}
    assert not any("vision_tower" in name for name in names)
    wider = adapters(get_peft_model(load(model_folder), lora_config(vision_tower=True)))
    assert any("vision_tower" in name and "q_proj" in name for name in wider)


def test_a_part_may_train_whole_beside_the_adapters(model_folder):
    recipe = read_recipe("finetune-lora", ["model=m", "data=d", "output=o", "trains=[multi_modal_projector]"])
    trained = {n for n, p in make_trainable(load(model_folder), recipe).named_parameters() if p.requires_grad}
    assert any(name.endswith("linear_1.base_layer.weight") for name in trained)
    assert any("in_proj.lora_A" in name for name in trained)
    assert not any("vision_tower" in name or "in_proj.base_layer" in name for name in trained)


def test_adapters_on_out_proj_learn_and_change_the_outputs(model_folder, inputs):
    model = get_peft_model(load(model_folder), lora_config(rank=4, dropout=0.0)).train()
    on_out_proj = {name: p for name, p in adapters(model).items() if "mixer.out_proj" in name}
    plain = {key: value for key, value in inputs.items() if key != "labels"}
    with torch.no_grad():
        before = model(**plain).logits
        for name, parameter in on_out_proj.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)  # B begins at zero, where A has no gradient
        after = model(**plain).logits
    assert (after - before).abs().max() > 1e-3  # a kernel that went past the module would leave them as they were
    model(**inputs).loss.backward()
    assert len(on_out_proj) == 4
    for name, parameter in on_out_proj.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("offload", [False, True])
def test_under_checkpointing_the_gradients_of_adapters_are_the_same(model_folder, inputs, offload):
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(load(model_folder), lora_config(rank=4, dropout=0.0)).train()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapters(model).items():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        if checkpointed:
            model.gradient_checkpointing_enable({"sequence_interval": 16, "offload": offload})
        model(**inputs).loss.backward()
        grads.append({name: parameter.grad for name, parameter in adapters(model).items()})
    for name, expected in grads[0].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_run_writes_adapters_alone_which_load_and_merge_to_the_same_logits(changes, tmp_path, model_folder, inputs):
    options = changes(max_steps=6, gradient_checkpointing={"offload": True}, learning_rate=1e-2)
    assert main(["train", "finetune-lora", *(word for change in options for word in ("--set", change))]) == 0
    folder = tmp_path / "run" / "model"
    weights = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")]
    assert weights == ["adapter_model.safetensors"]
    plain = {key: value for key, value in inputs.items() if key != "labels"}
    with torch.no_grad():
        base = load(model_folder).eval()(**plain).logits
        loaded = PeftModel.from_pretrained(load(model_folder), folder).eval()
        expected = loaded(**plain).logits
        assert (expected - base).abs().max() > 1e-3
        loaded.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(load(model_folder), tmp_path / "again").eval()
        torch.testing.assert_close(again(**plain).logits, expected, rtol=0, atol=0)
        merged = loaded.merge_and_unload()
    assert not adapters(merged)
    with torch.no_grad():
        torch.testing.assert_close(merged(**plain).logits, expected, rtol=1e-5, atol=1e-5)
