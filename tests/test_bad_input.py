"""Bad input to train/main.py: exit code 2, one line with thing and remedy, nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import change_back_end
from tiny_scenes import write_scenes

from cac_fast.backend import BACKENDS
from cac_fast.train import distributed, errors, main

ROOT = Path(__file__).resolve().parents[1]
QUICK = "--backbone mobilenet_v2 --batch-size 2 --crop-size 32 --iterations 2 --workers 0".split()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of the test's own, to break."""
    return write_scenes(tmp_path / "data", {"train": (4, 2), "val": (1, 0)})


def fails(capfd: pytest.CaptureFixture, data: Path, *more: str) -> str:
    """Run the command in this process; return its one line."""
    output = data.parent / "run"
    arguments = ["--dataset", "folder", "--data-dir", str(data), "--output", str(output)]
    assert main.main([*arguments, *QUICK, "--device", "cpu", *more]) == 2
    stderr = capfd.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    return stderr.strip()


def test_missing_data_folder(capfd, tmp_path):
    assert "nowhere" in fails(capfd, tmp_path / "nowhere")


def test_empty_list(capfd, data):
    (data / "labeled.txt").write_text("\n")
    assert "labeled.txt" in fails(capfd, data, "--labeled", str(data / "labeled.txt"))


def test_list_names_a_missing_file(capfd, data):
    (data / "labeled.txt").write_text("00\n77\n")
    line = fails(capfd, data, "--labeled", str(data / "labeled.txt"))
    assert "77" in line and "labeled.txt" in line


def test_mask_of_another_size(capfd, data):
    mask = data / "masks" / "train" / "02.png"
    Image.open(mask).resize((10, 20), Image.Resampling.NEAREST).save(mask)
    line = fails(capfd, data)
    assert "02.png is 10 x 20 but image" in line and "56 x 48" in line


@pytest.mark.parametrize("split", ["train", "val"])
def test_label_out_of_range(capfd, data, split):
    mask = data / "masks" / split / "00.png"
    labels = np.array(Image.open(mask))
    labels[5, 5] = 77
    Image.fromarray(labels).save(mask)
    line = fails(capfd, data)
    assert "00.png" in line and "77" in line


def test_truncated_labeled_image(capfd, data):
    for image in (data / "images" / "train").iterdir():
        image.write_bytes(image.read_bytes()[:300])
    assert "images/train/0" in fails(capfd, data)


def test_validation_image_without_a_mask(capfd, data):
    (data / "masks" / "val" / "00.png").unlink()
    assert "val/00.png has no mask" in fails(capfd, data)


def test_back_end_that_is_not_there(capfd, data):
    assert "use auto" in fails(capfd, data, "--dc-backend", "cuda")


@pytest.mark.parametrize(
    ("name", "remedy"), [("reference", "use --dc-backend eager"), ("eager", "use --device cpu")]
)
def test_back_end_that_is_wrong_on_this_machine(capfd, data, monkeypatch, name, remedy):
    right = BACKENDS[name].load().rows

    def doubled(*given):
        loss, gradient = right(*given)
        return loss * 2, gradient

    change_back_end(monkeypatch, name, rows=doubled)
    line = fails(capfd, data, "--dc-backend", name)
    assert f"{name!r} is wrong on cpu: its loss is 1.0e+00 off" in line
    assert line.endswith(remedy)
    # Without the contrast it is not used.
    run = ["--dataset", "folder", "--data-dir", str(data), "--device", "cpu", *QUICK]
    run += ["--dc-backend", name, "--no-contrastive", "--output", str(data.parent / "other")]
    assert main.main(run) == 0


def test_other_images_in_the_folder_of_a_run(capfd, data):
    run = ["--dataset", "folder", "--data-dir", str(data), "--device", "cpu", *QUICK]
    lists = [data / "a.txt", data / "b.txt"]
    for number, path in enumerate(lists):
        path.write_text(f"00\n0{number + 1}\n")
    assert main.main([*run, "--output", str(data.parent / "run"), "--labeled", str(lists[0])]) == 0
    capfd.readouterr()
    assert "other labeled images" in fails(capfd, data, "--labeled", str(lists[1]))


