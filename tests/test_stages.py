"""The stages one after another on tiny models: what a recipe asks for is made, what it leaves out is not missed."""

import json
import shutil

import pytest
import yaml

from first_trl.evaluation import teacher_curves
from first_trl.recipe import load_recipe
from first_trl.run import calibration_methods, jobs
from first_trl.stages import cache, calibrate, distill, evaluate
from tests.cache_recipe import write_recipe, write_rows

TASK = {
    "prompt": "Review : {text} Sentiment :",
    "completion": " {label}",
    "choices": ["good", "bad"],
    "append_eos": False,
    "max_length": 60,
}


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def tiny_recipe(folder, *removed, **sections):
    """A recipe with a given teacher, all four stages cheap, without the `removed` (dotted) keys; returns its path."""
    defaults = {"task": TASK, "evaluate": {"bootstrap": 20}, "calibrate": {"bootstrap": 10}}
    path = write_recipe(folder, rows=24, **{**defaults, **sections})
    content = yaml.safe_load(path.read_text())
    content["distill"] |= {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4}
    for key in removed:
        section, _, last = key.rpartition(".")
        (content[section] if section else content).pop(last)
    path.write_text(yaml.safe_dump(content))
    for seed, role in enumerate(("train", "validation", "test")):
        write_rows(folder / f"{role}.jsonl", 24, 10 + seed)
    return path


