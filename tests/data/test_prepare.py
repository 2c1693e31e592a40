"""The ``prepare`` verb: exact pixels, the same bytes however it ran, resume, errors that name every bad sample."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError
from mtunet_dist.prepare import main, prepare
from mtunet_dist.sources._images import nearest, resize_rgb
from mtunet_dist.sources._source import RawSample
from mtunet_dist.system.folder_lock import LOCK, lock_folder
from mtunet_dist.tasks.segmentation import VOID

HEIGHT, WIDTH = 8, 16
SAMPLES = {"train": 5, "val": 2}


def raw_sample(split: str, i: int) -> RawSample:
    """Random pixels at twice the prepared size; some void, some depth invalid."""
    rng = np.random.default_rng([i, len(split)])
    shape = (2 * HEIGHT, 2 * WIDTH)
    label = rng.integers(0, 3, shape, dtype=np.uint8)
    label[:2] = VOID
    depth = rng.integers(1, 65536, shape).astype(np.uint16)
    depth[:, :4] = 0
    rgb = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    return RawSample(rgb, {"segmentation": label, "depth": depth})


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset for the source ``folder``."""
    root = tmp_path / "source"
    for split, count in SAMPLES.items():
        for i in range(count):
            sample = raw_sample(split, i)
            save(root / split / "rgb" / f"{split}{i}.png", sample.rgb)
            save(root / split / "label" / f"{split}{i}.png", sample.targets["segmentation"])
            save(root / split / "depth" / f"{split}{i}.png", sample.targets["depth"])
    (root / "dataset.yaml").write_text("classes: [a, b, c]\n")
    return root


def run(root: Path, out: Path, **changes: Any) -> PreparedDataset:
    settings: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "shard_size": 2}
    return prepare("folder", root, out, **{**settings, **changes})


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_label_and_depth_are_the_nearest_source_pixels(root: Path, tmp_path: Path) -> None:
    split = run(root, tmp_path / "out").split("train")
    for i in range(len(split)):
        source, stored = raw_sample("train", i), split.decode(i)
        for name, dtype in (("segmentation", np.uint8), ("depth", np.uint16)):
            expected = Image.fromarray(source.targets[name]).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
            np.testing.assert_array_equal(stored.targets[name], expected)
            assert stored.targets[name].dtype == dtype


