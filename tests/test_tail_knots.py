"""A temperature over the whole vocabulary, from a few sums that a cache keeps: exact to 0.01 nats in every stage."""

import json
import math
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml

from first_trl.cache.format import TAIL_POWERS, TAIL_POWERS_COLUMN
from first_trl.cache.reader import open_cache
from first_trl.calibration import recalibrate, search
from first_trl.evaluation import answer_set, recalibrated_answers
from first_trl.head import top_k_log_probs
from first_trl.modeling import load_model
from first_trl.recipe.loading import RecipeError, load_recipe
from first_trl.stages import cache as cache_stage
from first_trl.stages import calibrate as calibrate_stage
from tests.cache_recipe import write_recipe
from tests.cache_samples import make_row, write_cache
from tests.test_trainer import LAYOUTS, trainer_for
from tests.tiny import build_tokenizer

TEMPERATURES = np.exp(np.linspace(math.log(0.5), math.log(4), 25)).tolist()
SHARED = Path(os.environ.get("FIRST_DATA", "../shared"))


def errors(hidden, weight, top_k=5):
    """(largest error of the tail's sum, largest error of a recalibrated row) in nats, over all temperatures."""
    ids, rows, sums = top_k_log_probs(hidden, weight, top_k, tail_powers=TAIL_POWERS)
    logits = hidden.double() @ weight.double().T
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    in_sum, in_row = 0.0, 0.0
    for temperature in TEMPERATURES:
        exact = (logits / temperature).log_softmax(1)
        tail = exact.masked_fill(kept, -math.inf).logsumexp(1, keepdim=True)
        expected = torch.cat([exact.gather(1, ids), tail], 1)
        found = recalibrate(
            rows, "vocabulary_temperature", temperature, tail_power_knots=TAIL_POWERS, tail_power_log_sums=sums
        )
        in_row = max(in_row, (found - expected).abs().max().item())
        # log sum t^(1/T) is log p'_tail - log p'_1 + log t_1 / T, whatever the normalisation
        sum_error = (found[:, -1] - found[:, 0]) - (expected[:, -1] - expected[:, 0])
        in_sum = max(in_sum, sum_error.abs().max().item())
    return in_sum, in_row


def random_logits(kind, positions, vocabulary, generator):
    noise = torch.randn(positions, vocabulary, generator=generator)
    if kind.startswith("normal"):
        return float(kind.removeprefix("normal ")) * noise
    if kind == "heavy":
        return 2 * noise.abs() * noise  # a few tokens far above the others
    gap = float(kind.removeprefix("one token above "))  # the tail's likeliest token, and all others far below it
    logits = noise * 0.5
    logits[:, :5] += gap + 3
    logits[:, 5] = gap
    return logits


