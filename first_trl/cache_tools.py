"""The commands for a cache that is already there.

    first-trl cache inspect PATH                     what is in it
    first-trl cache verify PATH [--teacher TEACHER]  whether every byte, and the teacher, is still as it was
    first-trl cache push PATH REPO_ID                upload it to the Hub, with a card

PATH is a folder such as runs/NAME/cache/train, or the id of a data set repository on the Hub.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from .failures import explain

# The heavy imports are in the functions: the command line reads this page and must answer `--help` at once.

COMMANDS = ("inspect", "verify", "push")
NUM_EXAMPLES, POSITIONS_SHOWN = 10, 3
TEXT_SHOWN, BAR = 160, 40  # characters of a prompt (its end, which the answer follows), and of a histogram's bar
# Allowed between the cached probabilities and the teacher's now: storage rounds by 2e-4, 16-bit logits by much more.
TOLERANCE, TOLERANCE_16_BIT = 5e-4, 0.03
SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}


def main(argv: list[str]) -> int:
    """Run a command; returns its exit status."""
    options = _parser().parse_args(argv)
    try:
        print({"inspect": inspect, "verify": verify, "push": push}[options.command](options))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
    except Exception as error:
        known = explain(error, "cache") or (str(error) if isinstance(error, ValueError) else None)
        if known is None:
            raise
        print(known, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    page = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("first-trl cache", description=__doc__, formatter_class=page, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspecting, verifying, pushing = (commands.add_parser(name, allow_abbrev=False) for name in COMMANDS)
    for command in (inspecting, verifying, pushing):
        command.add_argument("path", metavar="PATH", help="a cache's folder, or a data set on the Hub")
        command.add_argument("--revision", help="branch of the repository, or commit of one to read")
    inspecting.add_argument("--tokenizer", help="folder or id; default: that of the run the cache lies in")
    verifying.add_argument("--teacher", help="folder or id: run it again over a sample of the rows")
    verifying.add_argument("--rows", type=int, default=32, help="rows of the sample (default: 32)")
    pushing.add_argument("repo_id", metavar="REPO_ID", help="owner/name, made if need be")
    pushing.add_argument("--license", help="of the rows, e.g. cc-by-4.0, or unknown; default: their data set's")
    pushing.add_argument("--language", nargs="*", help="of the rows, e.g. en; default: their data set's")
    pushing.add_argument("--private", action="store_true", help="make a new repository private")
    pushing.add_argument("--create_pr", action="store_true", help="open a pull request")
    return parser


def inspect(options: argparse.Namespace) -> str:
    """A page about a cache; tokens are shown as text where the teacher's tokenizer is known."""
    import yaml

    from .cache.reader import check_cache, open_cache
    from .modeling import load_tokenizer

    cache = open_cache(options.path, revision=options.revision)
    run, source = Path(cache.path).resolve().parent.parent, options.tokenizer
    if source is None and (run / "recipe.resolved.yaml").is_file():  # the run that the cache lies in
        recipe = yaml.safe_load((run / "recipe.resolved.yaml").read_text(encoding="utf-8"))
        source = (recipe.get("cache") or {}).get("teacher")
        source = source or (str(run / "teacher") if (run / "teacher").is_dir() else None)
    if source is None:
        return f"{describe(cache)}\n\nTokens are shown by their ids; --tokenizer FOLDER_OR_ID shows them as text."
    tokenizer = load_tokenizer(source)
    check_cache(cache, tokenizer=tokenizer)
    return describe(cache, tokenizer)


