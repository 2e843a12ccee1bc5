"""Publishing a routed model: the folder that ``save_pretrained`` writes, card included, uploaded in one commit."""

import tempfile
from pathlib import Path
from typing import Any

from routing_experts.models.card import write_card


def push(
    model: Any,
    repo_id: str,
    processor: Any = None,
    license_name: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a routed model",
    **kwargs: Any,
) -> str:
    """Uploads a routed model to the Hugging Face hub.

    Args:
        model: routed.
        repo_id: ``owner/name``; made if it is not there.
        processor: goes with the model, if given.
        license_name: for the card, such as ``apache-2.0``.
        private: of a repository that is made; the account's default for None.
        token: of the hub; the one that is logged in by default.
        commit_message: of the upload.
        **kwargs: for ``save_pretrained``.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "model"
        model.save_pretrained(saved, **kwargs)
        write_card(saved, model.roe_config, license_name=license_name)
        if processor is not None:
            processor.save_pretrained(saved)
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=made.repo_id, folder_path=saved, commit_message=commit_message)
    return str(commit)
