"""The command line: `search run`, `show`, `methods`, `targets`, `doctor`, `generate`, `materialize`, `export`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profilers.workload import LENGTHS
from search import machines
from search.config import ConfigError, add_flags, check_range, default_cache, from_arguments
from search.endings import Parser, Terminated, Version, ended_by, interrupted, status, stopped_by_term
from search.files import plain

if TYPE_CHECKING:
    from search.results import Answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns one of `search.endings.EXIT_CODES`."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if not hasattr(parsed, "command"):
        parser.print_help()
        return 2
    _quiet_libraries()
    try:
        with stopped_by_term():
            return int(parsed.command(parsed))
    except KeyboardInterrupt as stop:
        sys.stderr.write(interrupted(parsed.name_of_command))
        return 143 if isinstance(stop, Terminated) else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 (the last handler: what nobody expected is one line as well)
        return ended_by(error, parsed.debug)


def _quiet_libraries() -> None:
    """Libraries' own chatter does not belong between our lines; our warnings do."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    chatty = "transformers optuna lm_eval compressed_tensors torchao autoround matplotlib torch.utils._pytree"
    for name in chatty.split(" "):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    common.add_argument("--json", action="store_true", help="results as JSON on stdout")
    parser = Parser(
        prog="search",
        description="Search how to compress a language model so that it really meets a latency objective on a machine.",
    )
    parser.add_argument("--version", action=Version, nargs=0, help="the version, and the revision of a git checkout")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(command=run, name_of_command=name)
        return sub

    run = command("run", _run, "search, validate and export a policy for a latency objective")
    add_flags(run)
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="show the space, exports, time, memory and feasibility; compute, convert and measure nothing",
    )
    run.add_argument("--quiet", action="store_true", help="no progress on stderr")
    show = command("show", _show, "the measured policies of a study")
    show.add_argument("study", help="the study's folder")
    frontier = command("frontier", _frontier, "the measured frontier of a study, as CSV and picture")
    frontier.add_argument("study", help="the study's folder")
    frontier.add_argument("--objective", default="", help="whose answer to mark, for example 0.6x; default: the latest")
    frontier.add_argument("--out", default="", help="picture to write (.png or .svg); default: none")
    report = command("report", _report, "write a study's report again: one HTML page, no network")
    report.add_argument("study", help="the study's folder")
    report.add_argument("--objective", default="", help="whose answer to report, for example 0.6x; default: the latest")
    report.add_argument("--out", default="", help="file to write; default: report.html in the study")
    compare = command("compare", _compare, "several studies side by side: models, targets, settings")
    compare.add_argument("studies", nargs="+", metavar="STUDY", help="folders of studies")
    compare.add_argument("--all", action="store_true", help="also policies that another of the same study beats")
    compare.add_argument("--out", default="", help="picture to write (.png or .svg); default: none")
    methods = command("methods", _methods, "the compression methods there are")
    methods.add_argument("name", nargs="?", default="", help="one method: its knobs, limits and what it refuses")
    command("runtimes", _runtimes, "what each runtime loads, through which export, and why not")
    machines.register(command, _printed, _validate)
    explain = command("explain", _explain, "which choices of an answer cost the quality and which save the time")
    explain.add_argument("study", help="the study's folder")
    explain.add_argument("--objective", default="", help="which answer, for example 0.6x; default: the latest")
    explain.add_argument("--by", choices=["kind", "block", "site"], default="kind", help="what is swapped back together")
    explain.add_argument("--layer", default="", metavar="TEXT", help="only sites whose name contains this")
    cache = command("cache", _cache, "what lies in the cache, and getting rid of it")
    cache.add_argument("--cache", default="", help="cache folder")
    cache.add_argument("--verify", action="store_true", help="read and check everything")
    cache.add_argument(
        "--clear",
        default="",
        metavar="KIND",
        help="delete models, tables, maps, generated, rotations, materialized, kernels, pace or all",
    )
    cache.add_argument("--results", default="results", help="folder of the studies whose banks count [results]")
    cache.add_argument(
        "--max-size", default="", metavar="BYTES", help="cut the banks down to 10GiB, say: the longest unused first"
    )
    generate = command("generate", _generate, "write text with a compressed checkpoint, on the real kernels")
    generate.add_argument("checkpoint", help="folder of a checkpoint, or of a study (its latest answer)")
    generate.add_argument("--prompt", default="The capital of France is", help="text to continue")
    generate.add_argument("--tokens", type=int, default=48, help="tokens to write")
    generate.add_argument("--threads", type=int, default=0, help="threads; 0: half of the machine's cores")
    generate.add_argument("--on", default="cpu", choices=["cpu", "cuda"], help="the device of this machine that writes")
    materialize = command("materialize", _materialize, "turn a policy file into a compressed checkpoint")
    materialize.add_argument("policy", help="policy file (YAML)")
    materialize.add_argument("--out", required=True, help="folder to write")
    materialize.add_argument("--study", default="", help="study whose compressed tensors are used where they fit")
    machines.run_flags(materialize, {"model", "data", "sequence", "calibration_tokens", "seed", "cache"})
    export = command("export", _export, "export an answer for an engine, load it back and compare")
    export.add_argument("study", help="the study's folder, or a checkpoint that `search materialize` wrote")
    export.add_argument(
        "--format", required=True, help="compressed-tensors, auto-round, gptq, torchao, gguf, dense, modelopt, mlx"
    )
    export.add_argument("--objective", default="", help="which answer, for example 0.6x; default: the latest")
    export.add_argument("--candidate", default="", metavar="N", help="`best`, or another policy's row or name in `search show`")
    export.add_argument("--out", default="", help="folder to write; default: in the study")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from search.progress import Progress
    from search.run import run_study

    config = from_arguments(arguments)
    progress = Progress(quiet=arguments.quiet)
    if arguments.dry_run:
        from search.dry_run import dry_run

        _print(dry_run(config, progress), arguments.json)
        return 0
    try:
        answer = run_study(config, progress)
    except KeyboardInterrupt:
        progress.say(progress.best and f"{progress.best}; nothing was validated yet")
        raise
    _print_answer(config.folder, answer, arguments.json)
    return status(answer)


