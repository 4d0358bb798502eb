"""The sections of a recipe as pydantic models, with the help, the limits and the conflicts of every setting.

`sft`, `distill` and the arms hold settings of TRL's SFTConfig and ModelConfig and of FIRSTConfig, of which
`training_model` makes models. Nothing heavy is imported, so that a wrong recipe is refused within a second.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, create_model, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from .constants import CRITERIA, DEFAULT_ARMS, POSITIONS, RECALIBRATION_METHODS
from .errors import FirstTrlError
from .files import write_atomically
from .loss_rules import LOSS_CHOICES, LOSS_LIMITS
from .templates import Piece, parse_template
from .trl_fields import known_fields

# How fast a cache is made, and where its server is. Other batches round differently, as far as the teacher's dtype
# rounds, and a server batches as it likes: none tells two caches apart, in the manifest or in the run's record.
SPEED_SETTINGS = ("tokens_per_batch", "server_requests", "server_url")
Conflict = tuple[tuple, str]  # (where, "what is wrong; what to do")


class Section(BaseModel):
    """Base of the sections: types are strict, unknown keys are errors, and so are the `conflicts`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong between settings that are each right by themselves; paths start in this section."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self):
        errors = [(path, PydanticCustomError("conflict", "{why}", {"why": why})) for path, why in self.conflicts()]
        if errors:
            details = [InitErrorDetails(type=error, loc=path, input=None) for path, error in errors]
            raise ValidationError.from_exception_data(type(self).__name__, details)
        return self


