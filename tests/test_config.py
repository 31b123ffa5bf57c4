"""Settings: sources, precedence, types, and one clear line for each mistake."""

from __future__ import annotations

import json

import pytest

from cac_fast.train import config
from cac_fast.train.errors import InputError

BASE = ["--dataset", "folder", "--data-dir", "somewhere"]


def test_later_sources_win(tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(
        "batch_size = 6\ncrop_size = 64\nlearning_rate = 0.5\nlabeled_scale = [0.5, 1.5]\n"
    )
    settings = config.parse(
        [
            *BASE,
            "--config",
            str(toml),
            "--crop-size",
            "128",
            "--seed",
            "3",
            "--learning-rate",
            "0.25",
        ]
    )
    assert (settings.optim.batch_size, settings.data.crop_size, settings.run.seed) == (
        6,
        128,
        3,
    )
    assert settings.optim.learning_rate == 0.25
    assert settings.data.labeled_scale == (0.5, 1.5)
    assert settings.model.network == "deeplabv3plus"
    settings = config.parse(["--dataset", "toycity", "--iterations", "3"])
    assert (settings.optim.iterations, settings.model.backbone) == (3, "resnet18")


@pytest.mark.parametrize(
    ("dataset", "crop", "rate", "past"), [("voc", 320, 0.001, 1), ("cityscapes", 720, 0.01, 0)]
)
def test_paper_settings(dataset, crop, rate, past):
    settings = config.parse(["--dataset", dataset, "--data-dir", "d"])
    assert settings.data.crop_size == crop
    assert settings.optim.learning_rate == rate
    assert settings.optim.learning_rate * settings.optim.head_learning_rate_factor == pytest.approx(
        10 * rate
    )
    assert settings.loss.bank_past_steps == past
    assert (
        settings.optim.batch_size,
        settings.optim.iterations,
        settings.num_warmup,
    ) == (8, 92_560, 5785)
    assert (settings.loss.dc_weight, settings.loss.temperature, settings.loss.threshold) == (
        0.1,
        0.1,
        0.75,
    )
    assert settings.loss.normalization == "image" and settings.loss.negatives_per_view is None
    assert (
        settings.optim.momentum,
        settings.optim.weight_decay,
        settings.optim.poly_power,
    ) == (0.9, 1e-4, 0.9)


@pytest.mark.parametrize(
    "switch",
    [
        "projector",
        "context",
        "contrastive",
        "directional",
        "negative_sampling",
        "positive_filtering",
    ],
)
def test_ablation_switches_are_one_flag_each(switch):
    assert config.parse(BASE).flat()[switch] is True
    assert config.parse([*BASE, f"--no-{switch.replace('_', '-')}"]).flat()[switch] is False


@pytest.mark.parametrize("text, value", [("false", False), ('"off"', False), ("1", True)])
def test_switches_of_a_toml_file(tmp_path, text, value):
    toml = tmp_path / "run.toml"
    toml.write_text(f"directional = {text}\n")
    assert config.parse([*BASE, "--config", str(toml)]).loss.directional is value
    toml.write_text('directional = "maybe"\n')
    with pytest.raises(InputError, match="--directional maybe: expected true or false"):
        config.parse([*BASE, "--config", str(toml)])


def test_settings_equal_themselves_after_json():
    settings = config.parse([*BASE, "--iou-range", "0.2,0.9"])
    former = json.loads(json.dumps(settings.flat()))
    assert config.differences(settings, former) == []


def test_differences_name_what_changes_the_result():
    former = config.parse(BASE).flat()
    settings = config.parse([*BASE, "--crop-size", "64", "--workers", "7"])
    (difference,) = config.differences(settings, former)
    assert difference.startswith("crop_size: 320 there, 64 here")


def test_a_run_goes_on_where_its_weights_file_has_moved():
    former = config.parse([*BASE, "--weights", "old/resnet50.pth"]).flat()
    settings = config.parse([*BASE, "--weights", "new/resnet50.pth"])
    assert config.differences(settings, former) == []
    settings = config.parse([*BASE, "--weights", "old/resnet101.pth"])
    assert len(config.differences(settings, former)) == 1


def test_a_run_made_before_a_setting_was_there_goes_on():
    settings = config.parse(BASE)
    former = settings.flat()
    del former["forward"], former["accumulate"]
    assert config.differences(settings, former) == []
    changed = config.parse([*BASE, "--forward", "joint"])
    assert config.differences(changed, former) == ["forward: 'separate' there, 'joint' here"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "folder"], "--data-dir is needed"),
        ([*BASE, "--momentum", "-1"], "must not be negative"),
        ([*BASE, "--momentum", "1"], "must be below 1"),
        ([*BASE, "--temperature", "0"], "--temperature must be a number of at least 1e-06, not 0"),
        ([*BASE, "--seed", str(2**70)], "must be below 2**32"),
        ([*BASE, "--head-learning-rate-factor", "-1"], "must be positive"),
        (["--data-dir", "d"], "--dataset is needed"),
        (["--dataset", "citscapes", "--data-dir", "d"], "did you mean cityscapes?"),
        ([*BASE, "--bath-size", "3"], "did you mean --batch-size?"),
        ([*BASE, "--set", "crop-sise=8"], "did you mean crop_size?"),
        ([*BASE, "--set", "crop_size=64"], "--set crop_size=64: use --crop-size 64"),
        ([*BASE, "--set", "directional=off"], "--set directional=off: use --no-directional"),
        ([*BASE, "--set=directional=yes"], "--set directional=yes: use --directional"),
        ([*BASE, "--crop-size", "100"], "--crop-size 100 is not a multiple of 8: use 96 or 104"),
        ([*BASE, "--crop-size", "x"], "--crop-size x: expected a whole number"),
        ([*BASE, "--iterations", "1.5"], "--iterations 1.5: expected a whole number"),
        ([*BASE, "--learning-rate", "-1"], "--learning-rate -1.0: must be positive"),
        ([*BASE, "--learning-rate", "nan"], "--learning-rate nan: expected a number"),
        ([*BASE, "--batch-size", "0"], "--batch-size 0: must be positive"),
        ([*BASE, "--accumulate", "0"], "--accumulate 0: must be positive"),
        ([*BASE, "--forward", "jiont"], "did you mean joint?"),
        ([*BASE, "--compile", "--checkpoint-activations"], "use one of them"),
        ([*BASE, "--labeled-scale", "2"], "two numbers"),
        ([*BASE, "--labeled-scale", "2,1"], "lower first"),
        ([*BASE, "--iou-range", "0.5,1.5"], "at most 1"),
        ([*BASE, "--threshold", "1.5"], "--threshold 1.5: a confidence is at most 1"),
        ([*BASE, "--config", "absent.toml"], "no such file"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(InputError) as error:
        config.parse(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_toml_mistakes_name_the_file(tmp_path):
    broken, unknown = tmp_path / "broken.toml", tmp_path / "unknown.toml"
    broken.write_text("crop_size = = 3\n")
    unknown.write_text("croop_size = 64\n")
    for path, message in ((broken, "broken.toml"), (unknown, "did you mean crop_size?")):
        with pytest.raises(InputError, match=message):
            config.parse([*BASE, "--config", str(path)])
