"""One video over two processes, looked at from inside: started by `launch`."""

import json
import sys

import torch
import torch.distributed as dist

from video_ma2mba.modeling.sequence_parallel import SequenceGroup, cut_span, set_sequence_group

from ..tiny import tiny_model

LAYERS, CHUNK = 4, 16
PLACEHOLDERS = {"pixel_values": 46, "pixel_values_videos": 47}


def long_batch(tokens):
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 40, (1, tokens), generator=draw)
    labels = torch.full_like(ids, -100)
    labels[:, -9:] = ids[:, -9:]  # the answer lies on the last rank alone
    return {"input_ids": ids, "labels": labels}


def traced(order, tokens=1024):
    """Run forward and backward; returns the trace of all ranks."""
    model = tiny_model(text={"num_hidden_layers": LAYERS}).train()
    model.gradient_checkpointing_enable(order=order, layer_interval=1, sequence_interval=CHUNK)
    trace = []
    neighbours = SequenceGroup(trace=trace)
    set_sequence_group(model, neighbours)
    for turn in range(2):  # the first one warms up
        trace.clear()
        span, _ = cut_span(long_batch(tokens), neighbours.rank, neighbours.size, 4, PLACEHOLDERS)
        if turn:
            dist.barrier()
        model(**span, num_items_in_batch=9).loss.backward()
    everyones = [None] * neighbours.size
    dist.all_gather_object(everyones, trace)
    return [entry for of_one in everyones for entry in of_one]


def main(orders):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for order in orders:
        trace = traced(order)
        if dist.get_rank() == 0:
            print("TRACE " + json.dumps({"order": order, "trace": trace}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
