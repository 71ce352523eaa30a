"""From a folder to the Hub: which files a repository needs, whether they are sound, and their upload."""

from collections.abc import Iterable
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .. import modeling, processing
from ..loading import hub_answers
from .adapters import CONFIG, WEIGHTS, check_adapter, is_adapter
from .checkpoint_reader import CheckpointReader, read_json
from .conversion import check_answers
from .model_card import check_card

_NEEDED = (
    "config.json", "generation_config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip


def files_to_share(folder: Path) -> dict[str, Path]:
    """The files that a Hub repository of this checkpoint needs, README.md aside: name -> where it lies.

    What else lies in the folder, such as the Trainer's `training_args.bin`, is not among them; so no pickle ever is. A
    folder without code gets that of this package; one of adapters needs none.

    Raises:
        ValueError: files that are missing, weights that are broken or a pickle.
    """
    if is_adapter(folder):
        return {name: folder / name for name in (CONFIG, WEIGHTS)}
    if missing := [name for name in _NEEDED if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder}: lacks {', '.join(missing)}; write them with model.save_pretrained and processor.save_pretrained"
        )
    weights = CheckpointReader(folder).file_names()
    if pickles := sorted(name for name in weights if name.endswith(".bin")):
        raise ValueError(f"{folder}: {', '.join(pickles)} may run code when loaded; save as safetensors")
    return {name: folder / name for name in (*_NEEDED, *weights)} | {file.name: file for file in _code(folder)}


def _code(folder: Path) -> set[Path]:
    """The modules that `auto_map` names, and all that they import from beside them; this package's if none is there."""
    classes = [
        *read_json(folder, "config.json").get("auto_map", {}).values(),
        *read_json(folder, "processor_config.json").get("auto_map", {}).values(),
    ]
    modules = {f"{name.partition('.')[0]}.py" for name in classes}
    if not {"modeling_video_ma2mba.py", "processing_video_ma2mba.py"} <= modules:
        raise ValueError(
            f"{folder}: has no auto_map that names its code; write it again with model.save_pretrained and "
            "processor.save_pretrained of the package video_ma2mba"
        )
    if not any((folder / name).is_file() for name in modules):
        ours = [file for room in (modeling, processing) for file in Path(room.__path__[0]).glob("*.py")]
        return _with_imports(file for file in ours if file.name in modules)
    if missing := sorted(name for name in modules if not (folder / name).is_file()):
        raise ValueError(f"{folder}: lacks the code {', '.join(missing)}")
    return _with_imports(folder / name for name in modules)


def _with_imports(modules: Iterable[Path]) -> set[Path]:
    return {Path(file) for module in modules for file in [str(module), *get_relative_import_files(module)]}


def check_folder(folder: Path, card: str) -> str:
    """Read the card, load the model, or the adapters on their model, and let it answer; returns the answer.

    Raises:
        ValueError: a card that the Hub cannot read, or an answer that is none.
    """
    check_card(card, folder / "README.md")
    return check_adapter(folder) if is_adapter(folder) else check_answers(folder)


def upload(folder: Path, repo: str, files: Iterable[str], private: bool) -> str:
    """Create the repository if need be, and upload `files` of `folder` in one commit; returns its address.

    Raises:
        ValueError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi()
    try:
        address = str(hub.create_repo(repo, private=private, exist_ok=True))
        hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="Video-Ma2mba: weights, code and card",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if not hub_answers():
            raise ValueError(f"{repo}: the Hub cannot be reached, so nothing was uploaded") from error
        raise ValueError(f"{repo}: the Hub does not take the upload: {error}") from error
    return address
