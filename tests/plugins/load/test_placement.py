"""Parts of a model can be elsewhere: on the CPU, on disk, on other GPUs, with the same tokens."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import builder, recipe, verdict
from engine.errors import DoesNotFit, RecipeError
from engine.loading.placement import Placement
from tests.conftest import Build
from tests.models import tiny_model
from tests.plugins.helpers import logits, plain, receipt

EVERYTHING = 460_032
"""Bytes of the tiny llama's parameters in float32."""
LAYER = "{rest:cpu,model.layers.0:disk}"


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        layout: tiny_model("llama", tmp_path_factory.mktemp(layout), max_shard_size=size)
        for layout, size in {"single": "50GB", "sharded": "100KB"}.items()
    }


def refused(*overrides: str) -> str:
    """Return what check says to a recipe."""
    found = verdict.check(recipe.compose("base", ["model.path=recipes://embedded", *overrides]))
    assert all(problem.hint for problem in found.problems)
    return "\n".join(map(str, found.problems))


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize("device_map", [LAYER, "{rest:disk}", "{model:disk,lm_head:cpu}"])
def test_layers_on_disk_give_the_same_tokens(
    build: Build, layouts: dict[str, Path], tmp_path: Path, layout: str, device_map: str
) -> None:
    folder = layouts[layout]
    session = build(
        f"model.path={folder}",
        f"load.device_map={device_map}",
        f"load.offload_folder={tmp_path}/off",
        "attention=eager",
    )
    assert logits(session.model).equal(logits(plain(folder)))
    assert (
        session.generate("def add").token_ids
        == build(f"model.path={folder}", "attention=eager").generate("def add").token_ids
    )
    evidence = receipt(session, "load").evidence
    on_disk = sum(p.numel() * 4 for p in session.model.parameters() if p.is_meta)
    assert on_disk > 0
    assert evidence["tensors held against the files"] == 21
    if device_map == "{rest:disk}":
        assert (evidence["device"], on_disk) == ("disk", EVERYTHING)
    else:
        assert evidence["bytes on disk"] == on_disk
        assert evidence["bytes on cpu"] == EVERYTHING - on_disk


@pytest.mark.parametrize("name", ["auto", "balanced", "sequential", "cpu"])
def test_a_machine_without_gpus_takes_every_named_map(build: Build, name: str) -> None:
    session = build(f"load.device_map={name}")
    assert session.generate("def add").token_ids == build().generate("def add").token_ids
    assert session.device == torch.device("cpu")
    assert receipt(session, "load").evidence["device"] == "cpu"


def test_what_exceeds_the_limit_goes_to_the_disk_only_with_leave(
    build: Build, tmp_path: Path
) -> None:
    limit = ("load.device_map=auto", "load.max_memory={cpu:300KB}")
    with pytest.raises(RecipeError, match=r"460032 bytes.*300000"):
        build(*limit)
    session = build(*limit, f"load.offload_folder={tmp_path}")
    evidence = receipt(session, "load").evidence
    assert int(evidence.get("bytes on cpu", 0)) <= 300_000
    assert "disk" in str(evidence["device"])
    assert logits(session.model).equal(logits(build().model))


def test_what_accelerate_offloads_without_leave_is_refused(build: Build, tmp_path: Path) -> None:
    model = build("load.device_map={rest:disk}", f"load.offload_folder={tmp_path}").model
    options: Any = {"device_map": "auto", "max_memory": {}, "offload_unpacked": False}
    Placement(offload_folder="there", **options).verify(model)
    with pytest.raises(DoesNotFit, match="would go to disk, which the recipe does not allow"):
        Placement(offload_folder=None, **options).verify(model)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "qwen3", "bloom"])
def test_other_families_can_be_offloaded(build: Build, tmp_path: Path, family: str) -> None:
    place = ("load.device_map={rest:disk}", f"load.offload_folder={tmp_path}")
    found = build(*place, family=family).generate("def add").token_ids
    assert found == build(family=family).generate("def add").token_ids


def test_converted_weights_are_offloaded_converted(build: Build, tmp_path: Path) -> None:
    place = (f"load.device_map={LAYER}", f"load.offload_folder={tmp_path}")
    session = build("heads=grouped", *place)
    assert any(tmp_path.rglob("*.safetensors"))
    assert logits(session.model).equal(logits(build("heads=grouped").model))
    other = build("heads=grouped", *place)  # in a folder of its own, though the option is the same
    assert len(list(tmp_path.iterdir())) == 2
    for each in (session, other):
        each.close()
    del session, other, each
    gc.collect()


