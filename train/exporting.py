"""A network in a file that needs nothing of this program, written, run again and compared."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

import cac_fast
from cac_fast.train import checkpoint, provenance
from cac_fast.train.data.images import IGNORE
from cac_fast.train.errors import InputError, is_full, writing
from cac_fast.train.exportable import Exportable, pool_by_products
from cac_fast.train.inference import Predictor
from cac_fast.train.progress import warn

FORMATS = "onnx", "torch"
RESULTS = "labels", "logits"
SMALLEST_SIDE, LARGEST_SIDE = 8, 8192
METADATA = "cac_fast"
"""The key of the metadata; in PyTorch's file the name before .json."""

_OPSET = 18
_NEEDED = "onnx", "onnxscript", "onnxruntime"
# Batch, height and width: whole cells, none, and less than a network takes.
_CHECKED = (2, 64, 96), (1, 205, 331), (1, 20, 27)

Graph = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) uint8 to what the file was made for."""


class Difference(NamedTuple):
    """How far a file is from the network.

    value: the largest difference of a logit, over the largest logit (0 for labels).
    pixels: with another label, of `of_pixels`. clear: those of them whose best two logits differ by
        more than rounding does.
    """

    value: float
    pixels: int
    clear: int
    of_pixels: int

    @property
    def is_rounding(self) -> bool:
        return self.value <= 1e-4 and self.clear == 0 and self.pixels <= self.of_pixels / 1000

    def __str__(self) -> str:
        value = f"logits differ by {self.value:.0e} of the largest, " if self.value else ""
        return f"{value}{self.pixels} of {self.of_pixels} pixels have another label"


def check_packages(file_format: str) -> None:
    """Raise InputError if a package that `file_format` needs is not there."""
    for name in _NEEDED if file_format == "onnx" else ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"--format onnx needs {name} ({error}): pip install {' '.join(_NEEDED)}, which is "
                "the extra 'cac_fast[export]', or use --format torch"
            ) from error


def describe(path: Path, predictor: Predictor, result: str) -> dict[str, Any]:
    """The metadata of a file made from the checkpoint `path`, whose network `predictor` has."""
    config = checkpoint.read(checkpoint.find(path))["config"]
    expected = predictor.network.preprocessing
    return {
        "result": result,
        "classes": list(predictor.classes),
        "palette": [list(color) for color in predictor.palette],
        "ignore": IGNORE,
        "mean": list(expected.mean),
        "std": list(expected.std),
        "network": config["network"],
        "backbone": config["backbone"],
        "version": cac_fast.__version__,
        "commit": provenance.commit(),
    }


def export(
    predictor: Predictor,
    about: dict[str, Any],
    path: Path,
    file_format: str,
    images: Sequence[Tensor] = (),
) -> Difference:
    """Write `path`, run it at several sizes and compare it with `predictor`, which is on the CPU.

    The file takes the name only if it agrees; otherwise none is left.

    about: the metadata; its "result" says what the file returns.
    images: (3, H, W) uint8, to compare on as well.

    Raises:
        InputError: the network cannot be exported or the file not be written.
    """
    write, read = _KINDS[file_format]
    unchecked = path.with_name(f"{path.name}.unchecked")
    try:
        with writing(path):
            write(predictor, about, unchecked)
        batches = [*made_up_images(), *(image[None] for image in images)]
        difference = compare(read(unchecked), predictor, about["result"], batches)
        if difference.is_rounding:
            os.replace(unchecked, path)
    finally:
        unchecked.unlink(missing_ok=True)
    return difference


def made_up_images() -> list[Tensor]:
    """Batches (B, 3, H, W) uint8 of colors that change slowly, of several sizes."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for batch, height, width in _CHECKED:
        colors = torch.rand(batch, 3, height // 16 + 2, width // 16 + 2, generator=generator)
        smooth = F.interpolate(colors, (height, width), mode="bilinear")
        batches.append((255 * smooth).to(torch.uint8))
    return batches


def compare(
    graph: Graph, predictor: Predictor, result: str, batches: Sequence[Tensor]
) -> Difference:
    """How far `graph` is from `predictor` on batches (B, 3, H, W) uint8."""
    values, pixels, clear, of_pixels = [0.0], 0, 0, 0
    for batch in batches:
        expected = torch.stack([predictor.logits(image) for image in batch])
        largest = expected.abs().max().item() or 1.0
        shape = expected.shape if result == "logits" else (len(batch), *batch.shape[2:])
        found = _run(graph, batch)
        if found is None or found.shape != shape:
            pixels = batch[:, 0].numel()
            return Difference(float("inf"), pixels, pixels, pixels)
        if result == "logits":
            values.append((found - expected).abs().max().item() / largest)
            found = found.argmax(1)
        differs = found.long() != expected.argmax(1)
        best = expected.topk(2, dim=1).values
        pixels += int(differs.sum())
        clear += int((differs & (best[:, 0] - best[:, 1] > 1e-3 * largest)).sum())
        of_pixels += differs.numel()
    return Difference(torch.tensor(values).max().item(), pixels, clear, of_pixels)  # or NaN


def _run(graph: Graph, batch: Tensor) -> Tensor | None:
    """What `graph` makes of `batch`; None and a warning where it does not take its size."""
    try:
        return graph(batch)
    except Exception as error:  # onnxruntime and PyTorch have types of their own
        if is_full(error):
            raise
        reason, *_ = f"{error}".strip().splitlines() or [""]
        warn(f"the file fails on images {tuple(batch.shape)}: {type(error).__name__}: {reason}")
        return None


def read_onnx(path: Path) -> Graph:
    """A file of `--format onnx` as onnxruntime runs it on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def read_torch(path: Path) -> Graph:
    """A file of `--format torch` as `torch.export.load` reads it."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _write_onnx(predictor: Predictor, about: dict[str, Any], path: Path) -> None:
    import onnx

    graph = Exportable(copy.deepcopy(predictor), about["result"])
    pool_by_products(graph)
    names = {"input_names": ["image"], "output_names": [about["result"]]}
    settings = {"dynamo": True, "opset_version": _OPSET, "verbose": False}
    program = _traced(torch.onnx.export, graph, **settings, **names)
    for node in program.model.graph:
        node.metadata_props.clear()  # lines of this program, with paths of this machine
    program.model.metadata_props[METADATA] = json.dumps(about)
    program.save(path, external_data=False)  # one file
    onnx.checker.check_model(path)


def _write_torch(predictor: Predictor, about: dict[str, Any], path: Path) -> None:
    # Pools that round sizes up compare them in ways that always hold, but PyTorch cannot prove it.
    settings = {"prefer_deferred_runtime_asserts_over_guards": True}
    program = _traced(torch.export.export, Exportable(predictor, about["result"]), **settings)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with paths of this machine
    with path.open("wb") as file:
        try:
            torch.export.save(program, file, extra_files={f"{METADATA}.json": json.dumps(about)})
        except OSError:
            raise
        except Exception as error:  # what it traces it cannot always save, as ceil of a size
            raise _refusal(error) from error


_KINDS = {"onnx": (_write_onnx, read_onnx), "torch": (_write_torch, read_torch)}


@torch.no_grad()
def _traced(export_function: Callable[..., Any], graph: Exportable, **options: Any) -> Any:
    """What an exporter of PyTorch makes of `graph`, for every batch and size.

    Raises:
        InputError: it cannot.
    """
    # Two images of two sides that need padding: 1 and what is equal would be taken for constants.
    example = (torch.zeros(2, 3, 61, 99, dtype=torch.uint8),)
    height, width = (Dim(name, min=SMALLEST_SIDE, max=LARGEST_SIDE) for name in ("height", "width"))
    sizes = {"image": {0: Dim("batch"), 2: height, 3: width}}
    logger = logging.getLogger("torch")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return export_function(graph.eval(), example, dynamic_shapes=sizes, **options)
    except Exception as error:  # whatever a network of somebody else's meets in there
        if is_full(error):
            raise
        raise _refusal(error) from error
    finally:
        logger.setLevel(level)


def _refusal(error: Exception) -> InputError:
    reason, *_ = f"{error}".strip().splitlines() or [""]
    return InputError(
        f"the network cannot be exported for every size ({type(error).__name__}: {reason}): "
        "PyTorch's exporter does not take one of its operators; try the other --format"
    )
