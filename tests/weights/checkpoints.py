"""Random tiny checkpoints in exactly the published key layouts, written as they are published."""

import json

import torch
from safetensors.torch import save_file

VOCAB, PADDED = 277, 288  # stated, and padded to a multiple of 16 as the rows of the table
WIDTH, LAYERS, HEADS, HEAD_DIM, STATE = 32, 3, 4, 16, 8
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
SIDES = {"clip": 4, "siglip": 5}  # patches along each side: an even and an odd one, as the real towers have
ACTIVATION = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
EPS = {"clip": 1e-5, "siglip": 1e-6}


def normal(*shape, std=0.3, mean=0.0):
    return mean + std * torch.randn(*shape)


def mamba2_tensors(table="embedding", head=True, layers=LAYERS):
    inner, conv_dim = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * STATE
    tensors = {f"backbone.{table}.weight": normal(PADDED, WIDTH), "backbone.norm_f.weight": normal(WIDTH, mean=1)}
    for layer in range(layers):
        name = f"backbone.layers.{layer}."
        tensors |= {
            name + "norm.weight": normal(WIDTH, mean=1),
            name + "mixer.dt_bias": normal(HEADS, std=1),
            name + "mixer.A_log": normal(HEADS, mean=-2),
            name + "mixer.D": normal(HEADS, mean=1),
            name + "mixer.in_proj.weight": normal(inner + conv_dim + HEADS, WIDTH),
            name + "mixer.conv1d.weight": normal(conv_dim, 1, 4),
            name + "mixer.conv1d.bias": normal(conv_dim),
            name + "mixer.norm.weight": normal(inner, mean=1),
            name + "mixer.out_proj.weight": normal(WIDTH, inner),
        }
    if head:
        tensors["lm_head.weight"] = tensors[f"backbone.{table}.weight"].clone()
    return tensors


def tower_tensors(kind, prefix="vision_model.", layers=TOWER["num_hidden_layers"], old=False):
    width, between, patch, side = TOWER["hidden_size"], TOWER["intermediate_size"], TOWER["patch_size"], SIDES[kind]
    positions = side**2 + (kind == "clip")
    shapes = {
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
    }
    if kind == "clip":
        shapes |= {"embeddings.class_embedding": (width,)}
        shapes |= {"pre_layrnorm.weight": (width,), "pre_layrnorm.bias": (width,)}
    else:
        shapes |= {"embeddings.patch_embedding.bias": (width,)}
    for layer in range(layers):
        for name, (out, into) in {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (width, width), "self_attn.v_proj": (width, width),
            "self_attn.out_proj": (width, width), "mlp.fc1": (between, width), "mlp.fc2": (width, between),
        }.items():  # fmt: skip
            shapes[f"encoder.layers.{layer}.{name}.weight"] = (out, into)
            shapes[f"encoder.layers.{layer}.{name}.bias"] = (out,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"encoder.layers.{layer}.{name}.weight"] = shapes[f"encoder.layers.{layer}.{name}.bias"] = (width,)
    tensors = {prefix + name: normal(*shape) for name, shape in shapes.items()}
    if old:
        tensors[prefix + "embeddings.position_ids"] = torch.arange(positions)[None]
    return tensors


def whole_vision_tensors(kind):
    """With the text side and the heads that a published CLIP or SigLIP has."""
    width = TOWER["hidden_size"]
    tensors = tower_tensors(kind, old=kind == "clip")
    tensors |= {"logit_scale": torch.ones([]), "text_model.embeddings.token_embedding.weight": normal(9, 8)}
    if kind == "clip":
        return tensors | {"visual_projection.weight": normal(8, width), "text_projection.weight": normal(8, 8)}
    return tensors | {"logit_bias": torch.ones(1), "vision_model.head.probe": normal(1, 1, width)}


def llava_tensors(kind, prefix=""):
    tower = "mm_model.vision_tower.vision_tower.vision_model."
    layers = TOWER["num_hidden_layers"] - (kind == "siglip")  # the authors delete SigLIP's last layer
    tensors = mamba2_tensors(head=False) | tower_tensors(kind, tower, layers) | {
        "mm_model.mm_projector.0.weight": normal(WIDTH, TOWER["hidden_size"]),
        "mm_model.mm_projector.0.bias": normal(WIDTH),
        "mm_model.mm_projector.2.weight": normal(WIDTH, WIDTH),
        "mm_model.mm_projector.2.bias": normal(WIDTH),
    }  # fmt: skip
    return {prefix + name: value for name, value in tensors.items()}


def state_spaces_config():
    return {
        "d_model": WIDTH, "d_intermediate": 0, "n_layer": LAYERS, "vocab_size": VOCAB,
        "ssm_cfg": {"layer": "Mamba2", "d_state": STATE, "headdim": HEAD_DIM}, "attn_layer_idx": [], "attn_cfg": {},
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }  # fmt: skip


def transformers_mamba2_config():
    return {
        "model_type": "mamba2", "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_heads": HEADS,
        "head_dim": HEAD_DIM, "n_groups": 1, "state_size": STATE, "expand": 2, "conv_kernel": 4, "chunk_size": 256,
        "hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True, "rms_norm": True,
        "layer_norm_epsilon": 1e-5, "time_step_limit": [0.0, float("inf")], "tie_word_embeddings": True,
        "vocab_size": PADDED, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip


def tower_config(kind, whole):
    sizes = {**TOWER, "image_size": SIDES[kind] * TOWER["patch_size"]}
    if whole:
        return {"model_type": kind, "vision_config": {"model_type": f"{kind}_vision_model", **sizes}}
    return {"model_type": f"{kind}_vision_model", **sizes}


def llava_config(kind):
    return {
        **state_spaces_config(), "model_type": "llava_mamba", "architectures": ["LlavaMambaForCausalLM"],
        "mm_vision_tower": f"somebody/tiny-{kind}", "mm_hidden_size": TOWER["hidden_size"],
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": 2, "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True, "torch_dtype": "bfloat16",
    }  # fmt: skip


def write_checkpoint(folder, config, tensors, *, suffix="safetensors", num_shards=1):
    """config.json and the weights: `model.safetensors` or `pytorch_model.bin`, whole or in shards with their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, names = {"safetensors": "model", "bin": "pytorch_model"}[suffix], list(tensors)
    index = {}
    for number in range(num_shards):
        part = f"-{number + 1:05}-of-{num_shards:05}" if num_shards > 1 else ""
        shard = {name: tensors[name] for name in names[number::num_shards]}
        file = folder / f"{stem}{part}.{suffix}"
        save_file(shard, file) if suffix == "safetensors" else torch.save(shard, file)
        index |= dict.fromkeys(shard, file.name)
    if num_shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder
