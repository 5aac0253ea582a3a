"""`.env` and the YAML files, read strictly into frozen dataclasses."""

import io
import json
import os
import re
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from defect_detection import PipelineError, retention, strict_yaml, uris
from defect_detection.retention import Retention

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FILE = ROOT / "src" / "config.yaml"
ENV_FILE = ROOT / ".env"
LOCAL_SUFFIX = ".local"  # of the file beside .env that git ignores
# Defaults of variables that neither these files nor the environment set.
STORE = "sqlite:///mlflow.db"
API_PORT = 5001
JOBS_PATH = ".jobs"
Quantize = Literal["none", "float16", "int8"]  # how the served model's weights are stored
Color = Literal["auto", "grey"]  # auto keeps the colour of images that have it
Head = Literal["map", "wide", "good"]  # what a model makes its verdict from
QUANTIZE: tuple[str, ...] = get_args(Quantize)
DEVICES = ("auto", "cpu", "gpu")  # values of the variable DEVICE
LARGEST = 1_000_000  # bytes of a file of settings

T = TypeVar("T")

UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")  # errors of pydantic
_STRICT = ConfigDict(extra="forbid", strict=True)
Name = Annotated[str, Field(min_length=1)]
Product = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]
Count = Annotated[int, Field(ge=1)]
Epochs = Annotated[int, Field(ge=1, le=1000)]
BatchSize = Annotated[int, Field(ge=1, le=4096)]
Share = Annotated[float, Field(ge=0, lt=1)]
Side = Annotated[int, Field(ge=16, le=2048)]
ImageSize = tuple[Side, Side]
Rate = Annotated[float, Field(gt=0, lt=1)]
TimeOfDay = Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$", examples=["06:00"])]
WeightDecay = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=_STRICT)
class Paths:
    """Files and folders; relative ones count from the project's root.

    `line` is the folder of the verdict log and of what else is kept of the line.
    """

    data_path: Name
    best_model: Name
    cache: Name
    line: Name = retention.FOLDER


@dataclass(frozen=True, config=_STRICT)
class HyperParameters:
    """One hyper-parameter set of `train.py`.

    Attributes:
        name: of the set.
        blocks: pretrained blocks, which keep their weights; fewer are quicker and see less.
        views: 2 also uses a copy of each image rotated by 180 degrees, which takes twice as long.
        head: "map" looks for a defect place by place, and learns from strong variants and drawn
            blemishes; "wide" also weighs what is seen in the image as a whole, and learns from the
            images as they are and from gentle variants; "good" learns from good parts only.
        learning_rate: the highest; it falls along a cosine to 0 at the last epoch.
        weight_decay: of AdamW, the share of a weight that a step takes away, per learning rate.
        batch_size: images in a step.
        epochs: passes over the variants.
    """

    name: Name
    blocks: Annotated[int, Field(ge=8, le=11)]
    views: Annotated[int, Field(ge=1, le=2)]
    head: Head
    learning_rate: Rate
    weight_decay: WeightDecay
    batch_size: BatchSize
    epochs: Epochs

    def layers(self) -> dict[str, object]:
        """Return the hyper-parameters of the network itself."""
        return {"blocks": self.blocks, "views": self.views, "head": self.head}


@dataclass(frozen=True, config=_STRICT)
class FitParameters:
    """How a model is fitted, whatever its network.

    Attributes:
        learning_rate: the highest; it falls along a cosine to 0 at the last epoch.
        weight_decay: of AdamW, the share of a weight that a step takes away, per learning rate.
        batch_size: images in a step.
        epochs: passes over the variants.
        validation_share: share of the photographs held out from each fit.
        seed: of everything random.
    """

    learning_rate: Rate
    weight_decay: WeightDecay
    batch_size: BatchSize
    epochs: Epochs
    validation_share: Rate
    seed: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=_STRICT)
class Sampling:
    """Which variants of the training images a model is fitted to.

    Attributes:
        variants: how many, each photograph of a class as often as the others.
        seed: decides which variants are drawn.
        cache: absolute path of the folder where their features are kept.
    """

    variants: Annotated[int, Field(ge=10)]
    seed: Annotated[int, Field(ge=0)]
    cache: Path