def test_best_in_place_of_last(capfd, data):
    run = ["--dataset", "folder", "--data-dir", str(data), "--device", "cpu", *QUICK]
    folder = data.parent / "run"
    assert main.main([*run, "--output", str(folder)]) == 0
    capfd.readouterr()
    (folder / "best.pt").replace(folder / "last.pt")
    assert "copy of best.pt" in fails(capfd, data)


def test_best_without_last_is_not_written_over(capfd, data):
    run = ["--dataset", "folder", "--data-dir", str(data), "--device", "cpu", *QUICK]
    folder = data.parent / "run"
    assert main.main([*run, "--output", str(folder)]) == 0
    capfd.readouterr()
    (folder / "last.pt").unlink()
    best = (folder / "best.pt").read_bytes()
    line = fails(capfd, data)
    assert "best.pt" in line and "--restart" in line
    assert (folder / "best.pt").read_bytes() == best and list(folder.glob("samples/*.png"))


def test_crop_not_a_multiple_of_8(capfd, data):
    assert "use 32 or 40" in fails(capfd, data, "--crop-size", "36")


def test_share_that_leaves_no_labeled_image(capfd, data):
    assert "1/100" in fails(capfd, data, "--labeled-share", "1/100")


def test_unknown_option(capfd, data):
    assert "did you mean --batch-size?" in fails(capfd, data, "--batchsize", "4")


def test_one_image_per_process_without_batch_statistics(capfd, data):
    assert "--freeze-bn" in fails(capfd, data, "--batch-size", "1")


def test_slices_that_cannot_be_made(capfd, data):
    sliced = "--batch-size", "4", "--accumulate"
    assert "--accumulate 3 cannot slice the 4 images" in fails(capfd, data, *sliced, "3")
    assert "a smaller --accumulate" in fails(capfd, data, *sliced, "4")


def test_weights_of_another_architecture(capfd, data, tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "w.pth")
    assert "another architecture" in fails(capfd, data, "--weights", str(tmp_path / "w.pth"))


def test_resume_from_a_broken_or_foreign_checkpoint(capfd, data):
    arguments = ["--dataset", "folder", "--data-dir", str(data), "--device", "cpu"]
    last = data.parent / "run" / "last.pt"
    assert main.main([*arguments, *QUICK, "--output", str(last.parent)]) == 0
    capfd.readouterr()
    assert "backbone: 'mobilenet_v2' there" in fails(capfd, data, "--backbone", "resnet18")
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    line = fails(capfd, data)
    assert "last.pt cannot be read" in line and "--restart" in line
    assert last.stat().st_size == len(whole) // 2  # nothing is deleted unasked


def test_output_that_cannot_be_a_folder(capfd, data):
    (data.parent / "run").write_text("a file")
    assert "--output" in fails(capfd, data)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(distributed.InputError, match=r"3 processes .* only 2 GPU"):
        distributed.pick_device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu(capfd, data):
    assert "use --device cpu" in fails(capfd, data, "--device", "cuda")


def test_as_a_program(data):
    """Exit code and streams as a shell sees them, for a mistake that only the data shows."""
    (data / "classes.txt").unlink()
    command = [sys.executable, str(ROOT / "train" / "main.py"), "--dataset", "folder"]
    finished = subprocess.run(
        [*command, "--data-dir", str(data), *QUICK],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert "classes.txt" in finished.stderr


@pytest.mark.parametrize(("rank", "kind", "said"), [(0, 0, 1), (1, 0, 0), (1, 1, 1)])
def test_who_says_it_under_torchrun(capfd, monkeypatch, rank, kind, said):
    """A machine's first rank speaks for all; of what one rank met alone only that rank knows."""
    monkeypatch.setenv("LOCAL_RANK", str(rank))

    def command() -> None:
        raise (errors.InputError, errors.RankInputError)[kind]("file x is broken")

    assert distributed.run_command(command) == 2
    assert capfd.readouterr().err == "error: file x is broken\n" * said


def test_a_name_of_two_lines_is_said_in_one(capfd):
    def command() -> None:
        raise errors.InputError("file a\nb.png is broken")

    assert distributed.run_command(command) == 2
    assert capfd.readouterr().err == "error: file a\\nb.png is broken\n"
