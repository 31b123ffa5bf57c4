"""LR-ASPP on MobileNetV2 in training on a CPU: with the kernels for light networks, and without.

    python bench/light.py [--json FILE]

Both networks have the same weights. The gradients of both are compared with float64 first; then
both take turns at forward and backward of a batch, on the threads given, and so does the backbone
of the network with the kernels: what it does not take is the head's share, upsampling and loss
included. A turn gives one ratio.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from cac_fast import build_info
from cac_fast.train.distributed import run_command
from cac_fast.train.errors import InputError
from cac_fast.train.networks import Segmenter, build_network, lraspp, segmenter
from cac_fast.train.options import Parser, at_least
from lib.measure import command_line, facts, percentiles, progress, write_record

CLASSES = 11
CPU = torch.device("cpu")


def networks() -> tuple[Segmenter, Segmenter]:
    """LR-ASPP without and with the kernels, of the same weights, in training, channels-last."""
    made = []
    for lighten in (lambda network: None, lraspp.lighten):
        torch.manual_seed(0)
        with mock.patch.object(lraspp, "lighten", lighten):
            network = build_network("lraspp", "mobilenet_v2", CLASSES)
        made.append(network.to(memory_format=torch.channels_last).train())
    return made[0], made[1]


def run(network: Segmenter, image: Tensor, label: Tensor, light: bool) -> Tensor:
    """A forward and a backward pass; the gradients of all weights, one after another."""
    network.zero_grad(set_to_none=True)
    # Which way logits are upsampled is asked of their form, which both have.
    with mock.patch.object(segmenter, "takes_light_kernels", lambda logits: light):
        loss = F.cross_entropy(network(image), label)
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in network.parameters()])


def run_backbone(network: Segmenter, image: Tensor) -> None:
    """A forward and a backward pass of the backbone alone, from gradients of its features."""
    network.zero_grad(set_to_none=True)
    features = network.backbone(image)
    torch.autograd.backward(features, [torch.ones_like(each) for each in features])


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios, and the bounds of its 95 % interval."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - 2 * error), math.exp(mean + 2 * error)


def main(arguments: list[str] | None = None) -> None:
    """Compare, time, print a table.

    Raises:
        InputError: an argument cannot be used, or the extension, which has the kernels, is not
            built.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=at_least(2), default=8, help="(%(default)s)")
    parser.add_argument("--crop-size", type=at_least(32), default=128, help="(%(default)s)")
    parser.add_argument("--threads", type=at_least(1), default=1, help="(%(default)s)")
    parser.add_argument("--turns", type=at_least(2), default=20, help="(%(default)s)")
    parser.add_path("--json", "FILE", "write the record", writable=True)
    options = parser.parse_args(arguments)
    if not build_info()["built"]:
        raise InputError(f"the kernels are in the extension: {build_info()['reason']}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = options.batch_size, 3, options.crop_size, options.crop_size
    image = torch.randn(size).contiguous(memory_format=torch.channels_last)
    label = torch.randint(CLASSES, (size[0], *size[2:]))
    both = dict(zip(("plain", "light"), networks(), strict=True))
    exact = run(copy.deepcopy(both["plain"]).double(), image.double(), label, False)
    errors = {}
    for name, network in both.items():
        found = run(network, image, label, name == "light")
        errors[name] = float((found - exact).norm() / exact.norm())
    passes: dict[str, Callable[[], object]] = {
        "plain": lambda: run(both["plain"], image, label, False),
        "light": lambda: run(both["light"], image, label, True),
        "light_backbone": lambda: run_backbone(both["light"], image),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(options.turns):
        for name, make in passes.items():
            begin = time.perf_counter()
            make()
            seconds[name].append(time.perf_counter() - begin)
        progress(f"turn {turn + 1} of {options.turns}")
    plain, light, backbone = seconds.values()
    mean, low, high = interval([a / b for a, b in zip(plain, light, strict=True)])
    share = 1 - interval([a / b for a, b in zip(backbone, light, strict=True)])[0]
    for name, error in errors.items():
        print(
            f"{name}: {1000 * statistics.median(seconds[name]):.0f} ms for forward and backward, "
            f"gradients {error:.1e} off float64"
        )
    print(f"{mean:.2f} times as fast [{low:.2f}, {high:.2f}]")
    print(f"head, upsampling and loss: {100 * share:.0f} % of the time with the kernels")
    record = {"command": command_line("bench/light.py", arguments or sys.argv[1:]), **facts(CPU)}
    record |= {name: vars(options)[name] for name in ("batch_size", "crop_size", "threads")}
    record |= {name: percentiles(times) for name, times in seconds.items()}
    record |= {"speedup": mean, "speedup_95": [low, high], "head_share": share}
    record |= {"gradient_errors": errors}
    write_record(options.json and Path(options.json), record)


if __name__ == "__main__":
    sys.exit(run_command(main))