KINDS = ["normal 0.5", "normal 2", "normal 5", "heavy", *(f"one token above {gap}" for gap in (5, 10, 15, 20, 30, 45))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tail_at_any_temperature_is_within_a_hundredth_of_a_nat(kind):
    logits = random_logits(kind, 12, 20_000, torch.Generator().manual_seed(0))
    # a head whose logits are these: one hidden unit for each position
    in_sum, in_row = errors(torch.eye(12), logits.T.contiguous())
    assert in_sum <= 0.01 and in_row <= 0.01


def test_the_sharpest_bend_of_a_large_vocabulary_is_within_a_hundredth_of_a_nat():
    """One token, and 200,000 equal ones at a distance: nothing bends more, wherever the bend is put."""
    for distance in np.linspace(5, 50, 46):
        knots = torch.tensor([math.log1p(200_000 * math.exp(-distance * power)) for power in (*TAIL_POWERS, 1.0)])
        row = torch.tensor([[-1.0, knots[-1]]])
        for temperature in TEMPERATURES:
            options = {"tail_power_knots": TAIL_POWERS, "tail_power_log_sums": knots[None, :-1].double()}
            found = recalibrate(row.double(), "vocabulary_temperature", temperature, **options)
            exact = math.log1p(200_000 * math.exp(-distance / temperature))
            assert (found[0, 1] - found[0, 0] - 1 / temperature).item() == pytest.approx(exact, abs=0.0101)


def test_a_vocabulary_that_is_kept_whole_has_no_tail_at_any_temperature():
    hidden, weight = torch.randn(3, 4), torch.randn(6, 4)
    _, rows, sums = top_k_log_probs(hidden, weight, 6, tail_powers=TAIL_POWERS)
    options = {"tail_power_knots": TAIL_POWERS, "tail_power_log_sums": sums}
    found = recalibrate(rows, "vocabulary_temperature", 2.0, **options)
    torch.testing.assert_close(found[:, :-1], (rows[:, :-1] / 2).log_softmax(1))
    assert torch.isneginf(found[:, -1]).all()


def test_the_search_finds_a_planted_temperature_of_the_whole_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3000, 200, generator=generator)
    labels = torch.multinomial((logits / 2).softmax(1), 1, generator=generator)
    ids, rows, sums = top_k_log_probs(logits, torch.eye(200), 5, tail_powers=TAIL_POWERS)
    is_label = ids == labels
    target = torch.where(is_label.any(1), is_label.int().argmax(1), 5)
    result = search(
        rows, target, "vocabulary_temperature", "nll", tail_power_knots=TAIL_POWERS, tail_power_log_sums=sums
    )
    assert result.value == pytest.approx(2.0, rel=0.1)


