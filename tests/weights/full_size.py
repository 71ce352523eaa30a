"""Convert a checkpoint of real shapes whose files are holes, and print what that took.

    python tests/weights/full_size.py 3.1b DIR     # a free folder; the result takes up to 6 GB there, and is removed

The source is of type llava_mamba in bfloat16, with the head beside the table as published.
"""

import json
import re
import shutil
import struct
import sys
import time
from pathlib import Path

SIZES = {"0.7b": (1024, 48), "1.8b": (2048, 48), "3.1b": (2560, 64)}
TOWER = "mm_model.vision_tower.vision_tower.vision_model."


def shapes(width, layers, tower_layers=24, rows=50288):
    """Name -> shape of every tensor: a Mamba-2, CLIP-ViT-L/14-336 and the projector."""
    inner, heads = 2 * width, 2 * width // 64
    conv_dim = inner + 2 * 128
    found = {"backbone.embedding.weight": (rows, width), "lm_head.weight": (rows, width)}
    found["backbone.norm_f.weight"] = (width,)
    for layer in range(layers):
        name = f"backbone.layers.{layer}."
        found |= {name + "norm.weight": (width,), name + "mixer.norm.weight": (inner,)}
        found |= {name + f"mixer.{part}": (heads,) for part in ("A_log", "D", "dt_bias")}
        found |= {name + "mixer.conv1d.weight": (conv_dim, 1, 4), name + "mixer.conv1d.bias": (conv_dim,)}
        found |= {name + "mixer.in_proj.weight": (inner + conv_dim + heads, width)}
        found |= {name + "mixer.out_proj.weight": (width, inner)}
    found |= {
        TOWER + "embeddings.class_embedding": (1024,),
        TOWER + "embeddings.position_embedding.weight": (577, 1024),
    }
    found[TOWER + "embeddings.patch_embedding.weight"] = (1024, 3, 14, 14)
    for layer in range(tower_layers):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            found[f"{TOWER}encoder.layers.{layer}.{part}.weight"] = (1024, 1024)
            found[f"{TOWER}encoder.layers.{layer}.{part}.bias"] = (1024,)
        for part, (out, into) in {"mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}.items():
            found[f"{TOWER}encoder.layers.{layer}.{part}.weight"] = (out, into)
            found[f"{TOWER}encoder.layers.{layer}.{part}.bias"] = (out,)
        for part in (f"encoder.layers.{layer}.layer_norm1", f"encoder.layers.{layer}.layer_norm2"):
            found |= {f"{TOWER}{part}.{kind}": (1024,) for kind in ("weight", "bias")}
    for part in ("pre_layrnorm", "post_layernorm"):
        found |= {f"{TOWER}{part}.{kind}": (1024,) for kind in ("weight", "bias")}
    found |= {"mm_model.mm_projector.0.weight": (width, 1024), "mm_model.mm_projector.0.bias": (width,)}
    return found | {"mm_model.mm_projector.2.weight": (width, width), "mm_model.mm_projector.2.bias": (width,)}


def count(shape):
    product = 1
    for side in shape:
        product *= side
    return product


def write_source(folder, width, layers, **kwargs):
    """A checkpoint that takes no disk: the header of a safetensors file and a hole of zeros after it."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llava_mamba", "d_model": width, "n_layer": layers, "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16, "tie_embeddings": True, "rms_norm": True,
        "residual_in_fp32": True, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_spatial_pool_mode": "bilinear",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes(width, layers, **kwargs).items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * count(shape)]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
    return end


def resident_peak_bytes():
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def convert(source, out, shard_bytes=None):
    """Bytes resident at most: when all is imported, and when the folder is written."""
    from video_ma2mba.weights.conversion import SHARD_BYTES
    from video_ma2mba.weights.from_llava_mamba import read_llava_mamba

    tokenizer = Path(__file__).resolve().parents[2] / "model_cards" / "video-ma2mba-0.7b"
    conversion = read_llava_mamba(str(source), str(tokenizer))
    before = resident_peak_bytes()
    conversion.write(out, shard_bytes=shard_bytes or SHARD_BYTES)
    return before, resident_peak_bytes()


def main():
    size, scratch = sys.argv[1], Path(sys.argv[2])
    begin = time.perf_counter()
    try:
        source_bytes = write_source(scratch / "source", *SIZES[size])
        before, peak = convert(scratch / "source", scratch / "out")
        out_bytes = sum(path.stat().st_size for path in (scratch / "out").glob("*.safetensors"))
    finally:
        for name in ("source", "out"):
            shutil.rmtree(scratch / name, ignore_errors=True)
    parameters = sum(map(count, shapes(*SIZES[size]).values()))
    print(json.dumps({
        "size": size, "source_parameters": parameters, "source_bytes": source_bytes, "result_bytes": out_bytes,
        "resident_before_bytes": before, "resident_peak_bytes": peak, "seconds": time.perf_counter() - begin,
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