def describe(cache, tokenizer=None) -> str:
    """A page about a cache: what it is made from, its size, the teacher's confidence, and ten of its rows."""
    import numpy as np

    from .cache.arrays import row_blocks
    from .constants import IGNORED
    from .errors import shorten

    def text(ids) -> str:
        words = " ".join(map(str, ids)) if tokenizer is None else repr(tokenizer.decode(ids))
        return words if len(words) <= TEXT_SHOWN else f"...{words[-TEXT_SHOWN:]}"

    totals, counts_B = cache.manifest["totals"], np.zeros(10, dtype=np.int64)
    for block in row_blocks(cache.dataset, "all") if totals["supervised_positions"] else ():
        counts_B += np.histogram(np.exp(block.log_probs[:, 0]).clip(0, 1), bins=10, range=(0, 1))[0]
    examples = {}
    for number in np.unique(np.linspace(0, totals["rows"] - 1, NUM_EXAMPLES).astype(int)).tolist():
        row = cache.dataset[number]
        places = [i for i, label in enumerate(row["labels"]) if label != IGNORED and i > 0]
        labels = [[row["labels"][i]] for i in places[:POSITIONS_SHOWN]]
        pairs = map(zip, row["teacher_ids"], row["teacher_log_probs"])
        shown = list(zip(labels, pairs, row["teacher_tail_log_prob"], strict=False))
        prompt = row["input_ids"][: places[0] if places else None]
        examples[number] = {"prompt": prompt, "shown": shown, "more": len(places) - POSITIONS_SHOWN}
    page = _template("cache_page.jinja", shorten=shorten, text=text, exp=math.exp).render(
        cache.manifest,  # whatever entries it has, those below are ours
        cache=cache,
        size=sum(shard["bytes"] for shard in cache.manifest["shards"]),
        teacher_size=teacher_bytes(cache),
        bars=[(count, round(count * BAR / max(counts_B.max(), 1))) for count in counts_B.tolist()],
        examples=examples,
    )
    return page.rstrip()


def _template(name: str, **filters):
    from jinja2 import Environment, FileSystemLoader

    folder = FileSystemLoader(Path(__file__).parent / "hub")
    environment = Environment(loader=folder, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"entries": _entries, **filters}
    return environment.get_template(name)


def _entries(section: dict, names: str, as_code: bool = False) -> str:
    """Some entries of a section of the manifest, the first without its name; of a hash enough to tell two apart."""
    texts = {name: section[name] for name in names.split() if section.get(name) is not None}
    texts = {name: f"{text[:12]}..." if name.endswith("sha256") else str(text) for name, text in texts.items()}
    texts = {name: _code(text) if as_code else text for name, text in texts.items()}
    first = names.partition(" ")[0]
    return ", ".join(text if name == first else f"{name} {text}" for name, text in texts.items())


