"""Lists of a share: `python train/split.py ... --labeled-share 1/8 --output DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cac_fast.train import distributed
from cac_fast.train.data.layouts import open_data
from cac_fast.train.data.splits import select, write_lists
from cac_fast.train.errors import InputError, writing
from cac_fast.train.options import Parser, add_data_options, at_least


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the two lists; 0 at the end, 2 after one line about bad input."""
    parser = Parser(
        prog="train/split.py",
        description="Write labeled.txt and unlabeled.txt, the lists that training derives from the "
        "same --labeled-share and --data-list.",
    )
    add_data_options(parser)
    text = "share of the masks that is used, as 1/8, or full"
    parser.add_argument("--labeled-share", required=True, metavar="SHARE", help=text)
    parser.add_argument(
        "--data-list", type=at_least(0), default=0, metavar="N", help="seed of the share [0]"
    )
    parser.add_path("--output", "DIR", "folder for the two lists", required=True)
    return distributed.run_command(lambda: _split(parser.parse_args(arguments)))


def _split(options: argparse.Namespace) -> None:
    for name in ("labeled.txt", "unlabeled.txt"):
        if (options.output / name).exists():
            raise InputError(
                f"{options.output / name} is there already: give another --output or remove it"
            )
    data = open_data(options.dataset, options.data_dir)
    labeled, unlabeled = select(data, None, None, options.labeled_share, options.data_list)
    with writing(f"--output {options.output}"):
        write_lists(options.output, labeled, unlabeled, data.root)
    print(
        f"{len(labeled)} labeled and {len(unlabeled)} unlabeled images: "
        f"labeled.txt and unlabeled.txt in {options.output}"
    )


if __name__ == "__main__":
    sys.exit(main())
