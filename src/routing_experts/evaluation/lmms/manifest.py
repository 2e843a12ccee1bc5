"""What lmms-eval finds in the entry-point group ``lmms_eval.models``: the model ``roe``."""

from typing import Any

MODEL_ID = "roe"
_CLASSES = "routing_experts.evaluation.lmms.model"


def manifest() -> Any:
    """Routed models, asked by chat messages; with ``--force_simple`` also tasks that compare likelihoods."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID,
        simple_class_path=f"{_CLASSES}.SimpleModel",
        chat_class_path=f"{_CLASSES}.ChatModel",
    )