def _print(value: dict[str, Any] | list[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain(value), indent=1))
    elif isinstance(value, dict):
        for name, text in value.items():
            print(f"{name}: {text}")
    else:
        for row in value:
            print(row)


def _print_answer(folder: Path, answer: Answer, as_json: bool) -> None:
    from search.report.content import answer as words
    from search.report.terminal import measured_text, wrapped
    from search.results import json_rows, saved_report

    data = saved_report(folder, answer.objective)
    if as_json:
        told = {"answer": answer.to_json(), "measured": json_rows(data.measured), "folder": str(folder)}
        print(json.dumps(plain(told), indent=1))
        return
    said = [*words(data), *(f"note: {note}" for note in data.notes)]
    print(f"{measured_text(data)}\n\n{wrapped(said)}\nreport: {folder / 'report.html'}")


def _show(arguments: argparse.Namespace) -> int:
    from search.results import saved_answer

    _print_answer(Path(arguments.study), saved_answer(Path(arguments.study)), arguments.json)
    return 0


def _frontier(arguments: argparse.Namespace) -> int:
    from search.frontier import csv_text
    from search.report.picture import write_picture
    from search.results import json_rows, saved_report

    data = saved_report(Path(arguments.study), arguments.objective)
    if arguments.out:
        write_picture(data, Path(arguments.out))
    if arguments.json:
        print(json.dumps(plain(json_rows(data.measured)), indent=1))
    else:
        sys.stdout.write(csv_text([entry.candidate for entry in data.measured]))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from search.report.page import write_page
    from search.results import saved_report

    folder = Path(arguments.study)
    out = Path(arguments.out) if arguments.out else folder / "report.html"
    write_page(saved_report(folder, arguments.objective), out)
    print(json.dumps({"report": str(out)}) if arguments.json else out)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from search.report.compare import cautions, compare, write_comparison
    from search.results import saved_report

    folders = [Path(name) for name in arguments.studies]
    names = [folder.resolve().name for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"compare: a study is named twice in {', '.join(labels)}")
    studies = {label: saved_report(folder) for label, folder in zip(labels, folders, strict=True)}
    table = compare(studies, frontier_only=not arguments.all)
    notes = cautions(studies)
    if arguments.out:
        write_comparison(studies, Path(arguments.out))
    if arguments.json:
        print(json.dumps(plain({"policies": table.json(), "cautions": notes}), indent=1))
        return 0
    print(table.text())
    for note in notes:
        print(f"note: {note}")
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from search.method_list import details, listing, rows

    if arguments.json:
        print(json.dumps(rows([arguments.name]) if arguments.name else rows(), indent=1))
    else:
        print(details(arguments.name) if arguments.name else listing())
    return 0


def _runtimes(arguments: argparse.Namespace) -> int:
    from search.runtime_list import listing, rows

    print(json.dumps(rows(), indent=1) if arguments.json else listing())
    return 0


def _printed(run: Callable[[argparse.Namespace], machines.Shown]) -> machines.Run:
    def command(arguments: argparse.Namespace) -> int:
        found = run(arguments)
        print(json.dumps(plain(found.value), indent=1) if arguments.json else found.text)
        return found.status

    return command


