#!/bin/sh
# Evaluate through a server with lmms-eval's OpenAI-compatible model, every frame of the task's videos:
#   ./lmms_eval.sh http://127.0.0.1:8000 video-ma2mba-tiny --tasks TASK [whatever else lmms-eval takes]
# The server reads the videos by their paths: start it with --allow-media DIR.
set -e
server=$1/v1 name=$2
shift 2
export OPENAI_API_KEY="${OPENAI_API_KEY:-none}"
exec lmms-eval --model openai_compatible --batch_size 1 "$@" \
  --model_args "model_version=$name,base_url=$server,pass_video_url=True,max_frames_num=-1,timeout=600"
