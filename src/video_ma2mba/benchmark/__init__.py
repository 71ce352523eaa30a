"""What `video-ma2mba bench NAME` runs: a module for each name that `cli/bench.py` lists, and what these are made of.

memory   `counting`, live bytes on the meta device; `resident`, bytes of a process that trains
scan     `peers`, the modules of transformers beside ours; `mixer`, the core of mamba_ssm beside ours, on a GPU
serve    `serve_clients`, who asks; `serve_attention`, an attention model that is served for comparison
study    `studies/`, a module for each, and what they share
all      `machine`, the clock, the peaks of memory, and what stands beside every figure
"""
