"""Every command where its terminal is hostile: Ctrl-C at bad moments, an output that takes no more or no umlauts."""

from __future__ import annotations

import ast
import importlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtunet_dist import cli
from mtunet_dist.config import load_config, save_config
from mtunet_dist.system.command import command
from mtunet_dist.system.terminal import INTERRUPTED
from mtunet_dist.train import train

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
Words = Callable[[str], list[object]]


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an umlaut: ``config.yaml``, the run ``läufe``, and the data that it was trained on."""
    folder = tmp_path_factory.mktemp("über")
    (folder / "daten").symlink_to(prepared)
    words = [f"run_dir={folder}/läufe", f"data.root={folder}/daten", "model.widths=[4,4,8,8]", "model.bottleneck=8"]
    config = load_config(
        None, [*words, "batch_size=4", "eval_batch_size=2", "epochs=1", "device=cpu", "log.pictures=1"]
    )
    save_config(config, folder / "config.yaml")
    train(config)
    return folder


@pytest.fixture
def words(trained: Path, prepared: Path, tmp_path: Path) -> Words:
    """The words of a small but whole work of each verb."""
    out = tmp_path / "größe"
    every: dict[str, list[object]] = {
        "synthesize": [out, "--train=1", "--val=0", "--test=0", "--height=32", "--width=64", "--workers=1"],
        "prepare": ["folder", prepared.parent / "source", out, "--size", "32x48", "--workers", "0"],
        "summary": [trained / "daten", "--out", tmp_path / "bild-ü.png"],
        "train": [trained / "config.yaml"],
        "evaluate": [trained / "läufe"],
        "reproduce": ["--help"],
        "launch": ["--help"],
        "sweep": ["--help"],
        "submit": ["--help"],
        "status": [trained],
        "predict": [trained / "läufe", prepared.parent / "source" / "val" / "rgb", "--out", out],
        "export": [trained / "läufe", "--out", tmp_path / "gewichte-ü.safetensors"],
    }
    return every.__getitem__


def outcome(verb: str, words: list[object], monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a verb in this process."""
    monkeypatch.setattr(sys, "argv", [verb, *map(str, words)])
    try:
        importlib.import_module(f"mtunet_dist.{verb}").main()
    except SystemExit as ended:
        return ended.code or 0
    return 0


@pytest.mark.parametrize("verb", cli.VERBS)
def test_an_output_without_umlauts_gets_escapes(verb: str, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert outcome(verb, words(verb), monkeypatch) == 0
    assert sys.stdout is stdout
    assert stdout.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_full_disk_behind_the_output_stops_nothing_but_is_said(
    verb: str, words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert outcome(verb, words(verb), monkeypatch) == 1
    assert capsys.readouterr().err == (
        "error: standard output: No space left on device; what was to be printed is lost\n"
    )
    for word in words(verb):
        if isinstance(word, Path):
            assert word.exists()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_reader_that_wants_no_more_is_no_error(
    verb: str, words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", pipe)
        assert outcome(verb, words(verb), monkeypatch) == 0
    assert "rror" not in capsys.readouterr().err


def test_a_closed_stdout_or_stderr_changes_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        for stream in (None, io.TextIOWrapper(full, write_through=True)):
            monkeypatch.setattr(sys, "stderr", stream)
            assert outcome("train", ["nowhere.yaml"], monkeypatch) == 2
            monkeypatch.setattr(sys, "stdout", None)
            assert outcome("train", ["--version"], monkeypatch) == 0


@pytest.mark.parametrize("verb", cli.VERBS)
def test_ctrl_c_at_work_is_a_line(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("argparse.ArgumentParser.parse_known_args", lambda *_, **__: press())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert outcome(verb, [], monkeypatch) == INTERRUPTED
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


@pytest.fixture
def hooked(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that presses Ctrl-C as it imports numpy or torch; it first says how threads wait."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run in the background\n"
        "class Hook:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('numpy', 'torch'):\n"
        "            print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules, flush=True)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            time.sleep(10)\n"
        "sys.meta_path.insert(0, Hook())\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    return {**kept, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "status"])  # that imports neither
@pytest.mark.parametrize("way", ["mtunet", "python -m"])
def test_ctrl_c_during_imports_is_a_line_and_threads_were_told_to_wait_before_torch(
    verb: str, way: str, hooked: dict[str, str]
) -> None:
    words = [str(SCRIPTS / "mtunet"), verb] if way == "mtunet" else ["-m", f"mtunet_dist.{verb}"]
    _interrupted_import(words, hooked)


@pytest.mark.parametrize("script", ["launch/local.py", "launch/nodes.py", "tune/sweep.py", "slurm/submit.py"])
def test_ctrl_c_during_imports_of_a_script_is_a_line(script: str, hooked: dict[str, str]) -> None:
    _interrupted_import([script], hooked)


def _interrupted_import(words: list[str], hooked: dict[str, str]) -> None:
    ended = subprocess.run(
        [sys.executable, *words, "--help"], env=hooked, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (INTERRUPTED, "interrupted\n")
    assert ended.stdout == "PASSIVE False\n"


def ends(tmp_path: Path, code: str) -> tuple[int, str]:
    """Exit code and stderr of a script, in a session of its own, which Ctrl-C reaches as a whole."""
    file = tmp_path / "script.py"
    file.write_text(
        "import os, signal, sys, time\n"
        "if __name__ == '__main__': signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mtunet_dist.system.command import command\nfrom mtunet_dist.system.workers import Pool\n" + code,
        encoding="utf-8",
    )
    ended = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, timeout=120, start_new_session=True
    )
    return ended.returncode, ended.stderr


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    code, said = ends(
        tmp_path,
        """
@command
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
main()
""",
    )
    assert (code, said) == (-signal.SIGINT, "")  # 130 to a shell


def test_ctrl_c_in_a_destructor_or_after_the_work_is_heard(tmp_path: Path) -> None:
    code, said = ends(
        tmp_path,
        """
class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
@command
def main():
    Deaf()
    time.sleep(60)
main()
""",
    )
    assert (code, said) == (INTERRUPTED, "interrupted\n")
    code, said = ends(
        tmp_path,
        """
import atexit, threading
def at_end():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
atexit.register(at_end)
@command
def main(): ...
main()
""",
    )
    assert (code, said) == (-signal.SIGINT, "")


@pytest.mark.parametrize("moment", ["0", "0.05", "0.3", "1"])
def test_workers_leave_ctrl_c_to_their_parent(tmp_path: Path, moment: str) -> None:
    code, said = ends(
        tmp_path,
        f"""
def work(number):
    time.sleep(0.02)
@command
def main():
    with Pool(2) as pool:
        done = pool.map(work, range(1000))
        time.sleep({moment})
        os.killpg(0, signal.SIGINT)
        try:
            list(done)
        finally:
            pool.shutdown(cancel_futures=True)
if __name__ == "__main__":
    main()
""",
    )
    assert (code, said) == (INTERRUPTED, "interrupted\n")


def test_all_pools_of_processes_are_that_one() -> None:
    found = {
        str(path.relative_to(REPOSITORY))
        for folder in ("mtunet_dist", "launch", "slurm", "tune")
        for path in (REPOSITORY / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (getattr(node, "id", None) or getattr(node, "attr", None)) in ("ProcessPoolExecutor", "get_context")
    }
    assert found == {"mtunet_dist/system/workers.py"}


def test_a_command_of_one_s_own_gives_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGINT), sys.stdout, sys.unraisablehook
    command(lambda: None)()
    assert (signal.getsignal(signal.SIGINT), sys.stdout, sys.unraisablehook) == before
