"""The clients of `bench serve`: a script of its own that imports next to nothing, as little of a client as can be."""

import asyncio
import json
import statistics
import sys
import time
from typing import Any
from urllib.parse import urlsplit


async def load(
    url: str, ids: list[str], questions: list[str], tokens: int, clients: int, requests: int
) -> dict[str, Any]:
    """Clients that ask one question after another over connections that stay."""
    address, left = urlsplit(url), iter(range(requests))
    first_tokens: dict[str, list[float]] = {one: [] for one in ids}

    async def client() -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        for number in left:
            memory = ids[number % len(ids)]
            content = [
                {"type": "memory", "id": memory},
                {"type": "text", "text": questions[number // len(ids) % len(questions)]},
            ]
            body = json.dumps({
                "messages": [{"role": "user", "content": content}], "stream": True, "ignore_eos": True,
                "max_completion_tokens": tokens,
            }).encode()  # fmt: skip
            begin = time.perf_counter()
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.partition(b"\r\n")[0]:
                raise OSError(head.decode() + (await reader.read(2000)).decode())
            seen = 0
            while size := int(await reader.readline(), 16):
                chunk = await reader.readexactly(size + 2)
                seen += chunk.count(b"data: ")
                if seen >= 2 and begin:  # the first event says only who speaks
                    first_tokens[memory].append(time.perf_counter() - begin)
                    begin = 0.0
            await reader.readline()
        writer.close()

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - begin
    every = [one for some in first_tokens.values() for one in some]
    return {
        "requests_per_s": requests / seconds,
        "first_token_s": statistics.median(every),
        "by_memory": {memory: statistics.median(some) for memory, some in first_tokens.items()},
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(**json.loads(sys.argv[1])))))
