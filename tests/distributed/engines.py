"""One training step's worth of every engine, against one process: run by `fork` in several processes.

Each cell (an engine, a way of checkpointing, all weights or adapters, batches accumulated) trains a tiny model for
three steps of SGD. What is reported is the worst relative error of any tensor's gradient and weight over the steps: of
the engine and of one process, both against one process in float64; and how far the engine is from one process that
cuts the same cells.

One process's error is the most that it has in any of its modes: each cuts the sums of float32 at other places, and from
cut to cut the error differs by a factor of four (`rounding`). What is shared by several processes is cut at yet others;
there "that one process" goes through the same spans, and two processes must equal it to the bit (`cells`). ZeRO-3 puts
a linear function of its own in the place of torch's, with other sums, for good: "that one process" has it, too.

As a command, under `torch.distributed.run`: the cells as JSON on the command line; one line of JSON per cell comes out.
"""

import functools
import json
import os
import resource
import sys
import time
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from ..tiny import tiny_model

LAYERS, TOKENS, FRAMES, STEPS, RATE, SCALE = 4, 40, 3, 3, 1e-2, 0.3
CUT = {"layer_interval": 2, "sequence_interval": 8}
MODES = {
    "off": None,
    "layer": {"axes": ("layer",), "layer_interval": 2},
    "layer+offload": {"axes": ("layer",), "layer_interval": 2, "offload": True},
    "layer_major": {"order": "layer_major", **CUT},
    "layer_major+offload": {"order": "layer_major", "offload": True, **CUT},
    "sequence_major": {"order": "sequence_major", **CUT},
    "sequence_major+offload": {"order": "sequence_major", "offload": True, **CUT},
    "horizon": {"gradient_horizon": 20, **CUT},  # all frames of some processes lie before it, and half of others'
}
# What one process does in the other modes is that of one of these to the bit: where borders wait, and in which order
# the cells come, changes no sum.
ORDERS_OF_SUMS = ("off", "layer", "layer_major")
TRAINS = ("all", "lora", "frozen tower")
LINEAR = torch.nn.functional.linear


def make_model(trains="all", mode="off", dtype=torch.float32, tie=True):
    """A model to be trained, the same in every process."""
    text = {"num_hidden_layers": LAYERS, "tie_word_embeddings": tie}
    model = tiny_model(text=text, vision_chunk_size=2).train()
    with torch.no_grad():  # quieter, or three steps of it would amplify every rounding error a thousandfold
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("mixer" in name or "vision_tower" in name):
                parameter.mul_(SCALE)
    if MODES[mode] is not None:
        model.gradient_checkpointing_enable(**MODES[mode])
    if trains == "frozen tower":
        model.model.vision_tower.requires_grad_(False)
    if trains != "lora":
        return model.to(dtype)
    from peft import get_peft_model

    from video_ma2mba.training.lora import lora_config

    torch.manual_seed(5)
    model = get_peft_model(model, lora_config(rank=4, dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)  # it begins at zero, where nothing else of an adapter has a gradient
    return model.to(dtype)


def make_batch(number, rank):
    """Batch `number` of a process: of another length on each; every third one is text alone on odd ranks."""
    draw = torch.Generator().manual_seed(1000 * number + rank)
    ids = torch.randint(2, 40, (1, TOKENS + 7 * rank), generator=draw)
    labels = ids.clone()
    labels[:, :24] = -100
    if number % 3 == 2 and rank % 2:
        return {"input_ids": ids, "labels": labels}
    num_frames = FRAMES + 2 * (rank % 2)
    ids[:, 2 : 2 + 4 * num_frames] = 47
    pixels = torch.randint(0, 256, (1, num_frames, 3, 16, 16), generator=draw, dtype=torch.uint8)
    return {"input_ids": ids, "labels": labels, "pixel_values_videos": pixels}


def span_of(batch, rank, ranks):
    """What a rank trains on of a batch that is shared; the mean of the losses over the ranks is that of the batch."""
    from video_ma2mba.modeling.sequence_parallel import cut_span

    span, _ = cut_span(batch, rank, ranks, 4, {"pixel_values": 46, "pixel_values_videos": 47})
    span["num_items_in_batch"] = (batch["labels"][:, 1:] != -100).sum() / ranks  # DDP takes the mean
    return span


def in_spans(model, batch, ranks):
    """The loss of a batch in one process that goes through the spans of `ranks` one after another."""
    (backbone,) = (part for part in model.modules() if type(part).__name__ == "Mamba2Backbone")
    cache = backbone.new_cache(1)
    return sum(model(**span_of(batch, rank, ranks), cache=cache).loss / ranks for rank in range(ranks))


@functools.cache
def one_process(trains, mode, accumulated, world, dtype=torch.float32, tie=True, ranks=1, linear=LINEAR):
    """What engines are measured by: the mean over the batches of all ranks; (loss, gradients, weights) of each step."""
    torch.nn.functional.linear = linear
    model = make_model(trains, mode, dtype, tie)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    history = []
    for step in range(STEPS):
        losses = []
        for number in range(step * accumulated, (step + 1) * accumulated):
            for rank in range(world):
                batch = make_batch(number, rank)
                loss = model(**batch).loss if ranks == 1 else in_spans(model, batch, ranks)
                (loss / world / accumulated).backward()
                losses.append(loss.item())
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        gradients = {name: torch.zeros(()) if g is None else g.clone() for name, g in gradients.items()}
        optimizer.step()
        optimizer.zero_grad()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        history.append((sum(losses) / len(losses), gradients, weights))
    return history


class Plain:
    """DDP, and what all engines have in common."""

    ranks = 1  # that share a batch

    def __init__(self, model, accumulated):
        self.bare, self.accumulated = model, accumulated
        self.model = self.wrap(model)
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def wrap(self, model):
        return torch.nn.parallel.DistributedDataParallel(model)

    def without_sync(self):
        return self.model.no_sync()

    def backward(self, batch, last):
        with nullcontext() if last else self.without_sync():
            loss = self.model(**batch).loss
            (loss / self.accumulated).backward()
        return loss.detach()

    def gradients(self):
        return {name: whole(p.grad) for name, p in self.bare.named_parameters() if p.requires_grad}

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self):
        return {name: whole(p.detach()) for name, p in self.bare.named_parameters()}


