"""The settings of a recipe's sections, one dataclass each, with the help and the limits of every setting.

Nothing heavy is imported here, so that a wrong recipe is refused in a fraction of a second. The sections `sft` and
`distill` are not here: they hold the settings of TRL (`SFTConfig`, `ModelConfig`) and of `FIRSTConfig`, which
`first_trl.recipe.field_tables` reads from their source. Reading a recipe file is `first_trl.recipe.loading`.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, fields

from .field_types import Problem, Settings
from .templates import Piece, parse_template

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SERVER_URL = re.compile(r"https?://[^\s@]+")
# Settings of the cache that say how a teacher is run, and the backends that let them.
_ONLY_WITH = {
    "teacher_dtype": ("hf",),
    "load_in_4bit": ("hf",),
    "attn_implementation": ("hf",),
    "server_url": ("server",),
    "server_requests": ("server",),
    "support": ("hf",),  # a server gives its most probable tokens, and no others
}
# Settings of the cache that say how fast it is made. Other batches round differently, as far as the teacher's dtype
# rounds, and a server batches as it likes: neither tells two caches apart, in the manifest or in the run's record.
SPEED_SETTINGS = ("tokens_per_batch", "server_requests")
# One list for calibration and for recalibrated training: the value found is the value used.
RECALIBRATION_METHODS = ("temperature", "probability", "label_smoothing", "none")


def setting(default, help: str, **limits):
    """A dataclass field with its help and its limits; `MISSING` as the default makes it required."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class TaskConfig(Settings):
    """How a row of data becomes a prompt and a completion, the same in training, caching and evaluation.

    With neither template, rows have the columns `prompt` and `completion`, or are conversational (`messages`, or
    messages in those two columns) and go through the tokenizer's chat template.
    """

    prompt: str | None = setting(None, "Template of the prompt over the columns, e.g. 'Review: {text}\\nSentiment:'.")
    completion: str | None = setting(None, "Template of what the model must answer, e.g. ' {label}'.")
    choices: list[str] | None = setting(None, "The closed answers: every value of the completion's one column.")
    append_eos: bool = setting(True, "End every completion with the end-of-sequence token.")
    max_length: int = setting(1024, "Most tokens of prompt and completion together.", minimum=2)
    chat_template_kwargs: dict | None = setting(None, "Arguments of the chat template, for conversational rows.")

    def broken_rules(self) -> list[Problem]:
        problems = []
        if (self.prompt is None) != (self.completion is None):
            given, missing = ("prompt", "completion") if self.completion is None else ("completion", "prompt")
            remedy = f"write {missing} too, or neither"
            problems.append(Problem(given, getattr(self, given), f"it comes without {missing}", remedy))
        if self.prompt is not None and self.chat_template_kwargs is not None:
            remedy = "remove it, or remove prompt and completion and give conversational rows"
            what = "a prompt template does not go through the chat template"
            problems.append(Problem("chat_template_kwargs", self.chat_template_kwargs, what, remedy))
        pieces: tuple[Piece, ...] = ()
        for key in ("prompt", "completion"):
            template = getattr(self, key)
            try:
                pieces = parse_template(template or "")
            except ValueError as error:
                what = str(error).removeprefix(f"template {template!r}").lstrip(": ")
                problems.append(Problem(key, template, what, "correct the template"))
        if self.completion is not None and not self.completion.strip():
            problems.append(Problem("completion", self.completion, "it is empty", "write what the model must answer"))
        if self.choices is not None:
            problems += self._broken_choices(self.choices, [piece for piece in pieces if piece.column is not None])
        return problems

    def _broken_choices(self, choices: list[str], fields: list[Piece]) -> list[Problem]:
        if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
            remedy = "list at least two different answers, none of them empty"
            return [Problem("choices", self.choices, "these are not choices between answers", remedy)]
        if self.completion is not None and len(fields) != 1:
            what = f"with choices the completion needs exactly one column, not {len(fields)}"
            return [Problem("completion", self.completion, what, "write e.g. ' {label}', or remove choices")]
        return []


@dataclass
class DatasetConfig(Settings):
    """One split: what `datasets.load_dataset` takes, the columns to rename, and how many rows to keep."""

    path: str = setting(MISSING, "Hub id, local folder or file, or json, csv, parquet, text with data_files.")
    name: str | None = setting(None, "Configuration of the dataset, e.g. main.")
    split: str | None = setting(None, "Split, slices allowed, e.g. train[:90%]. Default: the role's own name.")
    revision: str | None = setting(None, "Branch, tag or commit of the dataset on the Hub.")
    data_files: str | list[str] | None = setting(None, "Files to read, relative to the current directory.")
    columns: dict | None = setting(None, "Name used in the templates -> column of the dataset.")
    max_rows: int | None = setting(None, "Keep this many rows.", minimum=1)
    shuffle_seed: int | None = setting(None, "Shuffle with this seed before max_rows is taken.", minimum=0)
    out_of_domain: bool = setting(False, "Test sets: reported as out of domain.")
    task: dict | None = setting(None, "Test sets: settings of `task` that this set needs otherwise.")

    def broken_rules(self) -> list[Problem]:
        wrong = {k: v for k, v in (self.columns or {}).items() if not (isinstance(k, str) and isinstance(v, str))}
        if wrong:
            return [Problem("columns", wrong, "it maps something other than texts", "write new_name: old_name")]
        if len(set((self.columns or {}).values())) < len(self.columns or {}):
            return [Problem("columns", self.columns, "two names read one column", "keep one of them")]
        return []


