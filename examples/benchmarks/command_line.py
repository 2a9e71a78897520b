"""Parameters of a ProtoPNet on the command line."""

import ast


def add_set(parser):
    """Let `--set lambda_l1=1e-3 augmentation=None` change settings."""
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters")


def settings_of(args):
    """Return the parameters of `--set`."""
    for item in args.set:
        if "=" not in item:
            raise SystemExit(f"--set {item}: write NAME=VALUE.")
    return {name: value_of(text) for name, text in (item.split("=", 1) for item in args.set)}


def value_of(text):
    """Return what Python reads in a text, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
