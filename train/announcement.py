"""What a run says before its first step."""

from __future__ import annotations

from collections.abc import Callable

from cac_fast.train.config import Config
from cac_fast.train.data.opening import Inputs
from cac_fast.train.distributed import World
from cac_fast.train.methods import Method
from cac_fast.train.optimizer import poly
from cac_fast.train.progress import warn


def announce(
    say: Callable[[str], None],
    config: Config,
    world: World,
    inputs: Inputs,
    method: Method,
    *,
    weights: str,
    precision: str,
    iteration: int,
    grew_from: int | None,
) -> None:
    """Say where the run stands, what it reads, what it trains, and warn of what looks wrong.

    weights: where the network's come from. iteration: where it goes on. grew_from: the former run's
    ``--iterations``, if it had fewer.
    """
    folder, total = config.run_folder, config.optim.iterations
    if iteration == total:
        say(f"{folder} is finished already (--restart starts over)")
    elif iteration:
        say(f"resuming {folder} at iteration {iteration}")
    if grew_from is not None:
        before, now = (
            config.optim.learning_rate * poly(iteration, end, config.optim.poly_power)
            for end in (grew_from, total)
        )
        say(
            f"--iterations grew from {grew_from} to {total}: the learning rate follows the longer "
            f"schedule, here {now:.3g} in place of {before:.3g}"
        )
    validation = len(inputs.data.splits["val"])
    say(
        f"{config.data.dataset}: {len(inputs.labeled)} labeled, {len(inputs.unlabeled)} unlabeled, "
        f"{validation} validation images, {len(inputs.data.classes)} classes"
    )
    say(inputs.found)
    for warning in inputs.warnings if world.is_main else ():
        warn(warning)
    size = sum(parameter.numel() for parameter in method.evaluated.parameters()) / 1e6
    say(
        f"{config.loss.method}: {config.model.network} on {config.model.backbone}, "
        f"{size:.1f} M parameters"
    )
    say(weights)
    if method.report is not None:
        say(method.report)
    say(f"{total} iterations on {world.size} x {world.device.type}, {precision}, into {folder}")
    if not validation:
        say("no validation images: best.pt will be the last state")
