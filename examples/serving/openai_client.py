"""Ask a memory server with OpenAI's client: a video is sent once, and then asked about by its id.

video-ma2mba serve model_cards/video-ma2mba-tiny        # in another terminal
python examples/serving/openai_client.py story.mp4 "What colour was the circle?" "Which shape came last of all?"
"""

import argparse
import time

import httpx
from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video")
parser.add_argument("questions", nargs="+")
parser.add_argument("--server", default="http://127.0.0.1:8000")
parser.add_argument("--key", default="none", help="where the server asks for one")
args = parser.parse_args()

http = httpx.Client(base_url=args.server, headers={"Authorization": f"Bearer {args.key}"}, timeout=600)
with open(args.video, "rb") as file:
    memory = http.post("/v1/memories", files={"file": file}).raise_for_status().json()
while memory["status"] not in ("ready", "failed"):
    time.sleep(0.2)
    memory = http.get(f"/v1/memories/{memory['id']}").json()
if memory["status"] == "failed":
    raise SystemExit(memory["error"])

client = OpenAI(base_url=f"{args.server}/v1", api_key=args.key)
name = client.models.list().data[0].id
for question in args.questions:
    content = [{"type": "memory", "id": memory["id"]}, {"type": "text", "text": question}]
    stream = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": content}], max_completion_tokens=64, stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
