"""``--help`` prints whatever Megatron's comments say."""

from argparse import ArgumentParser

from megatron_moe_inject.host.help_texts import make_printable


def test_a_per_cent_sign_is_printed(capsys):
    parser = ArgumentParser(prog="p")
    parser.add_argument("--factor", default=3, help="reserve (10% of it)")
    parser.add_argument("--other", default=3, help="%(metavar)s of 100%% (default %(default)s)")
    parser.add_argument("--hidden", help=None)
    text = make_printable(parser).format_help()
    assert "reserve (10% of it)" in text
    assert "None of 100% (default 3)" in text
    assert make_printable(parser).format_help() == text