def _number(value: Any, check: Callable[[Any], float]) -> float:
    """`1e-4`, which YAML reads as text, is a number, and 20 stays 20."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", value):
        value = float(value)
    checked = check(value)
    return value if type(value) is int else checked


def _texts(value: Any, check: Callable[[Any], list[str]]) -> list[str]:
    return check([value] if isinstance(value, str) else value)


Number = Annotated[float, WrapValidator(_number)]
Texts = Annotated[list[str], WrapValidator(_texts, json_schema_input_type=list[str] | str)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes, which training seeds as well
Bins = Annotated[int, Field(ge=1, le=1000)]
Resamples = Annotated[int, Field(ge=0, le=100_000)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")]  # of an arm or a test set
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([.]?[A-Za-z0-9_-]){0,99}$")]
HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class TaskConfig(Section):
    """How a row of data becomes a prompt and a completion, the same in training, caching and evaluation.

    With neither template, rows have the columns `prompt` and `completion`, or are conversational (`messages`, or
    messages in those two columns) and go through the tokenizer's chat template.
    """

    prompt: str | None = Field(None, description="Template of the prompt over the columns, e.g. 'Review: {text}'.")
    completion: str | None = Field(None, description="Template of what the model must answer, e.g. ' {label}'.")
    choices: list[str] | None = Field(None, description="The closed answers: all values of the completion's column.")
    append_eos: bool = Field(True, description="End every completion with the end-of-sequence token.")
    max_length: int = Field(1024, ge=2, le=10**8, description="Most tokens of prompt and completion together.")
    too_long: Literal["refuse", "drop", "cut"] = Field(
        "refuse", description="Rows that do not fit; cut: their prompt."
    )
    supervise: Literal["last", "all"] = Field("last", description="Turns of the assistant that are learned.")
    chat_template_kwargs: dict | None = Field(None, description="Of the chat template, e.g. {enable_thinking: false}.")

    def conflicts(self) -> Iterator[Conflict]:
        prompt, completion, choices = self.prompt, self.completion, self.choices
        pieces: tuple[Piece, ...] = ()
        for key, template in (("prompt", prompt), ("completion", completion)):
            try:
                pieces = parse_template(template or "")
            except ValueError as error:
                why = str(error).removeprefix(f"template {template!r}").lstrip(": ")
                yield (key,), f"{why}; correct the template"
        if (prompt is None) != (completion is None):
            given, missing = ("prompt", "completion") if completion is None else ("completion", "prompt")
            yield (given,), f"it comes without {missing}; write both, or neither"
        if prompt is not None and self.chat_template_kwargs is not None:
            why = "a prompt template does not go through the chat template; remove it, or remove prompt and completion"
            yield ("chat_template_kwargs",), why
        if self.supervise == "all" and (prompt is not None or choices is not None):
            why = "it is for conversations with free answers; remove it, or remove prompt, completion and choices"
            yield ("supervise",), why
        if completion is not None and not completion.strip():
            yield ("completion",), "it is empty; write what the model must answer"
        if choices is not None and (len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices)):
            yield ("choices",), "these are not choices; list at least two different answers, none of them empty"
        columns = [piece for piece in pieces if piece.column is not None]
        if choices is not None and completion is not None and len(columns) != 1:
            why = f"with choices it needs exactly one column, not {len(columns)}; write e.g. ' {{label}}'"
            yield ("completion",), why


class DatasetConfig(Section):
    """One split: what `datasets.load_dataset` takes, the columns to rename, and how many rows to keep."""

    path: str = Field(description="Hub id, local folder or file, or json, csv, parquet, text with data_files.")
    name: str | None = Field(None, description="Configuration of the dataset, e.g. main.")
    split: str | None = Field(None, description="Split, slices allowed, e.g. train[:90%]. Default: the role's name.")
    revision: str | None = Field(None, description="Branch, tag or commit of the dataset on the Hub.")
    data_files: str | list[str] | None = Field(None, description="Files to read, relative to the current directory.")
    columns: dict[str, str] | None = Field(None, description="Name used in the templates -> column of the dataset.")
    max_rows: Count | None = Field(None, description="Keep this many rows.")
    shuffle_seed: Seed | None = Field(None, description="Shuffle with this seed before max_rows is taken.")
    bad_rows: Literal["refuse", "drop"] = Field("refuse", description="Rows that cannot be used, counted.")
    overlap: Literal["refuse", "drop"] = Field("refuse", description="Test sets: rows also fitted on, counted.")
    out_of_domain: bool = Field(False, description="Test sets: reported as out of domain.")
    task: dict | None = Field(None, description="Test sets: settings of `task` that this set needs otherwise.")

    def conflicts(self) -> Iterator[Conflict]:
        if self.columns is not None and len(set(self.columns.values())) < len(self.columns):
            yield ("columns",), "two names read one column; keep one of them"


class Datasets(Section):
    """The splits of a recipe: one to learn from, one to choose on, and named ones that are only reported.

    `transfer` holds rows that the teacher never trained on; where it is given, students are distilled on it and not on
    `train`, whose rows the teacher labels with a confidence that validation never sees.
    """

    train: DatasetConfig | None = Field(None, description="Rows that the teacher, and students on labels, learn.")
    validation: DatasetConfig = Field(description="Rows that recalibration and thresholds are fitted on.")
    test: dict[FolderName, DatasetConfig] = Field(min_length=1, description="Rows that are only reported, by name.")
    transfer: DatasetConfig | None = Field(None, description="Rows that students are distilled on, instead of train.")

    def conflicts(self) -> Iterator[Conflict]:
        for role in ("train", "transfer", "validation"):
            split = getattr(self, role) or DatasetConfig(path="")
            for key in ("task", "out_of_domain", "overlap"):
                if getattr(split, key) != DatasetConfig.model_fields[key].default:
                    yield (role, key), "it is for test sets only; remove it"
            if role in self.test:
                yield ("test", role), "a split of the recipe has this name in reports; choose another name"


class WriteAnswers(Section):
    """How the teacher answers rows of `datasets.transfer`; answers that they have are not read. Greedy by default."""

    max_new_tokens: Count = Field(512, description="Most tokens of an answer, of those that task.max_length counts.")
    temperature: Number = Field(0.0, ge=0, le=10, description="0: the most probable token each time; 1: as it is.")
    top_p: Number = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that have this mass.")
    seed: Seed = Field(0, description="Seed of the samples.")

    def conflicts(self) -> Iterator[Conflict]:
        if self.top_p < 1 and self.temperature == 0:
            yield ("top_p",), "nothing is sampled at temperature 0; remove it, or write a temperature"


class CacheConfig(Section):
    """What is kept of the teacher, and how it is run."""

    top_k: int = Field(5, ge=1, le=10**6, description="Most probable tokens kept per position (the paper keeps 5).")
    support: Literal["top_k", "choices"] = Field(
        "top_k", description="Tokens kept: the top_k most probable, or task.choices, among which mass then moves."
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="Type of the stored log-probabilities.")
    rows_per_shard: Count = Field(1024, description="Examples in one file: what a crash can lose.")
    tokens_per_batch: Count = Field(8192, description="Tokens of a batch, padding included. Free to change.")
    teacher: str | None = Field(None, description="Model or adapter to cache, instead of the teacher that `sft` made.")
    teacher_revision: str | None = Field(None, description="Branch, tag or commit of that teacher on the Hub.")
    teacher_dtype: Literal["auto", "bfloat16", "float16", "float32", None] = Field(None, description="Else sft.dtype.")
    load_in_4bit: bool | None = Field(None, description="Run the teacher in NF4, or not. Default: as trained.")
    attn_implementation: str | None = Field(None, description="Attention of the teacher, e.g. sdpa.")
    write_answers: WriteAnswers | None = Field(
        None, description="The teacher writes the answers of datasets.transfer: settings below, {} for all defaults."
    )
    streaming: bool = Field(False, description="Read the rows as a stream: no copy of the dataset on this machine.")
    backend: Literal["hf", "server"] = Field("hf", description="What runs the teacher: transformers, or `vllm serve`.")
    server_url: str | None = Field(None, description="Its address; any server that gives prompt_logprobs.")
    server_requests: int = Field(16, ge=1, le=1024, description="Requests to it at one time. Free to change.")

    def conflicts(self) -> Iterator[Conflict]:
        if self.teacher_revision is not None and self.teacher is None:
            yield ("teacher_revision",), "there is no cache.teacher; write cache.teacher too, or remove it"
        if self.backend == "server" and not re.fullmatch(r"https?://[^\s@?#]+", self.server_url or ""):
            yield ("server_url",), "it is not the address of a server; write e.g. http://127.0.0.1:8000"
        # A server chooses type, quantisation and attention itself, and shows no tokens of one's choice.
        local = ("teacher_dtype", "load_in_4bit", "attn_implementation", "support")
        for key in ("server_url", "server_requests") if self.backend == "hf" else local:
            if getattr(self, key) != type(self).model_fields[key].default:
                other = "server" if self.backend == "hf" else "hf"
                yield (key,), f"backend: {self.backend} has no use for it; remove it, or write backend: {other}"


class CalibrateConfig(Section):
    """How the recalibration value is searched on the validation cache."""

    method: Literal[*RECALIBRATION_METHODS, "auto"] = Field(  # type: ignore[valid-type]
        "temperature", description="Maps to search; auto takes the one with the lowest cross-validated criterion."
    )
    criterion: Literal[*CRITERIA] = Field("ece", description="What the search minimises.")  # type: ignore[valid-type]
    num_bins: Bins = Field(10, description="Bins of the calibration error.")
    positions: Literal[*POSITIONS] | None = Field(  # type: ignore[valid-type]
        None,
        description="answer: the first completion token in which the choices differ (without choices the first); all: "
        "every one but those that the template forces. Default: answer with task.choices, all without.",
    )
    bootstrap: Resamples = Field(200, description="Resamples for the interval of the value; 0 for none.")
    seed: Seed = Field(0, description="Seed of the resamples.")


class EvaluateConfig(Section):
    """How the arms are measured on the test sets."""

    num_bins: Bins = Field(10, description="Bins of the calibration error and of the diagrams.")
    bootstrap: Resamples = Field(1000, description="Resamples for the intervals; 0 for none.")
    tokens_per_batch: Count = Field(8192, description="Tokens of one batch, padding included.")
    seed: Seed = Field(0, description="Seed of the resamples.")
    allow_overlap: bool = Field(False, description="Measure on test sets that share rows with the other splits.")


class PushConfig(Section):
    """Where an adapter goes on the Hub."""

    hub_model_id: HubId | None = Field(None, description="Repository, e.g. my-name/my-student.")
    arm: str = Field("first", description="Whose student is pushed; best: of the lowest NLL on validation.")
    license: str | None = Field(None, description="Licence, e.g. apache-2.0. Default: that of the base model.")
    private: bool = Field(False, description="Create the repository as private.")
    revision: str | None = Field(None, description="Branch to push to.")
    create_pr: bool = Field(False, description="Open a pull request instead of pushing.")
    commit_message: str | None = Field(None, description="Message of the commit.")


def _each(table: dict[str, Any]) -> dict[str, Any]:
    """`{"a b": x}` -> `{"a": x, "b": x}`."""
    return {key: value for keys, value in table.items() for key in keys.split()}


# Settings that the stages set themselves, or that TRL is about to remove, and keys and values of earlier versions of
# first-trl: what is wrong; what to do.
RESERVED: dict[str, str] = _each({
    "remove_unused_columns label_names do_train do_eval do_predict local_rank resume_from_checkpoint":
        "the stage decides this; remove it",
    "trust_remote_code": "code that comes with a model is never run; remove it",
    "output_dir": "the stages choose their own folders; write output_dir and name at the top of the recipe",
    "model_init_kwargs": "only training would read it; write dtype, attn_implementation or model_revision itself",
    "calibration": "the calibrate stage writes it; write recalibration_method and recalibration_value",
    "dataset_kwargs dataset_text_field completion_only_loss assistant_only_loss truncation_mode":
        "the task section decides what is trained on; remove it",
    "chat_template_path eos_token pad_token": "the tokenizer's own is used; save it with the model",
    "push_to_hub hub_model_id hub_revision hub_private_repo hub_strategy hub_always_push hub_token":
        "training uploads nothing; fill the push section",
    "include_for_metrics batch_eval_metrics prediction_loss_only use_liger_kernel":
        "training builds no logits; remove it: `first-trl evaluate` measures",
    "label_smoothing_factor": "TRL removes it; smooth the teacher: recalibration_method: label_smoothing",
    "cross_fit": "it was removed: rows of their own measured better; remove it and write datasets.transfer",
    "include_eos": "tokens that are forced are never counted; remove it",
    "tail_knots vocabulary_temperature": "it measured worse and was removed; remove it, or write temperature",
    "vllm vllm_options": "vLLM runs as a server only; start `vllm serve`, write backend: server and server_url",
})  # fmt: skip
# Bounds of the settings that people most often get wrong; the rest is left to TRL.
LIMITS: dict[str, dict[str, Any]] = LOSS_LIMITS | _each({
    "learning_rate warmup_steps weight_decay max_grad_norm": {"ge": 0},
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lora_r lora_alpha": {"ge": 1},
    "seed data_seed": {"ge": 0, "lt": 2**32},
    "num_train_epochs": {"gt": 0},
    "max_length": {"ge": 2},
    "lora_dropout": {"ge": 0, "lt": 1},
})  # fmt: skip
# What the stages choose where the recipe is silent and TRL would choose otherwise.
STAGE_DEFAULTS = {"report_to": "none", "save_strategy": "epoch", "save_total_limit": 2}
CONFIGS = {"sft": "SFTConfig", "distill": "FIRSTConfig", "arms": "FIRSTConfig"}
# Settings that no dataclass of TRL or ours has: the stages read them from the recipe.
_CLOSING = (bool, Field(True, description="Fit one closing temperature per student on validation."))
_ROUNDS = (int, Field(1, ge=1, le=2, description="2: train on for a tenth of the steps, at that temperature."))
_TRAINER = (Literal["first", "sft"], Field("first", description="`first`: knowledge matching; `sft`: on labels."))
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "distill": {"closing": _CLOSING, "rounds": _ROUNDS},
    "arms": {"trainer": _TRAINER},
}
# The names that annotations of TRL use; those of its own classes stand for anything.
_NAMES = {"float": Number, "Texts": Texts, "Literal": Literal} | {t.__name__: t for t in (int, str, bool, dict, list)}


def first_only_keys() -> set[str]:
    """The settings that FIRSTConfig adds to SFTConfig."""
    return set(known_fields("FIRSTConfig")) - set(known_fields("SFTConfig"))


@cache
def training_model(section: str) -> type[Section]:
    """The settings of `sft`, of `distill` or of one of the `arms` as a model in which none is required."""
    fields: dict[str, Any] = {}
    for name, spec in (known_fields(CONFIGS[section]) | known_fields("ModelConfig")).items():
        if name in RESERVED:
            continue
        if choices := LOSS_CHOICES.get(name, spec.choices):
            # None in the Literal: typing gives `Literal[...] | None` in the order in which it first met these values.
            hint = Literal[*choices, None] if "None" in spec.annotation else Literal[*choices]
        else:
            names = defaultdict(lambda: Any, _NAMES)
            hint = eval(spec.annotation.replace("list[str]", "Texts"), {"__builtins__": {}}, names)
        default: Any = STAGE_DEFAULTS.get(name, spec.default)
        fields[name] = (hint, Field(default, description=spec.help, **LIMITS.get(name, {})))
    fields |= OWN_SETTINGS.get(section, {})
    return create_model(f"{section.capitalize()}Settings", __base__=Section, **fields)


def _escaped(value: Any) -> Any:
    """A copy in which every `${` is `$${`, but not in keys, where variables are not read."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def arm_of(student: str) -> str:
    """`first/seed-1` -> `first`; an arm's own name stays as it is."""
    return student.partition("/")[0]


