"""The train command in several processes, on the stories."""

import json

from video_ma2mba.training.engines import DISTRIBUTED

from .launch import launch, lines

# name: what the recipe is told, and how many processes
RUNS = {
    "ddp": ({}, 2),
    "fsdp2": ({"fsdp_config": "fsdp2"}, 2),
    "sequence": ({"sequence_parallel": 2, "gradient_checkpointing": {"order": "layer_major", "layer_interval": 1}}, 2),
    "zero1": ({"deepspeed": "zero1"}, 2),
    "zero2": ({"deepspeed": "zero2"}, 2),
    "zero3": ({"deepspeed": "zero3"}, 2),
    "hsdp": ({"fsdp_config": "hsdp"}, 4),
    "sequence, fsdp2": ({"fsdp_config": "fsdp2", "sequence_parallel": 2}, 4),
}


class Command:
    """Runs it with outputs under `root`."""

    def __init__(self, model, data, root):
        self.root, self.found = root, {}
        self.values = {
            "model": str(model), "data": str(data), "global_batch_size": 4, "max_steps": 4, "save_steps": 2,
            "logging_steps": 1, "learning_rate": 1e-3, "vision_learning_rate": 1e-4,
        }  # fmt: skip
        shards = json.loads((DISTRIBUTED / "hsdp.json").read_text())
        (root / "hsdp.json").write_text(json.dumps({**shards, "dp_shard_size": 2}))  # here all are on one node

    def wanted(self, name, values, flags=(), recipe="finetune", bf16=False):
        """One run, as `train.run_all` takes it."""
        values = {**self.values, "output": str(self.root / name), **values}
        if values.get("fsdp_config") == "hsdp":
            values["fsdp_config"] = str(self.root / "hsdp.json")
        options = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        return {"name": name, "bf16": bf16, "arguments": ["train", recipe, *flags, *options]}

    def start(self, processes, *wanted, fails=False, **environment):
        """Run them in the same processes; returns what is known of each, or the standard error of one that fails."""
        environment = {"FSDP_ON_A_CPU": "1", **environment}
        done = launch("tests.distributed.train", json.dumps(wanted), processes=processes, timeout_s=600, **environment)
        assert (done.returncode != 0) == fails, done.stderr[-20000:]
        return done.stderr if fails else {one["name"]: one for one in lines(done, "RUN")}

    def once(self, name):
        """The run of an engine in float32 and in bfloat16; a later call finds what the first one did."""
        if name not in self.found:
            values, processes = RUNS[name]
            float32, bfloat16 = self.wanted(name, values), self.wanted(f"{name} bf16", values, bf16=True)
            self.found[name] = self.start(processes, float32, bfloat16)
        return self.found[name]

    def report(self, name):
        return json.loads((self.root / name / "train_report.json").read_text())

    def losses(self, name):
        return [entry["loss"] for entry in self.report(name)["losses"]]
