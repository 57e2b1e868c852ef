"""The command line: `search run`, `show`, `methods`, `targets`, `doctor`, `generate`, `materialize`, `export`."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.config import ConfigError, add_flags, default_cache, from_arguments

if TYPE_CHECKING:
    from search.results import Answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0 for success, 1 for an objective that is not met, 2 for bad input, 130 for an interruption."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if not hasattr(parsed, "command"):
        parser.print_help()
        return 2
    _quiet_libraries()
    try:
        return int(parsed.command(parsed))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; everything finished so far is kept, the same command goes on from there\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, KeyError, OSError, ImportError, MemoryError) as error:
        if parsed.debug:
            raise
        sys.stderr.write(f"search: {_one_line(error)}\n")
        return 2


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; use fewer --calibration-tokens or a shorter --sequence"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def _quiet_libraries() -> None:
    """Libraries' own chatter does not belong between our lines; our warnings do."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    for name in ("transformers", "optuna", "lm_eval", "compressed_tensors", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    common.add_argument("--json", action="store_true", help="results as JSON on stdout")
    parser = argparse.ArgumentParser(
        prog="search",
        description="Search how to compress a language model so that it really meets a latency objective on a machine.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(command=run)
        return sub

    run = command("run", _run, "search, validate and export a policy for a latency objective")
    add_flags(run)
    run.add_argument("--dry-run", action="store_true", help="show the space and the expected cost, measure and compute nothing")
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
    command("targets", _targets, "the machines that can be searched for")
    doctor = command("doctor", _doctor, "what this machine can measure, and what spoils it")
    doctor.add_argument("--cache", default="", help="cache folder to check")
    explain = command("explain", _explain, "which choices of an answer cost the quality and which save the time")
    explain.add_argument("study", help="the study's folder")
    explain.add_argument("--objective", default="", help="which answer, for example 0.6x; default: the latest")
    explain.add_argument("--by", choices=["kind", "block", "site"], default="kind", help="what is swapped back together")
    explain.add_argument("--layer", default="", metavar="TEXT", help="only sites whose name contains this")
    cache = command("cache", _cache, "what lies in the cache, and getting rid of it")
    cache.add_argument("--cache", default="", help="cache folder")
    cache.add_argument("--verify", action="store_true", help="read and check everything")
    cache.add_argument("--clear", default="", metavar="KIND", help="delete models, tables, generated, kernels or all")
    generate = command("generate", _generate, "write text with a compressed checkpoint, on the real kernels")
    generate.add_argument("checkpoint", help="folder of a checkpoint, or of a study (its latest answer)")
    generate.add_argument("--prompt", default="The capital of France is", help="text to continue")
    generate.add_argument("--tokens", type=int, default=48, help="tokens to write")
    generate.add_argument("--threads", type=int, default=0, help="threads; 0: half of the machine's cores")
    materialize = command("materialize", _materialize, "turn a policy file into a compressed checkpoint")
    materialize.add_argument("policy", help="policy file (YAML)")
    materialize.add_argument("--out", required=True, help="folder to write")
    materialize.add_argument("--study", default="", help="study whose compressed tensors are used where they fit")
    _model_flags(materialize)
    export = command("export", _export, "export an answer for an engine, load it back and compare")
    export.add_argument("study", help="the study's folder")
    export.add_argument("--format", required=True, help="compressed-tensors or dense")
    export.add_argument("--objective", default="", help="which answer, for example 0.6x; default: the latest")
    export.add_argument("--out", default="", help="folder to write; default: in the study")
    return parser


def _model_flags(parser: argparse.ArgumentParser) -> None:
    """The run's flags that say which model and which text."""
    scratch = argparse.ArgumentParser(add_help=False)
    add_flags(scratch)
    wanted = {"model", "data", "sequence", "calibration_tokens", "seed", "cache"}
    for action in scratch._actions:
        if action.dest in wanted:
            parser._add_action(action)


def _run(arguments: argparse.Namespace) -> int:
    from search.progress import Progress
    from search.run import run_study

    config = from_arguments(arguments)
    progress = Progress(quiet=arguments.quiet)
    if arguments.dry_run:
        from search.dry_run import dry_run

        _print(dry_run(config, progress), arguments.json)
        return 0
    answer = run_study(config, progress)
    _print_answer(config.folder, answer, arguments.json)
    return 0 if answer.verdict == "met" else 1


def _print(value: dict[str, Any] | list[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(_plain(value), indent=1))
    elif isinstance(value, dict):
        for name, text in value.items():
            print(f"{name}: {text}")
    else:
        for row in value:
            print(row)


def _plain(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _print_answer(folder: Path, answer: Answer, as_json: bool) -> None:
    from search.report.content import answer as words
    from search.results import json_rows, saved_report, text_table

    data = saved_report(folder, answer.objective)
    entries = data.measured
    if as_json:
        print(json.dumps(_plain({"answer": answer.to_json(), "measured": json_rows(entries), "folder": str(folder)}), indent=1))
        return
    print(text_table(entries))
    print()
    for sentence in words(data):
        print(sentence)
    for note in data.notes:
        print(f"note: {note}")
    print(f"report: {folder / 'report.html'}")


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
        print(json.dumps(_plain(json_rows(data.measured)), indent=1))
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
        print(json.dumps(_plain({"policies": table.json(), "cautions": notes}), indent=1))
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


def _targets(arguments: argparse.Namespace) -> int:
    from profilers.target import targets

    rows = [
        {
            "name": target.name,
            "state": "here" if target.present else "stored table" if target.table else "not here",
            "description": target.description,
        }
        for target in targets()
    ]
    if arguments.json:
        print(json.dumps(_plain(rows), indent=1))
        return 0
    for row in rows:
        print(f"{row['name']:<12} {row['state']:<14} {row['description']}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from profilers.doctor import doctor

    findings = doctor(Path(arguments.cache) if arguments.cache else default_cache())
    if arguments.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'look'}  {finding.name:<18} {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1


def _explain(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict, replace

    from search.explain import explain, text
    from search.progress import Progress
    from search.results import saved_answer, saved_config, saved_prepared
    from search.run import check_same
    from search.session import Session

    folder = Path(arguments.study)
    answer, prepared = saved_answer(folder, arguments.objective), saved_prepared(folder)
    session = Session(
        replace(saved_config(folder), study=folder.resolve().name, results=str(folder.resolve().parent)), Progress()
    )
    check_same(session, prepared)
    result = explain(folder, answer, session, prepared, arguments.by, arguments.layer)
    print(json.dumps(_plain(asdict(result)), indent=1) if arguments.json else text(result))
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    from search.cache import KINDS, clear, items

    folder = Path(arguments.cache) if arguments.cache else default_cache()
    if arguments.clear:
        freed = clear(folder, arguments.clear)
        print(json.dumps({"freed_bytes": freed}) if arguments.json else f"{freed / 2**20:.1f} MiB freed")
        return 0
    found = items(folder, verify=arguments.verify)
    if arguments.json:
        print(json.dumps([vars(item) for item in found], indent=1))
    else:
        print(f"{folder}: {sum(item.size_bytes for item in found) / 2**20:.1f} MiB")
        for item in found:
            state = f"  {item.problem}" if item.problem else ""
            print(f"{item.size_bytes / 2**20:9.1f} MiB  {item.kind:<10} {item.name}  ({KINDS[item.kind]}){state}")
    return 1 if any(item.problem for item in found) else 0


def _generate(arguments: argparse.Namespace) -> int:
    from search.generate import generate

    if arguments.tokens < 1:
        raise ConfigError(f"--tokens {arguments.tokens}: must be at least 1")
    result = generate(_checkpoint(Path(arguments.checkpoint)), arguments.prompt, arguments.tokens, arguments.threads or None)
    if arguments.json:
        print(json.dumps(_plain(vars(result)), indent=1))
    else:
        print(arguments.prompt + result.text)
        sys.stderr.write(f"{result.n_tokens} tokens, {result.ms_per_token:.1f} ms each ({result.kernels})\n")
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
    return checkpoint_folder(folder, answer)


def _materialize(arguments: argparse.Namespace) -> int:
    from search.generate import materialize
    from search.progress import Progress

    config = replace(from_arguments(arguments), study="")
    study = Path(arguments.study) if arguments.study else None
    materialize(Path(arguments.policy), Path(arguments.out), config, study, Progress())
    print(arguments.out)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from search.generate import export_study
    from search.progress import Progress
    from search.results import saved_answer

    folder = Path(arguments.study)
    answer = saved_answer(folder, arguments.objective)
    out = Path(arguments.out) if arguments.out else None
    path, check = export_study(folder, answer, arguments.format, out, Progress())
    if arguments.json:
        print(json.dumps(_plain({"folder": str(path), **vars(check)}), indent=1))
    else:
        print(f"{path}: {check.message or 'equal'}; weights differ by {check.max_weight_diff:g} over {check.n_linears} linears")
    return 0


if __name__ == "__main__":
    sys.exit(main())
