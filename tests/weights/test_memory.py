"""Conversion streams: what is resident does not grow with the model. Full size: `full_size.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import full_size

CODE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("full_size", sys.argv[1])
full_size = importlib.util.module_from_spec(spec)
spec.loader.exec_module(full_size)
from pathlib import Path
print(json.dumps(full_size.convert(Path(sys.argv[2]), Path(sys.argv[3]), shard_bytes=2**24)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_no_more_than_shards_are_resident(tmp_path):
    source_bytes = full_size.write_source(tmp_path / "source", 512, 40)
    assert source_bytes > 600e6
    done = subprocess.run(
        [sys.executable, "-c", CODE, full_size.__file__, str(tmp_path / "source"), str(tmp_path / "out")],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    before, peak = json.loads(done.stdout)
    # a shard of 16 MiB and its source at a time; the largest tensors, the embeddings and the head, are 49 MiB each
    assert peak - before < 250e6
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 30


@pytest.mark.parametrize(("size", "billions"), [("0.7b", 0.7), ("1.8b", 1.8), ("3.1b", 3.1)])
def test_source_has_the_published_number_of_parameters(size, billions):
    total = sum(map(full_size.count, full_size.shapes(*full_size.SIZES[size]).values()))
    assert round(total / 1e9, 1) == billions
