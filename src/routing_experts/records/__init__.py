"""What runs leave behind, as JSON: results, training logs, studies, and where they were made. No torch."""

from routing_experts.records.entry import Count, Entry, Positive, Seconds, Share, load_json, save_json, write_text
from routing_experts.records.environment import environment
from routing_experts.records.log import LOG_NAME, LogLine, TrainingLog, read_log
from routing_experts.records.results import (
    CALIBRATION_NAME,
    MAX_ROUTES,
    RESULTS_NAME,
    Calibration,
    Dense,
    Results,
    RouteCount,
    Routed,
    Score,
    Skipping,
    Speed,
    SpeedCase,
    Static,
    SweepPoint,
    TaskResult,
)
from routing_experts.records.study import STUDY_NAME, Contrast, StudyRecord, StudyRun

__all__ = [
    "CALIBRATION_NAME",
    "LOG_NAME",
    "MAX_ROUTES",
    "RESULTS_NAME",
    "STUDY_NAME",
    "Calibration",
    "Contrast",
    "Count",
    "Dense",
    "Entry",
    "LogLine",
    "Positive",
    "Results",
    "RouteCount",
    "Routed",
    "Score",
    "Seconds",
    "Share",
    "Skipping",
    "Speed",
    "SpeedCase",
    "Static",
    "StudyRecord",
    "StudyRun",
    "SweepPoint",
    "TaskResult",
    "TrainingLog",
    "environment",
    "load_json",
    "read_log",
    "save_json",
    "write_text",
]
