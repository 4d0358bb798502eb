"""The commands for a cache that is already there.

    first-trl cache inspect PATH                     what is in it
    first-trl cache verify PATH [--teacher TEACHER]  whether every byte, and the teacher, is still as it was
    first-trl cache push PATH REPO_ID                upload it to the Hub, with a card

PATH is a folder such as runs/NAME/cache/train, or the id of a data set repository on the Hub.
"""

import argparse
import os
import sys
from pathlib import Path

COMMANDS = ("inspect", "verify", "push")


def main(argv: list[str]) -> int:
    """Run a command; returns its exit status."""
    options = _parser().parse_args(argv)
    from ..hub.upload import PushError

    try:
        {"inspect": inspect, "verify": verify, "push": push}[options.command](options)
        sys.stdout.flush()
    except (ValueError, PushError) as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="first-trl cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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


def inspect(options: argparse.Namespace) -> None:
    """Print a page about a cache; tokens are shown as text where the teacher's tokenizer is at hand."""

    from ..modeling import load_tokenizer
    from .inspection import describe, teacher_near
    from .reader import check_cache, open_cache

    cache = open_cache(options.path, revision=options.revision)
    source = options.tokenizer or teacher_near(Path(cache.path))
    tokenizer = None
    if source is not None:
        tokenizer = load_tokenizer(source)
        check_cache(cache, tokenizer=tokenizer)
    print(describe(cache, tokenizer))
    if tokenizer is None:
        print("\nTokens are shown by their ids; --tokenizer FOLDER_OR_ID shows them as text.")


def verify(options: argparse.Namespace) -> None:
    """Hash everything again and, given the teacher, run it again over a sample; prints what was found."""
    from .reader import open_cache
    from .verification import check_content, compare_with_teacher

    cache = open_cache(options.path, revision=options.revision)
    check_content(cache)
    totals, shards = cache.manifest["totals"], cache.manifest["shards"]
    size = sum(shard["bytes"] for shard in shards)
    print(f"{cache.path}: {len(shards)} shards, {size:,} bytes, {totals['rows']:,} rows: all as the manifest says.")
    if options.teacher is None:
        print("The teacher was not run; --teacher FOLDER_OR_ID compares a sample of the rows with it.")
        return
    model, tokenizer = _load_teacher(cache, options.teacher)
    found = compare_with_teacher(cache, model, len(tokenizer), options.rows)
    token = "the tail" if found.token_id is None else f"token {tokenizer.convert_ids_to_tokens(found.token_id)!r}"
    summary = (
        f"{found.rows} rows with {found.positions} supervised positions run again. Largest difference: "
        f"{found.largest:.2g} nats; beyond the rounding of what is stored, {found.unexplained:.2g}, at {token} of row "
        f"{found.row} (cached {found.cached:.6g}, now {found.now:.6g}). Allowed beyond rounding: "
        f"{found.tolerance:.2g} (the teacher itself differs by {found.live:.2g}, one row at a time or in batches)."
    )
    if found.exceeding:
        raise ValueError(
            f"{summary} {found.exceeding} positions differ by more than is allowed: this is not the teacher of "
            f"{cache.path}, or it runs otherwise here. Give the teacher that the manifest names, on such a machine as "
            "it ran on, or make the cache again."
        )
    print(summary)


def _load_teacher(cache, path: str):
    """The teacher of a cache and its tokenizer, loaded as when the cache was made; refused if it is another one."""
    import torch

    from ..modeling import load_model, load_tokenizer
    from ..training import load_arguments
    from .identity import weights_fingerprint
    from .reader import check_cache

    made_by, local = cache.manifest["teacher"], Path(path).is_dir()
    revision = None if local else made_by["commit"] or made_by["revision"]
    tokenizer = load_tokenizer(path, revision)
    known = local and made_by["weights_sha256"] is not None
    weights = {"teacher": {"weights_sha256": weights_fingerprint(path)}} if known else {}
    check_cache(cache, tokenizer=tokenizer, **weights)
    section = {"dtype": made_by["dtype"] or "auto", "load_in_4bit": made_by["quantization"] is not None}
    section["model_revision"] = revision or "main"
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return load_model(path, device=device, **load_arguments(section)), tokenizer


def push(options: argparse.Namespace) -> None:
    """Upload a cache to the Hub; prints the address."""
    from .hub import push_cache
    from .reader import open_cache

    if not Path(options.path).is_dir():
        raise ValueError(f"There is no folder {options.path}; give the cache's, such as runs/NAME/cache/train.")
    cache = open_cache(options.path)
    url = push_cache(
        cache, options.repo_id, private=options.private, revision=options.revision, create_pr=options.create_pr
    )
    print(f"Uploaded to {url}")
