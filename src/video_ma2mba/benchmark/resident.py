"""The measuring half of `bench memory`: a small model under the stock Trainer, one process for each length and method.

In float32 on the CPU: the peak of resident memory above what the process held when training began, the model loaded and
a short training done, so that all libraries are. On a GPU: the peak of allocated memory above that. The gradients and
the optimizer's states, three times the trained parameters, are in it, so they are added to the planner's prediction.
"""

import json
import sys
import tempfile
from typing import Any

from ..planning.measured import peak_bytes, restart_peak
from .machine import describe, in_measured_process

NUM_SUPERVISED = 512
NUM_STEPS = 3
WARM_UP_TOKENS = 8192
METHODS: dict[str, dict | None] = {"off": None, "MA-GC": {}}


def measure(device: str, lengths: list[int]) -> dict[str, Any]:
    """All lengths, without checkpointing and with what the planner picks by itself."""
    rows = [in_measured_process(__name__, device, length, method) for length in lengths for method in METHODS]
    for row in rows:
        off = next(r for r in rows if r["method"] == "off" and r["tokens"] == row["tokens"])
        row["part_of_off"] = row["measured_bytes"] / off["measured_bytes"]
        pairs = zip(row["losses"], off["losses"], strict=True)
        row["largest_loss_difference"] = max(abs(mine - theirs) for mine, theirs in pairs)
    return {"benchmark": "memory", "device": device, "dtype": "float32", "rows": rows, "machine": describe(device)}


def train(device: str, num_tokens: int, method: str) -> dict[str, Any]:
    """Train a few steps in this process, whose memory is measured."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from ..modeling.checkpoint_plan import peak_bytes_without
    from ..modeling.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
    from .train import random_text, small_config

    torch.manual_seed(0)
    config = small_config(128, {"hidden_size": 16, "intermediate_size": 32, "image_size": 28, "patch_size": 14})
    with torch.device(device):
        model = VideoMa2mbaForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(False)
    if METHODS[method] is not None:
        model.gradient_checkpointing_enable()
    samples = [random_text(num_tokens, NUM_SUPERVISED) for _ in range(NUM_STEPS)]

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.before = restart_peak(model.device)

    def run(first: int, learning_rate: float) -> tuple[Trainer, Watch]:
        """Train on what comes after the token `first`."""
        watch = Watch()
        data = [{"input_ids": ids[0, first:], "labels": labels[0, first:]} for ids, labels in samples]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=NUM_STEPS, per_device_train_batch_size=1, learning_rate=learning_rate, seed=0,
                use_cpu=device == "cpu", gradient_checkpointing=METHODS[method] is not None, logging_steps=1,
                save_strategy="no", report_to=[], disable_tqdm=True,
            )  # fmt: skip
            trainer = Trainer(model, arguments, train_dataset=data, callbacks=[watch])
            trainer.train()
        return trainer, watch

    run(max(num_tokens - WARM_UP_TOKENS, 0), 0.0)  # changes nothing, and loads what is loaded late
    model.zero_grad()
    trainer, watch = run(0, 1e-3)
    peak = peak_bytes(model.device) - watch.before
    plan = model.checkpoint_plan(1, num_tokens) if METHODS[method] is not None else None
    batch = {"dtype_bytes": 4, "num_supervised_tokens": NUM_SUPERVISED}
    activations = plan.predicted_peak_bytes if plan else peak_bytes_without(config, 1, num_tokens, **batch)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "tokens": num_tokens,
        "method": method,
        "plan": plan and str(plan),
        "measured_bytes": peak,
        "predicted_bytes": activations + 3 * 4 * trained,
        "predicted_activations_bytes": activations,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


if __name__ == "__main__":
    print(json.dumps(train(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
