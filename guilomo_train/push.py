"""An adapter folder to the Hugging Face Hub, with its card and the picture of its allocation."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from guilomo_serve.adapter import read_adapter, write_adapter
from guilomo_train.allocation_map import allocation_of, heat_map
from guilomo_train.config import PushConfig
from guilomo_train.errors import ConfigError

PICTURE_FILE = "allocation.png"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def push(config: PushConfig) -> str:
    """Uploads an adapter in one commit and returns its address; HF_TOKEN says who does it.

    Raises:
        AdapterError: it is no sound adapter.
        ConfigError: it names a base that others do not have, or the Hub does not take it.
    """
    folder = Path(config.adapter)
    adapter = read_adapter(folder)
    recorded = adapter.spec.base_model_name_or_path
    base = config.base or recorded
    if not _HUB_NAME.fullmatch(base) or Path(base).exists():
        raise ConfigError(
            f"the adapter's base is {base}, a folder that others do not have: give --base with its "
            "name on the Hub, which is written instead"
        )
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    owner, _, name = config.repo.partition("/")
    # A card of training says how to use a folder; here it is a repository.
    text = text.replace(recorded, base).replace('THIS_FOLDER")', f'{config.repo}")')
    text = text.replace(
        "guilomo-serve BASE --adapter name=THIS_FOLDER",
        f"guilomo-serve {base} --adapter-root hf://{owner}` and ask for the model `{name}",
    )
    text += f"\n![Experts and ranks of the layers]({PICTURE_FILE})\n"
    api = HfApi()
    with tempfile.TemporaryDirectory() as work:
        upload = Path(work) / "adapter"
        spec = replace(adapter.spec, base_model_name_or_path=base)
        write_adapter(replace(adapter, spec=spec), upload, text)
        heat_map(allocation_of(spec), upload / PICTURE_FILE)
        try:
            api.create_repo(config.repo, private=config.private, exist_ok=True)
            done = api.upload_folder(
                repo_id=config.repo, folder_path=upload, commit_message="guilomo-train push"
            )
        except (HfHubHTTPError, HFValidationError, OSError) as e:
            reason = str(e).strip().splitlines()[0]
            raise ConfigError(
                f"--repo {config.repo}: the Hub does not take it ({reason})"
            ) from None
    return str(done.commit_url)
