"""What would fit where a plan does not: the same video with other options of `video-ma2mba plan`."""

import math
from collections.abc import Iterator
from typing import Any

from .fitting import Case

SMALLER_OPTIMIZERS = ("adamw", "adamw-8bit", "lora", "qlora")  # each takes less than those before it
SMALLER_WEIGHTS = ("float32", "bfloat16", "nf4")
MORE_DEVICES = (2, 4, 8)


def remedies(case: Case, options: dict | None, num_frames: int, num_tokens: int, fps: float) -> list[dict[str, Any]]:
    """Rows of `Case.row` that fit, each with the `fps` it is of, named by the options that make it fit.

    Of each kind the first that fits, without offload and then with it; last the whole at a lower rate, and less of it.
    """
    rows = []
    for kind in _kinds(case, options):
        found = next(_that_fit(kind, options, num_frames, num_tokens), None)
        if found is not None:
            rows.append({**found, "fps": fps})
    return rows + list(_less_video(case, options, num_frames, fps))


def _kinds(case: Case, options: dict | None) -> Iterator[list[tuple[str, Case]]]:
    """Other cases of a kind by their options; the first kind is the case itself, which may lack offload."""
    yield [("", case)]
    if case.optimizer is None:
        for dtype in SMALLER_WEIGHTS[SMALLER_WEIGHTS.index(case.dtype) + 1 :]:
            yield [(f"--dtype {dtype}", case.like(dtype=dtype))]
        return
    if case.optimizer in SMALLER_OPTIMIZERS:
        for optimizer in SMALLER_OPTIMIZERS[SMALLER_OPTIMIZERS.index(case.optimizer) + 1 :]:
            yield [(f"--optimizer {optimizer}", case.like(optimizer=optimizer))]
    if (options or {}).get("gradient_horizon") is None:  # with which no video is shared
        yield [
            (f"--sequence-parallel {ranks}{flag}", case.like(ranks=ranks, devices=ranks, engine=engine))
            for ranks in MORE_DEVICES
            if ranks > case.training.devices
            for engine, flag in (("ddp", ""), ("zero1", " --engine zero1"))
        ]


def _that_fit(
    kind: list[tuple[str, Case]], options: dict | None, num_frames: int, num_tokens: int
) -> Iterator[dict[str, Any]]:
    for name, case in kind:
        for offload in (False, True) if case.optimizer is not None and not (options or {}).get("offload") else (False,):
            flags = f"{name} --offload".strip() if offload else name
            wanted = {**(options or {}), "offload": True} if offload else options
            if flags and case.fits(wanted, num_frames, num_tokens):
                yield case.row(flags, wanted, num_frames, num_tokens)


def _less_video(case: Case, options: dict | None, num_frames: int, fps: float) -> Iterator[dict[str, Any]]:
    if case.optimizer is None:
        return  # watching takes the same for any length
    for wanted, flag in ((options, ""), ({**(options or {}), "offload": True}, " --offload")):
        longest = case.row("", wanted, 1, case.config.tokens_per_frame)["longest_frames"]
        # rounded down, so that what is printed fits
        rate, hours = _floor(fps * longest / num_frames), _floor(longest / fps / 3600)
        if 0 < longest < num_frames and rate > 0:
            for name, its_fps in ((f"--fps {rate:g}", rate), (f"--hours {hours:g}", fps)):
                if hours > 0 or its_fps == rate:
                    num_tokens = longest * case.config.tokens_per_frame
                    yield {**case.row(name + flag, wanted, longest, num_tokens), "fps": its_fps}
            return


def _floor(number: float) -> float:
    """To two digits that count."""
    if number <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(number)) - 1)
    return math.floor(number / step) * step
