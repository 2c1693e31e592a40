"""What all command lines share: one name, --version, errors of one line, ``~``, formats, devices."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mtunet_dist import __version__, cli, distributed
from mtunet_dist.config import load_config, save_config
from mtunet_dist.errors import InputError
from mtunet_dist.system import arguments
from mtunet_dist.train import train

REPOSITORY = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(main, word, ...)``: exit code, stdout and stderr of a command in this process."""

    def call(main: Callable[[], None], *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["python -m something", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def main_of(verb: str) -> Callable[[], None]:
    main: Callable[[], None] = importlib.import_module(f"mtunet_dist.{verb}").main
    return main


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_has_one_name_however_it_is_started(verb: str, run: Run) -> None:
    assert run(main_of(verb), "--help")[1].startswith(f"usage: mtunet {verb} ")
    code, _, error = run(main_of(verb), "--no-such-option")
    assert code == 2
    assert error.startswith("error: ") and error.endswith(f"mtunet {verb} --help says more\n")
    assert len(error.splitlines()) == 1 and "key=value;" not in error


def test_no_message_names_another_way_to_start_a_verb() -> None:
    wrong = []
    for folder in ("mtunet_dist", "launch", "slurm", "tune"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            documentation = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if has_docstring(node)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in documentation:
                    wrong += [f"{path.name}: {node.value}"] if "python -m mtunet_dist." in node.value else []
    assert not wrong


def has_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)


@pytest.mark.parametrize("main", [cli.main, *map(main_of, cli.VERBS)])
def test_every_command_says_its_version(main: Callable[[], None], run: Run) -> None:
    assert run(main, "--version") == (0, f"mtunet_dist {__version__}\n", "")


def test_an_unknown_verb_is_one_line(run: Run) -> None:
    code, _, error = run(cli.main, "trian")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "trian" in error and "Did you mean 'train'" in error and "evaluate" in error


def test_paths_are_expanded_in_every_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert arguments.path("~/x") == tmp_path / "x"
    assert (arguments.home("./~/x"), arguments.home("s/x/")) == ("./~/x", "s/x/")
    for main, words in {
        main_of("train"): ["~/c.yaml"],
        main_of("evaluate"): ["~/run"],
        main_of("predict"): ["~/run", "~/photo.png", "--out=~/out"],
        main_of("export"): ["~/run", "--out=~/w.safetensors"],
        main_of("summary"): ["~/data"],
        main_of("prepare"): ["folder", "~/source", "~/out"],
        main_of("reproduce"): ["table2", "--nyuv2=~/data", "--out=~/out"],
        main_of("launch"): ["~/c.yaml"],
        main_of("status"): ["~/runs"],
        main_of("submit"): ["train", "~/c.yaml", "--profile=~/cluster.yaml"],
        main_of("sweep"): ["~/sweep.yaml"],
    }.items():
        code, _, error = run(main, *words)
        assert code == 2
        assert f"{tmp_path}/" in error and "~" not in error, error
    assert run(main_of("synthesize"), "--train=0", "--val=0", "--test=0", "~/streets")[0] == 0
    assert (tmp_path / "streets").is_dir() and not (tmp_path / "~").exists()
    code, _, error = run(main_of("summary"), "~no-such-user/data")
    assert code == 2 and "~no-such-user/data: there is no such home folder" in error


def test_no_path_of_a_command_line_is_left_unexpanded() -> None:
    wrong = []
    for folder in ("mtunet_dist", "launch", "slurm", "tune"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "type" and getattr(node.value, "id", None) == "Path":
                    wrong.append(f"{path.name}:{node.value.lineno}")
    assert not wrong


@pytest.mark.parametrize(
    ("verb", "words", "end"),
    [
        *[
            ("export", ["run", f"--out={name}"], ".safetensors")
            for name in ("m.onnx", "m.pt", "m", "m.SAFETENSORS.tmp")
        ],
        *[("summary", ["data", f"--out={name}"], ".png") for name in ("x.jpg", "x.pdf", "x")],
        ("predict", ["run", "photo.png", "--out=result.png"], "folder"),
        ("prepare", ["folder", "root", "data.tar"], "folder"),
        ("synthesize", ["streets.zip"], "folder"),
        ("reproduce", ["table2", "--out=table2.csv"], "folder"),
    ],
)
def test_a_name_that_promises_another_format_is_refused(
    verb: str, words: list[str], end: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = run(main_of(verb), *words)
    name = words[-1].removeprefix("--out=")
    assert (code, len(error.splitlines())) == (2, 1)
    assert name in error and end in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["step.py", "startup.py", "sweep_overhead.py"])
def test_benchmarks_write_markdown_only(script: str) -> None:
    text = (REPOSITORY / "benchmarks" / script).read_text(encoding="utf-8")
    assert '"--out", type=arguments.file(".md")' in text


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
def test_a_device_may_be_said_in_two_ways(
    verb: str,
    run: Run,
    overrides: list[str],
    tmp_path: Path,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load_config(None, [*overrides, "epochs=1"])
    save_config(config, tmp_path / "c.yaml")
    if verb != "train":
        train(config)
        capsys.readouterr()
    photo = prepared.parent / "source" / "val" / "rgb" / "000.png"
    words: list[object] = {
        "train": [tmp_path / "c.yaml"],
        "evaluate": [config.run_dir],
        "predict": [config.run_dir, photo, f"--out={tmp_path / 'out'}"],
    }[verb]

    def pick(device: str) -> None:
        raise InputError(f"picked {device}")

    monkeypatch.setattr(distributed, "pick_device", pick)
    for device in ("cuda", "cpu", "auto"):
        for said in ([f"device={device}"], ["--device", device], [f"--device={device}", "seed=3"]):
            assert run(main_of(verb), *words, *said) == (2, "", f"error: picked {device}\n")
    for said in ("device=tpu", "--device=tpu"):
        code, _, error = run(main_of(verb), *words, said)
        assert code == 2 and "tpu" in error and "cuda" in error and len(error.splitlines()) == 1
