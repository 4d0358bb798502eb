"""Run the teacher once over train and validation and keep its top-K log-probabilities.

    accelerate launch -m first_trl.stages.cache RECIPE [--key value ...]

Reads the teacher and the recipe's `datasets`; writes `runs/<name>/cache/{train,validation}/`. Every process writes its
own shards of the same folder; an interrupted run continues with the shards that are missing.
"""

from first_trl.pipeline import parse_stage, require, run_work, say, teacher_path


def main(argv: list[str] | None = None) -> None:
    recipe, _ = parse_stage("cache", argv)
    require(recipe, "sft")
    run_work(recipe, "cache", lambda continues: cache_splits(recipe))


def cache_splits(recipe) -> list[str]:
    """Cache both splits with one teacher; returns what was written."""
    from accelerate import PartialState
    from transformers import AutoTokenizer

    from first_trl.scoring import load_model
    from first_trl.training import load_arguments, teacher_section

    state, path = PartialState(), teacher_path(recipe)
    section = teacher_section(recipe)
    tokenizer = AutoTokenizer.from_pretrained(path, revision=recipe.cache.teacher_revision)
    model = load_model(path, device=state.device, **load_arguments(section))
    for role in ("train", "validation"):
        cache_split(recipe, role, model, tokenizer, section)
    return ["cache/train/manifest.json", "cache/validation/manifest.json"]


def cached_split(recipe, role: str):
    """The rows behind `cache/train` and `cache/validation`: with `datasets.transfer`, train is those rows instead."""
    return (recipe.datasets.transfer if role == "train" else None) or getattr(recipe.datasets, role)


def cache_split(recipe, role: str, model, tokenizer, section: dict) -> None:
    """Cache one split: this process's shards, then, on the main process, the manifest."""
    from accelerate import PartialState

    from first_trl.cache_writer import CacheWriter
    from first_trl.data import load_split, tokenize_dataset
    from first_trl.fingerprints import row_key
    from first_trl.scoring import teacher_rows, token_progress

    state, settings = PartialState(), recipe.cache
    with state.main_process_first():
        examples = tokenize_dataset(load_split(cached_split(recipe, role), role), recipe.task, tokenizer)
    writer = CacheWriter(
        recipe.run_folder / "cache" / role,
        cache_description(recipe, role, examples, tokenizer, section),
        top_k=settings.top_k,
        dtype=settings.dtype,
        rows_per_shard=settings.rows_per_shard,
    )
    if state.is_main_process:
        writer.acquire(overwrite=True)  # the run folder's record says that what is there is out of date
    state.wait_for_everyone()
    shards = range(0, -(-len(examples) // settings.rows_per_shard))
    with token_progress(f"cache {role}", examples, disable=not state.is_main_process) as progress:
        for shard in list(shards)[state.process_index :: state.num_processes]:
            start = shard * settings.rows_per_shard
            rows = list(examples.select(range(start, min(start + settings.rows_per_shard, len(examples)))))
            keys = [row_key(row["input_ids"], row["labels"]) for row in rows]
            if writer.shard_is_complete(shard, keys):
                progress(sum(len(row["input_ids"]) for row in rows))
                continue
            writer.write_shard(
                shard,
                teacher_rows(
                    model,
                    rows,
                    top_k=settings.top_k,
                    tokens_per_batch=settings.tokens_per_batch,
                    vocab_limit=len(tokenizer),
                    progress=progress,
                ),
            )
    state.wait_for_everyone()
    if state.is_main_process:
        totals = writer.finish(len(examples))["totals"]
        writer.release()
        say(
            f"cache: {role} has {totals['rows']} rows, {totals['supervised_positions']} supervised positions; the "
            f"teacher puts {totals['teacher_mass_mean']:.3f} of its mass on {settings.top_k} tokens (p10 "
            f"{totals['teacher_mass_p10']:.3f})"
        )
    state.wait_for_everyone()


def cache_description(recipe, role: str, examples, tokenizer, section: dict) -> dict:
    """What the cache is made from, for its manifest; no path of this machine."""
    from pathlib import Path

    from first_trl.cache_writer import library_versions
    from first_trl.fingerprints import (
        chat_template_fingerprint,
        dataset_fingerprint,
        row_key,
        tokenizer_fingerprint,
        weights_fingerprint,
    )

    path, data, base = teacher_path(recipe), cached_split(recipe, role), recipe.sft.get("model_name_or_path")
    local = Path(path).is_dir()
    files = [data.data_files] if isinstance(data.data_files, str) else data.data_files or []
    return {
        "teacher": {
            "id": Path(path).name if local else path,
            "base": Path(base).name if local and base else None,
            "base_sha256": weights_fingerprint(base) if local and base and Path(base).is_dir() else None,
            "revision": section["model_revision"],
            "weights_sha256": weights_fingerprint(path) if local else None,
            "dtype": section["dtype"],
            "quantization": "nf4" if section["load_in_4bit"] else None,
        },
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "chat_template_sha256": chat_template_fingerprint(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "dataset": {
            "path": Path(data.path).name if Path(data.path).exists() else data.path,
            "name": data.name,
            "files": [Path(file).name for file in files],
            "split": data.split,
            "revision": data.revision,
            "role": role,
            "rows": len(examples),
            "fingerprint": dataset_fingerprint(row_key(row["input_ids"], row["labels"]) for row in examples),
        },
        "task": vars(recipe.task),
        "library_versions": library_versions(),
    }


if __name__ == "__main__":
    main()
