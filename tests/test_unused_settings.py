"""Settings of the loss that the chosen method does not read: a run says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_training import CPU
from test_methods import OPTIONS
from toy_methods import tiny_network

from cac_fast.train import config, engine, inference, run_state
from cac_fast.train.registry import METHODS
from cac_fast.train.settings import LossSettings

TOYCITY = ["--dataset", "toycity"]
METHODS_WITH_SETTINGS = [name for name, entry in METHODS.entries.items() if entry.uses is not None]
SWITCHED_ON = {
    "cac": ["--averaged-labels"],
    "fixmatch": ["--dc-weight", "0.1"],
    "self_training": ["--teacher"],
}
READ_BY_THE_LOADER = {"method", "context", "false_negatives"}
"""Whatever the method is."""


def read_by(name: str, data: Any, folder: Any, more: list[str], monkeypatch: Any) -> set[str]:
    """The settings of the loss that a run of six steps of a method reads."""
    read = set()

    class Recorded(LossSettings):
        def __getattribute__(self, setting: str) -> Any:
            read.add(setting)
            return super().__getattribute__(setting)

    for module in (run_state, inference):
        monkeypatch.setattr(module, "build_network", tiny_network)
    options = [*OPTIONS, "--data-dir", str(data), "--output", str(folder / name)]
    settings = config.parse([*options, "--method", name, "--crop-size", "48", *more])
    settings = replace(settings, loss=Recorded(**vars(settings.loss)))
    read.clear()
    engine.train(settings, CPU)
    return read & set(vars(settings.loss))


@pytest.mark.parametrize("name", METHODS_WITH_SETTINGS)
def test_what_an_entry_names_is_what_its_method_reads(name, folder_data, tmp_path, monkeypatch):
    more = SWITCHED_ON.get(name, [])
    if more == ["--teacher"]:
        read_by("supervised", folder_data, tmp_path, ["--labeled-share", "1/2"], monkeypatch)
        more = ["--labeled-share", "1/2", "--teacher", str(tmp_path / "supervised")]
    read = read_by(name, folder_data, tmp_path, more, monkeypatch)
    named = set(METHODS.entry(name).uses.split())
    assert read - READ_BY_THE_LOADER == named - READ_BY_THE_LOADER


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (["--method", "cps", "--ema-decay", "0.9"], ["--ema-decay 0.9"]),
        (
            ["--method", "gct", "--no-projector", "--confidence", "0.5"],
            ["--no-projector", "--confidence 0.5"],
        ),
        (["--method", "cps", "--cutmix", "--warmup", "3"], []),
        (["--method", "cps", "--ema-decay", "0.996"], []),  # the default
        (["--method", "fixmatch", "--threshold", "0.9"], ["--threshold 0.9"]),
        (["--method", "fixmatch", "--threshold", "0.9", "--dc-weight", "0.1"], []),
        (["--method", "cac", "--ema-decay", "0.9"], ["--ema-decay 0.9"]),
        (["--method", "cac", "--ema-decay", "0.9", "--averaged-labels"], []),
        (
            ["--method", "self_training", "--pseudo-labels", "d", "--confidence", "0.9"],
            ["--confidence 0.9"],
        ),
        (["--method", "self_training", "--teacher", "r", "--confidence", "0.9"], []),
        (["--method", "supervised", "--dc-weight", "1"], []),
        (["--method", "mine:Own", "--confidence", "0.5"], []),
    ],
)
def test_flags_that_a_method_does_not_read(options, flags):
    assert config.unused(config.parse([*TOYCITY, *options])) == flags


def test_presets_are_no_flags():
    for dataset in ("voc", "cityscapes"):
        for name in METHODS.names:
            parsed = config.parse(["--dataset", dataset, "--data-dir", "d", "--method", name])
            assert config.unused(parsed) == []


def test_a_run_warns_of_them(folder_data, tmp_path, monkeypatch, capfd):
    read_by("cps", folder_data, tmp_path, ["--ema-decay", "0.9", "--temperature", "1"], monkeypatch)
    message = "warning: cps with these settings does not use --temperature 1.0, --ema-decay 0.9\n"
    assert message in capfd.readouterr().err
