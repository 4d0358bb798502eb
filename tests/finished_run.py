"""A run folder as the stages leave it, with a tiny student, made in a second: what the card and the upload read."""

import json

from tests.tiny import build_model, build_tokenizer

PROMPT = "Review: {text} Sentiment :"
ARM_NUMBERS = {
    "teacher": (0.81, 0.12),
    "base": (0.02, 0.3),
    "fine_tuned": (0.78, 0.17),
    "fine_tuned_post_hoc": (0.78, 0.031),
    "first": (0.79, 0.042),
}
FOUND = {"value": 1.7, "interval": [1.5, 1.9], "ece_before": 0.12, "ece_after": 0.02, "curve": []}
CALIBRATION = {"schema_version": 1, "method": "temperature", "value": 1.7, "criterion": "ece", "positions": "answer"}
CALIBRATION |= {"num_bins": 10, "num_positions": 1200, "families": {"temperature": FOUND}}
TABLE = "| Arm | ECE |\n| --- | ---: |\n| `teacher` | 12.0 % |\n| `first` | 4.2 % |\n| `first_post_hoc` | 2.2 % |\n"
CLOSING = {"temperature": 1.3, "fitted": 1.3, "interval": [1.1, 1.6], "why": "the interval does not contain 1"}
CLOSING |= {"num_examples": 200, "choice_token_ids": [11, 12], "scope": "choices", "vocabulary": {"temperature": 1.1}}
SENTENCES = [
    {"kind": "headline", "set": None, "text": "Is it better? `first` knows more."},
    {"kind": "loss", "set": "reviews", "text": "Against `fine_tuned_post_hoc`: accuracy 1.0 points higher."},
]
MANIFEST = {
    "manifest_sha256": "c0ffee" * 10 + "abcd",
    "tokenizer_sha256": "d00d" * 16,
    "top_k": 5,
    "teacher": {"id": "teacher", "base": "big-base", "revision": "main", "weights_sha256": "ab" * 32},
    "totals": {"supervised_positions": 2400},
    "library_versions": {"torch": "2.13.0"},
}


def measured(accuracy, ece):
    others = {"nll": 0.51, "brier": 0.2, "auroc": 0.7, "aurc": 0.1, "num_examples": 1600}
    interval = {"accuracy": [accuracy - 0.01, accuracy + 0.01], "ece": [ece - 0.01, ece + 0.01]}
    return {"accuracy": accuracy, "ece": ece, "trust_score": accuracy - ece, **others, "ci": interval}


def make_base(folder):
    """A tiny Llama with its tokenizer."""
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def make_run(folder, base, base_name=None, **sections):
    """(run folder, recipe) of a finished experiment in `folder`, its `first` arm an adapter of `base`.

    Args:
        base_name: how recipe and adapter call the base model; default: its path.
        sections: sections of the recipe to add or replace.
    """
    import yaml
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from first_trl.recipe import load_recipe

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation", "test"):
        row = {"text": f"the film {name} is good", "label": "good"}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    base_name = str(base_name or base)
    content = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "task": {"prompt": PROMPT, "completion": " {label}", "choices": ["good", "bad"], "max_length": 32},
        "datasets": {
            "train": {"path": "json", "data_files": str(folder / "train.jsonl")},
            "validation": {"path": "json", "data_files": str(folder / "validation.jsonl")},
            "test": {
                "reviews": {"path": "json", "data_files": str(folder / "test.jsonl")},
                "questions": {"path": "owner/questions", "name": "main", "split": "test", "out_of_domain": True},
            },
        },
        "sft": {"model_name_or_path": base_name},
        "distill": {"model_name_or_path": base_name, "use_peft": True, "lora_r": 4},
        "push": {"hub_model_id": "me/tiny-student", "license": "mit"},
        **sections,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(folder / "recipe.yaml")
    run = recipe.run_folder
    student = run / "students" / "first"
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(student)
    AutoTokenizer.from_pretrained(base).save_pretrained(student)
    from first_trl.student import describe_student

    validation = {"choice_confidence": [0.5, 0.7, 0.9, 0.95] * 50, "choice_correct": [False, True, True, True] * 50}
    described = describe_student("first", recipe.task, recipe.arm_section("first"), validation, 1.3)
    (student / "predict.json").write_text(json.dumps(described))
    ids = build_tokenizer().convert_tokens_to_ids(["good", "bad"])
    (student / "calibration.json").write_text(json.dumps(CLOSING | {"choice_token_ids": ids}))
    (student / "checkpoint-3").mkdir()
    for unwanted in ("checkpoint-3/optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state.pth"):
        (student / unwanted).write_bytes(b"not to be published")
    (run / "report").mkdir()
    (run / "cache" / "train").mkdir(parents=True)
    (run / "report" / "reliability_reviews.png").write_bytes(b"\x89PNG picture")
    (run / "report" / "index.html").write_text("<html>")
    arms = {
        arm: {test: measured(*numbers) for test in ("reviews", "questions")} for arm, numbers in ARM_NUMBERS.items()
    }
    metrics = {"view": "vocabulary", "arms": arms, "calibration": CALIBRATION, "verdicts": {"first": SENTENCES}}
    metrics |= {"provenance": {"recipe": recipe.to_dict()}, "selection": {"best": "first"}}
    (run / "report" / "table.md").write_text(
        "| Arm | ECE |\n| --- | --- |\n| `teacher` | 12 % |\n| `first` | 4.2 % |\n"
    )
    (run / "report" / "metrics.json").write_text(json.dumps(metrics))
    (run / "calibration.json").write_text(json.dumps(CALIBRATION))
    (run / "cache" / "train" / "manifest.json").write_text(json.dumps(MANIFEST))
    return run, recipe


def record_run(recipe):
    """Record every job of a recipe as finished, with a file for each that it should have made and has not."""
    from first_trl.files import write_atomically
    from first_trl.run import Run

    run = Run(recipe, source=str(recipe.run_folder.parent.parent / "recipe.yaml"))
    for name, job in run.jobs.items():
        for folder in job.folders:
            if not (run.path / folder).exists():
                write_atomically(run.path / folder / "made.json", "{}")
        run.begin(name)
        run.finish(name, 1.0)