def _validate(arguments: argparse.Namespace) -> int:
    from search.progress import Progress
    from search.validate import validate

    folder = Path(arguments.study)
    answer = validate(folder, Progress(), arguments.objective, arguments.on)
    _print_answer(folder, answer, arguments.json)
    return status(answer)


def _explain(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from search.explain import explain, text
    from search.folder import check_same
    from search.progress import Progress
    from search.results import saved_answer, saved_config, saved_prepared
    from search.session import Session

    folder = Path(arguments.study)
    answer, prepared = saved_answer(folder, arguments.objective), saved_prepared(folder)
    session = Session(saved_config(folder), Progress())
    check_same(session, prepared)
    result = explain(folder, answer, session, prepared, arguments.by, arguments.layer)
    print(json.dumps(plain(asdict(result)), indent=1) if arguments.json else text(result))
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    from search.cache import BANK, KINDS, banks, clear, items, trim
    from search.objectives import parse_bytes

    folder, results = Path(arguments.cache) if arguments.cache else default_cache(), Path(arguments.results)
    if arguments.clear or arguments.max_size:
        freed = trim(results, parse_bytes(arguments.max_size, "max-size", "10GiB")) if arguments.max_size else 0
        freed += clear(folder, arguments.clear) if arguments.clear else 0
        print(json.dumps({"freed_bytes": freed}) if arguments.json else f"{freed / 2**20:.1f} MiB freed")
        return 0
    found = items(folder, verify=arguments.verify) + banks(results, verify=arguments.verify)
    if arguments.json:
        print(json.dumps([vars(item) for item in found], indent=1))
    else:
        what = {**KINDS, BANK: f"compressed tensors of a study in {results}"}
        print(f"{folder}: {sum(item.size_bytes for item in found) / 2**20:.1f} MiB")
        for item in found:
            state = "  in use by a run" if item.held else f"  {item.problem}" if item.problem else ""
            print(f"{item.size_bytes / 2**20:9.1f} MiB  {item.kind:<10} {item.name}  ({what[item.kind]}){state}")
    return 1 if any(item.problem for item in found) else 0


def _generate(arguments: argparse.Namespace) -> int:
    from search.generate import generate

    check_range("--tokens", arguments.tokens, LENGTHS)
    folder, threads = _checkpoint(Path(arguments.checkpoint)), arguments.threads or None
    result = generate(folder, arguments.prompt, arguments.tokens, threads, arguments.on)
    if arguments.json:
        print(json.dumps(plain(vars(result)), indent=1))
    else:
        print(arguments.prompt + result.text)
        sys.stderr.write(f"{result.n_tokens} tokens, {result.ms_per_token:.1f} ms each ({result.kernels})\n")
        for note in result.notes:
            sys.stderr.write(f"note: {note}\n")
        for reason, sites in result.simulated.items():
            sys.stderr.write(
                f"note: {len(sites)} sites are simulated ({reason}): they run decoded, as dense ones, not at the format's speed, "
                "and their inputs are not rounded\n"
            )
    return 0


def _checkpoint(folder: Path) -> Path:
    """The checkpoint itself, or that of a study's latest answer."""
    if not (folder / "config.toml").exists():
        return folder
    from search.deliver import checkpoint_folder
    from search.results import saved_answer

    answer = saved_answer(folder)
    if answer.best is None or not answer.best.policy.sites:
        raise ConfigError(f"{folder}: its latest answer is the dense model, which has no checkpoint")
    return checkpoint_folder(folder, answer.best)


def _materialize(arguments: argparse.Namespace) -> int:
    from search.generate import materialize
    from search.progress import Progress

    study = Path(arguments.study) if arguments.study else None
    arguments.study = ""  # a folder here, and in a configuration a name
    config = from_arguments(arguments)
    materialize(Path(arguments.policy), Path(arguments.out), config, study, Progress())
    print(arguments.out)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from search.export.standalone import export_checkpoint, is_checkpoint
    from search.generate import export_study
    from search.progress import Progress
    from search.results import saved_answer

    folder, out = Path(arguments.study), Path(arguments.out) if arguments.out else None
    if is_checkpoint(folder):
        if out is None or arguments.objective or arguments.candidate:
            raise ConfigError(
                f"{folder} is a checkpoint, not a study: --out says where its export goes; --objective and --candidate say nothing"
            )
        path, check = out, export_checkpoint(folder, arguments.format, out)
    else:
        answer = saved_answer(folder, arguments.objective)
        path, check = export_study(folder, answer, arguments.format, out, Progress(), arguments.candidate or "best")
    if arguments.json:
        print(json.dumps(plain({"folder": str(path), **vars(check)}), indent=1))
    else:
        print(f"{path}: {check.summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