class FSDP2(Plain):
    """`fully_shard` of every block and of the rest."""

    mesh = None

    def units(self, model):
        return [m for m in model.modules() if type(m).__name__ in ("Mamba2Block", "CLIPEncoderLayer")]

    def wrap(self, model):
        from torch.distributed.fsdp import fully_shard

        for unit in self.units(model):
            fully_shard(unit, mesh=self.mesh)
        if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
            fully_shard(model.get_output_embeddings(), mesh=self.mesh)
        return fully_shard(model, mesh=self.mesh)

    def backward(self, batch, last):
        self.model.set_requires_gradient_sync(last)
        return super().backward(batch, last=True)


class FSDP2OneGroup(FSDP2):
    """`fully_shard` of the model alone."""

    def units(self, model):
        return []


class HSDP(FSDP2):
    """Four processes: two copies of the model, each sharded over two."""

    def wrap(self, model):
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        return super().wrap(model)


class Zero(Plain):
    """DeepSpeed by its own entry."""

    stage = 1

    def __init__(self, model, accumulated):
        import deepspeed

        self.bare = model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
        config = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulated,
            # the buffer for gradients takes 2 GB unless told, and no engine of a process is ever let go of
            "zero_optimization": {
                "stage": self.stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10**5
            },
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
            "gradient_clipping": 0.0,
        }  # fmt: skip
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.found = {}

    def backward(self, batch, last):
        from deepspeed.utils import safe_get_full_grad

        loss = self.model(**batch).loss
        self.model.backward(loss)
        if last:
            trained = [(name, p) for name, p in self.bare.named_parameters() if p.requires_grad]
            self.found = {name: safe_get_full_grad(p).clone() for name, p in trained}
        self.model.step()
        return loss.detach()

    def gradients(self):
        return self.found

    def step(self):
        pass

    def weights(self):
        import deepspeed

        parameters = dict(self.bare.named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=self.stage == 3):
            return {name: p.detach().clone() for name, p in parameters.items()}


class Zero2(Zero):
    stage = 2


class Zero3(Zero):
    stage = 3


