"""Run the teacher once over train and validation and keep its log-probabilities: of the top K, or of the choices.

    accelerate launch -m first_trl.stages.cache RECIPE [--key value ...]

Reads the teacher and the recipe's `datasets`; writes `runs/<name>/cache/{train,validation}/`. Every process writes its
own shards of the same folder; an interrupted run continues with the shards that are missing, on any number of them.
The teacher runs here, or on a server (`cache.backend`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import PurePath

from first_trl.errors import FirstTrlError
from first_trl.files import new_folder
from first_trl.run import LONG, cached_roles, require, run_job, status, teacher_path
from first_trl.stages.command import stage_command


@stage_command("cache")
def main(recipe, options) -> None:
    require(recipe, "sft")
    run_job(recipe, options, "cache", lambda continues: cache_splits(recipe), timeout=LONG)


def cache_splits(recipe) -> None:
    """Cache both splits with one teacher."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from first_trl.cache.identity import cache_identity, teacher_identity
    from first_trl.modeling import load_tokenizer
    from first_trl.recipe import teacher_section

    state, path, section = PartialState(), teacher_path(recipe), teacher_section(recipe)
    tokenizer = load_tokenizer(path, recipe.cache.teacher_revision)
    run_teacher, backend = teacher_runner(recipe, path, section, len(tokenizer))
    roles = cached_roles(recipe)
    identities: list = [None] * len(roles)
    if state.is_main_process:  # hashing a large teacher takes its time: once is enough
        teacher = teacher_identity(path, section)
        identities = [cache_identity(recipe, role, tokenizer, teacher, backend) for role in roles]
    broadcast_object_list(identities)
    for role, identity in zip(roles, identities, strict=True):
        cache_split(recipe, role, run_teacher, tokenizer, identity)


def teacher_runner(recipe, path: str, section: dict, vocab_limit: int) -> tuple[Callable, dict]:
    """A function from examples (and a progress callback) to a shard's columns, and the manifest's `backend`."""
    from accelerate import PartialState

    settings = recipe.cache
    wanted = {"top_k": settings.top_k, "vocab_limit": vocab_limit}
    if settings.backend == "server":
        from first_trl.vllm_scoring import connect, server_teacher_rows

        server = connect(settings.server_url, path, settings.top_k, recipe.task.max_length)
        backend = {"name": "server", "model": PurePath(server.model).name, "version": server.version}
        return partial(server_teacher_rows, server, requests=settings.server_requests, **wanted), backend
    from first_trl.modeling import load_model
    from first_trl.scoring import teacher_rows
    from first_trl.training import load_arguments

    model = load_model(path, device=PartialState().device, **load_arguments(section))
    run_teacher = partial(teacher_rows, model, tokens_per_batch=settings.tokens_per_batch, **wanted)
    return run_teacher, {"name": "hf", "model": None, "version": None}  # the library versions have it


def cache_split(recipe, role: str, run_teacher: Callable, tokenizer, identity: dict) -> None:
    """Cache one split: this process's shards, then, on the main process, the manifest."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from first_trl.cache.identity import cached_split, kept_tokens
    from first_trl.cache.reader import parquet_files
    from first_trl.cache.writer import CacheWriter, write_shards
    from first_trl.data.choices import forced_tokens, with_answer
    from first_trl.data.encoding import first_row
    from first_trl.data.rows import describe_lost, load_rows

    state, settings, folder = PartialState(), recipe.cache, new_folder(recipe.run_folder / "cache" / role)
    place = "datasets.transfer" if role == "train" and recipe.datasets.transfer else f"datasets.{role}"
    with state.local_main_process_first():
        split = cached_split(recipe, role)
        dataset, _, lost = load_rows(split, role, recipe.task, tokenizer, place=place, streaming=settings.streaming)
    if line := describe_lost(place, lost):
        status(line)
    first = next(iter(dataset))
    encode, asked = row_encoder(recipe, role, tokenizer, first)
    unlabelled = "candidates" in asked
    identity = {
        **identity,
        "labels": "teacher" if unlabelled else "given",
        "rows": lost,
        "forced": forced_tokens(recipe.task, tokenizer, first),
        "first_row": first_row(
            recipe.task, tokenizer, with_answer(first, recipe.task, recipe.task.choices[0]) if unlabelled else first
        ),
    }
    layout = {"top_k": kept_tokens(recipe), "dtype": settings.dtype, "rows_per_shard": settings.rows_per_shard}
    writer = CacheWriter(folder, identity, **layout)
    # What is there and of another job is removed: the run folder's record says that it is out of date
    with writer.hold(overwrite=True) if state.is_main_process else nullcontext():
        present: list = [parquet_files(folder) if state.is_main_process else None]
        broadcast_object_list(present)
        num_rows = write_shards(
            writer,
            dataset,
            encode,
            lambda examples, progress: run_teacher(examples, progress=progress, **asked),
            present=frozenset(present[0]),
            rank=state.process_index,
            processes=state.num_processes,
            answered_by_teacher=unlabelled,
            title=f"cache {role}",
        )
        state.wait_for_everyone()
        if state.is_main_process:
            totals = writer.finish(num_rows)["totals"]
            status(
                f"cache: {role} has {totals['rows']} rows, {totals['supervised_positions']} supervised positions; the "
                f"teacher puts {totals['teacher_mass_mean']:.3f} of its mass on {kept_tokens(recipe)} tokens (p10 "
                f"{totals['teacher_mass_p10']:.3f})"
            )
    state.wait_for_everyone()


def row_encoder(recipe, role: str, tokenizer, first_row: dict) -> tuple[Callable, dict]:
    """How a row becomes an example, and what the teacher is asked besides: tokens to keep, answers to choose among.

    Rows of `datasets.transfer` need no labels: the teacher's most probable choice stands in for each.
    """
    from first_trl.data.choices import encode_answer_row, has_answer, single_token_ids, unlabelled_encoder, with_answer
    from first_trl.data.encoding import encode_row

    place = "datasets.transfer" if role == "train" and recipe.datasets.transfer else f"datasets.{role}"
    wanted = {"task": recipe.task, "tokenizer": tokenizer, "place": place}
    encode: Callable = partial(encode_row, **wanted)
    asked: dict = {}
    if recipe.cache.support == "choices":
        asked["kept_ids"] = single_token_ids(recipe.task, tokenizer, first_row)
        encode = partial(encode_answer_row, choice_ids=asked["kept_ids"], **wanted)
    if place != "datasets.transfer" or has_answer(recipe.task, first_row):
        return encode, asked
    if recipe.cache.backend != "hf":
        raise FirstTrlError(f"{place}: rows without labels need cache.backend: hf, not {recipe.cache.backend}.")
    encode_answered = encode
    encode, candidates = unlabelled_encoder(recipe.task, tokenizer, first_row, place)
    encode_answered(with_answer(first_row, recipe.task, recipe.task.choices[0]), 0)  # refuses what labels would be
    status(f"cache: {place} has no labels: the teacher's most probable choice stands in for each")
    return encode, {**asked, "candidates": candidates}


if __name__ == "__main__":
    main()