def test_rgb_png_is_lossless_and_jpeg_close(root: Path, tmp_path: Path) -> None:
    expected = resize_rgb(raw_sample("train", 0).rgb, HEIGHT, WIDTH)
    lossless = run(root, tmp_path / "png", rgb_format="png").split("train").decode(0).rgb
    np.testing.assert_array_equal(lossless, expected)
    jpeg = run(root, tmp_path / "jpeg").split("train").decode(0).rgb
    assert jpeg.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(jpeg.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("targets", ["npy", "png"])
def test_shards_are_tars_that_webdataset_can_group(root: Path, tmp_path: Path, targets: str) -> None:
    run(root, tmp_path / "out", target_format=targets)
    with tarfile.open(tmp_path / "out/train-00001.tar") as tar:
        names = tar.getnames()
        parts = ("rgb.jpg", f"label.{targets}", f"depth.{targets}")
        assert names == [f"train{i}.{part}" for i in (2, 3) for part in parts]
        assert {(m.mtime, m.uid, m.gid, m.mode) for m in tar} == {(0, 0, 0, 0o644)}
    assert (tmp_path / "out/train-00001.tar").read_bytes()[257:263] == b"ustar\0"


def test_dataset_json_describes_what_is_stored(root: Path, tmp_path: Path) -> None:
    dataset = run(root, tmp_path / "out")
    samples = [raw_sample("train", i) for i in range(5)]
    label, depth = (
        np.stack([nearest(s.targets[name], HEIGHT, WIDTH) for s in samples]) for name in ("segmentation", "depth")
    )
    train = dataset.info.splits["train"]
    assert train.count == 5 and [s.count for s in train.shards] == [2, 2, 1]
    assert train.targets == {
        "segmentation": {
            "pixels": label.size,
            "valid": (label != VOID).sum(),
            "samples_without": 0,
            "classes": [(label == c).sum() for c in range(3)],
        },
        "depth": {
            "pixels": depth.size,
            "valid": (depth > 0).sum(),
            "samples_without": 0,
            "sum": depth.sum(dtype=np.int64),
            "min": depth[depth > 0].min(),
            "max": depth.max(),
        },
    }
    for shard in train.shards:
        data = (dataset.root / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    value = json.loads((dataset.root / "dataset.json").read_text())
    assert value["settings"] == {
        "source": "folder",
        "root": str(root),
        "options": {"allow_unlabelled": False},
        "height": HEIGHT,
        "width": WIDTH,
        "rgb_format": "jpeg",
        "target_format": "npy",
        "shard_size": 2,
        "resize": "stretch",
        "stored": "shards",
    }
    label, depth = value["targets"]["segmentation"], value["targets"]["depth"]
    assert (label["kind"], [entry["name"] for entry in label["classes"]]) == ("segmentation", ["a", "b", "c"])
    assert depth == {"kind": "depth", "depth": "metric", "unit": "metre", "scale": 0.001}


def test_same_bytes_from_two_workers_as_from_none(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "a" / "out", workers=0)
    run(root, tmp_path / "b" / "out", workers=2)
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


def test_resume_makes_only_what_is_missing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    run(root, whole)
    made: list[str] = []

    def stop_after(count: int) -> None:
        from mtunet_dist.data import shard_workers
        from mtunet_dist.data.shard_builder import make_shard

        def counted(task: Any) -> Any:
            if len(made) == count:
                raise KeyboardInterrupt
            made.append(task.path.name)
            return make_shard(task)

        monkeypatch.setattr(shard_workers, "make_shard", counted)

    stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        run(root, out)
    with pytest.raises(InputError, match="not a complete prepared dataset"):
        PreparedDataset(out)
    # What a kill at other moments leaves: a half-written shard, and a shard without its sidecar.
    (out / "train-00002.tar.tmp").write_bytes(b"half")
    (out / "train-00001.tar.done").unlink()
    made.clear()
    stop_after(-1)
    run(root, out)
    assert made == ["train-00001.tar", "train-00002.tar", "val-00000.tar"]
    assert contents(out) == contents(whole)


def test_shards_of_other_settings_are_not_taken_over(root: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "x" / "out", tmp_path / "y" / "out"
    (root / "val/label/val1.png").rename(tmp_path / "held.png")
    save(root / "val/label/val1.png", np.full((2 * HEIGHT, 2 * WIDTH), 9, dtype=np.uint8))
    with pytest.raises(InputError):
        run(root, out)
    assert (out / "train-00000.tar.done").is_file()
    (tmp_path / "held.png").replace(root / "val/label/val1.png")
    run(root, out, height=4, shard_size=4)
    run(root, other, height=4, shard_size=4)
    assert contents(out) == contents(other)


def test_shard_is_made_again_when_a_sample_got_its_label(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (root / "train/label/train0.png").rename(tmp_path / "held.png")
    (root / "val/label/val1.png").rename(tmp_path / "other.png")
    (root / "val/label/val1.png").write_bytes((tmp_path / "other.png").read_bytes()[:-5])
    with pytest.raises(InputError, match=r"val1\.png: corrupt"):
        run(root, out)
    (tmp_path / "held.png").rename(root / "train/label/train0.png")
    (tmp_path / "other.png").replace(root / "val/label/val1.png")
    dataset = run(root, out)
    assert (dataset.split("train").decode(0).targets["segmentation"] != VOID).any()
    assert dataset.info.splits["train"].targets["segmentation"]["samples_without"] == 0


def test_complete_dataset_is_left_alone(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(root, out)
    (out / "train-00000.tar.done").write_text("{}")  # damaged, but not needed
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run(root, out)
    assert "is complete" in " ".join(capsys.readouterr().out.split())  # the folder before it may fill a line
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(InputError, match="width=16 instead of 32"):
        run(root, out, width=32)


def test_bad_samples_are_all_named_and_good_shards_kept(root: Path, tmp_path: Path) -> None:
    for name in ("train1", "train4"):
        path = root / "train/label" / f"{name}.png"
        save(path, np.full((2 * HEIGHT, 2 * WIDTH), 77, dtype=np.uint8))
    with pytest.raises(InputError, match="2 bad samples") as error:
        run(root, tmp_path / "out")
    lines = str(error.value).splitlines()[1:]
    assert ["label/train1.png: label value 77" in lines[0], "label/train4.png: label value 77" in lines[1]] == [
        True
    ] * 2
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["train-00001.tar", "val-00000.tar"]


def test_wrong_headers_stop_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    Image.new("RGB", (2 * WIDTH, 2 * HEIGHT)).save(root / "val/label/val1.png")
    with pytest.raises(InputError, match=r"val/label/val1\.png: 8-bit RGB PNG"):
        run(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_than_ten_bad_samples_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "source"
    for part in ("rgb", "label", "depth"):
        for i in range(12):
            save(root / "train" / part / f"{i:02d}.png", np.zeros((4, 4, 3), dtype=np.uint8))
    (root / "dataset.yaml").write_text("classes: [a]\n")
    with pytest.raises(InputError, match="12 bad samples") as error:
        run(root, tmp_path / "out")
    assert str(error.value).endswith("and 2 more") and len(str(error.value).splitlines()) == 12


def test_fingerprint_follows_content_not_place(root: Path, tmp_path: Path) -> None:
    first = run(root, tmp_path / "a").split("train").fingerprint
    assert run(root, tmp_path / "b").split("train").fingerprint == first
    (root / "dataset.yaml").write_text("classes: [a, b, c]\ndepth_scale: 0.01\n")
    assert run(root, tmp_path / "c").split("train").fingerprint != first


def test_depth_of_16_bits_survives_in_full_range(tmp_path: Path) -> None:
    root = tmp_path / "source"
    depth = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    save(root / "train/depth/x.png", depth)
    save(root / "train/label/x.png", np.zeros((256, 256), dtype=np.uint8))
    save(root / "train/rgb/x.png", np.zeros((256, 256, 3), dtype=np.uint8))
    (root / "dataset.yaml").write_text("classes: [a]\n")
    for targets, read in (("png", lambda file: np.asarray(Image.open(file))), ("npy", np.load)):
        split = run(root, tmp_path / targets, height=256, width=256, target_format=targets).split("train")
        np.testing.assert_array_equal(read(io.BytesIO(split.stored(0)["depth"].tobytes())), depth)
        np.testing.assert_array_equal(split.decode(0).targets["depth"], depth)


def test_command_line_prepares_reports_and_verifies(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare", *words])
        main()
        return capsys.readouterr().out

    report = call("folder", str(root), out, "--size", "8x16", "--shard-size", "2", "--workers", "0")
    assert "samples" in report and "depth range (m)" in report
    assert PreparedDataset(Path(out)).info.width == 16
    assert "all checksums match" in call("--verify", out)
    with pytest.raises(SystemExit) as stop:
        call("folder", str(root), out, "--size", "8x8", "--workers", "0")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        call("folder", str(root), out, "colour=3")
    assert "colour" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["prepare", "synthesize", "data.shard_workers"])
def test_what_needs_no_torch_starts_without(module: str) -> None:
    code = f"import sys, mtunet_dist.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_processes_do_not_write_to_one_folder(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with lock_folder(out, "busy"), pytest.raises(InputError, match="another process is preparing"):
        run(root, out)
    run(root, out)
    assert not (out / LOCK).exists()
