"""Run `video-ma2mba train` several times in the same processes: started by `fork`, or by `launch` under torchrun.

The runs are JSON on the command line, each {"name", "arguments"}, maybe "bf16", and "dies" of the last one. One line of
JSON per run comes out of rank 0: its exit code, and the dtypes in which the mixers saw their parameters.
"""

import json
import os
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from video_ma2mba.cli import main
from video_ma2mba.modeling.mamba2 import Mamba2Mixer
from video_ma2mba.training import run as training
from video_ma2mba.training.trainer import VideoMa2mbaTrainer


def fsdp_on_a_cpu():
    """Let Accelerate take an FSDP plugin also where there is no accelerator: it would go on with DDP."""
    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched
    torch.cuda.current_device = lambda: torch.device("cpu")


def record_dtypes():
    """The set, filled by every mixer that runs, of (name, dtype) of its parameters and of what a projection gives."""
    seen = set()
    forward, core = Mamba2Mixer.forward, Mamba2Mixer._run_core

    def recorded(self, *args):
        seen.update((name, str(getattr(self, name).dtype)) for name in ("A_log", "D", "dt_bias"))
        return forward(self, *args)

    def recorded_core(self, projected, *args):
        seen.add(("projected", str(projected.dtype)))
        return core(self, projected, *args)

    Mamba2Mixer.forward, Mamba2Mixer._run_core = recorded, recorded_core
    return seen


def kill(rank, step, file):
    """Let a process die at the beginning of a step, as one does whose machine is gone, and write a file as it does."""
    training_step = VideoMa2mbaTrainer.training_step

    def deadly(self, *args, **kwargs):
        if self.args.process_index == rank and self.state.global_step == step:
            Path(file).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, *args, **kwargs)

    VideoMa2mbaTrainer.training_step = deadly


def wants_bfloat16(one, recipe):
    return one.get("bf16", False)


def run_all(runs):
    torch.set_num_threads(1)
    seen, environment = record_dtypes(), dict(os.environ)
    # One group for all runs: a second one of these processes would find the addresses of the first in their store.
    leave, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda: None
    for one in runs:
        start = time.perf_counter()
        os.environ.clear()  # the Trainer leaves the settings of its engine there
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()  # or the next model would be made for ZeRO-3
        training.computes_in_bfloat16 = partial(wants_bfloat16, one)
        seen.clear()
        if "dies" in one:
            kill(**one["dies"])
        try:
            code = main(one["arguments"])
        except Exception:
            traceback.print_exc()
            code = 1
        if os.environ.get("RANK", "0") == "0":
            result = {"name": one["name"], "code": code, "seen": sorted(seen)}
            print("RUN " + json.dumps({**result, "wall_s": round(time.perf_counter() - start, 1)}), flush=True)
        if code:
            sys.exit(code)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        leave()


if __name__ == "__main__":
    fsdp_on_a_cpu()
    run_all(json.loads(sys.argv[1]))
