"""Int8 weights by torchao on the CPU: which parts become small, what the tiny model then answers, LoRA on top."""

import numpy as np
import pytest
import torch
import torchao
from transformers import TorchAoConfig

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor
from video_ma2mba.data.synthetic import QUESTION_KINDS, make_story
from video_ma2mba.loading import TINY_MODEL


def load(**kwargs):
    return VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL, dtype=torch.bfloat16, **kwargs).eval()


@pytest.fixture(scope="module")
def plain():
    return load()


@pytest.fixture(scope="module")
def quantized():
    return load(quantization_config=TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig()))


@pytest.fixture(scope="module")
def prompts():
    """Two questions of each kind about each of two short stories, as the model's inputs."""
    processor = VideoMa2mbaProcessor.from_pretrained(TINY_MODEL)
    rng, found = np.random.default_rng(0), []
    for seed in range(2):
        story = make_story(seed, 12)
        frames = np.asarray(story.frames())
        for kind in QUESTION_KINDS * 2:
            content = [{"type": "video", "video": frames}, {"type": "text", "text": story.question(kind, rng).text}]
            chat = [{"role": "user", "content": content}]
            found.append(processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True))
    return found


def answers(model, prompts):
    return [model.generate(**prompt)[0, prompt["input_ids"].shape[1] :].tolist() for prompt in prompts]


def stored_bytes(weight):
    """Of a plain tensor, or of the tensors that a quantised one is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])


def linears(model):
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def test_all_linears_but_the_tied_head_take_half_the_bytes(plain, quantized):
    before, after = linears(plain), linears(quantized)
    assert before.keys() == after.keys()
    for part in ("mixer.in_proj", "mixer.out_proj", "self_attn.q_proj", "mlp.fc1", "multi_modal_projector.linear_1"):
        assert any(part in name for name in after)
    for name, weight in after.items():
        # one byte per number, and per row a scale in float32 and a zero point of a byte
        assert stored_bytes(weight) == weight.numel() + 5 * weight.shape[0], name
    ratio = sum(map(stored_bytes, after.values())) / sum(map(stored_bytes, before.values()))
    assert 0.5 < ratio < 0.53  # the rows are short here: 96 to 192 numbers
    assert quantized.lm_head.weight is quantized.get_input_embeddings().weight


def test_all_else_is_left_alone(plain, quantized):
    small = {name + ".weight" for name in linears(plain)}
    rest = [name for name in plain.state_dict() if name not in small]
    for part in ("A_log", "mixer.D", "dt_bias", "conv1d.weight", "norm_f.weight", "embeddings.weight"):
        assert any(part in name for name in rest)
    for name in rest:
        found, expected = quantized.get_parameter(name), plain.get_parameter(name)
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name


def test_answers_are_nearly_the_same(plain, quantized, prompts):
    before, after = answers(plain, prompts), answers(quantized, prompts)
    assert len({tuple(answer) for answer in before}) > 3
    same = sum(a == b for a, b in zip(before, after, strict=True))
    print(f"{same} of {len(prompts)} answers are the same")
    assert same >= 0.9 * len(prompts)


def test_round_trip(quantized, prompts, tmp_path):
    quantized.save_pretrained(tmp_path)
    loaded = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path)
    for name, weight in linears(loaded).items():
        assert stored_bytes(weight) == weight.numel() + 5 * weight.shape[0], name
    with torch.no_grad():
        assert torch.equal(loaded(**prompts[0]).logits, quantized(**prompts[0]).logits)


def test_lora_trains_on_top(prompts):
    from peft import LoraConfig, get_peft_model

    base = load(quantization_config=TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig()))
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules=["in_proj"], r=4, init_lora_weights=False))
    inputs = prompts[0]
    labels = torch.where(inputs["input_ids"] > 3, inputs["input_ids"], -100)
    before = model(**inputs, labels=labels).loss
    before.backward()
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert len(trained) == 2 * base.config.text_config.num_hidden_layers
    for name, param in trained.items():
        assert param.grad is not None, name
        assert param.grad.abs().max() > 0, name
    with torch.no_grad():
        for param in trained.values():
            param -= 0.01 * param.grad.sign()
        assert model(**inputs, labels=labels).loss < before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bitsandbytes_on_cuda(plain, prompts):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    model = load(quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cuda")
    on_device = [prompt.to("cuda") for prompt in prompts]
    same = sum(a == b for a, b in zip(answers(plain, prompts), answers(model, on_device), strict=True))
    assert same >= 0.9 * len(prompts)
