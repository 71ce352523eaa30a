"""Fine-tune on videos of your own with TRL's SFTTrainer, and ask the result.

    python examples/finetune_own_videos.py --example my_videos      # makes a folder to try it with
    python examples/finetune_with_trl.py my_videos -o my_trl --ask 0.mp4 "Is the circle bright?"

The folder holds the videos and `questions.jsonl`, with lines as {"video": "0.mp4", "question": "Is the circle bright?",
"answer": "yes"}. Needs `pip install trl`. What TRL does its own way:

- Its collators hand on pictures, and no videos but those in `messages`, as below. For `DPOTrainer`, `GRPOTrainer` and
  prompts with completions, give the frames of a video as `images`, with an entry {"type": "image"} for each: to the
  model an image is a video of one frame.
- `GRPOTrainer` draws answers with settings of its own. It needs `chat_template_kwargs={"padding": False,
  "return_tensors": None}`, or shorter prompts keep their padding, and `generation_kwargs={"suppress_tokens":
  [processor.image_token_id, processor.video_token_id]}`, or a placeholder may be drawn, which is refused.
- It multiplies by `lm_head.weight` itself: adapters on the head are refused.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import video_ma2mba  # noqa: F401 - tells transformers' Auto classes about the model
from video_ma2mba.training.parameters import parameter_groups

TINY = Path(__file__).parents[1] / "model_cards" / "video-ma2mba-tiny"

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("videos", type=Path, help="folder with the videos and questions.jsonl")
parser.add_argument("-o", "--output", default="my_trl", help="default: %(default)s")
parser.add_argument("--model", default=str(TINY), help="folder or Hub id (default: the tiny model)")
parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
parser.add_argument("--ask", nargs=2, metavar=("VIDEO", "QUESTION"), help="a question when it is done")
args = parser.parse_args()


def asked(video: str, question: str) -> dict:
    content = [{"type": "video", "path": str(args.videos / video)}, {"type": "text", "text": question}]
    return {"role": "user", "content": content}


rows = [json.loads(line) for line in (args.videos / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
samples = [
    {
        "messages": [
            asked(row["video"], row["question"]),
            {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
        ],
        "images": [],  # this column, though empty, tells TRL that there is something to see
    }
    for row in rows
]
processor = AutoProcessor.from_pretrained(args.model)
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
config = SFTConfig(
    args.output, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=1e-3, weight_decay=0.1,
    assistant_only_loss=True, max_length=None, report_to="none", save_strategy="no", logging_steps=10,
    bf16=torch.cuda.is_available(), gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"axes": ["layer", "sequence"]},
)  # fmt: skip
groups = parameter_groups(
    model, config.learning_rate, weight_decay=config.weight_decay
)  # spares norms, A_log, D, dt_bias
trainer = SFTTrainer(
    model, config, train_dataset=Dataset.from_list(samples), processing_class=processor,
    optimizers=(torch.optim.AdamW(groups), None),
)  # fmt: skip
trainer.train()
trainer.save_model(args.output)
processor.save_pretrained(args.output)
if args.ask:
    inputs = processor.apply_chat_template([asked(*args.ask)], add_generation_prompt=True, tokenize=True)
    answer = model.eval().generate(**inputs.to(model.device), max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    print(processor.decode(answer, skip_special_tokens=True))
