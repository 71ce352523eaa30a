"""The one form all training data take: a folder with chat messages, one conversation a line.

dataset.json       {"media_root": ..., "num_samples": ...}
manifest.jsonl     or manifest.parquet, or several manifest-1-of-8.parquet: FEATURES below
frames/            decoded frames, where they were cached; see `frame_cache`
report.json        how many were kept, what was left out and why
left_out.jsonl     all that was left out, where report.json has no more than the first of them
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..processes import files_of

if TYPE_CHECKING:
    import datasets

DESCRIPTION = "dataset.json"
NAMES = ("manifest.jsonl", "manifest.parquet")


def features() -> "datasets.Features":
    """The columns of a manifest. An entry has only the keys of its type; the others are null."""
    from datasets import Features, List, Value

    text, number = Value("string"), Value("float64")
    entry = {"type": text, "text": text, "path": text, "start_s": number, "end_s": number, "duration_s": number}
    return Features(
        {
            "id": text,
            "messages": List({"role": text, "content": List(entry)}),
            "watched_s": number,  # seconds of video in all entries
            "num_images": Value("int64"),
            "num_characters": Value("int64"),
        }
    )


def load_manifest(folder: str | Path, streaming: bool = False) -> "datasets.Dataset | datasets.IterableDataset":
    """The samples of a folder that `video-ma2mba data prepare` wrote.

    A stream of several files is what large sets are trained from: `datasets` deals the files to devices
    (`split_dataset_by_node`) and to the processes that load, and goes on where its `state_dict` says.

    Returns:
        A data set with the columns of `features()`, and `media_root` and `folder`, the same in every row.

    Raises:
        ValueError: No such folder, or not one of ours; says what is missing.
    """
    from datasets import Features, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError

    folder = Path(folder).resolve()
    described = read_description(folder)
    files = next((files for name in NAMES if (files := files_of(folder / name))), None)
    if files is None:
        raise ValueError(f"{folder}: neither {' nor '.join(NAMES)} is there; run `video-ma2mba data prepare` again")
    if described.get("num_samples") == 0:  # `datasets` cannot read a file of nothing
        raise ValueError(f"{folder}: there is not one sample; report.json there says why")
    kind = "json" if files[0].suffix == ".jsonl" else "parquet"
    names = [str(file) for file in files]
    try:
        dataset = load_dataset(kind, data_files=names, features=features(), split="train", streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(
            f"{folder}: its manifest is damaged, {error.__cause__}; run `video-ma2mba data prepare` again"
        ) from error
    places = {"media_root": str((folder / described["media_root"]).resolve()), "folder": str(folder)}
    all_features = Features({**features(), "media_root": Value("string"), "folder": Value("string")})
    return dataset.map(lambda batch: _placed(batch, places), batched=True, features=all_features)


def read_description(folder: Path) -> dict[str, Any]:
    """`dataset.json` of a prepared folder."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        Path(described["media_root"])
        return described
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder}: no prepared data set; make one with `video-ma2mba data prepare`") from error


def clean_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a manifest's reader gives them, without the nulls of other types of entry."""
    return [
        {
            "role": message["role"],
            "content": [
                {key: value for key, value in entry.items() if value is not None} for entry in message["content"]
            ],
        }
        for message in messages
    ]


def _placed(batch: dict[str, list], values: dict[str, str]) -> dict[str, list]:
    """The values for every row of a batch, of which every row is whole."""
    for name in features():
        if None in batch[name]:
            raise ValueError(
                f"{values['folder']}: a line of the manifest is damaged, it has no {name}; run `video-ma2mba data "
                "prepare` again"
            )
    return {name: [value] * len(batch["id"]) for name, value in values.items()}
