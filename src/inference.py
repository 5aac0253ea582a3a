"""Say of pictures whether they show a defect, by the model Production_Reg@prod.

Folders are searched with all that is below them for .jpeg, .jpg and .png files; globs may stand in
quotes; - is one picture's bytes on standard input. Without pictures, the two examples of
src/config.yaml are run.

The exit code is 0 when all pictures were judged, 1 when one could not be read, and with
--fail-on-defect 3 unless every picture is ok.
"""

import itertools
import logging
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from defect_detection import PipelineError, script

# What only some calls need is imported where it is needed: this script starts in a third of a
# second, and of that it spends the most on the runtime of the model.
if TYPE_CHECKING:
    from tqdm import tqdm

    from defect_detection.classifier import Classifier, Verdict
    from defect_detection.rows import Row, RowFile
    from defect_detection.serving import Production

log = logging.getLogger(__name__)

CHUNK = 16  # pictures that a thread decodes and judges at a time
LOOK_EVERY = 0.1  # seconds, into a watched folder, if a look does not take longer
HEATMAP_SIDE = 320  # pixels, the longer one
DEFECT_FOUND = 3  # exit code


@dataclass(frozen=True)
class Item:
    """A picture to judge: its name in the row, and where its bytes are."""

    path: str
    source: Path | bytes


@dataclass(frozen=True)
class Model:
    """A classifier and what it is called in the rows."""

    name: str
    classifier: "Classifier"


def main() -> int:
    """Settings, model, pictures; then a verdict each."""
    parser = arguments()
    options = parser.parse_args()
    check(parser, options)
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    with ExitStack() as stack:
        # Asking the registry takes two seconds: begun first, awaited last.
        production = None if options.model else ask_registry()
        if production is not None:
            stack.callback(production.close)
        items = None if options.watch else find(options)
        from defect_detection.classifier import Classifier

        if production is None:
            model = Model(options.model, Classifier.load(Path(options.model), threads=1))
        else:
            model = load(production)
        heatmaps = Path(options.heatmaps) if options.heatmaps else None
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        files = [stack.enter_context(file) for file in open_files(options)]
        if options.watch:
            watch(options.watch, model, production, heatmaps, files, pool)
        wanted = (i for i in items if not files or not all(f.holds(i.path) for f in files))
        counts, broken = Counter(), None
        with progress(options) if files else nullcontext() as bar:
            for rows in judged(wanted, model, heatmaps, pool):
                put(rows, files)
                counts.update(row.verdict for row in rows)
                broken = broken or next((row for row in rows if row.verdict == "error"), None)
                if bar is not None:
                    bar.update(len(rows))
    if files:
        said = ", ".join(f"{counts[name]} {name}" for name in sorted(counts)) or "none"
        print(f"{counts.total()} pictures judged: {said}")
    if options.fail_on_defect and counts.total() > counts["ok"]:
        return DEFECT_FOUND
    if broken:
        raise PipelineError(
            f"{counts['error']} of {counts.total()} pictures cannot be read. Replace or delete "
            f"them ({broken.path} {broken.reason})"
        )
    return 0


def arguments() -> ArgumentParser:
    """Describe the options."""
    parser = script.parser(__doc__, "python src/inference.py line3/ part.jpeg --csv verdicts.csv")
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PICTURE", help="file, folder, glob or -")
    add("--files-from", metavar="FILE", help="a list of pictures, one a line; - is standard input")
    add("--watch", metavar="DIR", help="judge what arrives there, as soon as it is written")
    add("--csv", type=Path, metavar="FILE", help="write rows there instead of printing them")
    add("--jsonl", type=Path, metavar="FILE", help="write rows as a JSON object a line")
    add("--resume", action="store_true", help="keep the rows of the files, skip their pictures")
    add("--heatmaps", metavar="DIR", help="write each picture with the evidence of a defect")
    add("--fail-on-defect", action="store_true", help="exit code 3 unless every picture is ok")
    add("--model", metavar="DIR", help="a model's folder instead of the registry's")
    return parser


def check(parser: ArgumentParser, options: Namespace) -> None:
    """End with exit code 2 if options contradict each other."""
    files = bool(options.csv or options.jsonl)
    if options.resume and not files:
        parser.error("--resume needs --csv or --jsonl")
    if options.csv and options.csv == options.jsonl:
        parser.error("--csv and --jsonl name one file")
    if options.files_from == "-" and "-" in options.pictures:
        parser.error("standard input is a picture or a list, not both")
    if options.watch and (options.pictures or options.files_from or options.fail_on_defect):
        parser.error("--watch goes on until it is ended: without pictures and --fail-on-defect")
    searched = [*options.pictures, *([options.watch] if options.watch else [])]
    for folder in filter(os.path.isdir, searched):
        if options.heatmaps and Path(options.heatmaps).resolve().is_relative_to(
            Path(folder).resolve()
        ):
            parser.error(f"--heatmaps lies in {folder}: heatmaps would be taken for pictures")
    if options.watch and not os.path.isdir(options.watch):
        raise PipelineError(f"{options.watch} is not a folder. Make it, or watch another")


def ask_registry() -> "Production":
    """Begin to ask which version is behind prod."""
    from defect_detection import serving, settings
    from defect_detection.settings import Config

    config = settings.read_yaml(settings.CONFIG_FILE, Config)
    store = settings.tracking_uri(settings.environment())
    cache = settings.from_root(config.paths.cache)
    return serving.Production(store, config.mlflow.production_model_name, cache)


