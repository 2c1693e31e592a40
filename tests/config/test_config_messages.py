"""Every key of a config: a value of the wrong kind is refused in words, and text stays as it is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import omegaconf.errors
import omegaconf.nodes
import pytest
import yaml

from mtunet_dist import plugins
from mtunet_dist.config import PLUGIN_SECTIONS, Config, flat, key_hints, load_config, plugin_options, save_config
from mtunet_dist.config.typed_yaml import all_keys, kind_of, load_as
from mtunet_dist.errors import InputError

REQUIRED = ["run_dir=r", "data.root=d"]
FOREIGN = {
    name for module in (omegaconf, omegaconf.errors, omegaconf.nodes) for name in vars(module) if name[0].isupper()
}
FOREIGN -= {"Any", "Path", "Enum", "Dict", "List", "Union", "Literal", "Optional", "Type"}  # not OmegaConf's own


def wrong_values(kind: Any) -> Iterator[Any]:
    """What a key of the type ``kind`` cannot be, as YAML gives it."""
    yield {"a": 1}
    yield None
    if get_origin(kind) is tuple:
        items = 1 if get_args(kind)[-1] is ... else len(get_args(kind))
        yield from (3, "word", True)
        yield from ([wrong] * items for wrong in wrong_values(get_args(kind)[0]))
        if get_args(kind)[0] is int:
            yield [4, 4, 8, 8.5]
        return
    yield [1, 2]
    if kind is not str:
        yield "neither"
        yield "[["
    if kind is int:
        yield 8.5
    if kind in (int, float):
        yield True
    if kind is bool:
        yield 0.5


def check(message: str, key: str, value: Any) -> None:
    assert "\n" not in message
    assert key in message
    assert all(word in message for word in re.findall(r"[\w.]+", json.dumps(value))), message
    assert "$" not in message
    assert not FOREIGN & set(re.findall(r"\w+", message)), message


def refusal(call: Callable[..., object], *args: Any) -> str:
    with pytest.raises(InputError) as refused:
        call(*args)
    return str(refused.value)


def nested(key: str, value: Any) -> Any:
    """``value`` as a file has it at the dotted ``key``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


OWN = [key for key in all_keys(Config) if key.split(".")[0] not in PLUGIN_SECTIONS]
PLUGINS = [(kind, name) for kind in plugins.PACKAGES for name in plugins.available(kind)]
TEXTS = [key for key in OWN if kind_of(Config, key) is str]


