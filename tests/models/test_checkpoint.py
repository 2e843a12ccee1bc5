"""Contract 7: saving and loading give the same model; only safetensors are written or read; nothing half done passes.

Every refusal is tested for what it says, and for leaving the files as they were.
"""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from routing_experts import api
from routing_experts.config import CONFIG_NAME, FORMAT_VERSION, RoEConfig
from routing_experts.errors import CheckpointError, ConfigError, ModelFamilyError, RoutingExpertsError
from routing_experts.models import checkpoint, staging
from routing_experts.models.card import CARD_NAME
from routing_experts.models.checkpoint import WEIGHTS_NAME, fingerprint, is_roe_key
from routing_experts.models.convert import is_routed
from routing_experts.models.load import POCKET, from_pretrained, load_base, load_processor
from routing_experts.models.options import KEEP_ALL
from tiny import GREEDY, batch_of, for_generate, prompt, route_everywhere, text_config, tiny_llama, tiny_llava

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@torch.inference_mode()
def logits(model: Any) -> dict[str, Tensor]:
    """Routed and dense logits of three rows; the routed ones must differ, or equality would prove nothing."""
    batch = batch_of([prompt(seed) for seed in range(3)], dtype=model.dtype)
    found = {"routed": model(**batch).logits, "dense": model(**batch, routing_options=KEEP_ALL).logits}
    assert not torch.equal(found["routed"], found["dense"])
    return found


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """The model's parameters in another precision, as loading does it; ``to`` would round the rotary table too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def assert_same_model(first: Any, second: Any) -> None:
    before, after = logits(first), logits(second)
    assert all(torch.equal(before[path], after[path]) for path in before)


def saved(folder: Path, build: Any = tiny_llava, **settings: Any) -> Any:
    """A routed model, written to a folder with its base's weights."""
    model = route_everywhere(build(), **settings)
    api.save_pretrained(model, folder)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@PRECISIONS
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["whole", "sharded"])
def test_a_folder_gives_the_model_back(build, dtype, shards, tmp_path):
    """Guards both paths of both kinds of model, and the settings, through both ways of writing weights."""
    model = route_everywhere(in_precision(build(), dtype), keep_bias=0.25, target_skip_ratio=0.4)
    model.save_pretrained(tmp_path / "routed", **shards)
    loaded = from_pretrained(tmp_path / "routed")
    assert (len(list((tmp_path / "routed").glob("model*.safetensors"))) > 1) == bool(shards)
    assert loaded.dtype == dtype
    assert loaded.roe_config == model.roe_config
    assert not loaded.training
    assert_same_model(model, loaded)


def test_a_loaded_model_generates_as_before(tmp_path):
    """Guards what only generation uses: the generation config and the cache of the loaded class."""
    batch = for_generate(batch_of([prompt(seed) for seed in range(3)]))
    expected = saved(tmp_path / "routed").generate(**batch, **GREEDY)
    assert torch.equal(from_pretrained(tmp_path / "routed").generate(**batch, **GREEDY), expected)


def test_another_precision_may_be_asked_for(tmp_path):
    """Guards ``dtype=``: an fp32 folder read in bf16 is the fp32 model turned to bf16."""
    model = saved(tmp_path / "routed")
    for dtype in (torch.bfloat16, torch.float16):
        assert from_pretrained(tmp_path / "routed", dtype=dtype).dtype == dtype
    assert_same_model(in_precision(model, torch.bfloat16), from_pretrained(tmp_path / "routed", dtype=torch.bfloat16))


@PRECISIONS
@pytest.mark.parametrize("given", ["object", "folder", "recorded name"])
def test_roe_parts_alone_are_loaded_onto_their_base(dtype, given, tmp_path):
    """Guards small checkpoints: a folder of a few files makes a routed model of the base it was made for."""
    in_precision(tiny_llava(), dtype).save_pretrained(tmp_path / "base")
    model = route_everywhere(load_base(tmp_path / "base"))
    api.save_pretrained(model, tmp_path / "parts", base_weights=False)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
    base = {"object": in_precision(tiny_llava(), dtype), "folder": tmp_path / "base", "recorded name": None}[given]
    assert_same_model(model, from_pretrained(tmp_path / "parts", base=base))


