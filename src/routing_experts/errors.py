"""What users' mistakes raise. Each message gives the value, what was expected, why, and what to do about it.

Our own broken invariants are plain ``assert`` statements; they are bugs, never a user's mistake.
"""


def shortened(text: str, limit: int = 300) -> str:
    """A text that others gave, as messages show it: whole unless it is long."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def first_line(error: BaseException) -> str:
    """What another library's error says first, or its class where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def shown(value: object) -> str:
    """A value that others gave, as messages show it."""
    return shortened(repr(value), 80)


class RoutingExpertsError(ValueError):
    """The parent of every error that this library raises about what a user gave it."""


class ConfigError(RoutingExpertsError):
    """A setting of a config or recipe is out of range, unknown, or contradicts another."""


class RecordError(RoutingExpertsError):
    """A training or evaluation record cannot be used; names the file, the record and the field."""


class PictureError(RecordError):
    """A record's picture cannot be read."""


class WorkerError(RoutingExpertsError):
    """A process that shares work on records has ended before it was done."""


class PromptError(RoutingExpertsError):
    """A dialogue cannot be laid out as a prompt or split into its turns."""


class ModelFamilyError(RoutingExpertsError):
    """The model is of a family that is not registered, or is in a state that the operation cannot take."""


class RouteError(RoutingExpertsError):
    """A route, routing option or cache does not fit the model or the request."""


class CheckpointError(RoutingExpertsError):
    """A checkpoint is missing, damaged, of another base model, of a newer format, or not safetensors."""


class TrainingError(RoutingExpertsError):
    """A training run cannot start or go on."""


class InterruptedRunError(TrainingError):
    """A training run was stopped by its user; it goes on from its last checkpoint."""


class RequestError(RoutingExpertsError):
    """A request to the engine cannot be answered; the others are."""


class MissingExtraError(RoutingExpertsError):
    """A feature was asked for whose optional package is not installed."""


class EvaluationError(RoutingExpertsError):
    """An evaluation cannot be run, or a sample of it could not be answered; what was answered is kept."""


class ReportError(RoutingExpertsError):
    """A run's records are missing or cannot be drawn."""
