"""Experiments of `video-ma2mba bench study`: modules with `run(scale, keep) -> dict` and `draw(result) -> figure`."""
