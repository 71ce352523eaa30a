"""What Prometheus asks for, in its text format."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .chat import Chat
    from .engine import Engine
    from .guard import Guard
    from .memories import Memories


def metrics_text(guard: "Guard", chat: "Chat", engine: "Engine", memories: "Memories") -> str:
    """All counters and gauges of a server; each name begins with `video_ma2mba_`."""

    def lines() -> Iterator[str]:
        name = "video_ma2mba_responses_total"
        yield f"# HELP {name} Responses by endpoint and status."
        yield f"# TYPE {name} counter"
        for (path, status), count in sorted(guard.responses.items()):
            yield f'{name}{{path="{path}",status="{status}"}} {count}'
        for name, kind, said, value in (
            ("requests_now", "gauge", "Requests being worked on.", guard.num_requests),
            ("slots", "gauge", "Answers that can be written at once.", engine.num_slots),
            ("slots_busy", "gauge", "Answers that are being read or written.", engine.num_busy),
            ("answers_waiting", "gauge", "Answers that wait for a slot.", engine.num_waiting),
            ("answers_total", "counter", "Answers that ended.", engine.answered),
            ("steps_total", "counter", "Steps of the loop that answers.", engine.steps),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", chat.num_prompt_tokens),
            ("cached_tokens_total", "counter", "Tokens of prompts that were remembered.", chat.num_cached_tokens),
            ("read_tokens_total", "counter", "Tokens of questions that were read.", engine.read),
            ("completion_tokens_total", "counter", "Tokens that were written.", engine.generated),
            ("first_token_seconds_sum", "counter", "Seconds to the first token.", chat.first_token_s),
            ("first_token_seconds_count", "counter", "Answers with a first token.", chat.num_first_tokens),
            ("videos_waiting", "gauge", "Videos being watched, or waiting for it.", memories.num_jobs),
            ("watched_frames_total", "counter", "Frames that were watched.", memories.watched_frames),
        ):
            yield f"# HELP video_ma2mba_{name} {said}"
            yield f"# TYPE video_ma2mba_{name} {kind}"
            yield f"video_ma2mba_{name} {value}"

    return "\n".join(lines()) + "\n"
