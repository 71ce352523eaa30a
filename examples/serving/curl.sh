#!/bin/sh
# Ask a memory server with curl: ./curl.sh story.mp4 "What colour was the circle?" [http://127.0.0.1:8000]
set -e
server=${3:-http://127.0.0.1:8000}
id=$(curl -sS --fail-with-body -F "file=@$1" "$server/v1/memories" | sed 's/.*"id":"\([0-9a-f]*\)".*/\1/')
curl -sSN "$server/v1/memories/$id/events" >&2 # until it is watched
question=$(printf %s "$2" | sed 's/[\\"]/\\&/g')
curl -sS --fail-with-body "$server/v1/chat/completions" -H 'Content-Type: application/json' -d '{"messages": [{"role": "user",
  "content": [{"type": "memory", "id": "'"$id"'"}, {"type": "text", "text": "'"$question"'"}]}], "max_completion_tokens": 64}'
echo
