"""The command line of `python -m electra_fast export`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from electra_fast.export.exporting import BERT, FORMATS, ITEMS, LIMIT
    from electra_fast.train.fine_tune_recipe import FILE_OPTIONS, FineTuneRecipe
    from electra_fast.train.options import add_options

    model = "a fine-tuned folder, a run of pretrain, or a folder of transformers' ElectraFor…"
    parser.add_argument("--model", required=True, help=model)
    format_ = parser.add_mutually_exclusive_group(required=True)
    format_.add_argument("--to", choices=[name for name in FORMATS if name != BERT], help="the format")
    as_bert = (
        "write a folder for servers that know BERT and not ELECTRA; base and large only, without the head"
    )
    format_.add_argument("--as-bert", dest="to", action="store_const", const=BERT, help=as_bert)
    out = "the new file: .onnx, .xml (with a .bin) or .pt2; with --as-bert a new folder"
    parser.add_argument("--out", required=True, help=out)
    parser.add_argument("--int8", action="store_true", help="onnx: quantise, and print the loss of each unit")
    limit = "int8: largest loss in points of the metric, or % changed predictions (default: {})"
    parser.add_argument("--limit", type=float, default=LIMIT, help=limit.format(LIMIT).replace("%", "%%"))
    items = f"int8: number of items of the files on which the loss is measured (default: {ITEMS})"
    parser.add_argument("--items", type=int, default=ITEMS, help=items)
    files = "files of the model's task; default: those that the run was evaluated on, else Python's manual"
    parser.add_argument("--data", nargs="+", default=[], metavar="PATH", help=files)
    add_options(parser, FineTuneRecipe, set(FILE_OPTIONS) - {"precision"})
