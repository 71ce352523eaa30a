"""Run as a module by test_gradient_checkpointing.py, in one process or under `python -m torch.distributed.run`.

Trains a tiny model with the stock Trainer and writes the loss of every step and a few weights to the JSON file named on
the command line.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..tiny import tiny_model


class Clips(Dataset):
    """Eight samples of 3 frames and 12 words each."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        input_ids = torch.randint(2, 40, (24,), generator=draw)
        input_ids[2:14] = 47
        labels = input_ids.clone()
        labels[:16] = -100
        pixels = torch.randint(0, 256, (3, 3, 16, 16), generator=draw, dtype=torch.uint8)
        return {"input_ids": input_ids, "labels": labels, "pixel_values_videos": pixels}


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])


def train(model, folder, **arguments):
    """Four steps over the clips. Returns the losses."""
    losses = Losses()
    settings = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "remove_unused_columns": False, "disable_tqdm": True,
        "train_sampling_strategy": "sequential", "seed": 0, "dataloader_pin_memory": False, "max_grad_norm": 0.0,
    }  # fmt: skip
    trainer = Trainer(model, TrainingArguments(**{**settings, **arguments}), train_dataset=Clips(), callbacks=[losses])
    trainer.train()
    return losses.values


if __name__ == "__main__":
    out, batch_size = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    model = tiny_model(text={"num_hidden_layers": 3})
    losses = train(
        model,
        out.parent,
        per_device_train_batch_size=batch_size,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"layer_interval": 2, "sequence_interval": 8},
    )
    weights = {name: parameter.flatten()[:4].tolist() for name, parameter in model.named_parameters()}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        out.write_text(json.dumps({"losses": losses, "weights": weights}))