@pytest.mark.parametrize("key", OWN)
def test_a_value_of_the_wrong_kind_is_refused_in_words(key: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for value in wrong_values(kind_of(Config, key)):
        file.write_text(yaml.safe_dump(nested(key, value)), encoding="utf-8")
        check(refusal(load_config, file), key, value)
    if key not in TEXTS:  # on the command line all is text
        check(refusal(load_config, None, [f"{key}={json.dumps(value)}"]), key, value)


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_an_option_of_the_wrong_kind_is_refused_in_words(kind: str, name: str) -> None:
    schema = plugins.options_schema(kind, name)
    for key in all_keys(schema):
        for value in wrong_values(kind_of(schema, key)):
            message = refusal(plugin_options, kind, name, {key: value})
            assert f"{kind} '{name}'" in message
            check(message, key, value)
        if kind_of(schema, key) is not str:
            check(refusal(plugin_options, kind, name, [f"{key}={json.dumps(value)}"]), key, value)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("seed=${nope}", ["seed=${nope}", "nothing that it refers to"]),
        ("seed=${oc.env:NO_SUCH_VARIABLE}", ["seed=", "NO_SUCH_VARIABLE"]),
        ("seed=${", ["seed=${", "'}'"]),
        ("epochs=${run_dir}", ["epochs=${run_dir}", "whole number"]),
        ("tasks=[null]", ["tasks=[null]", "list of texts"]),
        ("tasks=[[depth]]", ["tasks=[[depth]]", "list of texts"]),
        ("model.widths=[4,4,8,8.5]", ["widths=[4, 4, 8, 8.5]", "list of whole numbers"]),
        ("optim.betas[0]=3", ["optim.betas", "list"]),
        ("run_dir.a=3", ["run_dir={a: 3}", "text"]),
        ("=3", ["'=3'", "key=value"]),
    ],
)
def test_what_else_omegaconf_says_is_said_in_our_words(word: str, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    key, _, value = word.partition("=")
    messages = [refusal(load_config, None, [*REQUIRED, word])]
    if "$" in word:
        file.write_text(f"run_dir: r\ndata: {{root: d}}\n{key}: {value}\n", encoding="utf-8")
        messages.append(refusal(load_config, file))
        assert not word.endswith("${") or str(file) in messages[1]
    for message in messages:
        assert "\n" not in message and not FOREIGN & set(re.findall(r"\w+", message)), message
        assert "$VALUE" not in message
    assert all(part in messages[0] for part in parts), messages[0]


WRITTEN = ["2024_11_28", "1e3", "on", "Yes", "2024-11-28", "1:30", "0123", "0x1F", "1_000.5", ".inf", "007", "${seed}"]


@pytest.mark.parametrize("written", WRITTEN)
def test_text_in_a_file_stays_as_it_is_written(written: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    body = (
        f"run_dir: {written}\ndata:\n  root: &a {written}\n  train: *a\n  eval: {{}}\ncheckpoint:\n  best: {written}\n"
    )
    file.write_text(body.replace("{}", f"'{written}'"), encoding="utf-8")
    config = load_config(file)
    expected = "0" if written == "${seed}" else written
    texts = (config.run_dir, config.data.root, config.data.train, config.data.eval, config.checkpoint.best)
    assert texts == (expected,) * 5
    save_config(config, file)
    assert load_config(file) == config
    file.write_text(f"strategy:\n  name: deepspeed\n  config_file: {written}\n", encoding="utf-8")
    assert load_config(file, REQUIRED).strategy["config_file"] == expected


@dataclass(frozen=True)
class Lists:
    """A schema with what no config has."""

    words: tuple[str, ...] = ()
    switch: Literal["off", "on"] = "on"
    sizes: tuple[int, ...] = ()


def test_text_in_lists_and_choices_stays_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("words: [1e3, 2024_11, on]\nswitch: off\nsizes: [1_000, 2]\n", encoding="utf-8")
    assert load_as(Lists, file) == Lists(("1e3", "2024_11", "on"), "off", (1000, 2))


@pytest.mark.parametrize("key", [*TEXTS, "strategy.config_file"])
def test_a_leading_tilde_is_the_home_folder(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file, words = tmp_path / "c.yaml", [word for word in REQUIRED if not word.startswith(key)]
    plugin = ["strategy.name=deepspeed"] if key.startswith("strategy") else []
    for written, path in (("~/x", f"{tmp_path}/home/x"), ("~", f"{tmp_path}/home"), ("./~/x", "./~/x"), ("a~", "a~")):
        section = nested(key, written)
        if plugin:
            section["strategy"]["name"] = "deepspeed"
        file.write_text(json.dumps(section), encoding="utf-8")  # JSON has quotes, so that ~ is not null
        assert flat(load_config(file, words))[key] == path
        assert flat(load_config(None, [*words, *plugin, f"{key}={written}"]))[key] == path
    message = refusal(load_config, None, [*words, *plugin, f"{key}=~no-such-user/x"])
    assert key.rpartition(".")[2] in message and "~no-such-user/x" in message


def test_a_list_of_texts_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_as(Lists, {"words": ["~/a:/b", "c"]}).words == (f"{tmp_path}/a:/b", "c")


def test_a_file_that_is_not_utf8_or_not_readable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes("epochs: 1\nrun_dir: läufe\n".encode("latin-1"))
    assert re.search(r"c\.yaml: line 2 is not UTF-8", refusal(load_config, file))
    file.write_bytes("run_dir: läufe\n".encode("utf-16"))
    assert re.search(r"c\.yaml: line 1 is not UTF-8", refusal(load_config, file))
    file.write_bytes("\ufeffrun_dir: läufe\n".encode())  # as some editors begin a file
    assert load_config(file, ["data.root=d"]).run_dir == "läufe"

    def unreadable(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    assert "c.yaml: cannot be read: Permission denied" in refusal(load_config, file)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *[
            ("learning_rate=1", "optim.lr"),
            ("lr=1", "optim.lr"),
            ("LR=1", "optim.lr"),
            ("optim.learning-rate=1", "optim.lr"),
        ],
        *[("optimizer.lr=1", "optim"), ("training.lr=1", "optim.lr"), ("optimizer=sgd", "optim.name")],
        *[("batch=1", "batch_size"), ("bs=1", "batch_size"), ("data.batch_size=1", "batch_size")],
        *[("num_epochs=1", "epochs"), ("epoch=1", "epochs"), ("max_epochs=1", "epochs")],
        *[("wd=1", "optim.weight_decay"), ("momentum=1", "optim.momentum"), ("warmup=1", "optim.warmup_epochs")],
        *[("workers=1", "data.threads"), ("num_workers=1", "data.threads"), ("data.workers=1", "data.threads")],
        *[("amp=true", "precision"), ("output_dir=x", "run_dir"), ("out=x", "run_dir"), ("data_dir=x", "data.root")],
        *[("dropout=0.1", "model.dropout"), ("network=mtunet", "model.name"), ("root=x", "data.root")],
        *[("loader=torch", "data.loader"), ("flip=true", "data.augment.flip"), ("grad_clip=1", "optim.clip_norm")],
    ],
)
def test_names_that_other_programs_use_lead_to_ours(word: str, meant: str) -> None:
    message = refusal(load_config, None, [*REQUIRED, word])
    assert f"Did you mean '{meant}'" in message


@pytest.mark.parametrize(
    ("word", "where"), [("gpus=2", "--nproc"), ("image_size=3", "prepare --size"), ("resume=x", "run_dir")]
)
def test_what_the_config_does_not_say_is_said_where_to_say(word: str, where: str) -> None:
    assert where in refusal(load_config, None, [*REQUIRED, word])


def test_every_synonym_leads_to_a_key_that_there_is() -> None:
    keys = all_keys(Config)
    assert not [end for end in key_hints.SYNONYMS.values() if not any(k == end or k.endswith(f".{end}") for k in keys)]
