"""Judge images with the model in production, Production_Reg@prod.

Folders are searched with all folders below them for JPEG, PNG, BMP, TIFF and WebP files. Globs may
be given in quotes. - reads one image from standard input. Without images, the two examples of
src/config.yaml are judged.

The exit code is 0 when all images were judged, 1 when one could not be read, and with
--fail-on-defect 3 unless every image is ok.
"""

import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from defect_detection import PipelineError, cli

# Imports that only some calls need are made where they are needed: this script starts in a third
# of a second, most of which LiteRT takes.
if TYPE_CHECKING:
    from tqdm import tqdm

    from defect_detection.inference.judge import Item, Judge
    from defect_detection.inference.production import Production
    from defect_detection.inference.rows import Output, RowFile
    from defect_detection.inference.verdict_log import VerdictLog
    from defect_detection.settings import Config

log = logging.getLogger(__name__)

DEFECT_FOUND = 3  # exit code
LOG_WITHIN = 2  # seconds, at the end of a watch


class LineOnly(PipelineError):
    """The configuration cannot be read, since only requirements-line.txt is installed."""


def main() -> int:
    """Read the options, then judge; a signal ends it at once."""
    parser = arguments()
    options = parser.parse_args()
    check(parser, options)
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    try:
        with ExitStack() as stack:
            return infer(options, coloured, stack)
    except (SystemExit, KeyboardInterrupt) as ended:
        # A thread may wait for a share that does not answer; Python would wait for the thread.
        os._exit(130 if isinstance(ended, KeyboardInterrupt) else ended.code)


def infer(options: Namespace, coloured: bool, stack: ExitStack) -> int:
    """Find model, images and rows' files; judge; return the exit code.

    Files are read in threads, so that this one always hears signals.
    """
    if options.ray:
        return judge_on_cluster(options, stack)
    # Asking the registry takes two seconds: it begins first and is awaited last.
    production = None if options.model else ask_registry(options)
    if production is not None:
        stack.callback(production.close)
    worker = ThreadPoolExecutor(1)
    worker.submit(check_folders, options).result()
    items = iter(()) if options.watch else worker.submit(find, options).result()

    from defect_detection.inference.judge import Judge, NamedModel
    from defect_detection.inference.rows import Output

    output = Output([stack.enter_context(file) for file in open_files(options)], coloured)
    if production is None:
        model = NamedModel.load(options.model, options.model)
    else:
        model = NamedModel.in_production(production)
    pool = ThreadPoolExecutor(os.cpu_count())
    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    judge = Judge(model, Path(options.heatmaps) if options.heatmaps else None, pool)
    stack.callback(output.pause)
    if options.watch:
        from defect_detection.inference import watch

        verdicts = verdict_log(options)
        stack.callback(finish, verdicts)
        worker.submit(watch.follow, options.watch, judge, production, output, verdicts).result()
    return worker.submit(judge_all, options, items, judge, output).result()


def judge_on_cluster(options: Namespace, stack: ExitStack) -> int:
    """Judge the images of folders on a Ray cluster; return the exit code."""
    from defect_detection import cluster
    from defect_detection.inference.judge import NamedModel

    if options.model:
        model, folder = NamedModel.load(options.model, options.model), options.model
    else:
        production = ask_registry(options)
        stack.callback(production.close)
        model, folder = NamedModel.in_production(production), production.current().folder
    with cluster.connected(options.ray):
        from defect_detection.inference import on_ray

        keys = keys_of_buckets(options)
        counts = on_ray.judge_all(options.pictures, model, Path(folder), options.parquet, keys)
    print(said(counts, "have a row"))
    broken = f"their rows in {options.parquet} say why" if counts["error"] else ""
    return conclude(options, counts, Counter(), broken)


def keys_of_buckets(options: Namespace) -> dict[str, str]:
    """Return the variables by which buckets are reached, which the workers need too."""
    _, env = configuration(options.config)
    return {name: value for name, value in env.items() if name.startswith("AWS_")}