@dataclass(frozen=True, config=_STRICT)
class ModelParameters:
    """Parameters that all sets share.

    `image_size` is height and width in pixels. Images of more than `max_megapixels` are refused
    before they are decoded.
    """

    image_size: ImageSize
    color: Color
    variants: Annotated[int, Field(ge=100)]
    validation_share: Rate
    seed: Annotated[int, Field(ge=0)]
    quantize: Quantize
    sets: Annotated[list[HyperParameters], Field(min_length=1)]
    max_megapixels: Annotated[float, Field(gt=0, le=10_000)] = 100

    def __post_init__(self) -> None:
        """Refuse two sets with one name, whose runs would look alike."""
        twice = [name for name, n in Counter(s.name for s in self.sets).items() if n > 1]
        if twice:
            raise ValueError(
                f"two sets are named {twice[0]!r}, expected a name of its own for each"
            )

    @property
    def most_pixels(self) -> int:
        """`max_megapixels` in pixels."""
        return round(self.max_megapixels * 1e6)

    def sampling(self, cache: Path) -> Sampling:
        """Return the variants that all sets are fitted to."""
        return Sampling(self.variants, self.seed, cache)

    def fit_parameters(self, hyper: HyperParameters) -> FitParameters:
        """Return the fit parameters of a set."""
        return FitParameters(
            hyper.learning_rate,
            hyper.weight_decay,
            hyper.batch_size,
            hyper.epochs,
            self.validation_share,
            self.seed,
        )


@dataclass(frozen=True, config=_STRICT)
class MLflowNames:
    """Experiments, registered models, the alias of the model that waits for retraining.

    `evaluation_threshold` is the test accuracy from which a model goes to production.
    """

    experiment_name: Name
    production_model_name: Name
    testing_model_name: Name
    testing_model_alias: Name
    evaluation_threshold: Annotated[float, Field(ge=0, le=1)]

    def of(self, product: str | None) -> "MLflowNames":
        """Return the names of the experiments and models of a product, None for no product."""
        if product is None:
            return self
        return replace(
            self,
            experiment_name=f"{self.experiment_name}-{product}",
            production_model_name=f"{self.production_model_name}-{product}",
            testing_model_name=f"{self.testing_model_name}-{product}",
        )


@dataclass(frozen=True, config=_STRICT)
class Decisions:
    """What a plant demands of verdicts and of new versions.

    Attributes:
        max_escape_rate: largest share of the validation defects below the threshold.
        max_overkill_rate: largest share of the good parts that may be rejected.
        review_share: share of the validation images, the nearest to the threshold, that would
            be sent to a person.
        promotion: the alias prod goes to the highest accuracy, or only to a version that is
            significantly better than the one it would replace.
        refuse_chance: a version whose balanced accuracy may be chance is not released.
        refuse_escapes: nor is one with more escapes than `max_escape_rate` beyond doubt.
        refuse_overkill: nor is one with more overkill than `max_overkill_rate` beyond doubt.
    """

    max_escape_rate: Share
    max_overkill_rate: Share
    review_share: Share
    promotion: Literal["highest_acc", "significant"]
    refuse_chance: bool
    refuse_escapes: bool
    refuse_overkill: bool


def _pattern(text: str) -> str:
    """Refuse what is no regular expression, or has several groups, of which none is the id."""
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error
    if groups > 1:
        raise ValueError(f"{text!r} has {groups} groups, expected one at most")
    return text


@dataclass(frozen=True, config=_STRICT)
class Line:
    """How verdicts at the line are kept, shown and reviewed.

    Attributes:
        part_id: regular expression that finds the id of the part in the name of an image: its
            group, if it has one, else all that it matches.
        audit_share: share of the parts that pass that a person looks at, chosen at random.
        field_test_share: share of the photographs of approved labels that only test models.
        no_image_after: seconds without an image after which the line's page says so.
        shifts: when shifts begin, in local time.
        keep: what the verdict log keeps.
    """

    part_id: Annotated[str, AfterValidator(_pattern)] = r"^[^.]+"
    audit_share: Share = 0.02
    field_test_share: Rate = 0.2
    no_image_after: Annotated[float, Field(gt=0)] = 60.0
    shifts: Annotated[list[TimeOfDay], Field(min_length=1)] = field(
        default_factory=lambda: ["06:00", "14:00", "22:00"]
    )
    keep: Retention = Retention()


@dataclass(frozen=True, config=_STRICT)
class InferenceExamples:
    """Images to judge when none are given, relative to the data folder."""

    defective_image: Name
    ok_image: Name


@dataclass(frozen=True, config=_STRICT)
class Classes:
    """Names of the folders of each class, whatever their case."""

    defect: Annotated[list[Name], Field(min_length=1)]
    ok: Annotated[list[Name], Field(min_length=1)]

    def __post_init__(self) -> None:
        """Refuse a name of both classes."""
        both = {name.lower() for name in self.defect} & {name.lower() for name in self.ok}
        if both:
            raise ValueError(f"{sorted(both)[0]!r} is a name of both classes")


