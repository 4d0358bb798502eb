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
    run_teacher, write, backend = teacher_runner(recipe, path, section, len(tokenizer))
    roles = cached_roles(recipe)
    identities: list = [None] * len(roles)
    if state.is_main_process:  # hashing a large teacher takes its time: once is enough
        teacher = teacher_identity(path, section)
        identities = [cache_identity(recipe, role, tokenizer, teacher, backend) for role in roles]
    broadcast_object_list(identities)
    for role, identity in zip(roles, identities, strict=True):
        cache_split(recipe, role, run_teacher, write, tokenizer, identity)


def teacher_runner(recipe, path: str, section: dict, vocab_limit: int) -> tuple[Callable, Callable, dict]:
    """Functions from examples to a shard's columns and from prompts to answers, and the manifest's `backend`."""
    from accelerate import PartialState

    settings = recipe.cache
    wanted = {"top_k": settings.top_k, "vocab_limit": vocab_limit}
    if settings.backend == "server":
        from first_trl.vllm_scoring import connect, server_answers, server_teacher_rows

        server = connect(settings.server_url, path, settings.top_k, recipe.task.max_length)
        backend = {"name": "server", "model": PurePath(server.model).name, "version": server.version}
        run_teacher = partial(server_teacher_rows, server, requests=settings.server_requests, **wanted)
        return run_teacher, partial(server_answers, server, requests=settings.server_requests), backend
    from first_trl.generation import written_answers
    from first_trl.modeling import load_model
    from first_trl.scoring import teacher_rows
    from first_trl.training import load_arguments

    model = load_model(path, device=PartialState().device, **load_arguments(section))
    run_teacher = partial(teacher_rows, model, tokens_per_batch=settings.tokens_per_batch, **wanted)
    write = partial(written_answers, model, tokens_per_batch=settings.tokens_per_batch, vocab_limit=vocab_limit)
    return run_teacher, write, {"name": "hf", "model": None, "version": None}  # the library versions have it


def cache_split(recipe, role: str, run_teacher: Callable, write: Callable, tokenizer, identity: dict) -> None:
    """Cache one split: this process's shards, then, on the main process, the manifest."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from first_trl.cache.identity import cached_split, kept_tokens
    from first_trl.cache.reader import parquet_files
    from first_trl.cache.writer import CacheWriter, write_shards
    from first_trl.data.choices import forced_tokens, with_answer
    from first_trl.data.encoding import first_row
    from first_trl.data.rows import describe_lost, load_rows
    from first_trl.generation import writing_teacher

    state, settings, folder = PartialState(), recipe.cache, new_folder(recipe.run_folder / "cache" / role)
    place = "datasets.transfer" if role == "train" and recipe.datasets.transfer else f"datasets.{role}"
    written = settings.write_answers if place == "datasets.transfer" else None
    how = {"place": place, "streaming": settings.streaming, "write": written}
    with state.local_main_process_first():
        dataset, _, lost = load_rows(cached_split(recipe, role), role, recipe.task, tokenizer, **how)
    if line := describe_lost(place, lost):
        status(line)
    first = next(iter(dataset))
    encode, asked = row_encoder(recipe, place, tokenizer, first)
    unlabelled = "candidates" in asked
    answered = with_answer(first, recipe.task, recipe.task.choices[0]) if unlabelled else first
    identity = {
        **identity,
        "labels": "teacher" if unlabelled or written else "given",
        "rows": lost,
        "forced": forced_tokens(recipe.task, tokenizer, first),
        "first_row": first_row(recipe.task, tokenizer, answered),
    }
    run_teacher, count = partial(run_teacher, **asked), None
    if written:
        identity["write_answers"] = dict(written)
        run_teacher, count = writing_teacher(run_teacher, write, written, recipe.task, tokenizer, first)
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
            lambda examples, progress: run_teacher(examples, progress=progress),
            present=frozenset(present[0]),
            rank=state.process_index,
            processes=state.num_processes,
            answered_by_teacher=identity["labels"] == "teacher",
            title=f"cache {role}",
        )
        state.wait_for_everyone()
        if state.is_main_process:
            status(_summary(role, kept_tokens(recipe), writer.finish(num_rows, count)["totals"]))
    state.wait_for_everyone()


def _summary(role: str, kept: int, totals: dict) -> str:
    text = (
        f"cache: {role} has {totals['rows']} rows, {totals['supervised_positions']} supervised positions; the teacher "
        f"puts {totals['teacher_mass_mean']:.3f} of its mass on {kept} tokens (p10 {totals['teacher_mass_p10']:.3f})"
    )
    if "answers_cut" in totals:
        text += f"; of the written answers {totals['answers_cut']} are cut and {totals['answers_empty']} empty"
    return text


def row_encoder(recipe, place: str, tokenizer, first_row: dict) -> tuple[Callable, dict]:
    """How a row becomes an example, and what the teacher is asked besides: tokens to keep, answers to choose among.

    Rows of `datasets.transfer` need no labels: the teacher's most probable choice stands in for each.
    """
    from first_trl.data.choices import (
        encode_answer_row,
        has_answer,
        room_to_write,
        single_token_ids,
        unlabelled_encoder,
        with_answer,
    )
    from first_trl.data.encoding import encode_row

    wanted = {"task": recipe.task, "tokenizer": tokenizer, "place": place}
    if place == "datasets.transfer" and recipe.cache.write_answers:
        return partial(encode_row, **wanted | {"task": room_to_write(recipe.task, recipe.cache.write_answers)}), {}
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
