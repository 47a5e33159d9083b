"""The `strata` command: one thin file a verb, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import os
import sys

import typer

from strata.cli.ask import ask, chat
from strata.cli.bank import VERBS as BANK_VERBS
from strata.cli.bench import bench_decode, bench_memory, bench_ops, bench_train
from strata.cli.checkpoint import convert as convert_checkpoint
from strata.cli.cost import calibrate as cost_calibrate
from strata.cli.cost import cost
from strata.cli.cost_plan import plan as cost_plan
from strata.cli.data import prepare_data, references
from strata.cli.eval import ModelOrVerb, evaluate
from strata.cli.eval_memory import evaluate_memory
from strata.cli.eval_tasks import evaluate_tasks
from strata.cli.generate import generate
from strata.cli.knowledge import probe as knowledge_probe
from strata.cli.launch import local as launch_local
from strata.cli.launch import slurm as launch_slurm
from strata.cli.quantize import quantize
from strata.cli.quickstart import quickstart
from strata.cli.reader import data as reader_data
from strata.cli.reader import evaluate as reader_eval
from strata.cli.reader import pack as reader_pack
from strata.cli.reader import train as reader_train
from strata.cli.report import report
from strata.cli.status import status
from strata.cli.tokenizer import convert_tokenizer, fetch_tokenizer, train_tokenizer
from strata.cli.train import train
from strata.cli.tune import dpo, sft
from strata.errors import StrataError

app = typer.Typer(
    name="strata",
    help="Memory for language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(status)
app.command()(report)
app.command()(sft)
app.command()(dpo)
app.command()(generate)
app.command()(ask)
app.command()(chat)
app.command()(quantize)
app.command()(quickstart)

eval_app = typer.Typer(cls=ModelOrVerb)
eval_app.command("model")(evaluate)
eval_app.command("memory")(evaluate_memory)
eval_app.command("tasks")(evaluate_tasks)
app.add_typer(eval_app, name="eval")

bank_app = typer.Typer(help="Documents as memories of one model.", no_args_is_help=True)
for name, verb in BANK_VERBS.items():
    bank_app.command(name)(verb)
app.add_typer(bank_app, name="bank")

cost_app = typer.Typer(help="What knowledge costs in each memory format, and where it belongs.")
cost_app.callback(invoke_without_command=True)(cost)
cost_app.command("calibrate")(cost_calibrate)
cost_app.command("plan")(cost_plan)
app.add_typer(cost_app, name="cost")

knowledge_app = typer.Typer(
    help="What a model knows, and what it need not know.", no_args_is_help=True
)
knowledge_app.command("probe")(knowledge_probe)
app.add_typer(knowledge_app, name="knowledge")

data_app = typer.Typer(help="Documents to shards of tokens.", no_args_is_help=True)
data_app.command("prepare")(prepare_data)
data_app.command("references")(references)
app.add_typer(data_app, name="data")

checkpoint_app = typer.Typer(help="Checkpoints of training.", no_args_is_help=True)
checkpoint_app.command("convert")(convert_checkpoint)
app.add_typer(checkpoint_app, name="checkpoint")

launch_app = typer.Typer(
    help="Training as a Slurm job, or in several processes.", no_args_is_help=True
)
launch_app.command("slurm")(launch_slurm)
launch_app.command("local")(launch_local)
app.add_typer(launch_app, name="launch")

bench_app = typer.Typer(help="Speed, beside the rivals.", no_args_is_help=True)
bench_app.command("ops")(bench_ops)
bench_app.command("train")(bench_train)
bench_app.command("decode")(bench_decode)
bench_app.command("memory")(bench_memory)
app.add_typer(bench_app, name="bench")

reader_app = typer.Typer(help="A small decoder that learns to read.", no_args_is_help=True)
reader_app.command("data")(reader_data)
reader_app.command("train")(reader_train)
reader_app.command("eval")(reader_eval)
reader_app.command("pack")(reader_pack)
app.add_typer(reader_app, name="reader")

tokenizer_app = typer.Typer(help="Vocabularies.", no_args_is_help=True)
tokenizer_app.command("train")(train_tokenizer)
tokenizer_app.command("fetch")(fetch_tokenizer)
tokenizer_app.command("convert")(convert_tokenizer)
app.add_typer(tokenizer_app, name="tokenizer")


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 75 stopped and to be gone on
    with by the same command (`strata train`, `strata reader train`), 130 interrupted.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # we show our own
    try:
        app()
    except StrataError as error:
        if not _is_ours_to_tell(error):
            sys.exit(error.exit_code)
        _fail(str(error), code=error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(f"disk full while writing {error.filename or 'output'}: free some space", code=1)
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", code=1)


def _is_ours_to_tell(error: StrataError) -> bool:
    """Of processes that torchrun started, one tells what all know: wrong input, one a machine."""
    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if error.told_by == "main":
        return rank == 0
    if error.told_by == "launcher":
        return False
    return error.told_by == "all" or local == 0


def _fail(message: str, *, code: int) -> None:
    print(f"strata: error: {message}", file=sys.stderr)
    sys.exit(code)