def arguments() -> ArgumentParser:
    """Describe the options."""
    parser = cli.parser(__doc__, "python src/inference.py line3/ part.jpeg --csv verdicts.csv")
    add = parser.add_argument
    add("pictures", nargs="*", metavar="IMAGE", help="file, folder, glob or -")
    add("--files-from", metavar="FILE", help="a list of images, one a line; - is standard input")
    add("--watch", metavar="DIR", help="judge images as soon as they are written there")
    add("--csv", type=Path, metavar="FILE", help="write rows there instead of printing them")
    add("--jsonl", type=Path, metavar="FILE", help="write rows as one JSON object a line")
    add("--resume", action="store_true", help="keep the rows of the files, skip their images")
    add("--heatmaps", metavar="DIR", help="write each image with the evidence of a defect")
    add("--fail-on-defect", action="store_true", help="exit code 3 unless every image is ok")
    add("--ray", metavar="ADDRESS", help="judge folders or s3://bucket/prefix on this cluster")
    add("--parquet", metavar="DIR", help="with --ray: write rows there, skip images that have one")
    add("--model", metavar="DIR", help="a model's folder instead of the registry's")
    return parser


def check(parser: ArgumentParser, options: Namespace) -> None:
    """End with exit code 2 if options contradict each other."""
    strings = ("files_from", "watch", "heatmaps", "model", "ray", "parquet")
    cli.refuse_empty(parser, options, strings)
    files = bool(options.csv or options.jsonl)
    if bool(options.ray) != bool(options.parquet) or options.ray and not options.pictures:
        parser.error("--ray needs --parquet and folders, and --parquet needs --ray")
    if options.ray and (files or options.watch or options.files_from or options.heatmaps):
        parser.error("--ray takes neither --csv, --jsonl, --watch, --files-from nor --heatmaps")
    if options.resume and not files:
        parser.error("--resume needs --csv or --jsonl")
    paths = [os.path.realpath(file) for file in (options.csv, options.jsonl) if file]
    if len(paths) > len(set(paths)):
        parser.error("--csv and --jsonl name one file")
    if options.files_from == "-" and "-" in options.pictures:
        parser.error("standard input is an image or a list, not both")
    if options.watch and (options.pictures or options.files_from or options.fail_on_defect):
        parser.error("--watch takes neither images nor --files-from nor --fail-on-defect")
    if options.fail_on_defect and not options.pictures and not options.files_from:
        parser.error("--fail-on-defect needs images: without any, the examples are judged")


def check_folders(options: Namespace) -> None:
    """Raise PipelineError if a folder cannot be watched, or if heatmaps would be judged."""
    if options.watch and not os.path.isdir(options.watch):
        raise PipelineError(f"{options.watch} is not a folder. Make it, or watch another")
    if options.heatmaps:
        from defect_detection.inference import sources

        heatmaps = Path(options.heatmaps).resolve()
        for folder in sources.folders([options.watch] if options.watch else options.pictures):
            if heatmaps.is_relative_to(Path(folder).resolve()):
                raise PipelineError(
                    f"--heatmaps lies in {folder}: heatmaps would be taken for images. Write them "
                    f"to another folder"
                )


def ask_registry(options: Namespace) -> "Production":
    """Start to ask which version is in production."""
    config, env = configuration(options.config)
    from defect_detection import settings
    from defect_detection.inference.production import Production

    kept = settings.from_root(config.paths.cache)
    names, uri = config.names, settings.tracking_uri(env)
    return Production(uri, names.production_model_name, kept, names.testing_model_name)


@cache
def configuration(file: str | None) -> "tuple[Config, dict[str, str]]":
    """Read src/config.yaml, or another file, and the environment.

    Raises:
        LineOnly: only requirements-line.txt is installed, which cannot read them.
    """
    try:
        from defect_detection import settings
    except ModuleNotFoundError as error:
        raise LineOnly(
            f"{error.name} is not installed. Name images and a model's folder with --model, or "
            f"install requirements.txt"
        ) from error
    return settings.read_config(file), settings.environment()