def run_stages(path, *stages):
    for stage in stages or (cache, calibrate, distill, evaluate):
        stage.main([str(path)])
    recipe = load_recipe(path)
    return recipe, json.loads((recipe.run_folder / "report" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(recipe, metrics) of a run with a control, the method, and the method by two more families."""
    others = {f"first_{method}": {"recalibration_method": method} for method in ("label_smoothing", "probability")}
    arms = {"fine_tuned": {"trainer": "sft"}, "distilled": {"recalibration_method": "none"}, **others, "first": {}}
    return run_stages(tiny_recipe(tmp_path_factory.mktemp("whole"), arms=arms))


def test_the_report_of_a_run_has_thresholds_fitted_on_validation_for_every_arm_and_control(whole):
    recipe, metrics = whole
    students = {"fine_tuned", "first", "distilled", "first_label_smoothing", "first_probability"}
    arms = {"teacher", "teacher_recalibrated", "base"} | students | {f"{student}_post_hoc" for student in students}
    assert set(metrics["arms"]) == arms
    assert set(metrics["calibration"]["families"]) == {"temperature", "label_smoothing", "probability"}
    for arm in arms:
        assert set(metrics["arms"][arm]) == {"test"}, "validation is for fitting, and no column of the report"
        assert metrics["arms"][arm]["test"]["selective"]["target_accuracy"] == 0.9


def test_a_student_can_predict_from_its_own_folder_and_abstains_as_the_report_says(whole):
    from datasets import load_dataset

    from first_trl import predict

    recipe, metrics = whole
    folder = recipe.run_folder / "students" / "first"
    closing = json.loads((folder / "calibration.json").read_text())
    assert closing["num_examples"] == 24 and closing["temperature"] == 1 and "fewer than 50" in closing["why"]
    rows = list(load_dataset("json", data_files=recipe.datasets.test["test"].data_files, split="train"))
    answers = predict(folder, [{"text": row["text"]} for row in rows])
    measured = metrics["arms"]["first_post_hoc"]["test"]["choices"]
    right = [answer["answer"] == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) / len(right) == pytest.approx(measured["accuracy"])
    answered = [not answer["abstain"] for answer in answers]
    assert sum(answered) / len(answered) == pytest.approx(measured["selective"]["coverage"])


def test_the_report_of_a_run_draws_the_curve_on_validation_and_test_and_the_training(whole):
    recipe, metrics = whole
    report = recipe.run_folder / "report"
    assert (report / "calibration.png").is_file() and (report / "training.png").is_file()
    curves = teacher_curves(report / "answers", ["test"], metrics["calibration"])
    values = [point["value"] for point in metrics["calibration"]["families"]["temperature"]["curve"]]
    assert [point["value"] for point in curves["temperature"]["test"]] == values
    nearest = min(curves["temperature"]["test"], key=lambda point: abs(point["value"] - 1))
    assert nearest["ece"] == pytest.approx(metrics["arms"]["teacher"]["test"]["ece"], abs=0.05)


def test_a_report_with_other_settings_measures_the_answers_that_are_there_unless_one_is_damaged(whole, monkeypatch):
    recipe, _ = whole
    path, asked = str(recipe.run_folder.parent.parent / "recipe.yaml"), []
    monkeypatch.setattr("first_trl.evaluation.answer_sets", lambda *arguments: asked.append(arguments[3].name))
    evaluate.main([path, "--num_bins", "5"])
    report = recipe.run_folder / "report"
    assert json.loads((report / "metrics.json").read_text())["num_bins"] == 5 and asked == []
    answers = report / "answers" / "first" / "test.parquet"
    kept = answers.read_bytes()
    answers.write_bytes((report / "answers" / "distilled" / "test.parquet").read_bytes())
    evaluate.main([path])
    assert set(asked) == {"teacher", "base", *recipe.students}
    answers.write_bytes(kept)
    made_from = evaluate.made_from(recipe, report / "answers")
    assert made_from == evaluate.made_from(recipe, report / "answers")
    monkeypatch.setattr(evaluate, "version", lambda name: "0")
    assert made_from != evaluate.made_from(recipe, report / "answers"), "another release may measure otherwise"


@pytest.mark.parametrize("adapter", [True, False])
def test_a_second_round_goes_on_at_the_temperature_of_the_first_and_resumes_with_the_same_bytes(
    tmp_path, monkeypatch, adapter
):
    from first_trl import student

    found = {"temperature": 0.5, "fitted": 0.5, "interval": [0.4, 0.6], "why": "planted"}
    monkeypatch.setattr(student, "fitted_temperature", lambda *arguments: found)
    path, weights = tiny_recipe(tmp_path, arms={"first": {}}), {}
    options = ["--distill.rounds", "2", "--distill.max_steps", "20", "--distill.use_peft", str(adapter).lower()]
    make_trainer = distill.cache_trainer

    def stopped(recipe, student, folder, caches, first=None):
        if first is not None:
            raise KeyboardInterrupt
        return make_trainer(recipe, student, folder, caches, first)

    for name in ("undisturbed", "interrupted"):
        own = [str(path), *options, "--name", name]
        cache.main(own)
        calibrate.main(own)
        if name == "interrupted":
            monkeypatch.setattr(distill, "cache_trainer", stopped)
            with pytest.raises(SystemExit):
                distill.main(own)
            monkeypatch.setattr(distill, "cache_trainer", make_trainer)
        distill.main(own)
        folder = load_recipe(path, [*options, "--name", name]).run_folder / "students" / "first"
        weights[name] = [file.read_bytes() for file in folder.glob("*.safetensors")]
        first, second = json.loads((folder / "calibration.json").read_text())["rounds"]
        assert (first["steps"], second["steps"], second["value"]) == (20, 2, first["value"] / 2)
        assert not (folder / "round-1").exists()
    assert len(weights["interrupted"]) == 1 and weights["interrupted"] == weights["undisturbed"]


def test_an_existing_model_can_be_calibrated_and_measured_without_a_student(tmp_path):
    path = tiny_recipe(tmp_path, "datasets.train", "distill", arms={})
    recipe, metrics = run_stages(path)
    assert set(metrics["arms"]) == {"teacher", "teacher_recalibrated"}
    assert not (recipe.run_folder / "cache" / "train").exists() and list(jobs(recipe)) == [
        "cache",
        "calibrate",
        "evaluate",
    ]
    teacher = metrics["calibration"]["teacher"]
    assert "cached_rows" not in teacher and teacher["validation"]["num_positions"] == 24
    assert metrics["arms"]["teacher_recalibrated"]["test"]["num_examples"] == 24


def test_a_run_without_recalibration_ends_with_a_report_and_a_line_that_says_so(tmp_path, capsys):
    path = tiny_recipe(tmp_path, calibrate={"method": "none"}, arms={"fine_tuned": {"trainer": "sft"}})
    recipe, metrics = run_stages(path)
    assert calibration_methods(recipe) == ["none"] and metrics["calibration"]["value"] is None
    assert set(metrics["arms"]) == {"teacher", "base", "fine_tuned", "fine_tuned_post_hoc"}
    assert "calibrate: none leaves the teacher's ECE" in capsys.readouterr().err


def test_an_automatic_choice_of_the_family_is_what_the_students_and_the_controls_then_use(tmp_path, capsys):
    arms = {"fine_tuned": {"trainer": "sft"}, "first": {}}
    _, metrics = run_stages(tiny_recipe(tmp_path, calibrate={"method": "auto", "bootstrap": 5}, arms=arms))
    calibration = metrics["calibration"]
    chosen, families = calibration["method"], {"temperature", "probability"}
    assert chosen == calibration["choice"]["method"]
    assert calibration["value"] == calibration["families"][chosen]["value"]
    assert set(calibration["families"]) == set(calibration["choice"]["scores"]) == families
    said = capsys.readouterr().err
    assert f"calibrate: auto chooses {chosen}: lowest ECE on rows" in said and "fine_tuned_post_hoc with " in said
    assert f"teacher_recalibrated with {chosen} {calibration['value']:.3g}" in said


def test_a_smoothing_that_test_rows_do_not_allow_is_left_out_of_the_report_with_its_reason(whole, tmp_path, capsys):
    recipe = whole[0].model_copy(update={"output_dir": str(tmp_path)})
    run = shutil.copytree(whole[0].run_folder, recipe.run_folder)
    calibration = json.loads((run / "calibration.json").read_text())  # as if every row of the caches had allowed it:
    (run / "calibration.json").write_text(json.dumps(calibration | {"method": "label_smoothing", "value": 0.9}))
    evaluate.report(recipe, ["teacher", "base", *recipe.students], {})
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert "teacher_recalibrated" not in metrics["arms"] and "first_post_hoc" in metrics["arms"]
    assert "label smoothing takes 0.9 from the first token" in metrics["omitted"]["teacher_recalibrated"]
    said = capsys.readouterr().err
    assert "evaluate: teacher_recalibrated is left out: label smoothing takes 0.9" in said
    assert "teacher_recalibrated with" not in said and "fine_tuned_post_hoc with" in said
    summary = (run / "report" / "summary.md").read_text()
    assert "`teacher_recalibrated` is left out: label smoothing takes 0.9" in summary


def test_smoothing_takes_no_more_than_every_position_of_both_caches_allows(tmp_path, monkeypatch):
    import first_trl.calibration

    path, seen = tiny_recipe(tmp_path, arms={"smoothed": {"recalibration_method": "label_smoothing"}}), []
    monkeypatch.setattr(first_trl.calibration, "largest_smoothing", lambda rows: seen.append(len(rows)) or 0.01)
    for stage in (cache, calibrate):
        stage.main([str(path)])
    manifests = (tmp_path / f"runs/tiny/cache/{role}/manifest.json" for role in ("train", "validation"))
    positions = [json.loads(file.read_text())["totals"]["supervised_positions"] for file in manifests]
    assert sum(seen) == sum(positions)
    found = json.loads((tmp_path / "runs" / "tiny" / "calibration.json").read_text())["families"]["label_smoothing"]
    assert max(point["value"] for point in found["curve"]) <= 0.01


def test_the_checkpoints_of_a_finished_training_are_removed_when_its_student_is_continued(tmp_path, monkeypatch):
    recipe = load_recipe(tiny_recipe(tmp_path, arms={"first": {}}))
    folder = distill.new_folder(recipe.run_folder / "students" / "first")
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    monkeypatch.setattr(distill, "cache_trainer", pytest.fail)
    monkeypatch.setattr(distill, "close_student", lambda *args: None)
    distill.make_student(recipe, "first", None, continues=True)
    assert [file.name for file in folder.iterdir()] == ["trainer_state.json"]


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """(recipe's path, recipe, metrics) of a run with two seeds for each student."""
    arms = {"fine_tuned": {"trainer": "sft"}, "first": {}}
    path = tiny_recipe(tmp_path_factory.mktemp("seeded"), arms=arms, seeds=[3, 5], push={"hub_model_id": "me/tiny"})
    return path, *run_stages(path)


def test_several_seeds_make_a_student_each_and_one_row_of_the_report(seeded):
    _, recipe, metrics = seeded
    students = ["fine_tuned/seed-3", "fine_tuned/seed-5", "first/seed-3", "first/seed-5"]
    assert recipe.students == students and recipe.seed_of("first/seed-5") == 5
    assert all((recipe.run_folder / "students" / student / "predict.json").is_file() for student in students)
    arms = {"teacher", "teacher_recalibrated", "base", "fine_tuned", "fine_tuned_post_hoc", "first", "first_post_hoc"}
    assert set(metrics["arms"]) == arms and "seeds" not in metrics["arms"]["teacher"]["test"]
    measured = metrics["arms"]["first"]["test"]
    one, other = measured["seeds"]["ece"]["values"]
    assert one != other and measured["ece"] == pytest.approx((one + other) / 2)
    of_choices, of_control = measured["choices"]["seeds"], metrics["arms"]["fine_tuned_post_hoc"]["test"]["seeds"]
    assert len(measured["selective"]["seeds"]) == len(of_choices["ece"]["values"]) == 2
    assert len(of_control["ece"]["values"]) == 2
    table = (recipe.run_folder / "report" / "table.md").read_text()
    assert f"± {100 * measured['seeds']['ece']['spread']:.1f} |" in table
    assert any("trained from 2 seeds" in sentence["text"] for sentence in metrics["summary"])


def test_a_finished_seed_stays_when_another_is_added_or_made_again(seeded, capsys):
    path, recipe, _ = seeded
    distill.main([str(path), "--arm", "first/seed-5"])
    said = capsys.readouterr().err
    assert "distill.first/seed-5: up to date" in said and "seed-3" not in said
    distill.main([str(path), "--arm", "first", "--seeds", "3", "7"])
    said = capsys.readouterr().err
    assert "distill.first/seed-3: up to date" in said and "wrote" in said and "fine_tuned" not in said
    assert (recipe.run_folder / "students" / "first" / "seed-7" / "model.safetensors").is_file()


def test_the_first_seeds_student_is_the_one_that_is_pushed_and_the_card_says_what_its_figures_are(seeded, tmp_path):
    from first_trl.hub.card import prepare_upload_folder

    _, recipe, _ = seeded
    folder = prepare_upload_folder(recipe.run_folder, "first", recipe, tmp_path / "push")
    student = recipe.run_folder / "students" / "first" / "seed-3"
    assert (folder / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    card = (folder / "README.md").read_text()
    assert "means over 2 seeds; the weights here are those of seed 3." in card


def test_one_seed_keeps_the_layout_without_seeds(tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path, arms={"first": {}}, seeds=[4]))
    assert recipe.students == ["first"] and recipe.seed_of("first") == 4
