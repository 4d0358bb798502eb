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

# The heavy imports are in the functions: the command line reads this page and must answer `--help` at once.

COMMANDS = ("inspect", "verify", "push")
NUM_EXAMPLES, POSITIONS_SHOWN = 10, 3
TEXT_SHOWN, BAR = 160, 40  # characters of a prompt (its end, which the answer follows), and of a histogram's bar
# Allowed between the cached probabilities and the teacher's now: storage rounds by 2e-4, 16-bit logits by much more.
TOLERANCE, TOLERANCE_16_BIT = 5e-4, 0.03


def main(argv: list[str]) -> int:
    """Run a command; returns its exit status."""
    options = _parser().parse_args(argv)
    from .hub.upload import PushError

    try:
        print({"inspect": inspect, "verify": verify, "push": push}[options.command](options))
        sys.stdout.flush()
    except (ValueError, PushError) as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
    return 0


def _parser() -> argparse.ArgumentParser:
    page = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("first-trl cache", description=__doc__, formatter_class=page, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument("path", metavar="PATH", help="a cache's folder, or a data set on the Hub")
        if name == "inspect":
            command.add_argument("--tokenizer", help="folder or id; default: that of the run the cache lies in")
        if name == "verify":
            command.add_argument("--teacher", help="folder or id: run it again over a sample of the rows")
            command.add_argument("--rows", type=int, default=32, help="rows of the sample (default: 32)")
        if name == "push":
            command.add_argument("repo_id", metavar="REPO_ID", help="owner/name, made if need be")
            command.add_argument("--private", action="store_true", help="make a new repository private")
            command.add_argument("--create_pr", action="store_true", help="open a pull request")
        command.add_argument("--revision", help="branch of the repository" + ("" if name == "push" else " or commit"))
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
    from .errors import shorten

    manifest, totals = cache.manifest, cache.manifest["totals"]
    positions, size = max(totals["supervised_positions"], 1), sum(shard["bytes"] for shard in manifest["shards"])
    ours = teacher_bytes(cache)
    kept = "those of the choices" if manifest.get("support") == "choices" else "the most probable"
    exact = "what the kept ones leave of 1" if manifest.get("tail") == "from_top_k" else "their exact sum"
    facts = {
        "teacher": _entries(manifest["teacher"], "id revision commit base dtype quantization weights_sha256"),
        "rows from": _entries(manifest["dataset"], "path name files split revision max_rows"),
        "task": _entries(manifest["task"], " ".join(manifest["task"])),
        "rows": f"{totals['rows']:,} in {len(manifest['shards'])} shards",
        "supervised positions": f"{totals['supervised_positions']:,}",
        "kept": f"{manifest['top_k']} tokens each ({kept}), log-probabilities in {manifest['dtype']}",
        "all other tokens": exact,
        "on disk": f"{size:,} bytes, {size / positions:.1f} per supervised position",
        "of these, the teacher": f"{ours:,} bytes, {ours / positions:.1f} per supervised position",
        "teacher's mass on them": f"mean {totals['teacher_mass_mean']:.4f}, p10 {totals['teacher_mass_p10']:.4f}",
    }
    lines = [shorten(str(cache.path)), *(f"  {name:<23} {shorten(value)}" for name, value in facts.items())]
    counts_B = np.zeros(10, dtype=np.int64)
    for block in row_blocks(cache.dataset, "all") if totals["supervised_positions"] else ():
        counts_B += np.histogram(np.exp(block.log_probs[:, 0]).clip(0, 1), bins=10, range=(0, 1))[0]
    lines += ["", "confidence of the teacher's first token"]
    for i, count in enumerate(counts_B.tolist()):
        bar = "#" * round(count * BAR / max(counts_B.max(), 1))
        lines.append(f"  {i / 10:.1f} to {(i + 1) / 10:.1f} {count:>12,}  {bar}".rstrip())
    shown = np.unique(np.linspace(0, totals["rows"] - 1, NUM_EXAMPLES).astype(int)).tolist()
    lines += ["", f"{len(shown)} rows, evenly spread"]
    return "\n".join([*lines, *(line for row in shown for line in _example(row, cache.dataset[row], tokenizer))])


def teacher_bytes(cache) -> int:
    """Bytes on disk of the three columns that hold the teacher."""
    import pyarrow.parquet as pq

    files = [pq.read_metadata(cache.path / shard["name"]) for shard in cache.manifest["shards"]]
    groups = [file.row_group(i) for file in files for i in range(file.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(column.total_compressed_size for column in columns if column.path_in_schema.startswith("teacher"))


def _entries(section: dict, names: str, cell=str) -> str:
    """Some entries of a section of the manifest, the first without its name; of a hash enough to tell two apart."""
    texts = {name: section[name] for name in names.split() if section.get(name) is not None}
    texts = {name: f"{text[:12]}..." if name.endswith("sha256") else text for name, text in texts.items()}
    first = names.partition(" ")[0]
    return ", ".join(cell(text) if name == first else f"{name} {cell(text)}" for name, text in texts.items())


def _example(number: int, row: dict, tokenizer) -> list[str]:
    from .constants import IGNORED

    def text(ids) -> str:
        words = " ".join(map(str, ids)) if tokenizer is None else repr(tokenizer.decode(ids))
        return words if len(words) <= TEXT_SHOWN else f"...{words[-TEXT_SHOWN:]}"

    supervised = [i for i, label in enumerate(row["labels"]) if label != IGNORED and i > 0]
    lines = [f"  row {number}: {text(row['input_ids'][: supervised[0]] if supervised else row['input_ids'])}"]
    for place, position in enumerate(supervised[:POSITIONS_SHOWN]):
        pairs = zip(row["teacher_ids"][place], row["teacher_log_probs"][place], strict=True)
        kept = ", ".join(f"{text([token])} {math.exp(log_prob):.3f}" for token, log_prob in pairs)
        tail = math.exp(row["teacher_tail_log_prob"][place])
        lines.append(f"    label {text([row['labels'][position]])}: teacher {kept}, all others {tail:.3f}")
    more = len(supervised) - POSITIONS_SHOWN
    return [*lines, f"    and {more} more positions"] if more > 0 else lines


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

    made_by, local = cache.manifest["teacher"], Path(path).is_dir()
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
    card = build_card(open_cache(folder), options.repo_id)
    refuse_leaks("the card", card)
    refuse_leaks(MANIFEST, (folder / MANIFEST).read_text(encoding="utf-8"))
    write_atomically(folder / "README.md", card)
    where = {name: getattr(options, name) for name in ("private", "revision", "create_pr")}
    message = "Upload a teacher cache and its card"
    return f"Uploaded to {push_folder(folder, options.repo_id, commit_message=message, repo_type='dataset', **where)}"


def build_card(cache, repo_id: str) -> str:
    """The README.md of a cache's repository."""
    import jinja2
    import yaml

    manifest, totals, teacher = cache.manifest, cache.manifest["totals"], cache.manifest["teacher"]
    metadata = {
        "pretty_name": f"Teacher cache of {teacher['id']}",
        "tags": ["first-trl", "distillation", "teacher-cache"],
        "task_categories": ["text-generation"],
        "configs": [{"config_name": "default", "data_files": "train-*.parquet"}],
    }
    top_k, mass = manifest["top_k"], f"{totals['teacher_mass_mean']:.4f} on average, {totals['teacher_mass_p10']:.4f}"
    facts = {
        "teacher": _entries(teacher, "id revision commit dtype quantization base", _code),
        "teacher's weights": f"SHA-256 `{teacher['weights_sha256']}`" if teacher["weights_sha256"] else "on the Hub",
        "rows from": _entries(manifest["dataset"], "path name files split revision", _code),
        "prompt": _code(manifest["task"].get("prompt")),
        "completion": _code(manifest["task"].get("completion")),
        "supervised positions": f"{totals['supervised_positions']:,}",
        "teacher's mass on the kept tokens": f"{mass} or less at a tenth of the positions",
        "tokenizer": f"SHA-256 `{manifest['tokenizer_sha256']}` of its token to id mapping",
        "manifest": f"SHA-256 `{manifest['manifest_sha256']}`",
    }
    template = (Path(__file__).parent / "hub" / "cache_card.md").read_text(encoding="utf-8")
    return (
        jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
        .from_string(template)
        .render(
            metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
            title=re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", " ".join(str(teacher["id"]).split())),
            rows=f"{totals['rows']:,}",
            kept=f"{top_k} answers'" if manifest.get("support") == "choices" else f"its {top_k} most probable",
            repo_id=repo_id,
            facts=facts,
            top_k=top_k,
            dtype=manifest["dtype"],
        )
    )


def _code(value) -> str:
    """A value as a code span in one cell of a table, whatever is in it."""
    if value is None:
        return "none"
    text = str(value).replace("\n", "\\n").replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