def test_roe_parts_fit_their_base_in_half_the_precision(tmp_path):
    """Guards the fingerprint: a bf16 copy of the base is still that base."""
    model = route_everywhere(tiny_llava())
    model.save_pretrained(tmp_path, base_weights=False)
    loaded = from_pretrained(tmp_path, base=in_precision(tiny_llava(), torch.bfloat16))
    assert_same_model(in_precision(model, torch.bfloat16), loaded)


def test_roe_parts_of_a_nameless_base_ask_for_it(tmp_path):
    """Guards models built in memory: nothing says where their base is."""
    model = route_everywhere(tiny_llava())
    model.save_pretrained(tmp_path, base_weights=False)
    with pytest.raises(CheckpointError, match="Pass base="):
        from_pretrained(tmp_path)


def test_base_files_are_those_of_the_base(build, tmp_path):
    """Guards every other tool that reads the folder: keys, tensors, class name and configuration are the base's own."""
    from safetensors.torch import load_file

    build().save_pretrained(tmp_path / "plain")
    saved(tmp_path / "routed", build)
    plain, routed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "routed"))
    assert plain.keys() == routed.keys()
    assert all(torch.equal(tensor, routed[name]) for name, tensor in plain.items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "routed")]
    assert configs[0] == configs[1]
    assert configs[0]["architectures"] == [build.__annotations__["return"].__name__]
    assert all(is_roe_key(name) for name in load_file(tmp_path / "routed" / WEIGHTS_NAME))


def test_only_safetensors_and_json_are_written(tmp_path):
    """Guards against pickles, and against staging folders left behind."""
    saved(tmp_path / "routed")
    saved(tmp_path / "routed")  # once more over the first
    assert {path.suffix for path in (tmp_path / "routed").iterdir()} == {".json", ".safetensors", ".md"}
    assert [path.name for path in tmp_path.iterdir()] == ["routed"]


def test_saving_in_another_number_of_shards_leaves_no_older_weights(tmp_path):
    """Guards against readers that prefer the one file of an older save to the newer shards, and the other way."""
    saved(tmp_path)
    newer = route_everywhere(tiny_llava(seed=1))
    for shards in ({"max_shard_size": "20KB"}, {"max_shard_size": "30KB"}, {}):
        newer.save_pretrained(tmp_path, **shards)
        assert_same_model(newer, from_pretrained(tmp_path))
    assert {path.name for path in tmp_path.glob("*.safetensors*")} == {"model.safetensors", WEIGHTS_NAME}


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    """Guards a user's notes, and a processor that was written there before the model."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tokenizer.json").write_text("{}")
    saved(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "tokenizer.json").exists()


def test_roe_parts_alone_do_not_join_another_model_s_files(tmp_path):
    """Guards a folder with a base model's weights: parts alone beside them would be loaded onto those."""
    saved(tmp_path / "routed")
    before = contents(tmp_path / "routed")
    with pytest.raises(CheckpointError, match="another folder"):
        route_everywhere(tiny_llava(seed=1)).save_pretrained(tmp_path / "routed", base_weights=False)
    assert contents(tmp_path / "routed") == before


