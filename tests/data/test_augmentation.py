"""Augmentation against arithmetic written out again here, and draws that stay what they were."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

from helpers.training import TASKS
from mtunet_dist.config import AugmentConfig, DataConfig, load_config
from mtunet_dist.data.augmentation import Augmentation, Draw
from mtunet_dist.data.batch import Pixels
from mtunet_dist.data.color import color_map
from mtunet_dist.data.loader import make_augmentation, make_loader
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.splits import make_split
from mtunet_dist.data.torch_augmentation import augmented
from mtunet_dist.errors import InputError
from mtunet_dist.tasks.depth import Depth

CPU = torch.device("cpu")
EVERYTHING = {
    "flip": True,
    "scales": (1.0, 1.2, 1.5),
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.5,
    "hue": 0.1,
}


def expected(
    image: np.ndarray, label: np.ndarray, depth: np.ndarray, draw: Draw, depth_factor: float
) -> tuple[np.ndarray, ...]:
    """One sample augmented pixel by pixel: nearest in whole numbers, linear and colours in float64."""
    height, width = label.shape
    out_label, out_depth = np.empty_like(label), np.empty(label.shape)
    out_image = np.empty(image.shape)
    for r, c in itertools.product(range(height), range(width)):
        r_in = (2 * r + 1) * draw.height // (2 * height) + draw.top
        c_in = (2 * c + 1) * draw.width // (2 * width) + draw.left
        y = max((r + 0.5) * draw.height / height - 0.5, 0)
        x = max((c + 0.5) * draw.width / width - 0.5, 0)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, draw.height - 1), min(x0 + 1, draw.width - 1)
        corner = lambda i, j: image[draw.top + i, draw.left + j].astype(float)  # noqa: E731
        upper = corner(y0, x0) * (1 - (x - x0)) + corner(y0, x1) * (x - x0)
        lower = corner(y1, x0) * (1 - (x - x0)) + corner(y1, x1) * (x - x0)
        pixel = upper * (1 - (y - y0)) + lower * (y - y0)
        if draw.color is not None:
            rows = np.reshape(draw.color, (3, 4))
            pixel = np.array([row[:3] @ pixel + row[3] for row in rows])
        where = (r, width - 1 - c if draw.flip else c)
        out_label[where], out_depth[where] = label[r_in, c_in], depth[r_in, c_in] * depth_factor
        out_image[where] = pixel
    return np.clip(np.rint(out_image), 0, 255), out_label, out_depth


@pytest.mark.parametrize("kind", ["metric", "inverse"])
@pytest.mark.parametrize("source", ["dali", "torch", "cache"])
def test_loaders_give_what_the_draws_say_pixel_for_pixel(
    dataset: PreparedDataset, source: str, kind: Literal["metric", "inverse"]
) -> None:
    task = Depth.metric_depth(0.001) if kind == "metric" else Depth.inverse_depth(0.001)
    info = dataclasses.replace(dataset.info, targets={**dataset.info.targets, "depth": task})
    split, order = make_split(dataset.root, info, ["train"]), TrainOrder(12, batch_size=6, seed=4)
    augmentation = Augmentation(32, 48, seed=5, **EVERYTHING)  # type: ignore[arg-type]
    config = {
        "dali": DataConfig(root="", threads=1),
        "torch": DataConfig(root="", loader="torch", threads=0),
        "cache": DataConfig(root="", cache="host"),
    }[source]
    batch = next(make_loader(config, split, order, CPU, augmentation).batches(start=3))
    draws = [augmentation.draw(1, i) for i in batch["sample"].tolist()]
    assert {d.flip for d in draws} == {False, True}
    assert {d.height for d in draws} > {32}
    for n, draw in enumerate(draws):
        raw = split.decode(int(batch["sample"][n]))
        image, label, depth = expected(
            raw.rgb,
            raw.targets["segmentation"],
            raw.targets["depth"],
            draw,
            1 / draw.scale if kind == "metric" else draw.scale,
        )
        np.testing.assert_array_equal(batch["segmentation"][n].numpy(), label)
        np.testing.assert_allclose(batch["depth"][n, 0].numpy(), depth * 0.001, rtol=1e-6)
        assert np.abs(batch["image"][n].permute(1, 2, 0).numpy() - image).max() <= 1


@pytest.mark.parametrize("size", [30, 48, 120, 128, 288, 480])
def test_zoom_equals_torch_where_pixel_centres_tie(size: int) -> None:
    """Label as ``nearest-exact``, image as ``bilinear``, at sizes of which some put centres exactly on edges."""
    random = torch.Generator().manual_seed(0)
    for scale in (1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 4.0):
        window = round(size / scale)
        top = (size - window) // 2
        image = torch.randint(256, (1, size, size, 3), dtype=torch.uint8, generator=random)
        label = torch.randint(256, (1, size, size), dtype=torch.uint8, generator=random)
        depth = torch.randint(1 << 16, (1, size, size), generator=random).to(torch.uint16)
        cut = np.s_[..., top : top + window, top : top + window]
        planes = torch.stack([label.float(), depth.float()], 1)[cut]
        nearest = F.interpolate(planes, (size, size), mode="nearest-exact")[0]
        linear = F.interpolate(image.permute(0, 3, 1, 2)[cut].float(), (size, size), mode="bilinear")
        pixels = Pixels(image.clone(), {"segmentation": label.clone(), "depth": depth.view(torch.int16).clone()})
        tasks = {task.name: task for task in TASKS}
        out, targets = augmented(pixels, tasks, [Draw(top, top, window, window, 1.0, False)])
        assert torch.equal(targets["segmentation"].float(), nearest[:1])
        assert torch.equal(targets["depth"], nearest[1:])
        assert (out.permute(0, 3, 1, 2) - linear).abs().max() < 0.51


def test_draws_of_a_seed_are_those_of_the_first_version() -> None:
    """Whoever continues an old run gets its old augmentation, and colours do not disturb it."""
    old = {
        (0, 0): (18, 34, 107, 213, 1.2, True),
        (0, 1): (0, 0, 128, 256, 1.0, True),
        (3, 5): (12, 1, 85, 171, 1.5, True),
        (9, 100): (0, 0, 128, 256, 1.0, True),
    }
    plain = Augmentation(128, 256, flip=True, scales=(1.0, 1.2, 1.5), seed=7)
    colored = Augmentation(128, 256, flip=True, scales=(1.0, 1.2, 1.5), hue=0.2, seed=7)
    for key, values in old.items():
        assert plain.draw(*key) == Draw(*values)
        draw = colored.draw(*key)
        assert Draw(*values, color=draw.color) == draw
        assert draw.color is not None


def test_colours_stay_in_range_and_one_does_not_disturb_another() -> None:
    bright = Augmentation(8, 8, brightness=0.3)
    both = Augmentation(8, 8, brightness=0.3, saturation=0.5)
    factors = []
    for i in range(200):
        color = np.reshape(bright.draw(0, i).color, (3, 4))  # type: ignore[arg-type]
        factor = color[0, 0]
        np.testing.assert_allclose(color, np.eye(3, 4) * factor, atol=1e-12)
        grey = np.reshape(both.draw(0, i).color, (3, 4))[:, :3].sum(1)  # type: ignore[arg-type]
        np.testing.assert_allclose(grey, factor)
        factors.append(factor)
    assert 0.7 <= min(factors) < 0.72 and 1.28 < max(factors) <= 1.3
    darkest = min(
        np.reshape(Augmentation(8, 8, brightness=3.0).draw(0, i).color, (3, 4))[0, 0]  # type: ignore[arg-type]
        for i in range(100)
    )
    assert 0 <= darkest < 0.2


def test_each_colour_change_means_what_it_says() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)

    def apply(*parameters: float) -> np.ndarray:
        rows = np.reshape(color_map(*parameters), (3, 4))
        return np.clip(pixels @ rows[:, :3].T + rows[:, 3], 0, 255)

    image = Image.fromarray(pixels)
    assert np.abs(apply(1, 1, 1, 0) - pixels).max() < 1e-9
    for factor in (0.0, 0.6, 1.7):
        assert np.abs(apply(factor, 1, 1, 0) - np.asarray(ImageEnhance.Brightness(image).enhance(factor))).max() <= 1
        # PIL rounds the grey it blends with, and then truncates.
        assert np.abs(apply(1, 1, factor, 0) - np.asarray(ImageEnhance.Color(image).enhance(factor))).max() <= 2
    np.testing.assert_allclose(apply(1, 0, 1, 0), 127.5)
    np.testing.assert_allclose(apply(1, 0.5, 1, 0), pixels / 2 + 63.75)
    grey = np.full(3, 90.0)
    for parameters in ((1, 1, 0.3, 0.4), (1, 1, 2.0, -0.2)):
        rows = np.reshape(color_map(*parameters), (3, 4))
        np.testing.assert_allclose(rows[:, :3] @ grey + rows[:, 3], grey)
    red, green, blue = np.reshape(color_map(1, 1, 1, 1 / 3), (3, 4))[:, 0]
    assert green > max(red, blue)
    np.testing.assert_allclose(color_map(1, 1, 1, 0.5), color_map(1, 1, 1, -0.5), atol=1e-9)


def test_order_of_the_colour_changes_is_brightness_contrast_saturation_hue() -> None:
    whole, parts = np.eye(4), [(1.3, 1, 1, 0), (1, 0.6, 1, 0), (1, 1, 1.4, 0), (1, 1, 1, 0.1)]
    for part in parts:
        whole = np.vstack([np.reshape(color_map(*part), (3, 4)), [0, 0, 0, 1]]) @ whole
    np.testing.assert_allclose(np.reshape(color_map(1.3, 0.6, 1.4, 0.1), (3, 4)), whole[:3], atol=1e-9)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.augment.hue=0.6", ["data.augment.hue=0.6", "must be 0 to 0.5"]),
        ("data.augment.brightness=-1", ["data.augment.brightness=-1", "negative"]),
        ("data.augment.contrast=dark", ["contrast", "dark"]),
        ("data.dali.hw_decoder_load=2", ["data.dali.hw_decoder_load=2", "must be 0 to 1"]),
        ("data.cache=disk", ["disk", "host", "device"]),
        ("data.on_error=ignore", ["ignore", "skip"]),
    ],
)
def test_wrong_settings_are_refused(override: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load_config(None, ["run_dir=r", "data.root=d", override])
    assert all(word in str(error.value) for word in words)


def test_config_that_augments_nothing_makes_no_augmentation(dataset: PreparedDataset) -> None:
    assert make_augmentation(AugmentConfig(), dataset.info, 0) is None
    for change in ({"flip": True}, {"scales": (1.2,)}, {"hue": 0.1}, {"contrast": 0.1}):
        made = make_augmentation(AugmentConfig(**change), dataset.info, 3)  # type: ignore[arg-type]
        assert made is not None
        assert any(made.draw(0, i) != Draw(0, 0, 32, 48, 1.0, False) for i in range(20))
        assert made.seed == 3
