"""The parser that all commands share."""

from __future__ import annotations

import pytest

from cac_fast.train.errors import InputError
from cac_fast.train.options import Parser, add_data_options, at_least


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="test")
    add_data_options(parser)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--labeled-share")
    parser.add_argument("--offset", type=float)
    parser.add_argument("--workers", type=at_least(0))
    parser.add_argument("-n", type=int)
    return parser


GOOD = ["--dataset", "voc", "--checkpoint", "x"]


def test_good_options_are_parsed(parser: Parser) -> None:
    options = parser.parse_args(
        [*GOOD, "--offset", "-1.5", "--labeled-share=1/8", "--workers", "3", "-n2"]
    )
    assert (options.dataset, options.offset, options.labeled_share, options.workers, options.n) == (
        "voc",
        -1.5,
        "1/8",
        3,
        2,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chekpoint", "x"], "unknown option --chekpoint, did you mean --checkpoint?"),
        (["--chekpoint=x"], "unknown option --chekpoint, did you mean --checkpoint?"),
        (["--check", "x"], "unknown option --check, did you mean --checkpoint?"),
        (["-checkpoint", "x"], "unknown option -checkpoint, did you mean --checkpoint?"),
        (
            [*GOOD, "--labelled-share", "1/8"],
            "unknown option --labelled-share, did you mean --labeled-share?",
        ),
        ([*GOOD, "--labeled=a b"], "unknown option --labeled, did you mean --labeled-share?"),
        ([*GOOD, "--xyzzy"], "unknown option --xyzzy, --help lists the options"),
        ([*GOOD, "stray"], "unexpected argument stray: options start with --"),
        (["--dataset", "voc"], "the following arguments are required: --checkpoint"),
        ([*GOOD, "--dataset", "camvid"], "invalid choice: 'camvid'"),
        ([*GOOD, "--workers", "-1"], "-1 is less than 0"),
        ([*GOOD, "--workers", "two"], "'two' is not a whole number"),
        ([*GOOD, "--offset"], "argument --offset: expected one argument"),
    ],
)
def test_bad_options_are_one_sentence(parser: Parser, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parser.parse_args(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_follows_two_dashes_is_no_option(parser: Parser) -> None:
    with pytest.raises(InputError, match="unexpected argument"):
        parser.parse_args([*GOOD, "--", "--chekpoint"])
