"""The command line: `python -m electra_fast info`."""

import argparse


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m electra_fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which implementation serves each op here, and why")
    parser.parse_args(arguments)

    from electra_fast.installation import report

    print(report())


if __name__ == "__main__":
    main()