@dataclass(frozen=True, config=_STRICT)
class Config:
    """`src/config.yaml`.

    `product` is a suffix of experiments and registered models, so that several kinds of parts can
    share a tracking store.
    """

    product: Product | None
    paths: Paths
    classes: Classes
    model_parameters: ModelParameters
    mlflow: MLflowNames
    decisions: Decisions
    inference_examples: InferenceExamples
    line: Line = Line()

    @property
    def names(self) -> MLflowNames:
        """Names of the product's experiments and models."""
        return self.mlflow.of(self.product)

    @property
    def best_model(self) -> Path:
        """The product's file that says which model the evaluation takes."""
        path = from_root(self.paths.best_model)
        return path.with_stem(f"{path.stem}-{self.product}") if self.product else path


@dataclass(frozen=True, config=_STRICT)
class RetrainPaths:
    """The data folder; a relative path counts from the project's root."""

    data_path: Name


@dataclass(frozen=True, config=_STRICT)
class RetrainParameters:
    """How a model is fine-tuned. `image_size`, height and width, is that of a new model."""

    image_size: ImageSize
    batch_size: BatchSize
    epochs: Epochs
    learning_rate: Rate


@dataclass(frozen=True, config=_STRICT)
class RetrainOverrides:
    """What a single retraining may change; None keeps the value of re_train.yaml.

    The API's body, the command line of re_train.py and the job's command derive from these fields.
    """

    epochs: Epochs | None = None
    batch_size: BatchSize | None = None
    learning_rate: Rate | None = None

    def given(self) -> dict[str, int | float]:
        """Return the values that are not None, by name."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def options(self) -> list[str]:
        """Return the command-line options that give these values."""
        return [f"--{_dashed(name)}={value}" for name, value in self.given().items()]

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        """Add an option for each value to a parser."""
        for name in (one.name for one in fields(cls)):
            kind = get_args(_type_at(cls, (name,)))[0]  # of Annotated[int, ...]
            parser.add_argument(f"--{_dashed(name)}", type=kind, metavar="N")

    @classmethod
    def from_options(cls, options: Namespace) -> "RetrainOverrides":
        """Return the values of parsed options.

        Raises:
            PipelineError: one is out of range.
        """
        given = {one.name: getattr(options, one.name) for one in fields(cls)}
        return parse_json(json.dumps(given), cls, "The options")


@dataclass(frozen=True, config=_STRICT)
class RetrainConfig:
    """`re_train/re_train.yaml`; `include_inbox` says whether approved labels are learned from."""

    paths: RetrainPaths
    model_parameters: RetrainParameters
    mlflow: MLflowNames
    inference_examples: InferenceExamples
    include_inbox: bool = False


def read_config(path: str | None = None) -> Config:
    """Read `src/config.yaml`, or another file of that form.

    Raises:
        PipelineError: as `read_yaml` raises it.
    """
    return read_yaml(Path(path) if path else CONFIG_FILE, Config)


def read_yaml(path: Path, kind: type[T]) -> T:
    """Read a YAML file into the dataclass `kind`.

    Raises:
        PipelineError: the file is missing or not what `strict_yaml` reads; a key is unknown or
            missing; a value is of the wrong type or out of range. The message names file, key and
            what is expected.
    """
    content = strict_yaml.read(_read_text(path), str(path))
    # As JSON, since only there strict pydantic accepts a list for a tuple.
    return parse_json(json.dumps(content), kind, str(path))


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > LARGEST:
        raise PipelineError(f"{path}: is larger than 1 MB, expected a few lines of settings")
    try:
        text = content.decode("utf-8-sig")  # Windows begins files with a byte order mark
        wrong = text.encode().find(b"\0")  # between the letters of UTF-16
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong < 0:
        return text
    line = content.count(b"\n", 0, wrong) + 1
    raise PipelineError(f"{path} line {line}: is not UTF-8. Save the file as UTF-8")


def parse_json(text: str | bytes, kind: type[T], name: str) -> T:
    """Parse JSON into the dataclass `kind`, as strictly as `read_yaml`; errors begin with `name`.

    Raises:
        PipelineError: as `read_yaml` raises it.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise PipelineError(f"{name}: {_explain(error, kind)}") from error


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _explain(error: ValidationError, kind: type) -> str:
    # A misspelt key is also missing under its name: say how it was written.
    found = error.errors()
    first = next((one for one in found if one["type"] in UNKNOWN_KEY), found[0])
    key = ".".join(str(part) for part in first["loc"]) or "the file"
    key = key if key.isprintable() else repr(key)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] in UNKNOWN_KEY:
        known = [f.name for f in fields(_type_at(kind, first["loc"][:-1]))]
        meant = get_close_matches(str(first["loc"][-1]), known, 1)
        if meant:
            return f"{key} is not a known key, did you mean {meant[0]}?{more}"
        return f"{key} is not a known key, expected one of: {', '.join(known)}{more}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{key} is missing, expected {_describe(_type_at(kind, first['loc']))}{more}"
    if first["type"] == "json_invalid":
        return first["msg"]
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}{more}"
    got = json.dumps(first["input"])
    return f"{key} is {got[:60]}, expected {_describe(_type_at(kind, first['loc']))}{more}"