def test_a_base_is_not_saved_as_routed(tmp_path):
    """Guards ``api.save_pretrained``: there are no RoE parts in a plain model."""
    with pytest.raises(ModelFamilyError, match="not routed"):
        api.save_pretrained(tiny_llava(), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


AUTO = """
import sys
{imports}
folder, plain = sys.argv[1:]
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(folder)
assert routing_experts.is_routed(model), type(model)
assert model.roe_config.target_skip_ratio == 0.4
base = AutoModelForImageTextToText.from_pretrained(plain)
assert not routing_experts.is_routed(base), type(base)
assert type(base) is transformers.LlavaForConditionalGeneration
assert type(AutoModelForImageTextToText.from_config(base.config)) is type(base)
"""
PIPELINE = """
from PIL import Image
from transformers import pipeline
pipe = pipeline("image-text-to-text", model=folder)
assert routing_experts.is_routed(pipe.model)
content = [{"type": "image", "image": Image.new("RGB", (32, 32))}, {"type": "text", "text": "Read all digits."}]
answer = pipe(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
assert isinstance(answer[0]["generated_text"], str)
"""
CLASS_FIRST = "import routing_experts\nfrom transformers import LlavaForConditionalGeneration\nimport transformers"
TRANSFORMERS_FIRST = "import transformers\nfrom transformers import AutoModelForImageTextToText\nimport routing_experts"
ROUTING_FIRST = "import routing_experts\nimport transformers"


@pytest.fixture(scope="module")
def pocket_folders(tmp_path_factory) -> tuple[Path, Path]:
    """The pocket model with random weights, routed and plain, each with its processor."""
    folder = tmp_path_factory.mktemp("pocket")
    torch.manual_seed(0)
    model, processor = load_base("pocket", random_init=True), load_processor("pocket")
    model.save_pretrained(folder / "plain")
    processor.save_pretrained(folder / "plain")
    routed = api.convert(model, RoEConfig(target_skip_ratio=0.4), processor)
    api.save_pretrained(routed, folder / "routed", processor)
    return folder / "routed", folder / "plain"


@pytest.mark.parametrize(
    ("imports", "then"),
    [(TRANSFORMERS_FIRST, ""), (ROUTING_FIRST, PIPELINE), (CLASS_FIRST, "")],
    ids=["transformers first", "routing_experts first, pipeline", "a model's class before the auto classes"],
)
def test_transformers_own_entrances_give_a_routed_model(imports, then, pocket_folders):
    """Guards the auto class and the pipeline in a fresh interpreter; a plain folder stays plain."""
    code = AUTO.format(imports=imports) + then
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, pocket_folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


def test_the_auto_class_takes_the_usual_keywords(tmp_path):
    """Guards ``from_pretrained``'s own arguments on their way through the auto class."""
    saved(tmp_path)
    kwargs = {"dtype": torch.bfloat16, "use_safetensors": True, "attn_implementation": "eager"}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, **kwargs)
    assert is_routed(loaded)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"format_version": FORMAT_VERSION + 1}, CheckpointError, "Upgrade routing-experts"),
        ({"format_version": "one"}, CheckpointError, "format_version='one'"),
        ({"skipp_ratio": 0.3}, ConfigError, r"unknown settings \['skipp_ratio'\]"),
        ({"target_skip_ratio": 0.7}, ConfigError, "target_skip_ratio=0.7"),
        ({"gate": "hope"}, ConfigError, "gate='hope'"),
        ({"budget": [[0.1, 2.0], [0.2, 3.0]]}, ConfigError, "rates rise and biases fall"),
        ({"budget": [0.1, 2.0]}, ConfigError, "pairs"),
        ({"base": {"model": "x"}}, RoutingExpertsError, "base"),
        ({"markers": {"opens": [1]}}, RoutingExpertsError, "markers"),
    ],
)
def test_configs_that_cannot_be_meant_are_refused(changes, error, expected, tmp_path):
    """Guards against a newer format read as an old one, and against settings that are silently ignored."""
    saved(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(error, match=expected):
        from_pretrained(tmp_path)


def test_a_folder_of_format_1_is_read_and_written_as_today_s(tmp_path):
    """Guards checkpoints from before budgets: read as they are, and no longer format 1 once one is saved with them."""
    saved(tmp_path)
    path = tmp_path / CONFIG_NAME
    old = json.loads(path.read_text())
    assert old.pop("budget") == []
    path.write_text(json.dumps(old | {"format_version": 1}))
    config = from_pretrained(tmp_path).roe_config
    assert config.budget == ()
    replace(config, budget=((0.0, 4.0), (0.1, 2.5))).save(tmp_path)
    assert json.loads(path.read_text())["format_version"] == FORMAT_VERSION == 3
    assert RoEConfig.load(tmp_path).budget == ((0.0, 4.0), (0.1, 2.5))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(text, tmp_path):
    """Guards torn and foreign files."""
    saved(tmp_path)
    (tmp_path / CONFIG_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=CONFIG_NAME):
        from_pretrained(tmp_path)


def test_a_folder_without_roe_config_is_refused(tmp_path):
    """Guards the common slip of giving the run's folder, or a base's."""
    tiny_llava().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"no {CONFIG_NAME}"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "model.safetensors"])
