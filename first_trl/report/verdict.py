"""What the numbers of a report say, in words: sentences computed from `metrics.json`, whoever wins.

The rules are fixed before the numbers are known. First, which student knows more: NLL and accuracy, each student as it
is shipped, under its closing temperature. Then, whether it is calibrated: ECE as trained and as shipped, never alone.
A difference is one only if the 95 % interval of the paired bootstrap excludes 0 (for ECE without its bias,
`metrics.compare`); all else is noise, however large it looks. The model card repeats these sentences.
"""

from ..cache.arrays import is_memorised
from ..constants import ARMS, FOCUS, POST_HOC, REPORT_ARMS
from ..data.rows import describe_lost
from ..metrics import percent

VIEWS = {
    "choices": "the declared choices: confidence is the share of the most probable one among them",
    "vocabulary": "the first token of each answer: confidence is its probability over the whole vocabulary",
    "tokens": "every learned token but forced ones: confidence is its probability over the whole vocabulary",
}


def order_arms(arms) -> list[str]:
    """The known arms in the order of the report, then the others as they come; each with its shipped form after it."""
    names = dict.fromkeys([*ARMS, *(arm.removesuffix(POST_HOC) for arm in arms)])
    return [arm for name in names for arm in (name, name + POST_HOC) if arm in arms]


def trained_arms(arms) -> list[str]:
    """The students among the arms, in the report's order, without their shipped forms."""
    return [arm for arm in order_arms(arms) if arm not in REPORT_ARMS and not arm.endswith(POST_HOC)]


def shipped(arm: str, arms, controls=()) -> str:
    """The name under which an arm's answers are those that `predict` gives.

    `controls` are the students that carry no closing temperature: theirs was fitted for the report alone, so what is
    shipped is the arm as trained.
    """
    carried = all(student.partition("/")[0] != arm for student in controls)
    return arm + POST_HOC if carried and arm + POST_HOC in arms else arm


def measured(metrics: dict, arm: str, name: str) -> dict:
    """An arm's figures on a set, in the view that the report is about; empty if it was not measured."""
    values = metrics["arms"].get(arm, {}).get(name, {})
    return values.get("choices", values) if metrics["view"] == "choices" else values


def outcome(difference: dict | None, lower_is_better: bool) -> str:
    """ "win", "loss" or "noise" of the first of a pair; "unknown" without a difference or an interval."""
    if difference is None or difference["interval"] is None:
        return "unknown"
    low, high = difference["interval"]
    if low <= 0 <= high:
        return "noise"
    return "win" if (high < 0) == lower_is_better else "loss"


def knows_more(difference: dict) -> str:
    """ "win" if NLL or accuracy is better beyond noise and neither is worse; "loss", "mixed", "noise", "unknown"."""
    results = {outcome(difference.get("nll"), True), outcome(difference.get("accuracy"), False)}
    if {"win", "loss"} <= results:
        return "mixed"
    return next((result for result in ("win", "loss", "noise") if result in results), "unknown")


def verdict(metrics: dict, focus: str = FOCUS) -> list[dict]:
    """Sentences on one student, most important first.

    Args:
        metrics: in the form of `metrics.json`, without its verdicts.
        focus: the student that they are about.

    Returns:
        [{"kind", "set", "text"}]: kind is "headline", "win", "noise", "loss", "warning" or "note"; "set" is the data
        set that the sentence is about, or None. Names stand between backticks.
    """
    if focus in metrics["arms"]:
        sentences = _answers(metrics, focus)
        for name in metrics["arms"][focus]:
            sentences += _one_set(metrics, focus, name)
    else:
        sentences = [_say("headline", f"This run has no `{focus}` arm: the table compares the others only.")]
    return sentences + _missing(metrics) + _teacher_gap(metrics["calibration"]) + _limits(metrics)


def _say(kind: str, text: str, name: str | None = None) -> dict:
    return {"kind": kind, "set": name, "text": text}


def _shipped(metrics: dict, arm: str) -> str:
    return shipped(arm, metrics["arms"], metrics.get("controls", ()))


def _against(metrics: dict, focus: str, name: str) -> dict[str, dict]:
    """{trained control as shipped: the paired difference of a student as shipped to it}."""
    pairs = metrics["differences"][name].get(_shipped(metrics, focus), {})
    controls = [_shipped(metrics, arm) for arm in trained_arms(metrics["arms"]) if arm != focus]
    return {control: pairs[control] for control in controls if control in pairs}