@dataclass
class Datasets:
    """The splits of a recipe: one to learn from, one to choose on, and named ones that are only reported.

    `transfer` holds rows that the teacher never trained on; where it is given, students are distilled on it and not on
    `train`, whose rows the teacher labels with a confidence that validation never sees.
    """

    train: DatasetConfig | None
    validation: DatasetConfig
    test: dict[str, DatasetConfig]
    transfer: DatasetConfig | None = None


@dataclass
class CacheConfig(Settings):
    """What is kept of the teacher, and how it is run."""

    top_k: int = setting(5, "Most probable tokens kept at each supervised position (the paper keeps 5).", minimum=1)
    support: str = setting(
        "top_k",
        "Tokens kept: the top_k most probable, or those of task.choices, so that recalibration moves mass among them.",
        choices=("top_k", "choices"),
    )
    dtype: str = setting("float16", "Type of the stored log-probabilities.", choices=("float16", "float32"))
    rows_per_shard: int = setting(
        1024, "Examples in one file of the cache: the work that a crash can lose.", minimum=1
    )
    tokens_per_batch: int = setting(
        8192, "Tokens of one teacher batch, padding included. A change makes nothing again.", minimum=1
    )
    teacher: str | None = setting(None, "Model or adapter to cache, instead of the teacher that `sft` made.")
    teacher_revision: str | None = setting(None, "Branch, tag or commit of that teacher on the Hub.")
    teacher_dtype: str | None = setting(
        None, "Type the teacher runs in. Default: sft.dtype.", choices=("auto", "bfloat16", "float16", "float32")
    )
    load_in_4bit: bool | None = setting(None, "Run the teacher in 4-bit NF4, or not; default: as `sft` trained it.")
    attn_implementation: str | None = setting(None, "Attention of the teacher, e.g. sdpa or flash_attention_2.")
    streaming: bool = setting(False, "Read the rows as a stream: no copy of the dataset on this machine.")
    backend: str = setting("hf", "What runs the teacher: transformers, or a server.", choices=("hf", "server"))
    server_url: str | None = setting(None, "The server, e.g. http://127.0.0.1:8000; any that gives prompt_logprobs.")
    server_requests: int = setting(
        16, "Requests under way to the server at one time. A change makes nothing again.", minimum=1
    )

    def broken_rules(self) -> list[Problem]:
        problems = []
        if self.teacher_revision is not None and self.teacher is None:
            remedy = "write cache.teacher too, or remove it"
            problems.append(Problem("teacher_revision", self.teacher_revision, "there is no cache.teacher", remedy))
        if self.backend == "server" and not _SERVER_URL.fullmatch(self.server_url or ""):
            remedy = "write the address that the server was started at, e.g. http://127.0.0.1:8000"
            problems.append(Problem("server_url", self.server_url, "it is not the address of a server", remedy))
        for key, backends in _ONLY_WITH.items():
            default = next(f.default for f in fields(self) if f.name == key)
            if getattr(self, key) != default and self.backend not in backends:
                what = f"the backend {self.backend} has no use for it"
                remedy = f"remove it, or write backend: {' or '.join(backends)}"
                problems.append(Problem(key, getattr(self, key), what, remedy))
        return problems


@dataclass
class CalibrateConfig(Settings):
    """How the recalibration value is searched on the validation cache."""

    method: str = setting(
        "temperature",
        "Family of maps to search; auto chooses the one with the lowest cross-validated criterion.",
        choices=(*RECALIBRATION_METHODS, "auto"),
    )
    criterion: str = setting("ece", "What the search makes small.", choices=("ece", "nll"))
    num_bins: int = setting(10, "Bins of the calibration error.", minimum=1)
    positions: str = setting("answer", "First completion token, or every one.", choices=("answer", "all"))
    include_eos: bool = setting(False, "With positions: all, count the end of sequence, which is forced, as well.")
    bootstrap: int = setting(200, "Resamples for the interval of the value; 0 for none.", minimum=0)
    seed: int = setting(0, "Seed of the resamples.", minimum=0)


@dataclass
class EvaluateConfig(Settings):
    """How the arms are measured on the test sets."""

    num_bins: int = setting(10, "Bins of the calibration error and of the diagrams.", minimum=1)
    bootstrap: int = setting(1000, "Resamples for the intervals; 0 for none.", minimum=0)
    tokens_per_batch: int = setting(8192, "Tokens of one batch, padding included.", minimum=1)
    seed: int = setting(0, "Seed of the resamples.", minimum=0)
    allow_overlap: bool = setting(False, "Measure on test sets that share rows with the other splits.")


@dataclass
class PushConfig(Settings):
    """Where an adapter goes on the Hub."""

    hub_model_id: str | None = setting(None, "Repository, e.g. my-name/my-student.")
    arm: str = setting("first", "The arm whose student is pushed.")
    private: bool = setting(False, "Create the repository as private.")
    revision: str | None = setting(None, "Branch to push to.")
    create_pr: bool = setting(False, "Open a pull request instead of pushing.")
    commit_message: str | None = setting(None, "Message of the commit.")

    def broken_rules(self) -> list[Problem]:
        if self.hub_model_id is not None and not _HUB_ID.fullmatch(self.hub_model_id):
            remedy = "write owner/name, letters, digits, '-', '_' and '.' only"
            return [Problem("hub_model_id", self.hub_model_id, "it is not the id of a repository", remedy)]
        return []
