"""What a run says before its first step."""

from __future__ import annotations

from cac_fast.train.optimizer import poly
from cac_fast.train.progress import warn
from cac_fast.train.run_state import RunState


def announce(run: RunState) -> None:
    """Say where the run stands, what it reads, what it trains, and warn of what looks wrong."""
    config, world, data, say = run.config, run.world, run.data, run.log.say
    if run.iteration == run.iterations:
        say(f"{run.folder.path} is finished already (--restart starts over)")
    elif run.iteration:
        say(f"resuming {run.folder.path} at iteration {run.iteration}")
    if run.grew_from is not None:
        before, now = (
            config.optim.learning_rate * poly(run.iteration, total, config.optim.poly_power)
            for total in (run.grew_from, run.iterations)
        )
        say(
            f"--iterations grew from {run.grew_from} to {run.iterations}: the learning "
            f"rate follows the longer schedule, here {now:.3g} in place of {before:.3g}"
        )
    say(
        f"{config.data.dataset}: {len(run.inputs.labeled)} labeled, "
        f"{len(run.inputs.unlabeled)} unlabeled, {len(data.splits['val'])} validation "
        f"images, {len(data.classes)} classes"
    )
    say(run.inputs.found)
    for warning in run.inputs.warnings if world.is_main else ():
        warn(warning)
    size = sum(parameter.numel() for parameter in run.network.parameters()) / 1e6
    say(
        f"{config.loss.method}: {config.model.network} on {config.model.backbone}, "
        f"{size:.1f} M parameters"
    )
    say(run.weights_report)
    if run.method.report is not None:
        say(run.method.report)
    say(
        f"{run.iterations} iterations on {world.size} x {world.device.type}, "
        f"{run.precision}, into {run.folder.path}"
    )
    if not data.splits["val"]:
        say("no validation images: best.pt will be the last state")