@pytest.fixture
def knotted(tmp_path, monkeypatch):
    """The folder of a recipe with tail knots, its caches made."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    recipe = write_recipe(
        tmp_path,
        rows=24,
        cache={"tail_knots": True, "top_k": 3},
        calibrate={"method": "vocabulary_temperature", "criterion": "nll", "bootstrap": 0},
        model={"tie_word_embeddings": False},
    )
    cache_stage.main([str(recipe)])
    return recipe


def test_the_column_goes_from_the_teacher_through_the_cache_to_the_calibration(knotted, tmp_path):
    cache = open_cache(tmp_path / "runs" / "tiny" / "cache" / "train")
    assert cache.manifest["tail_powers"] == list(TAIL_POWERS)
    model, row = load_model(str(tmp_path / "teacher")), cache.dataset[5]
    with torch.no_grad():
        logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
    places = [i - 1 for i in range(1, len(row["labels"])) if row["labels"][i] != -100]
    kept = torch.zeros(len(places), logits.shape[1], dtype=torch.bool).scatter(
        1, torch.tensor(row["teacher_ids"]), True
    )
    tail = logits.log_softmax(1)[places].masked_fill(kept, -math.inf)
    exact = torch.stack([(tail * power).logsumexp(1) for power in TAIL_POWERS], 1)
    np.testing.assert_allclose(row[TAIL_POWERS_COLUMN], exact.numpy(), atol=1e-4)
    calibrate_stage.main([str(knotted)])
    calibration = json.loads((tmp_path / "runs" / "tiny" / "calibration.json").read_text())
    assert 0.5 <= calibration["value"] <= 4 and calibration["method"] == "vocabulary_temperature"
    family = calibration["families"]["vocabulary_temperature"]
    assert family["nll_after"] <= family["nll_before"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_student_equal_to_the_tempered_teacher_has_no_loss(knotted, tmp_path, layout):
    student = load_model(str(tmp_path / "teacher"))
    student.lm_head.weight.data /= 2.5  # the teacher at temperature 2.5
    cache = open_cache(tmp_path / "runs" / "tiny" / "cache" / "train")
    settings = {"recalibration_method": "vocabulary_temperature", "recalibration_value": 2.5}
    trainer = trainer_for(student, cache, build_tokenizer(), tmp_path / "out", **settings, **LAYOUTS[layout])
    assert abs(trainer.evaluate()["eval_loss"]) <= 1e-3
    as_it_is = trainer_for(student, cache, build_tokenizer(), tmp_path / "out")
    assert as_it_is.evaluate()["eval_loss"] > 0.05


def test_answers_are_recalibrated_over_the_whole_vocabulary(knotted, tmp_path):
    recipe = load_recipe(knotted)
    model, tokenizer = load_model(str(tmp_path / "teacher")), build_tokenizer()
    rows = datasets.Dataset.from_json(str(tmp_path / "validation.jsonl"), cache_dir=str(tmp_path / "json"))

    def answers(with_knots):
        options = {"top_k": 3, "tokens_per_batch": 256, "tail_knots": with_knots}
        table = answer_set(model, rows, recipe.task, tokenizer, **options)
        return {name: np.array(table[name][:]) for name in table.column_names}

    found = recalibrated_answers(answers(True), "vocabulary_temperature", 2.5)
    model.lm_head.weight.data /= 2.5
    expected = answers(False)
    np.testing.assert_allclose(found["log_probs"], expected["log_probs"], atol=0.01)
    np.testing.assert_allclose(found["label_log_prob"], expected["label_log_prob"], atol=0.01)
    assert (expected["target"] == 3).any()  # labels outside the kept tokens are among them


def test_the_method_is_refused_where_the_cache_keeps_no_knots(tmp_path):
    cases = {
        "calibrate.method": {"calibrate": {"method": "vocabulary_temperature"}},
        "arms.first.recalibration_method": {"arms": {"first": {"recalibration_method": "vocabulary_temperature"}}},
    }
    for number, (place, sections) in enumerate(cases.items()):
        path = write_recipe(tmp_path / str(number), rows=2, **sections)
        with pytest.raises(RecipeError, match="cache.tail_knots: true") as raised:
            load_recipe(path)
        assert place.split(".")[-1] in str(raised.value)
        content = yaml.safe_load(path.read_text())
        content["cache"]["tail_knots"] = True
        path.write_text(yaml.safe_dump(content))
        load_recipe(path)
    with pytest.raises(RecipeError, match="write backend: hf"):
        load_recipe(path, ["--cache.backend", "server", "--cache.server_url", "http://127.0.0.1:1"])


def test_a_trainer_refuses_a_cache_without_knots(tmp_path, make_model, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    tokenizer = build_tokenizer()
    write_cache(tmp_path / "cache", [make_row(i, vocabulary=20) for i in range(4)])
    cache = open_cache(tmp_path / "cache")
    cache.manifest["tokenizer_sha256"] = None
    monkeypatch.setattr("first_trl.trainer.check_cache", lambda *args, **kwargs: None)
    settings = {"recalibration_method": "vocabulary_temperature", "recalibration_value": 2.0}
    with pytest.raises(ValueError, match="has no tail knots: make it again with cache.tail_knots: true"):
        trainer_for(make_model(len(tokenizer)), cache, tokenizer, tmp_path / "out", **settings)


def test_rows_without_the_sums_are_not_written_into_a_cache_with_knots(tmp_path):
    with pytest.raises(ValueError, match=f"{TAIL_POWERS_COLUMN} has shape"):
        write_cache(tmp_path / "cache", [make_row(0)], tail_powers=list(TAIL_POWERS))


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="FIRST_DATA names no folder with models/ and data/")
def test_a_real_model_is_within_a_hundredth_of_a_nat():
    from transformers import AutoTokenizer

    path = SHARED / "models" / "reviews-teacher-base"
    model, tokenizer = load_model(str(path)), AutoTokenizer.from_pretrained(path)
    lines = (SHARED / "data" / "reviews" / "validation.jsonl").read_text().splitlines()[:60]
    with torch.no_grad():
        rows = [tokenizer(f"Review: {json.loads(line)['text']}\nSentiment:", return_tensors="pt") for line in lines]
        hidden = torch.cat([model.base_model(**row).last_hidden_state[0] for row in rows])
    in_sum, in_row = errors(hidden, model.lm_head.weight.detach())
    print(f"{len(hidden)} positions: tail's sum within {in_sum:.5f} nats, rows within {in_row:.5f} nats")
    assert in_sum <= 0.01 and in_row <= 0.01
