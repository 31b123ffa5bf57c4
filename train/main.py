"""Train: `torchrun train/main.py --dataset cityscapes --data-dir DIR`, or plain `python`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cac_fast.train import config, distributed


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments` and train; 0 at the end, 2 after one line about bad input."""

    def command() -> None:
        settings = config.parse(arguments)
        # Imported late, so that a mistyped option is answered at once.
        from cac_fast.train.engine import train

        with distributed.world(settings.run.device) as world:
            train(settings, world)

    return distributed.run_command(command)


if __name__ == "__main__":
    sys.exit(main())