class Recipe(Section):
    """A checked recipe. `sft`, `distill` and `arms` hold the settings as written; stages fill in the rest."""

    name: RunName = Field(description="The run's folder in output_dir.")
    output_dir: str = Field("runs", pattern=r"\S", description="Folder of all runs.")
    seed: Seed = Field(0, description="Seed of the teacher and, without seeds, of every student.")
    seeds: list[Seed] | None = Field(None, description="Train every student once with each of these seeds.")
    task: TaskConfig = Field(default_factory=TaskConfig)
    datasets: Datasets
    sft: dict[str, Any] = Field(default_factory=dict, description="The teacher's training on labels.")
    cache: CacheConfig = Field(default_factory=CacheConfig)
    calibrate: CalibrateConfig = Field(default_factory=CalibrateConfig)
    distill: dict[str, Any] = Field(default_factory=dict, description="The students' training.")
    arms: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: copy.deepcopy(DEFAULT_ARMS),
        description="The students to compare: for each, the settings that differ from distill.",
    )
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    push: PushConfig = Field(default_factory=PushConfig)

    @property
    def run_folder(self) -> Path:
        """Where every stage reads and writes."""
        return Path(self.output_dir) / self.name

    @property
    def students(self) -> list[str]:
        """The folders below `students/`: arms, or `<arm>/seed-<n>` with several seeds; names stand for arms too."""
        several = self.seeds is not None and len(self.seeds) > 1
        return [f"{arm}/seed-{seed}" for arm in self.arms for seed in self.seeds or []] if several else list(self.arms)

    def students_of(self, arm: str) -> list[str]:
        """The students of an arm, one per seed, in the order of `seeds`."""
        return [student for student in self.students if arm_of(student) == arm]

    def seed_of(self, student: str) -> int:
        """The seed that a student is trained with."""
        _, several, seed = student.partition("/seed-")
        return int(seed) if several else self.seeds[0] if self.seeds else self.seed

    def arm_trainer(self, arm: str) -> str:
        """`first` (knowledge matching) or `sft` (the control, trained on labels)."""
        return self._arm(arm).get("trainer", "first")

    def has_second_round(self, arm: str) -> bool:
        """Whether an arm is trained on, once its closing temperature is known."""
        return self.distill.get("rounds", 1) == 2 and self.arm_trainer(arm) == "first"

    def arm_section(self, arm: str) -> dict:
        """The settings of one student: `distill` with the arm's own on top; with `trainer: sft` those of TRL alone."""
        left_out = {"trainer", "closing", "rounds"} | (first_only_keys() if self.arm_trainer(arm) == "sft" else set())
        return {key: value for key, value in (self.distill | self._arm(arm)).items() if key not in left_out}

    def _arm(self, arm: str) -> dict:
        if arm_of(arm) not in self.arms:
            known = ", ".join(self.arms) or "none"
            raise FirstTrlError(f"There is no arm {arm_of(arm)!r} in this recipe; its arms are {known}.")
        return self.arms[arm_of(arm)]

    def to_dict(self) -> dict:
        """Plain values that [`load_recipe`] reads back to an equal recipe; variables and overrides are resolved."""
        return self.model_dump(exclude_none=True)

    def to_yaml(self) -> str:
        """The recipe as it runs, defaults included; `${` is written so that reading gives it back."""
        return yaml.safe_dump(_escaped(self.to_dict()), sort_keys=False, allow_unicode=True, width=100)

    def write_resolved(self, path: str | Path) -> None:
        """Write the recipe as it runs, as YAML."""
        write_atomically(path, self.to_yaml())

    def conflicts(self) -> Iterator[Conflict]:
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            yield ("seeds",), "these are not seeds; list different whole numbers, e.g. [0, 1, 2]"


def teacher_section(recipe: Recipe) -> dict:
    """How the teacher is loaded for inference: as `sft` trained it, unless `cache` says otherwise."""
    settings = recipe.cache
    names = "load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage"
    quantization = {name: recipe.sft[name] for name in names.split() if name in recipe.sft}
    if settings.load_in_4bit is not None:
        quantization |= {"load_in_4bit": settings.load_in_4bit, "load_in_8bit": False}
    return {
        "model_revision": settings.teacher_revision or "main",
        "dtype": settings.teacher_dtype or recipe.sft.get("dtype", "float32"),
        "attn_implementation": settings.attn_implementation or recipe.sft.get("attn_implementation"),
        "load_in_4bit": False,
        **quantization,
        "backend": settings.backend,
    }
