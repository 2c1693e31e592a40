"""Config: what is accepted, what is refused and how, and that it survives a round trip."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from mtunet_dist import plugins
from mtunet_dist.config import Config, config_from_text, load_config, plugin_options, save_config
from mtunet_dist.config.typed_yaml import to_yaml
from mtunet_dist.errors import InputError

REQUIRED = ["run_dir=r", "data.root=d"]


def test_defaults_are_the_papers_settings() -> None:
    config = load_config(None, REQUIRED)
    assert (config.optim.name, config.optim.lr, config.epochs, config.batch_size) == ("adam", 1e-4, 200, 8)
    assert config.model == {
        "name": "mtunet",
        "widths": (64, 128, 256, 512),
        "bottleneck": 1024,
        "dense_scope": "encoder",
        "attention": True,
        "cross_talk": True,
        "cross_talk_from": "attended",
        "dense_image": False,
        "skips_after_dropout": False,
        "upsampling": "transposed",
        "dropout": 0.2,
    }
    assert config.weighting["name"] == "learned"
    assert config.weighting["lr"] == 1e-3


def test_command_line_beats_file_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run_dir: r\ndata: {root: d, eval: test}\nepochs: 7\noptim: {lr: 1e-3}\n")
    config = load_config(file, ["epochs=9"])
    assert (config.epochs, config.optim.lr, config.data.eval, config.data.train) == (9, 1e-3, "test", "train")


def test_saved_config_loads_back_equal(tmp_path: Path) -> None:
    config = load_config(None, [*REQUIRED, "model.widths=[4,4,8,8]", "weighting.name=fixed", "tasks=[depth]"])
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert config_from_text(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["lrr", "Did you mean", "lr"]),
        ("optm.lr=1", ["optm", "Did you mean", "optim"]),
        ("model.width=[4]", ["width", "Did you mean", "widths", "mtunet"]),
        ("model.widths=4", ["widths"]),
        ("epochs=ten", ["epochs", "ten"]),
        ("epochs=0", ["epochs=0", "positive"]),
        ("optim.clip_norm=-1", ["optim.clip_norm", "negative"]),
        ("precision=fp8", ["fp8", "bf16"]),
        ("model.name=mtnet", ["mtnet", "Did you mean", "mtunet"]),
        ("weighting.name=none", ["none", "equal", "fixed", "learned"]),
        ("weighting.name=null", ["null", "learned"]),
        ("model=mtunet", ["model=mtunet", "write model.name=mtunet"]),
        ("optim=adam", ["optim=adam", "write optim.name=adam"]),
        ("data=null", ["data=null", "section", "root, train"]),
        ("tasks=depth", ["tasks=depth", "must be a list", "tasks=[depth]"]),
        ("tasks[0]=depth", ["tasks", "must be a list"]),
        ("optim.betas=[0.9]", ["optim.betas=[0.9]", "list of 2"]),
        ("optim.betas=[0.9,a]", ["optim.betas=[0.9, a]", "numbers"]),
        ("optim.betas=[0.9,1]", ["optim.betas=[0.9, 1.0]", "[0, 1)"]),
        ("optim.momentum=1", ["optim.momentum=1.0", "[0, 1)"]),
        ("optim.step_gamma=0", ["optim.step_gamma=0.0", "positive"]),
        ("optim.poly_power=-1", ["optim.poly_power=-1.0", "positive"]),
        ("optim.lr=inf", ["optim.lr=inf", "finite"]),
        ("optim.weight_decay=.nan", ["optim.weight_decay=nan", "finite"]),
        ("data.augment.scales=[1.0,.inf]", ["data.augment.scales=[1.0, inf]", "finite"]),
        ("model.dropout=.nan", ["dropout=nan", "finite", "mtunet"]),
        ("data.augment.flp=true", ["data.augment.flp", "Did you mean", "flip"]),
        ("weighting.windw=3", ["windw", "Did you mean", "window", "learned"]),
        ("run_dir=", ["run_dir", "empty"]),
        ("data.root=???", ["data.root", "given"]),
        ("run_dir=\udcff", ["run_dir=", "UTF-8"]),
        ("data.augment.scales=[0.5]", ["scales", "0.5"]),
        ("tasks=[depth,depth]", ["['depth', 'depth']", "different targets", "segmentation", "normals"]),
        ("tasks=[]", ["tasks=[]", "one or more"]),
        ("tasks=[parts]", ["checkpoint.best is missing", "parts/miou"]),
        ("epochs", ["epochs", "key=value"]),
        ("epochs=[1", ["epochs=[1"]),
    ],
)
def test_wrong_override_is_one_line_that_names_it(override: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load_config(None, [*REQUIRED, override])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "text",
    [
        *["0123", "1e3", "1:30", "null", "true", "off", "[a", "{b", "*a", "a=b", "tür", "道", "'q'", '"q"'],
        *["$x", "${x}", "${oc.env:HOME}", "${", r"\${x}", r"\\${x}" "\\"],
        "a #b",
        "/a: b",
    ],
)
def test_strings_arrive_as_they_stand_and_survive_saving(text: str, tmp_path: Path) -> None:
    config = load_config(None, [f"run_dir={text}", f"data.root={text}", f"checkpoint.best={text}"])
    assert (config.run_dir, config.data.root, config.checkpoint.best) == (text, text, text)
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert config_from_text(to_yaml(config)) == config


def test_a_files_reference_to_another_key_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run_dir: runs/${seed}\ndata: {root: d}\nmodel: {name: mtunet, bottleneck: '${batch_size}'}\n")
    config = load_config(file, ["seed=3", "batch_size=4", "model.dropout=0.5"])
    assert (config.run_dir, config.model["bottleneck"], config.model["dropout"]) == ("runs/3", 4, 0.5)


class OptionOfText:
    """A plugin with an option that is a string."""

    def __init__(self, *, path: str = "", kind: Literal["off", "on"] = "on", size: int = 1) -> None: ...


def test_text_options_of_plugins_arrive_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    find = plugins.find
    monkeypatch.setattr(plugins, "find", lambda kind, name: find(kind, name) if kind == "task" else OptionOfText)
    words = [f"model.{word}" for word in ("path=[${x}: null", "kind=off", "size=2", "name=textual")]
    config = load_config(None, [*REQUIRED, *words])
    assert config.model == {"name": "textual", "path": "[${x}: null", "kind": "off", "size": 2}
    assert config_from_text(to_yaml(config)) == config


def test_another_plugin_does_not_inherit_the_options_of_the_files(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {name: mtunet, widths: [4, 4, 8, 8], bottleneck: 8, dropout: 0.5}\n")
    assert load_config(file, [*REQUIRED, "model.name=mtunet"]).model["widths"] == (4, 4, 8, 8)
    assert load_config(file, [*REQUIRED, "model.name=segnet"]).model == plugin_section("segnet")
    narrow = load_config(file, [*REQUIRED, "model.widths=[4,4,4,4,4]", "model.name=segnet"])
    assert narrow.model == {**plugin_section("segnet"), "widths": (4, 4, 4, 4, 4)}
    assert load_config(file, [*REQUIRED, "model.name=st_unet"]).model["dropout"] == 0.2


def plugin_section(name: str) -> dict[str, object]:
    return {"name": name, **plugin_options("model", name, {})}


def test_a_plugin_without_a_name_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("weighting: {name: null}\n")
    with pytest.raises(InputError, match=r"weighting\.name is missing.*learned"):
        load_config(file, REQUIRED)


def test_missing_required_key_is_named() -> None:
    with pytest.raises(InputError, match=r"run_dir"):
        load_config(None, ["data.root=d"])


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1\n")
    with pytest.raises(InputError, match=r"bad\.yaml"):
        load_config(bad)
    bad.write_text("- 1\n")
    with pytest.raises(InputError, match=r"bad\.yaml.*mapping"):
        load_config(bad)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(None, REQUIRED).epochs = 3  # type: ignore[misc]


def test_every_plugin_file_defines_a_plugin_with_defaults_for_all_options() -> None:
    for kind in plugins.PACKAGES:
        assert plugins.available(kind)
        for name in plugins.available(kind):
            assert isinstance(plugin_options(kind, name, {}), dict)


def test_every_config_file_in_the_repository_loads() -> None:
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert files
    for file in files:
        assert isinstance(load_config(file), Config)
