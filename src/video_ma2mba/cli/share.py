"""Check a folder with a model or with LoRA adapters, write its card, and upload both to the Hugging Face Hub."""

import argparse
import re
import sys
from pathlib import Path

HELP = "write a model's card and upload the model to the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="as save_pretrained, `train` or `convert` wrote it")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository on the Hub")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--dry-run", action="store_true", help="check everything and list the files, upload nothing")
    steps.add_argument("--card-only", action="store_true", help="write DIR/README.md anew and stop")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    card = parser.add_argument_group("the card", "rendered where DIR has no README.md, and by --card-only")
    card.add_argument("--license", default="apache-2.0", metavar="ID", help="default: %(default)s")
    card.add_argument("--base-model", action="append", metavar="HUB_ID", help="may be given more than once")
    card.add_argument("--training", type=Path, metavar="JSON", help="an object; its entries become a table")
    card.add_argument(
        "--evaluation", type=Path, metavar="JSON", help='{"results": [{"dataset": ..., "metric": ..., "value": ...}]}'
    )


def run(args: argparse.Namespace) -> None:
    folder = args.folder
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"{folder}: there is neither config.json nor adapter_config.json; name a folder that save_pretrained, "
            "`train` or `convert` wrote"
        )
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", args.repo):
        raise ValueError(f"--repo {args.repo}: a repository of the Hub looks like owner/name")

    from ..files import write_text
    from ..weights.adapters import has_card, is_adapter, render_adapter_card
    from ..weights.model_card import read_report, render_card
    from ..weights.sharing import check_folder, files_to_share, upload

    if args.card_only or not has_card(folder):
        options = {
            "licence": args.license, "base_models": args.base_model, "training": read_report(args.training),
        }  # fmt: skip
        if is_adapter(folder):
            if args.evaluation is not None:
                raise ValueError("--evaluation: a card of adapters has no table of results; leave the option out")
            card = render_adapter_card(folder, args.repo, **options)
        else:
            card = render_card(folder, args.repo, **options, evaluation=read_report(args.evaluation))
        write_text(folder / "README.md", f"{str(card).rstrip()}\n")
        print(f"wrote {folder / 'README.md'}", file=sys.stderr)
    if args.card_only:
        return
    files = sorted(["README.md", *files_to_share(folder)])
    answer = check_folder(folder)
    for name in files:
        print(f"{(folder / name).stat().st_size:>14,}  {name}")
    print(f"{sum((folder / name).stat().st_size for name in files):>14,}  bytes in all", file=sys.stderr)
    if left_out := sorted({path.name for path in folder.iterdir()} - set(files)):
        print(f"not uploaded: {', '.join(left_out)}", file=sys.stderr)
    print(f"loads, and says of a black frame: {answer!r}", file=sys.stderr)
    if args.dry_run:
        print("a dry run: nothing was uploaded", file=sys.stderr)
        return
    print(upload(folder, args.repo, files, args.private))