def test_missing_weights_are_named(name, tmp_path):
    """Guards incomplete copies of a folder."""
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 60, 0.5, 0.999])
@pytest.mark.parametrize("name", [WEIGHTS_NAME, "model.safetensors"])
def test_truncated_weights_are_refused(name, kept, tmp_path):
    """Guards interrupted downloads, cut in the header or in the tensors."""
    saved(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        from_pretrained(tmp_path)


def test_a_missing_shard_is_refused(tmp_path):
    """Guards incomplete copies of large models."""
    route_everywhere(tiny_llava()).save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="model-00002"):
        from_pretrained(tmp_path)


class Bomb:
    """Unpickling one touches a file: proof that a pickle's code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("instead_of", [WEIGHTS_NAME, "model.safetensors"])
@pytest.mark.parametrize("name", ["same", "pytorch_model.bin", "roe.pt"])
def test_pickles_are_never_opened(instead_of, name, tmp_path):
    """Guards against code in weights: under a safetensors name, or beside with the safetensors gone."""
    folder, marker = tmp_path / "routed", tmp_path / "ran"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # the bomb works
    marker.unlink()
    saved(folder)
    (folder / instead_of).unlink()
    planted = folder / (instead_of if name == "same" else name)
    planted.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(CheckpointError, match=planted.name):
        from_pretrained(folder)
    assert not marker.exists()


def test_a_pickle_beside_complete_weights_is_not_opened(tmp_path):
    """Guards the order of search: safetensors are there, so nothing else is looked at."""
    model = saved(tmp_path / "routed")
    (tmp_path / "routed" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert_same_model(model, from_pretrained(tmp_path / "routed"))
    assert not (tmp_path / "ran").exists()


def llama_of(**changes: Any) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(text_config(**changes)).eval()


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (lambda: llama_of(hidden_size=64), "hidden_size=32, this one has 64"),
        (lambda: llama_of(vocab_size=80), "vocab_size=64, this one has 80"),
        (lambda: llama_of(num_hidden_layers=6), "num_layers=5, this one has 6"),
        (tiny_llava, "model_type='llama', this one has 'llava'"),
        (lambda: tiny_llama(seed=1), "same shape but other weights"),
    ],
    ids=["width", "vocabulary", "depth", "family", "weights"],
)
def test_another_base_is_refused(other, expected, tmp_path):
    """Guards against parts that fit by shape only, and leaves the other base as it was."""
    route_everywhere(tiny_llama()).save_pretrained(tmp_path, base_weights=False)
    base = other()
    with pytest.raises(CheckpointError, match=expected):
        from_pretrained(tmp_path, base=base)
    assert not is_routed(base)


@pytest.mark.parametrize("part", ["q_proj", "up_proj", "input_layernorm", "embed_tokens", "multi_modal_projector"])
def test_roe_parts_alone_of_a_tuned_base_are_refused(part, tmp_path):
    """Guards against parts that need a base which nobody keeps, whichever of its weights were tuned."""
    model = route_everywhere(tiny_llava())
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data *= 1.01
    with pytest.raises(CheckpointError, match="Save with base_weights=True"):
        model.save_pretrained(tmp_path / "parts", base_weights=False)
    assert not (tmp_path / "parts").exists()
    model.save_pretrained(tmp_path / "whole")
    assert_same_model(model, from_pretrained(tmp_path / "whole"))


def test_the_fingerprint_ignores_routing(tmp_path):
    """Guards RoE training: adapters and routers may change as they like."""
    base = tiny_llava()
    before = fingerprint(base)
    assert fingerprint(route_everywhere(base)) == before
    assert fingerprint(tiny_llava(dtype=torch.bfloat16)) == before
    assert fingerprint(tiny_llava(seed=1)) != before


def test_parts_of_other_routed_layers_are_refused(tmp_path):
    """Guards a config and weights that were mixed from two runs."""
    saved(tmp_path / "some", routed_layers=(1, 2))
    saved(tmp_path / "more", routed_layers=(1, 2, 3))
    (tmp_path / "some" / WEIGHTS_NAME).replace(tmp_path / "more" / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=r"missing.*layers\.3"):
        from_pretrained(tmp_path / "more")


def test_a_save_that_fails_while_writing_leaves_the_old_model(tmp_path, monkeypatch):
    """Guards full disks: the old folder is untouched and nothing is left beside it."""
    saved(tmp_path / "routed")
    before = contents(tmp_path / "routed")

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        route_everywhere(tiny_llava(seed=1)).save_pretrained(tmp_path / "routed")
    assert contents(tmp_path / "routed") == before
    assert [path.name for path in tmp_path.iterdir()] == ["routed"]


@pytest.mark.parametrize("renamed", range(4))
def test_a_save_that_fails_while_renaming_is_visibly_incomplete(renamed, tmp_path, monkeypatch):
    """Guards the moment in which old and new files are mixed: neither entrance takes such a folder for a model."""
    saved(tmp_path / "routed")
    replace, left = os.replace, [renamed]

    def breaks_down(source: Any, target: Any) -> None:
        if Path(target).parent == tmp_path / "routed":  # staging writes its own files whole, too
            if not left[0]:
                raise OSError("killed")
            left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", breaks_down)
    with pytest.raises(OSError, match="killed"):
        route_everywhere(tiny_llava(seed=1)).save_pretrained(tmp_path / "routed")
    monkeypatch.undo()
    for load in (from_pretrained, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(CheckpointError, match=f"no {CONFIG_NAME}"):
            load(tmp_path / "routed")
    assert [path.name for path in tmp_path.iterdir()] == ["routed"]


def test_what_a_killed_save_left_is_cleared_by_the_next(tmp_path, monkeypatch):
    """Guards disks against staging folders that pile up; those of other folders are left alone."""
    model = route_everywhere(tiny_llava())
    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(checkpoint, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("killed")))
        for name in ("routed", "routed-2", "routed.2"):
            with pytest.raises(OSError, match="killed"):
                model.save_pretrained(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 3
    model.save_pretrained(tmp_path / "routed")
    assert len(list(tmp_path.iterdir())) == 3  # the model and the two others' leftovers
    assert_same_model(model, from_pretrained(tmp_path / "routed"))


@pytest.mark.parametrize("name", ["./nothing here", "runs/nothing", "nothing-of-the-kind"])
def test_a_name_that_leads_nowhere_is_refused(name, tmp_path, monkeypatch):
    """Guards typing errors, for routed models and for bases."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (from_pretrained, load_base, load_processor):
        with pytest.raises(CheckpointError, match=name):
            load(name)


def test_the_pocket_folder_is_plain():
    """Guards ``pocket``: what ships is the base model, and its class is transformers' own."""
    assert not (POCKET / CONFIG_NAME).exists()
    assert type(load_base("pocket", random_init=True)) is LlavaForConditionalGeneration
