"""Ask a memory server with OpenAI's client: a video is sent once, and then asked about by its id.

video-ma2mba serve model_cards/video-ma2mba-tiny        # in another terminal
python examples/serving/openai_client.py story.mp4 "What colour was the circle?" "Which shape came last of all?"
"""

import argparse
import time
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video", type=Path)
parser.add_argument("questions", nargs="+")
parser.add_argument("--server", default="http://127.0.0.1:8000")
parser.add_argument("--key", default="none", help="where the server asks for one")
args = parser.parse_args()

client = OpenAI(base_url=f"{args.server}/v1", api_key=args.key)
memory = client.post(
    "/memories",
    cast_to=dict,
    body={},
    files={"file": (args.video.name, args.video.read_bytes())},
    options={"headers": {"Content-Type": "multipart/form-data"}},
)
while memory["status"] not in ("ready", "failed"):
    time.sleep(0.2)
    memory = client.get(f"/memories/{memory['id']}", cast_to=dict)
if memory["status"] == "failed":
    raise SystemExit(memory["error"])

name = client.models.list().data[0].id
for question in args.questions:
    content = [{"type": "memory", "id": memory["id"]}, {"type": "text", "text": question}]
    stream = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": content}], max_completion_tokens=64, stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
