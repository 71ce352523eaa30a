"""How far one process is from float64, by where the sequence is cut: `python -m tests.distributed.rounding`.

Nothing differs between these runs but the order of float32 sums; so this is what such an order is worth.
"""

import statistics

import torch

from .engines import MODES, TOKENS, one_process, worst

torch.set_num_threads(1)
exact = one_process("lora", "off", 1, 1, torch.float64)
errors = []
for cut in range(3, TOKENS + 1):
    MODES[f"cut at {cut}"] = {"order": "sequence_major", "layer_interval": 2, "sequence_interval": cut}
    errors.append(worst(exact, one_process("lora", f"cut at {cut}", 1, 1))[1])
middle = statistics.median(errors)
print(f"gradients of {len(errors)} cuts: {min(errors):.1e} to {max(errors):.1e}, median {middle:.1e}")