def _answers(metrics: dict, focus: str) -> list[dict]:
    """The three answers of the first screen, on the first set: is it calibrated, is it better, what to ship."""
    name = next(iter(metrics["arms"][focus]))
    results = {control: knows_more(pair) for control, pair in _against(metrics, focus, name).items()}
    if not results:
        better = f"No trained control was measured, so nothing can be said for `{focus}`."
    elif set(results.values()) == {"unknown"}:
        better = "Measured without bootstrap intervals, so no difference can be told from noise."
    else:
        words = {
            "win": "knows more than",
            "loss": "knows less than",
            "noise": "cannot be told apart from",
            "mixed": "knows neither more nor less than",
        }
        parts = [
            f"{words[kind]} {_join([f'`{arm}`' for arm, result in results.items() if result == kind])}"
            for kind in words
            if kind in results.values()
        ]
        better = f"On `{name}`, by NLL and accuracy as shipped, `{focus}` {_join(parts)}."
    texts = [f"Is it calibrated? {_calibration(metrics, focus, name)}", f"Is it better? {better}"]
    if best := metrics.get("selection", {}).get("best"):
        figures, on_validation = measured(metrics, _shipped(metrics, best), name), metrics["selection"]["nll"]
        others = [f"`{arm}` {nll:.3f}" for arm, nll in on_validation.items() if arm != best and nll is not None]
        text = f"What should I ship? `{best}` has the lowest NLL on validation as shipped, {on_validation[best]:.3f}"
        text += f" ({_join(others)})" if others else ""
        if figures:
            nll = "infinite" if figures["nll"] is None else f"{figures['nll']:.3f}"
            text += f"; on `{name}` it is {percent(figures['accuracy'])} right at an NLL of {nll}"
        pairs = _against(metrics, best, name) if best in metrics["arms"] else {}
        if ahead := [f"`{arm}`" for arm, pair in pairs.items() if knows_more(pair) == "loss"]:
            text += f", where {_join(ahead)} knows more: validation and test disagree, so look at both"
        texts.append(f"{text}.")
    return [_say("headline", text) for text in texts]


def _calibration(metrics: dict, focus: str, name: str) -> str:
    """A student's ECE on a set as trained and as shipped, and whether it can be told from perfect calibration."""
    own = measured(metrics, _shipped(metrics, focus), name)
    text = f"On `{name}`, `{focus}` has an ECE of {percent(measured(metrics, focus, name)['ece'])} as trained"
    if _shipped(metrics, focus) != focus:
        text += f" and {percent(own['ece'])} as shipped"
    if "ece" in own["ci"]:
        low, high = own["ci"]["ece"]
        text += f" (95 % interval {100 * low:.1f} to {100 * high:.1f})"
    chance = own["ece_noise_floor"]["p95"]
    if own["ece"] <= chance:
        return text + "; with this many examples, that cannot be told from perfect calibration."
    return text + f"; perfect calibration would show at most {percent(chance)} by chance."


def _one_set(metrics: dict, focus: str, name: str) -> list[dict]:
    """A student on one set: its figures, each control, its calibration, and what explains it."""
    figures = measured(metrics, _shipped(metrics, focus), name)
    nll = "" if figures["nll"] is None else f", with an NLL of {figures['nll']:.3f}"
    where = f"{'out of' if name in metrics['out_of_domain'] else 'in'} domain, {figures['num_examples']:,} examples"
    text = f"On `{name}` ({where}), `{focus}` is {percent(figures['accuracy'])} right{nll}."
    sentences = [_say("note", text, name)]
    for control, pair in _against(metrics, focus, name).items():
        text = f"Against `{control}`: accuracy {_compared(pair.get('accuracy'), False, 100, ' points')}"
        text += f"; NLL {_compared(pair.get('nll'), True, 1, '')}"
        text += f"; ECE without its bias {_compared(pair.get('ece_debiased'), True, 100, ' points')}."
        result = knows_more(pair)
        if result != "win" and control == f"fine_tuned{POST_HOC}":
            text += f" `{focus}` does not beat the fine-tuned model under one temperature here."
        sentences.append(_say({"mixed": "noise", "unknown": "note"}.get(result, result), text, name))
    sentences.append(_say("note", _calibration(metrics, focus, name), name))
    errors = {arm: found["ece"] for arm in trained_arms(metrics["arms"]) if (found := measured(metrics, arm, name))}
    lowest = min(errors, key=lambda arm: errors[arm])
    if lowest != focus:
        text = f"As trained, the lowest ECE is that of `{lowest}`, {percent(errors[lowest])}."
        sentences.append(_say("note", text, name))
    return sentences + _diagnosis(metrics, focus, name)


def _compared(difference: dict | None, lower_is_better: bool, scale: float, unit: str) -> str:
    if difference is None:
        return "cannot be compared"
    value, digits = scale * difference["difference"], 1 if scale > 1 else 3
    text = f"{abs(value):.{digits}f}{unit} {'lower' if value < 0 else 'higher'}"
    if difference["interval"] is None:
        return text + " (no interval, so it may be noise)"
    low, high = (scale * bound for bound in difference["interval"])
    noise = ", within noise" if outcome(difference, lower_is_better) == "noise" else ""
    return text + f" ({low:+.{digits}f} to {high:+.{digits}f}{noise})"


