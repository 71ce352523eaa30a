"""Settings for the whole suite, made before anything imports torch or transformers."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two xdist workers on two cores: more threads only fight
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