def _type_at(kind: Any, location: tuple) -> Any:
    """Return the declared type at a location such as ("model_parameters", "sets", 0)."""
    for part in location:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        if isinstance(part, int):
            kind = get_args(kind)[min(part, len(get_args(kind)) - 1)]
        else:
            kind = get_type_hints(kind, include_extras=True)[part]
    if type(None) in get_args(kind):  # X | None: a given value must be an X
        kind = get_args(kind)[0]
    return kind


def _describe(kind: Any) -> str:
    """Return what a declared type accepts in words, such as 'a whole number, at least 1'."""
    if is_dataclass(kind):
        return "the keys " + ", ".join(f.name for f in fields(kind))
    schema = TypeAdapter(kind).json_schema()
    names = {
        "integer": "a whole number",
        "number": "a number",
        "string": "a text",
        "boolean": "true or false",
    }
    limits = {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    if schema["type"] == "array" and schema.get("minItems") == schema.get("maxItems"):
        each = _describe(get_args(kind)[0])
        return f"a list of {schema['minItems']}, each {each}"
    if schema["type"] == "array":
        return "a list that is not empty"
    if "enum" in schema:
        return "one of: " + ", ".join(schema["enum"])
    text = names[schema["type"]]
    if "examples" in schema:
        return f"{text} such as {schema['examples'][0]}"
    if "pattern" in schema:
        return f"{text} of letters, digits, dots, dashes and underscores"
    if schema["type"] == "string":
        return f"{text} that is not empty"
    return ", ".join(
        [text] + [f"{words} {schema[k]}" for k, words in limits.items() if k in schema]
    )


def environment(environ: Mapping[str, str] = os.environ, env_file: Path = ENV_FILE) -> dict:
    """Merge `.env`, `.env.local` beside it and the process's environment; the last one wins.

    Empty values count as unset.

    Raises:
        PipelineError: a line of the files cannot be understood, or one is not UTF-8.
    """
    local_file = env_file.with_name(env_file.name + LOCAL_SUFFIX)
    merged = {**_read_env(env_file), **_read_env(local_file), **environ}
    return {name: value for name, value in merged.items() if value}


def _read_env(path: Path) -> dict[str, str | None]:
    if not path.is_file():
        return {}
    text = _read_text(path)
    for found in parse_stream(io.StringIO(text)):
        if found.error or (found.key is not None and found.value is None):
            # Not the line itself, which may hold a password.
            raise PipelineError(f"{path} line {found.original.line}: expected NAME=value")
    return dotenv_values(stream=io.StringIO(text))


def device(env: Mapping[str, str]) -> str:
    """Return the variable DEVICE, where a model is fitted: "auto", "cpu" or "gpu".

    Raises:
        PipelineError: it has another value.
    """
    asked = env.get("DEVICE", DEVICES[0])
    if asked not in DEVICES:
        raise PipelineError(f"DEVICE is {asked!r}, expected one of: {', '.join(DEVICES)}")
    return asked


def from_root(path: str | Path) -> Path:
    """Make a path absolute; a relative one counts from the project's root."""
    return (ROOT / path).resolve()


def line_folder(env: Mapping[str, str], config: Config) -> Path:
    """Return the folder of the verdict log: the variable LINE_PATH, then the configuration's."""
    return from_root(env.get("LINE_PATH", config.paths.line))


def tracking_uri(env: Mapping[str, str]) -> str:
    """Return MLFLOW_TRACKING_URI with a relative sqlite or file path made absolute.

    Relative means relative to the project's root, from whichever folder a script is started. The
    URI of a server has the user and the password of MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD, unless it has its own.

    Raises:
        PipelineError: it is neither a URI nor a folder.
    """
    uri = env.get("MLFLOW_TRACKING_URI", STORE)
    if uri.startswith(uris.SQLITE):
        return uris.SQLITE + str(from_root(uri.removeprefix(uris.SQLITE)))
    if uri.startswith("file:"):
        path = uri.removeprefix("file:")
        return from_root(path.removeprefix("//") if path.startswith("//") else path).as_uri()
    if "://" not in uri:
        if re.match(r"\w[\w+.-]*:", uri):
            raise PipelineError(
                f"MLFLOW_TRACKING_URI is {uris.without_password(uri)}, expected such as {STORE}, "
                f"file:./mlruns or http://192.168.0.10:5000"
            )
        return from_root(uri).as_uri()
    user, password = env.get("MLFLOW_TRACKING_USERNAME"), env.get("MLFLOW_TRACKING_PASSWORD")
    if user and password and uris.is_server(uri) and uris.split(uri)[0] == uri:
        return uris.joined(uri, user, password)
    return uri