class Sequence(Plain):
    """Each video over `ranks` processes, and DDP over all of them."""

    ranks = 2

    def share(self, model):
        from video_ma2mba.modeling.sequence_parallel import SequenceGroup, set_sequence_group

        firsts = range(0, dist.get_world_size(), self.ranks)
        groups = [dist.new_group(range(first, first + self.ranks)) for first in firsts]
        self.neighbours = SequenceGroup(groups[dist.get_rank() // self.ranks])
        set_sequence_group(model, self.neighbours)

    def wrap(self, model):
        self.share(model)
        return super().wrap(model)

    def backward(self, batch, last):
        return super().backward(span_of(batch, self.neighbours.rank, self.ranks), last)


class Sequence4(Sequence):
    ranks = 4


class SequenceFSDP2(Sequence):
    """Each video over two processes, with sharded parameters."""

    def wrap(self, model):
        self.share(model)
        return FSDP2.wrap(FSDP2.__new__(FSDP2), model)

    def backward(self, batch, last):
        self.model.set_requires_gradient_sync(last)
        return super().backward(batch, last=True)


ENGINES = {
    "ddp": Plain,
    "zero1": Zero,
    "zero2": Zero2,
    "zero3": Zero3,
    "fsdp2": FSDP2,
    "fsdp2, one group": FSDP2OneGroup,
    "hsdp": HSDP,
    "sequence 2": Sequence,
    "sequence 4": Sequence4,
    "sequence 2, fsdp2": SequenceFSDP2,
}


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def distance(expected, found):
    """The worst relative error over the tensors. One that is zero but for rounding is measured by all of them."""
    norm = {name: tensor.double().norm().item() for name, tensor in expected.items()}
    floor = 1e-4 * sum(value**2 for value in norm.values()) ** 0.5
    assert expected.keys() == found.keys()
    return max(
        (found[name].double() - tensor.double()).norm().item() / max(norm[name], floor)
        for name, tensor in expected.items()
    )


def worst(expected, found):
    """Over the steps: of the losses, the gradients, the weights."""
    losses = max(abs(one[0] - other[0]) / abs(one[0]) for one, other in zip(expected, found, strict=True))
    return [
        losses, *(max(distance(a[i], b[i]) for a, b in zip(expected, found, strict=True)) for i in (1, 2))
    ]  # fmt: skip


def run(cell):
    """One cell: {"engine", "mode", "trains", "accumulated", "tie"} -> the same with what was measured, or `refused`."""
    engine, mode, trains, accumulated = (cell[key] for key in ("engine", "mode", "trains", "accumulated"))
    tie = cell.get("tie", True)
    ranks = ENGINES[engine].ranks
    world = dist.get_world_size() // ranks
    torch.nn.functional.linear = LINEAR  # whatever was left there by the cell before
    trained = ENGINES[engine](make_model(trains, mode, tie=tie), accumulated)
    history = []
    for step in range(STEPS):
        numbers = range(step * accumulated, (step + 1) * accumulated)
        losses = [trained.backward(make_batch(n, dist.get_rank() // ranks), last=n == numbers[-1]) for n in numbers]
        loss = torch.stack(losses).double().mean()
        dist.all_reduce(loss)
        gradients = trained.gradients()
        trained.step()
        history.append((loss.item() / world / ranks, gradients, trained.weights()))
    if dist.get_rank():
        return None
    orders = (mode,) if mode == "horizon" else ORDERS_OF_SUMS
    linear = torch.nn.functional.linear
    exact = one_process(trains, orders[0], accumulated, world, torch.float64, tie)
    errors = [worst(exact, one_process(trains, order, accumulated, world, tie=tie)) for order in orders]
    own = [max(of_each) for of_each in zip(*errors, strict=True)]
    same_sums = mode.removesuffix("+offload").replace("sequence_major", "layer_major")
    alone = one_process(trains, same_sums, accumulated, world, tie=tie, ranks=ranks, linear=linear)
    error, apart = worst(exact, history), worst(alone, history)
    return {**cell, "own": own, "error": error, "to_the_bit": apart[1:] == [0, 0], "apart": apart}


def peak_mib():
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(cells):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written yet is NaN
    if any(cell["engine"].startswith("zero") for cell in cells):
        import deepspeed

        deepspeed.init_distributed("gloo", timeout=timedelta(seconds=300))
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    for cell in cells:
        start = time.perf_counter()
        try:
            result = run(cell)
        except ValueError as error:  # of all ranks, at the same place
            result = {**cell, "refused": str(error)}
        if dist.get_rank() == 0:
            result |= {"wall_s": round(time.perf_counter() - start, 1), "peak_mib": peak_mib()}
            print("CELL " + json.dumps(result), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(json.loads(sys.argv[1]))
