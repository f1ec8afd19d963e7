"""Puts a finished output folder on the Hub, or corrects the card of one that is there.

python recipes/push.py outputs/whisper --hub_model_id me/whisper --hub_base_model_id me/base
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME

from publishing.card import CardArguments, is_hub_name, read_subject
from publishing.hub import HubTarget, check_target, push_folder
from training.endings import run_main


def parse_push_command(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the folder and the flags, which are those of the recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Output folder of a recipe.")
    parser.add_argument("--hub_model_id", required=True, help="Repository to push to, such as me/speaker.")
    parser.add_argument("--hub_private_repo", action="store_true", default=None, help="Make it private.")
    parser.add_argument("--hub_revision", help="Branch to push to.")
    parser.add_argument("--hub_base_model_id", help="The adapter's base on the Hub, where it was a folder here.")
    parser.add_argument("--hub_token", help="Token; default: HF_TOKEN or that of `hf auth login`.")
    parser.add_argument("--language", nargs="+", help="Corrects the card: language codes of the speech.")
    parser.add_argument("--dataset_licence", help="Corrects the card: licence of the data.")
    parser.add_argument("--licence", help="Corrects the card: licence of what was trained.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Pushes a folder that was trained earlier."""
    arguments = parse_push_command(argv)
    card = CardArguments(arguments.language, arguments.dataset_licence, arguments.licence)
    corrections = {name: value for name, value in asdict(card).items() if value is not None}

    # Where to
    config_path = arguments.folder / ADAPTER_CONFIG_NAME
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    subject = read_subject(arguments.folder)
    if subject and (subject.is_base_on_hub or not subject.base):
        base = subject.base
    else:
        base = None if subject else config.get("base_model_name_or_path")
    is_same_base = arguments.hub_base_model_id in (None, base)
    target = HubTarget(
        arguments.hub_model_id,
        is_private=arguments.hub_private_repo,
        revision=arguments.hub_revision,
        base_model_id=arguments.hub_base_model_id or (base if base and is_hub_name(base) else None),
        base_revision=config.get("revision") if is_same_base else None,
        token=arguments.hub_token,
    )
    target = check_target(target, needs_base=bool(config))

    # Push
    print(push_folder(arguments.folder, target, corrections))


if __name__ == "__main__":
    run_main(main)
