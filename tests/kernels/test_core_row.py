"""`bench scan --rows core` compares like with like."""

import torch

from video_ma2mba.benchmark.peers import make_pair, text_config
from video_ma2mba.benchmark.scan import _differences, _forward_backward


def test_both_give_the_same(device, monkeypatch):
    config = text_config("tiny", 1)
    config.num_heads, config.head_dim = 8, config.num_heads * config.head_dim // 8  # as causal_conv1d needs it
    monkeypatch.setattr("video_ma2mba.benchmark.peers.text_config", lambda *args: config)
    pair = make_pair("core", "tiny", torch.float32, 40, 1, [16], str(device), 0)
    differences = _differences(pair.names, *(_forward_backward(pair, one) for one in (pair.ours, pair.theirs[16])))
    assert set(differences) == {"out", "grad_projected"}
    assert max(differences.values()) < 1e-4
