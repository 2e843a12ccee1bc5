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
    base_weights: bool = True,
    **upload: Any,
) -> str:
    """Uploads a routed model to the Hugging Face hub.

    Args:
        model: routed.
        repo_id: ``owner/name``; made if it is not there.
        processor: goes with the model, if given.
        license_name: for the card, such as ``apache-2.0``.
        private: of a repository that is made; the account's default for None.
        token: of the hub; the one that is logged in by default.
        base_weights: as in ``save_pretrained``.
        **upload: for the hub's ``upload_folder``: ``commit_message``, ``revision``, ``create_pr`` …

    Returns:
        The commit's address.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "model"
        model.save_pretrained(saved, base_weights=base_weights)
        write_card(saved, model.roe_config, license_name=license_name)
        if processor is not None:
            processor.save_pretrained(saved)
        return push_folder(saved, repo_id, private, token, **upload)


def push_folder(
    folder: Path, repo_id: str, private: bool | None = None, token: str | None = None, **upload: Any
) -> str:
    """Uploads a saved model's folder as it is; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    made = api.create_repo(repo_id, private=private, exist_ok=True)
    settings = {"commit_message": "Upload a routed model"} | upload
    return str(api.upload_folder(repo_id=made.repo_id, folder_path=folder, **settings))
