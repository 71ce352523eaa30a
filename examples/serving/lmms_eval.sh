#!/bin/sh
# Evaluate through a server with lmms-eval's OpenAI-compatible model: ./lmms_eval.sh TASK [MODEL_NAME] [http://127.0.0.1:8000]
# lmms-eval sends some frames of a video as pictures, at most max_frames_num; `video-ma2mba eval` watches every frame.
set -e
OPENAI_API_BASE=${3:-http://127.0.0.1:8000}/v1 OPENAI_API_KEY=${OPENAI_API_KEY:-none} \
  lmms-eval --model openai_compatible --tasks "$1" --batch_size 1 \
  --model_args "model_version=${2:-video-ma2mba-tiny},max_frames_num=32"