def test_the_terminal_stays_quiet(
    build: Build, model: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model("llama")
    capfd.readouterr()
    build(f"load.device_map={LAYER}", f"load.offload_folder={tmp_path}").generate("def add")
    assert capfd.readouterr() == ("", "")


def test_offloaded_files_are_removed_with_the_model(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    words = [f"model.path={model('llama')}", "model.dtype=float32"]
    words += [f"load.device_map={LAYER}", f"load.offload_folder={tmp_path}"]
    session = builder.build(recipe.compose("base", words))
    assert list(tmp_path.iterdir())
    session.close()
    del session
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["load.device_map=everywhere"], "neither one of auto"),
        (["load.device_map={}"], "neither one of auto"),
        (["load.device_map={rest:tape}"], "nor a mapping of modules to cpu"),
        (["load.device_map={rest:0}", "target=cpu"], "the target has none"),
        (["load.device_map=auto", "load.max_memory={cpu:much}"], "no mapping of GPUs and cpu"),
        (["load.max_memory={cpu:1GiB}"], "max_memory does nothing"),
        (["load.device_map={rest:disk}"], "no folder is given"),
        (["load.offload_folder=x"], "offload_folder does nothing"),
        (["load.offload_unpacked=true"], "offload_unpacked does nothing"),
    ],
)
def test_impossible_places_are_refused(overrides: list[str], says: str) -> None:
    assert says in refused(*overrides)


def test_a_mapping_must_name_what_there_is_and_all_of_it(build: Build, tmp_path: Path) -> None:
    folder = f"load.offload_folder={tmp_path}"
    with pytest.raises(RecipeError, match=r"no module model\.layers\.7"):
        build("load.device_map={rest:cpu,model.layers.7:disk}", folder)
    with pytest.raises(RecipeError, match=r"says nothing of model\.embed_tokens, .*lm_head"):
        build("load.device_map={model.layers:disk}", folder)


def test_packing_and_offloading_need_consent() -> None:
    place = ("load.device_map={rest:0,lm_head:cpu}", "target=t4", "model.dtype=float16")
    assert "transformers refuses to leave it unpacked" in refused(*place, "quantize=nf4")
    assert refused(*place, "quantize=nf4", "load.offload_unpacked=true") == ""
    place = ("load.device_map={rest:cpu,lm_head:disk}", "load.offload_folder=x", "target=cpu")
    found = refused(*place, "quantize=nf4", "load.offload_unpacked=true")
    assert "nothing would be packed" in found


def test_memory_is_not_summed_up_where_it_is_spread() -> None:
    small = ["target=cpu", "target.usable_gib=0.000001"]
    assert "does-not-fit" in {p.code for p in verdict.check(recipe.compose("tiny", small)).problems}
    spread = [*small, "load.device_map=auto", "load.offload_folder=x"]
    assert verdict.check(recipe.compose("tiny", spread)).ok


def test_an_offload_folder_that_cannot_be_written_is_told_by_check(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    closed = [tmp_path / "file", tmp_path / "file" / "x" / "y", tmp_path / "nowhere" / "x"]
    closed += [tmp_path / ("x" * 300), Path("~nobody-of-this-name/x")]
    closed += [Path("/proc/x")] if Path("/proc/self").exists() else []
    for folder in closed:
        for device_map in (LAYER, "{rest:disk}", "auto"):
            said = refused(f"load.device_map={device_map}", f"load.offload_folder='{folder}'")
            assert f"load.offload_folder={folder} cannot be written: " in said, folder
    assert refused("load.device_map={rest:disk}", f"load.offload_folder={tmp_path}/a/b") == ""
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "nowhere"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_devices_give_the_same_tokens(build: Build) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found: Any = build("load.device_map={rest:0,model.layers.1:1}")
    assert receipt(found, "load").evidence["device"] == "cuda:0, cuda:1"
    assert found.generate("def add").token_ids == build().generate("def add").token_ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parts_wait_on_the_cpu(build: Build, tmp_path: Path) -> None:
    found: Any = build("load.device_map={rest:0,model.layers.1:cpu}")
    assert receipt(found, "load").evidence["device"] == "cpu, cuda:0"
    assert found.device == torch.device("cuda:0")
    assert found.generate("def add").token_ids == build().generate("def add").token_ids
    on_cpu = build("load.device_map=cpu")
    assert on_cpu.device == torch.device("cpu")
    assert on_cpu.generate("def add").token_ids == found.generate("def add").token_ids


@pytest.mark.parametrize("positions", ["alibi", "learned", "sinusoidal"])
def test_tables_of_positions_are_proven_from_the_disk(
    build: Build, tmp_path: Path, positions: str
) -> None:
    choice = f"position_encoding={positions}"
    place = ("load.device_map={rest:disk}", f"load.offload_folder={tmp_path}")
    found = build(choice, *place, family="gpt2").generate("def add").token_ids
    assert found == build(choice, family="gpt2").generate("def add").token_ids