def _diagnosis(metrics: dict, focus: str, name: str) -> list[dict]:
    """What teacher and student know explains which way the student's confidence errs as trained."""
    teacher, raw = measured(metrics, "teacher", name), measured(metrics, focus, name)
    if not teacher or name in metrics["out_of_domain"]:
        return []
    pairs, control = metrics["differences"][name], _shipped(metrics, "fine_tuned")
    own = pairs.get(_shipped(metrics, focus), {})
    result = outcome(own.get("teacher", {}).get("accuracy"), False)
    gap, temperature = raw["mean_confidence"] - raw["accuracy"], metrics.get("closing", {}).get(focus, 1.0)
    errs = f"{'over' if gap > 0 else 'under'}-confident by {100 * abs(gap):.1f} points as trained"
    explained = {("win", False): ("more", "soft"), ("loss", True): ("less", "sharp")}.get((result, gap > 0))
    text = f"The teacher is {percent(teacher['accuracy'])} right and `{focus}` {percent(raw['accuracy'])}"
    if explained and temperature != 1:
        knows, targets = explained
        text += f": a student that knows {knows} than its teacher learns targets that are too {targets} for it"
        text += f", and is {errs}"
    else:
        text += f". `{focus}` is {errs}"
    corrects = f"; its closing temperature {temperature:.3g} corrects that" if (temperature - 1) * gap > 0 else ""
    sentences = [_say("note", f"{text}{corrects}.", name)]
    bought, stronger = own.get(control, {}), outcome(pairs.get("teacher", {}).get(control, {}).get("accuracy"), False)
    won = "win" in (outcome(bought.get("accuracy"), False), outcome(bought.get("nll"), True))
    if focus != "fine_tuned" and stronger in ("noise", "loss") and not won:
        labelled = percent(measured(metrics, control, name)["accuracy"])
        text = (
            f"The teacher, {percent(teacher['accuracy'])} right, is not better beyond noise than the student "
            f"fine-tuned on labels, {labelled} right: distilling from it buys nothing here."
        )
        sentences.append(_say("warning", text, name))
    return sentences


def _missing(metrics: dict) -> list[dict]:
    """What the table lacks, and why where an arm was meant to be there."""
    texts = [
        f"`{arm}` is left out: {reason}. Another `calibrate.method` serves every row."
        for arm, reason in metrics.get("omitted", {}).items()
    ]
    for arm, sets in metrics.get("outside", {}).items():
        counts = _join([f"{count:,} rows of `{name}`" for name, count in sets.items()])
        texts.append(
            f"`{arm}`: in {counts} a choice is outside the kept tokens, so the map was applied to the choices alone."
        )
    sentences = [_say("warning", text) for text in texts]
    for name, rows in metrics.get("lost", {}).items():
        if line := describe_lost(name, rows):
            sentences.append(_say("warning", f"{line}.", name if name in metrics["differences"] else None))
    known = (*metrics["arms"], *metrics.get("omitted", {}), FOCUS)
    if missing := [f"`{arm}`" for arm in ARMS if arm not in known]:
        text = f"Not measured in this run: {_join(missing)}. A missing control leaves its question open."
        sentences.append(_say("warning", text))
    return sentences


def _teacher_gap(calibration: dict | None) -> list[dict]:
    """The warning sign of a teacher that labels rows it was trained on."""
    teacher = (calibration or {}).get("teacher")
    if not teacher or "cached_rows" not in teacher:
        return []  # nothing was cached for students to learn from
    cached, validation = teacher["cached_rows"], teacher["validation"]
    right = "has" if cached["accuracy"] is None else f"is {percent(cached['accuracy'])} right at"
    text = (
        f"The teacher {right} a mean confidence of {percent(cached['confidence'])} on the rows that it labels for the "
        f"students{', which have no labels of their own' if cached['accuracy'] is None else ''}, and is "
        f"{percent(validation['accuracy'])} right at {percent(validation['confidence'])} on validation."
    )
    if not is_memorised(cached, validation):
        return [_say("note", text)]
    text += (
        " That is how a teacher looks on rows that it was trained on: a value fitted on validation does not make its "
        "confidence on them true, and the students learn from them. Give `datasets.transfer` rows that it was not "
        "trained on, which need no labels."
    )
    return [_say("warning", text)]


def _limits(metrics: dict) -> list[dict]:
    """What the intervals and the table do not say."""
    figures = {(arm, name): values for arm, sets in metrics["arms"].items() for name, values in sets.items()}
    impossible = [
        f"`{arm}` on `{name}` ({values['num_impossible_labels']:,})"
        for (arm, name), values in figures.items()
        if values["num_impossible_labels"]
    ]
    warnings = [_say("warning", f"Labels given probability 0, so that the NLL is infinite: {_join(impossible)}.")]
    text = "Each arm was trained once: the intervals show the luck of the test examples, not that of the training."
    if seeds := [len(values["seeds"]["ece"]["values"]) for values in figures.values() if "seeds" in values]:
        text = (
            f"Each student was trained from {max(seeds)} seeds: its figures are their means, ± is their standard "
            "deviation, and the intervals show the luck of the test examples."
        )
    return [*(warnings if impossible else []), _say("note", text)]


def _join(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), *parts[-1:]] if len(parts) > 1 else parts)
