"""Run the teacher once over train and validation and keep its top-K log-probabilities.

    accelerate launch -m first_trl.stages.cache RECIPE [--key value ...]

Reads the teacher and the recipe's `datasets`; writes `runs/<name>/cache/{train,validation}/`. Every process writes its
own shards of the same folder; an interrupted run continues with the shards that are missing, on any number of them.
"""

from functools import partial

from first_trl.pipeline import parse_stage, require, run_work, say, teacher_path

ROLES = ("train", "validation")


def main(argv: list[str] | None = None) -> None:
    recipe, _ = parse_stage("cache", argv)
    require(recipe, "sft")
    run_work(recipe, "cache", lambda continues: cache_splits(recipe), patient=True)


def cache_splits(recipe) -> list[str]:
    """Cache both splits with one teacher; returns what was written."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from transformers import AutoTokenizer

    from first_trl.cache_identity import cache_identity, teacher_identity
    from first_trl.scoring import load_model
    from first_trl.training import load_arguments, teacher_section

    state, path, revision = PartialState(), teacher_path(recipe), recipe.cache.teacher_revision
    section = teacher_section(recipe)
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    identities = [None, None]
    if state.is_main_process:  # hashing a large teacher takes its time: once is enough
        teacher = teacher_identity(path, section)
        identities = [cache_identity(recipe, role, tokenizer, teacher) for role in ROLES]
    broadcast_object_list(identities)
    model = load_model(path, revision=revision, device=state.device, **load_arguments(section))
    for role, identity in zip(ROLES, identities, strict=True):
        cache_split(recipe, role, model, tokenizer, identity)
    return [f"cache/{role}/manifest.json" for role in ROLES]


def cache_split(recipe, role: str, model, tokenizer, identity: dict) -> None:
    """Cache one split: this process's shards, then, on the main process, the manifest."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from first_trl.cache import parquet_files
    from first_trl.cache_identity import cached_split
    from first_trl.cache_run import write_shards
    from first_trl.cache_writer import CacheWriter
    from first_trl.data import encode_row, load_split
    from first_trl.scoring import teacher_rows

    state, settings, folder = PartialState(), recipe.cache, recipe.run_folder / "cache" / role
    layout = {"top_k": settings.top_k, "dtype": settings.dtype, "rows_per_shard": settings.rows_per_shard}
    writer, present = CacheWriter(folder, identity, **layout), [None]
    if state.is_main_process:
        writer.acquire(overwrite=True)  # the run folder's record says that what is there is out of date
        present = [parquet_files(folder)]
    broadcast_object_list(present)
    with state.local_main_process_first():
        dataset = load_split(cached_split(recipe, role), role, streaming=settings.streaming)
    num_rows = write_shards(
        writer,
        dataset,
        partial(encode_row, task=recipe.task, tokenizer=tokenizer),
        lambda examples, progress: teacher_rows(
            model,
            examples,
            top_k=settings.top_k,
            tokens_per_batch=settings.tokens_per_batch,
            vocab_limit=len(tokenizer),
            progress=progress,
        ),
        present=frozenset(present[0]),
        rank=state.process_index,
        processes=state.num_processes,
        title=f"cache {role}",
    )
    state.wait_for_everyone()
    if state.is_main_process:
        totals = writer.finish(num_rows)["totals"]
        writer.release()
        say(
            f"cache: {role} has {totals['rows']} rows, {totals['supervised_positions']} supervised positions; the "
            f"teacher puts {totals['teacher_mass_mean']:.3f} of its mass on {settings.top_k} tokens (p10 "
            f"{totals['teacher_mass_p10']:.3f})"
        )
    state.wait_for_everyone()


if __name__ == "__main__":
    main()