def teacher_bytes(cache) -> int:
    """Bytes on disk of the three columns that hold the teacher."""
    import pyarrow.parquet as pq

    files = [pq.read_metadata(cache.path / shard["name"]) for shard in cache.manifest["shards"]]
    groups = [file.row_group(i) for file in files for i in range(file.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(column.total_compressed_size for column in columns if column.path_in_schema.startswith("teacher"))


def verify(options: argparse.Namespace) -> str:
    """Check everything again and, given the teacher, run it again over a sample; returns what was found."""
    from .cache.reader import open_cache

    cache = open_cache(options.path, revision=options.revision)
    check_keys(cache)
    shards, rows = cache.manifest["shards"], cache.manifest["totals"]["rows"]
    size = sum(shard["bytes"] for shard in shards)
    found = f"{cache.path}: {len(shards)} shards, {size:,} bytes, {rows:,} rows: all as the manifest says.\n"
    if options.teacher is None:
        return f"{found}The teacher was not run; --teacher FOLDER_OR_ID compares a sample of the rows with it."
    model, tokenizer = _load_teacher(cache, options.teacher)
    return found + compare_with_teacher(cache, model, len(tokenizer), options.rows)


def check_keys(cache) -> None:
    """Compare every row with its key, and their fingerprint and totals with the manifest; CacheError if one differs.

    The bytes and contents of an opened cache are checked; this finds a manifest that was made for other rows.
    """
    import pyarrow.parquet as pq

    from .cache.format import CacheError, row_key
    from .cache.reader import check_cache
    from .cache.shard import summarize

    def shards() -> Iterator[tuple]:
        for shard in cache.manifest["shards"]:
            file = cache.path / shard["name"]
            table = pq.read_table(file)
            for number, row in enumerate(table.select(["input_ids", "labels", "row_key"]).to_pylist()):
                key = row_key(row["input_ids"], row["labels"])
                if row["row_key"] != key:
                    raise CacheError(
                        f"{file}: row {number} has row_key {row['row_key']}, its tokens give {key}. Make it again."
                    )
            yield file, table

    check_cache(cache, **summarize(shards()))


def compare_with_teacher(cache, model, vocab_limit: int, num_rows: int = 32) -> str:
    """Run the teacher again over rows spread evenly over a cache; CacheError where a probability differs by too much.

    Both the probabilities of the cached tokens and the K largest are compared: tokens of the right probability are not
    enough, nor are tokens that were once among the largest. A cache of the choices holds them whatever their rank.
    """
    import numpy as np
    import torch

    from .cache.format import CacheError
    from .constants import IGNORED
    from .head import partition_log_probs, top_k_log_probs
    from .modeling import innermost, language_model_head
    from .scoring import hidden_states_at

    numbers = np.unique(np.linspace(0, len(cache.dataset) - 1, num_rows).astype(int)).tolist()
    rows = [row for row in cache.dataset.select(numbers).to_list() if row["teacher_ids"]]
    if not rows:
        raise CacheError(f"The {num_rows} rows sampled of {cache.path} have no supervised position. Ask for more.")
    positions = [np.flatnonzero(np.asarray(row["labels"][1:]) != IGNORED) for row in rows]
    head, largest, num_positions = language_model_head(innermost(model)), 0.0, sum(map(len, positions))
    with torch.inference_mode():
        for indices, hidden_ND in hidden_states_at(model, [row["input_ids"] for row in rows], positions, 8192):
            ids_NK = torch.tensor([ids for i in indices for ids in rows[i]["teacher_ids"]], device=hidden_ND.device)
            cached_NK = torch.tensor([values for i in indices for values in rows[i]["teacher_log_probs"]]).exp()
            tail_N = torch.tensor([value for i in indices for value in rows[i]["teacher_tail_log_prob"]]).exp()
            now_NK1 = partition_log_probs(hidden_ND, head.weight, ids_NK, *head[1:]).exp().cpu()
            differences = [cached_NK - now_NK1[:, :-1], (tail_N - now_NK1[:, -1])[:, None]]
            if cache.manifest.get("support") != "choices":
                limits = {"vocab_limit": vocab_limit}
                best_NK1 = top_k_log_probs(hidden_ND, head.weight, ids_NK.shape[1], *head[1:], **limits)[1].exp().cpu()
                differences.append(cached_NK - best_NK1[:, :-1])
            largest = max(largest, torch.cat(differences, dim=1).abs().max().item())
    allowed = TOLERANCE if cache.manifest["teacher"].get("dtype") == "float32" else TOLERANCE_16_BIT
    summary = f"{len(rows)} rows with {num_positions} supervised positions run again. Largest difference of "
    summary += f"probabilities: {largest:.2g}; allowed: {allowed:.2g}."
    if not largest <= allowed:
        raise CacheError(
            f"{summary} This is not the teacher of {cache.path}, or it runs otherwise here: give the teacher that the "
            "manifest names, on such a machine as it ran on, or make the cache again."
        )
    return summary


def _load_teacher(cache, path: str):
    """The teacher of a cache and its tokenizer, loaded as when the cache was made; refused if it is another one."""
    import torch

    from .cache.identity import weights_fingerprint
    from .cache.reader import check_cache
    from .modeling import load_model, load_tokenizer
    from .training import load_arguments

    asked = ("revision", "commit", "weights_sha256", "dtype", "quantization")  # a cache made by hand may lack some
    made_by, local = dict.fromkeys(asked) | cache.manifest["teacher"], Path(path).is_dir()
    revision = None if local else made_by["commit"] or made_by["revision"]
    tokenizer = load_tokenizer(path, revision)
    known = local and made_by["weights_sha256"] is not None
    weights = {"teacher": {"weights_sha256": weights_fingerprint(path)}} if known else {}
    check_cache(cache, tokenizer=tokenizer, **weights)
    section: dict = {"dtype": made_by["dtype"] or "auto", "model_revision": revision or "main"}
    if made_by["quantization"] == "int8":
        section["load_in_8bit"] = True
    elif made_by["quantization"] is not None:
        section |= {"load_in_4bit": True, "bnb_4bit_quant_type": made_by["quantization"]}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return load_model(path, device=device, **load_arguments(section)), tokenizer


def push(options: argparse.Namespace) -> str:
    """Upload a cache to the Hub, its card beside its shards, unless that would publish a token or a local path."""
    from .cache.format import MANIFEST
    from .cache.reader import open_cache
    from .errors import FirstTrlError
    from .files import write_atomically
    from .hub.upload import push_folder
    from .redaction import refuse_leaks

    folder = Path(options.path)
    if not folder.is_dir():
        raise FirstTrlError(f"There is no folder {options.path}; give the cache's, such as runs/NAME/cache/train.")
    cache = open_cache(folder)
    source = source_card(cache.manifest["dataset"])
    card = build_card(cache, options.repo_id, options.license or source.license, options.language or source.language)
    refuse_leaks("the card", card)
    refuse_leaks(MANIFEST, (folder / MANIFEST).read_text(encoding="utf-8"))
    write_atomically(folder / "README.md", card)
    where = {name: getattr(options, name) for name in ("private", "revision", "create_pr")}
    message = "Upload a teacher cache and its card"
    return f"Uploaded to {push_folder(folder, options.repo_id, commit_message=message, repo_type='dataset', **where)}"


def source_card(dataset: dict):
    """The metadata of the card of the data set on the Hub that the rows are from; empty where it cannot be had."""
    from huggingface_hub import DatasetCard, DatasetCardData
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    from .constants import BUILDERS, HUB_ID

    name = dataset["path"]
    if dataset.get("files_sha256") is None and name not in BUILDERS.values() and HUB_ID.fullmatch(name):
        try:
            return DatasetCard.load(name, ignore_metadata_errors=True).data
        except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
            return DatasetCardData()  # the licence is asked for then
    return DatasetCardData()


def build_card(cache, repo_id: str, license=None, language=None) -> str:
    """The README.md of a cache's repository.

    Raises:
        FirstTrlError: the licence of the rows is not known.
    """
    from huggingface_hub import DatasetCardData

    from .errors import FirstTrlError
    from .hub.card import escape_markdown

    if license is None:
        raise FirstTrlError(
            "The licence of the cache's rows is not known: give --license, e.g. cc-by-4.0, or unknown."
        )
    manifest = cache.manifest
    rows = manifest["totals"]["rows"]
    metadata = DatasetCardData(
        license=license,
        language=language,
        size_categories=next((size for limit, size in SIZES.items() if rows < limit), "n>10M"),
        pretty_name=f"Teacher cache of {manifest['teacher']['id']}",
        tags=["first-trl", "distillation", "teacher-cache"],
        task_categories=["text-generation"],
        configs=[{"config_name": "default", "data_files": "train-*.parquet"}],
    )
    template = _template("cache_card.md", escape=escape_markdown, code=_code)
    return template.render(manifest, metadata=metadata.to_yaml(), license=license, repo_id=repo_id)


def _code(value) -> str:
    """A value as a code span in one cell of a table, whatever is in it."""
    text = str(value).replace("\n", "\\n").replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
