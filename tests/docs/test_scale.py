"""docs/scale.md quotes records only: what stands between markers is a committed record's, word for word."""

from statistics import mean, median
from typing import Any

import pytest
from quoted import RESULTS, block_of, page_of, record_of

from routing_experts.models.load import load_processor
from routing_experts.records import StudyRecord
from routing_experts.reports import study_markdown
from routing_experts.studies.plan import load_study
from routing_experts.training.making import make_model
from routing_experts.training.parameters import freeze_all_but

PAGE = "docs/scale.md"
MIB = 2**20


def equivalence_table(record: dict[str, Any]) -> str:
    """A row a way, a distance a stage."""
    stages = [name for name in record["rows"][0]["distance"] if name != "skip_rate"]
    lines = [f"| way | processes | {' | '.join(stages)} |", "|---|--:|" + "--:|" * len(stages)]
    for row in record["rows"]:
        cells = " | ".join(f"{row['distance'][stage]:.1e}" for stage in stages)
        lines.append(f"| {row['way']} | {row['processes']} | {cells} |")
    return "\n".join(lines)


def test_the_equivalence_table_is_the_record() -> None:
    """Guards that no engine trains another run (contract 10)."""
    record = record_of("equivalence")
    assert block_of(PAGE, "equivalence") == equivalence_table(record)
    assert {row["way"] for row in record["rows"]} >= {"one process", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2"}
    assert max(max(row["distance"].values()) for row in record["rows"]) <= 1e-4


def stages_table(record: dict[str, Any]) -> str:
    """A row a stage, a ratio to dense tuning by turns and recomputation, and seconds of the first."""
    rows = {(row["stage"], row["turns"], row["recomputed"]): row for row in record["rows"]}
    lines = [
        "| stage | one turn | four turns | one turn, recomputed | four turns, recomputed |",
        "|---|--:|--:|--:|--:|",
    ]
    dense = [f"{median(rows['dense_tuning', 1, recomputed]['step_seconds']):.1f} s" for recomputed in (False, True)]
    lines.append(f"| dense fine-tuning | {dense[0]} | | {dense[1]} | |")
    for stage in ("adapter_warmup", "router_warmup", "instruction_tuning"):
        cells = (f"{rows[stage, turns, again]['of_dense']:.2f}" for again in (False, True) for turns in (1, 4))
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_stages_table_is_the_record() -> None:
    """Guards a step's cost beside dense fine-tuning's: warm-up stages take less, instruction tuning no tenth more."""
    record = record_of("stages")
    assert block_of(PAGE, "stages") == stages_table(record)
    of_dense = {(row["stage"], row["turns"], row["recomputed"]): row["of_dense"] for row in record["rows"]}
    assert len(of_dense) == len(record["rows"])
    for (stage, *_), ratio in of_dense.items():
        assert ratio <= {"dense_tuning": 1.0, "instruction_tuning": 1.10}.get(stage, 0.85)


def memory_table(record: dict[str, Any]) -> str:
    """A row a case: counted, and measured with soft and with the default gates."""
    soft, hard = "measured_softmax", "measured_gumbel_straight_through"
    lines = [
        "| tuned | batch | recomputed | stage | counted | soft gates | default gates |",
        "|---|--:|---|---|--:|--:|--:|",
    ]
    for row in record["rows"]:
        words = ("LoRA" if row["lora"] else "full", row["batch_size"], "yes" if row["gradient_checkpointing"] else "no")
        sizes = (f"{row[name] / MIB:,.0f}" for name in ("counted", soft, hard))
        lines.append(f"| {' | '.join(map(str, words))} | {row['stage']} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def test_the_memory_table_is_the_record() -> None:
    """Guards the estimate: with soft gates, which it counts, it is within a tenth of what processes took."""
    record = record_of("memory")
    assert block_of(PAGE, "memory") == memory_table(record)
    for row in record["rows"]:
        of_measured = row["counted"] / row["measured_softmax"]
        assert 0.9 < of_measured < (1.1 if row["stage"] != "adapter_warmup" else 1.5)  # random routes leave work out


def test_the_study_of_scale_is_the_record() -> None:
    """Guards what LoRA costs in answers: each seed within 1.5 points of dense at a quarter of the layers skipped."""
    record_of("scale")
    study = StudyRecord.load(RESULTS / "scale.json")
    assert block_of(PAGE, "study") == study_markdown(study).strip()
    by_arm = {name: [run for run in study.runs if run.arm == name] for name in ("routed", "lora", "distilled")}
    assert [len(runs) for runs in by_arm.values()] == [3, 3, 3]
    assert all(run.skip_rate == pytest.approx(0.25, abs=0.01) for run in study.runs)
    assert all(run.accuracy > study.base_accuracy - 0.015 for run in by_arm["lora"])
    assert mean(run.accuracy for run in by_arm["distilled"]) < mean(run.accuracy for run in by_arm["routed"])


def test_the_study_s_lora_trains_as_few_parameters_as_the_page_says(tmp_path) -> None:
    """Guards the share: under a tenth, counted on the model that the arm trains."""
    pytest.importorskip("peft")
    recipe = load_study("scale").arm_recipe("lora", 0.25, 0, tmp_path, 12)
    model = make_model(recipe, load_processor(recipe.model))
    trained = sum(freeze_all_but(model, recipe.stages[-1].trains, lora=True).values())
    share = trained / sum(parameter.numel() for parameter in model.parameters())
    assert share < 0.1
    assert f"{100 * share:.1f} % of the parameters" in page_of(PAGE)
