"""The train command in several processes, on the stories."""

import json
import time

from video_ma2mba.training.engines import DISTRIBUTED

from .launch import fork, launch, lines

# name: what the recipe is told, and how many processes
RUNS = {
    "ddp": ({"num_workers": None}, 2),
    "fsdp2": ({"fsdp_config": "fsdp2"}, 2),
    "sequence": ({"sequence_parallel": 2, "gradient_checkpointing": {"order": "layer_major", "layer_interval": 1}}, 2),
    "zero1": ({"deepspeed": "zero1"}, 2),
    "zero2": ({"deepspeed": "zero2"}, 2),
    "zero3": ({"deepspeed": "zero3"}, 2),
    "hsdp": ({"fsdp_config": "hsdp"}, 4),
    "sequence, fsdp2": ({"fsdp_config": "fsdp2", "sequence_parallel": 2}, 4),
}
# the recipe as it is; its second step, the first at a rate above zero, destroys the model, so that the best one is
# not the last; and of which engines
BEST = {
    "held_out": 0.25, "evaluation_data": [], "evaluation_steps": 1, "save_steps": 1, "max_steps": 2,
    "learning_rate": 1.0,
}  # fmt: skip
KEEPS_BEST = ("fsdp2", "zero3")


class Command:
    """Runs it with outputs under `root`."""

    def __init__(self, model, data, root):
        self.root, self.found, self.ended_s = root, {}, {}
        self.values = {
            "model": str(model), "data": str(data), "global_batch_size": 4, "max_steps": 4, "save_steps": 2,
            "logging_steps": 1, "learning_rate": 1e-3, "vision_learning_rate": 1e-4, "held_out": 0,
            "evaluation_steps": 0, "num_workers": 0,  # each would import everything anew; DDP has what the recipe says
        }  # fmt: skip
        shards = json.loads((DISTRIBUTED / "hsdp.json").read_text())
        (root / "hsdp.json").write_text(json.dumps({**shards, "dp_shard_size": 2}))  # here all are on one node

    def wanted(self, name, values, flags=(), recipe="finetune", **how):
        """One run, as `train.run_all` takes it; how: bf16, dies."""
        values = {**self.values, "output": str(self.root / name), **values}
        if values.get("fsdp_config") == "hsdp":
            values["fsdp_config"] = str(self.root / "hsdp.json")
        options = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        return {"name": name, "arguments": ["train", recipe, *flags, *options], **how}

    def start(self, processes, *wanted, fails=False):
        """Run them in the same processes; the last one `fails` or not. What is known of each, and what they said."""
        run = launch if fails else fork
        done = run("tests.distributed.train", json.dumps(wanted), processes=processes, timeout_s=600)
        assert (done.returncode != 0) == fails, done.stderr[-20000:]
        found = {one["name"]: one for one in lines(done, "RUN")}
        assert all(found[one["name"]]["code"] == 0 for one in wanted[: len(wanted) - fails]), done.stderr[-20000:]
        return found, done.stderr

    def once(self, name):
        """All runs of an engine: in float32, in bfloat16, of `BEST`, and one that is killed; later calls find them."""
        if name not in self.found:
            values, processes = RUNS[name]
            runs = [self.wanted(name, values), self.wanted(f"{name} bf16", values, bf16=True)]
            runs += [self.wanted(f"{name} best", {**BEST, **values})] * (name in KEEPS_BEST)
            died = self.root / f"{name} died"
            runs.append(self.wanted(f"{name} cut", values, dies={"rank": 1, "step": 3, "file": str(died)}))
            self.found[name], _ = self.start(processes, *runs, fails=True)
            self.ended_s[name] = time.time() - died.stat().st_mtime
        return self.found[name]

    def report(self, name):
        return json.loads((self.root / name / "train_report.json").read_text())

    def losses(self, name):
        return [entry["loss"] for entry in self.report(name)["losses"]]