def verdict_log(options: Namespace) -> "VerdictLog":
    """Return the log of a watch's verdicts, as the configuration says.

    A small PC at the line may have none, or only requirements-line.txt, which cannot read it.
    """
    from defect_detection import retention
    from defect_detection.inference.verdict_log import Rules, VerdictLog

    here = Path(__file__).resolve().parent
    usual = partial(VerdictLog, here.parent / retention.FOLDER, Rules())
    if options.model and not options.config and not (here / "config.yaml").exists():
        return usual()
    try:
        config, env = configuration(options.config)
    except LineOnly:
        if options.config:
            raise
        return usual()
    from defect_detection import settings

    return VerdictLog(settings.line_folder(env, config), Rules.of(config.line))


def finish(verdicts: "VerdictLog") -> None:
    """Wait until verdicts are in the log, and say how many are not."""
    left = verdicts.flush(LOG_WITHIN) + verdicts.unlogged
    if left:
        log.warning("%d verdicts are not in %s: %s", left, verdicts.file, verdicts.trouble)


def find(options: Namespace) -> "Iterator[Item]":
    """Return the images to judge: the examples if none are named.

    Raises:
        PipelineError: a folder holds none, a glob matches none, or there are no examples.
    """
    from defect_detection.inference import sources

    if options.pictures or options.files_from:
        return sources.items(options.pictures, options.files_from)
    config, env = configuration(options.config)
    from defect_detection.dataset.folder import DataFolder
    from defect_detection.inference.judge import Item

    folder = DataFolder.choose(options, env, config)
    examples = folder.examples(config.inference_examples, log.info)
    return (Item(str(path), path) for path in examples)


def open_files(options: Namespace) -> "Iterator[RowFile]":
    """Open the files that rows go to."""
    from defect_detection.inference.rows import Csv, JsonLines

    if options.csv:
        yield Csv(options.csv, options.resume)
    if options.jsonl:
        yield JsonLines(options.jsonl, options.resume)


def judge_all(options: Namespace, items: "Iterator[Item]", judge: "Judge", output: "Output") -> int:
    """Judge images and write their rows; return the exit code.

    Raises:
        PipelineError: an image cannot be read, or rows cannot be written.
    """
    counts: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    broken = ""

    def wanted() -> "Iterator[Item]":
        for item in items:
            verdict = output.kept(item.path)
            if verdict is None:
                yield item
            else:
                kept[verdict] += 1

    with progress(options) if output else nullcontext() as bar:
        for judged in judge.judged(wanted()):
            rows = [one.row for one in judged]
            output.put(rows)
            counts.update(row.verdict for row in rows)
            errors = (f"{row.path} {row.reason}" for row in rows if row.verdict == "error")
            broken = broken or next(errors, "")
            if bar is not None:
                bar.update(len(rows))
    output.settle()
    if output:
        print(said(counts, "judged") + (f"; {said(kept, 'have a row')}" if kept else ""))
    return conclude(options, counts, kept, broken)


def said(counts: Counter[str], what: str) -> str:
    """Return counts of verdicts in words."""
    each = ", ".join(f"{counts[name]} {name}" for name in sorted(counts)) or "none"
    return f"{counts.total()} images {what}: {each}"


def conclude(options: Namespace, counts: Counter[str], kept: Counter[str], broken: str) -> int:
    """Return the exit code.

    Raises:
        PipelineError: an image cannot be read.
    """
    asked = counts + kept
    if options.fail_on_defect and asked.total() > asked["ok"]:
        return DEFECT_FOUND
    if broken:
        raise PipelineError(
            f"{counts['error']} of {asked.total()} images cannot be read. Replace or delete "
            f"them ({broken})"
        )
    return 0


def progress(options: Namespace) -> "AbstractContextManager[tqdm | None]":
    """Show a bar if standard error is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from tqdm import tqdm

    from defect_detection.inference import sources

    total = None
    if not options.files_from and not options.resume:
        named = [name for name in options.pictures if name != "-"]
        total = sum(1 for _ in sources.expand(named, say=lambda *_: None))
    return tqdm(total=total, unit=" images")


if __name__ == "__main__":
    cli.run(main)
