"""Data that was mended in a local folder is read anew; without that, datasets serves what lay there before."""

import os
from pathlib import Path

import datasets
from datasets import load_dataset

from routing_experts.evaluation.lmms.local_data import contents_of, prepared_anew

CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data.parquet\n---\n"
NAME = "somebody/set"


def write(word: str) -> Path:
    folder = Path(NAME)
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list([{"word": word}]).to_parquet(str(folder / "data.parquet"))
    (folder / "README.md").write_text(CARD)
    return folder


def read() -> str:
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    return load_dataset(NAME, cache_dir=_resolve_hf_datasets_cache_dir())["test"][0]["word"]


def test_mended_data_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (os.environ["HF_DATASETS_CACHE"], datasets.config.HF_DATASETS_CACHE)
    with prepared_anew([write("broken")]):
        assert read() == "broken"
    with prepared_anew([write("mended")]):
        assert read() == "mended"
    assert (os.environ["HF_DATASETS_CACHE"], datasets.config.HF_DATASETS_CACHE) == before


def test_one_name_in_two_places_is_two_sets(tmp_path, monkeypatch):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        with prepared_anew([write(place)]):
            assert read() == place


def test_what_did_not_change_is_prepared_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write("same")
    assert contents_of([folder]) == contents_of([folder.resolve()])
    with prepared_anew([folder]):
        first = datasets.config.HF_DATASETS_CACHE
    with prepared_anew([folder]):
        assert first == datasets.config.HF_DATASETS_CACHE


def test_without_local_folders_nothing_is_changed():
    before = datasets.config.HF_DATASETS_CACHE
    with prepared_anew([]):
        assert before == datasets.config.HF_DATASETS_CACHE