def load(production: "Production") -> Model:
    """Wait for the version behind prod and load it."""
    from defect_detection.classifier import Classifier

    served = production.current()
    classifier = Classifier.load(Path(served.folder), threads=1)
    log.info("%s, test accuracy %.4f", served, served.acc)
    return Model(f"{served.name}/{served.number}", classifier)


def find(options: Namespace) -> Iterator[Item]:
    """Return the pictures that are asked for, the examples if none are.

    Raises:
        PipelineError: a folder holds none, a glob matches none, or the list cannot be read.
    """
    from defect_detection import dataset, settings, sources
    from defect_detection.settings import Config

    if not options.pictures and not options.files_from:
        config = settings.read_yaml(settings.CONFIG_FILE, Config)
        env = settings.environment()
        folder = script.data_folder(options.data, env, config.paths.data_path)
        pictures = dataset.example_pictures(folder, config.inference_examples, log.info)
        return (Item(str(path), path) for path in pictures)
    named = [name for name in options.pictures if name != "-"]
    paths = sources.expand(named)
    if options.files_from == "-":
        sys.stdin.reconfigure(errors="surrogateescape")
        paths = itertools.chain(paths, sources.listed(sys.stdin))
    elif options.files_from:
        # Closed when the process ends.
        lines = open(options.files_from, encoding="utf-8", errors="surrogateescape")
        paths = itertools.chain(paths, sources.listed(lines))
    items = (Item(path, Path(path)) for path in paths)
    if "-" in options.pictures:
        items = itertools.chain(items, [Item("-", sys.stdin.buffer.read())])
    return items


def open_files(options: Namespace) -> Iterator["RowFile"]:
    """Open the files that rows go to."""
    from defect_detection.rows import Csv, JsonLines

    if options.csv:
        yield Csv(options.csv, options.resume)
    if options.jsonl:
        yield JsonLines(options.jsonl, options.resume)


def judged(
    items: Iterable[Item], model: Model, heatmaps: Path | None, pool: ThreadPoolExecutor
) -> Iterator[list["Row"]]:
    """Judge pictures on all cores; return rows in order, some at a time, with few under way."""
    work = partial(judge, model, heatmaps)
    items, under_way = iter(items), deque()
    while chunk := list(itertools.islice(items, CHUNK)):
        under_way.append(pool.submit(work, chunk))
        if len(under_way) > 2 * os.cpu_count():
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def judge(model: Model, heatmaps: Path | None, chunk: list[Item]) -> list["Row"]:
    """Judge some pictures in one thread."""
    from defect_detection.rows import Row

    verdicts = model.classifier.classify_all([item.source for item in chunk])
    if heatmaps:
        for item, verdict in zip(chunk, verdicts, strict=True):
            if verdict.evidence is not None:
                draw(item, verdict, heatmaps)
    return [Row.of(i.path, v, model.name) for i, v in zip(chunk, verdicts, strict=True)]


def draw(item: Item, verdict: "Verdict", folder: Path) -> None:
    """Write a picture with the evidence over it, as PNG below `folder` where its path says.

    Raises:
        PipelineError: it cannot be written.
    """
    from defect_detection import images

    path = Path(os.path.relpath(item.path))
    if ".." in path.parts:
        path = Path(*Path(os.path.abspath(item.path)).parts[1:])
    target = folder / path.with_name(f"{path.name}.png" if item.path != "-" else "stdin.png")
    picture = images.decode_within(item.source, HEATMAP_SIDE)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        images.lay_over(picture, verdict.evidence, verdict.probability).save(
            target, compress_level=1
        )
    except OSError as error:
        raise PipelineError(f"{target}: cannot be written ({error.strerror})") from error


def put(rows: list["Row"], files: list["RowFile"]) -> None:
    """Write rows to the files; print them if there are none."""
    for file in files:
        file.add(rows)
    if not files:
        print(*rows, sep="\n", flush=True)


def progress(options: Namespace) -> "AbstractContextManager[tqdm | None]":
    """Show a bar on a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from tqdm import tqdm

    from defect_detection import sources

    total = None
    if not options.files_from and not options.resume:
        total = sum(1 for _ in sources.expand([p for p in options.pictures if p != "-"]))
    return tqdm(total=total, unit=" pictures")


def watch(
    folder: str,
    model: Model,
    production: "Production | None",
    heatmaps: Path | None,
    files: list["RowFile"],
    pool: ThreadPoolExecutor,
) -> None:
    """Judge pictures as they arrive in a folder, by the version behind prod, until ended."""
    from defect_detection.sources import Arrival, Watch

    watched = Watch(folder, lambda path: bool(files) and all(f.holds(path) for f in files))
    waiting: deque[Arrival] = deque()

    def items() -> Iterator[Item]:
        for arrival in watched.arrivals():
            waiting.append(arrival)
            yield Item(arrival.path, arrival.content)

    log.info("Watching %s; end with Ctrl-C", folder)
    while True:
        started = time.monotonic()
        for rows in judged(items(), model, heatmaps, pool):
            arrived = [(row, waiting.popleft()) for row in rows]
            # What cannot be decoded may not be written to its end yet.
            whole = [(r, a) for r, a in arrived if r.verdict != "error" or a.final]
            if whole:
                put([row for row, _ in whole], files)
            for _, arrival in whole:
                arrival.judged()
        if production is not None and production.moved():
            model = load(production)
        time.sleep(max(LOOK_EVERY, time.monotonic() - started))


if __name__ == "__main__":
    script.run(main)
