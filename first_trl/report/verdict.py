"""What the numbers of a report say, in words: sentences computed from `metrics.json`, whoever wins.

The rule is fixed before the numbers are known. An arm is better calibrated than another on a set if the 95 % interval
of their paired difference in ECE excludes 0; otherwise the difference is called noise, however large it looks. The
fair controls are the trained students and what is laid over them; the teacher and the untrained base are shown beside.
"""

from ..cache.arrays import is_memorised

FOCUS = "first"
REFERENCES = ("teacher", "teacher_recalibrated", "base")
ARMS = (*REFERENCES, "fine_tuned", "fine_tuned_post_hoc", "distilled", "distilled_post_hoc", FOCUS)


def order_arms(arms) -> list[str]:
    """The known arms in the order of the report, then the others as they come."""
    return [arm for arm in ARMS if arm in arms] + [arm for arm in arms if arm not in ARMS]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def outcome(difference: dict, lower_is_better: bool) -> str:
    """ "win", "loss" or "noise" of the focus against a control; "unknown" without an interval."""
    if difference["interval"] is None:
        return "unknown"
    low, high = difference["interval"]
    if low <= 0 <= high:
        return "noise"
    return "win" if (high < 0) == lower_is_better else "loss"


def verdict(metrics: dict) -> list[dict]:
    """Sentences for the summary, most important first.

    Args: `metrics` in the form of `metrics.json`, without its summary.
    Returns [{"kind", "set", "text"}]: kind is "headline", "win", "noise", "loss", "warning" or "note"; "set" is the
    data set that the sentence is about, or None. Names stand between backticks.
    """
    arms, differences = metrics["arms"], metrics["differences"]
    if FOCUS in arms:
        sentences = _headline(differences)
        for name in arms[FOCUS]:
            sentences += _one_set(metrics, name)
    else:
        sentences = [_say("headline", f"This run has no `{FOCUS}` arm: the table compares the others only.")]
    return (
        sentences
        + _missing(arms, metrics.get("omitted", {}))
        + _teacher_gap(metrics["calibration"])
        + _limits(metrics)
    )


def _say(kind: str, text: str, name: str | None = None) -> dict:
    return {"kind": kind, "set": name, "text": text}


def _controls(arms) -> list[str]:
    return [arm for arm in order_arms(arms) if arm not in (*REFERENCES, FOCUS)]


def _headline(differences: dict) -> list[dict]:
    """On how many sets the focus is better calibrated than each control, noise counted as not better."""
    controls = _controls({arm: None for by_arm in differences.values() for arm in by_arm})
    if not controls:
        return [_say("headline", f"`{FOCUS}` has no trained control in this run, so nothing can be said for it.")]
    if all(arm["ece"]["interval"] is None for by_arm in differences.values() for arm in by_arm.values()):
        return [_say("headline", "Measured without bootstrap intervals: no difference below can be told from noise.")]
    parts, beaten_everywhere = [], True
    for control in controls:
        outcomes = [outcome(by_arm[control]["ece"], True) for by_arm in differences.values() if control in by_arm]
        wins = outcomes.count("win")
        beaten_everywhere &= wins == len(outcomes)
        parts.append(f"`{control}` on {wins} of {len(outcomes)}")
    text = f"`{FOCUS}` is better calibrated, beyond noise, than {_join(parts)} test {_plural('set', len(differences))}"
    return [_say("headline", text + ("." if beaten_everywhere else "; where it is not, the sentences below say so."))]


def _one_set(metrics: dict, name: str) -> list[dict]:
    """The focus on one set: its own numbers, then each control, then who has the lowest ECE."""
    own = metrics["arms"][FOCUS][name]
    kind = "out of domain" if name in metrics["out_of_domain"] else "in domain"
    text = f"On `{name}` ({kind}, {own['num_examples']:,} examples) `{FOCUS}` has an ECE of {percent(own['ece'])}"
    if "ece" in own["ci"]:
        low, high = own["ci"]["ece"]
        text += f" (95 % interval {100 * low:.1f} to {100 * high:.1f})"
    text += f" at {percent(own['accuracy'])} accuracy."
    if own["ece"] <= own["ece_noise_floor"]["p95"]:
        text += " With this many examples, that cannot be told from perfect calibration."
    sentences = [_say("note", text, name)]
    for control in _controls(metrics["differences"][name]):
        sentences.append(_against(metrics["differences"][name][control], control, name))
    return sentences + _lowest(metrics, name) + _selective(own, name)


def _against(difference: dict, control: str, name: str) -> dict:
    """One sentence on the focus against one control; a loss of accuracy beyond noise makes it a loss."""
    ece, accuracy = difference["ece"], difference["accuracy"]
    results = outcome(ece, True), outcome(accuracy, False)
    text = f"ECE {_compared(ece, results[0])} than `{control}`'s; accuracy {_compared(accuracy, results[1])}."
    if results[0] != "win" and control.endswith("_post_hoc"):
        better = "is better calibrated" if results[0] == "loss" else "is as well calibrated, as far as can be told"
        text += (
            f" `{FOCUS}` does not beat `{control}` here: one scalar, fitted on validation and laid over "
            f"`{control.removesuffix('_post_hoc')}`, {better}."
        )
    kind = "loss" if "loss" in results else results[0]
    return _say("note" if kind == "unknown" else kind, text, name)


def _compared(difference: dict, result: str) -> str:
    points = 100 * difference["difference"]
    text = f"{abs(points):.1f} points {'lower' if points < 0 else 'higher'}"
    if difference["interval"] is None:
        return text + " (no interval, so it may be noise)"
    low, high = (100 * bound for bound in difference["interval"])
    return text + f" ({low:+.1f} to {high:+.1f}{', within noise' if result == 'noise' else ''})"


def _lowest(metrics: dict, name: str) -> list[dict]:
    """Who has the lowest ECE among the students, when it is not the focus."""
    arms = {arm: sets[name] for arm, sets in metrics["arms"].items() if arm not in REFERENCES and name in sets}
    lowest = min(arms, key=lambda arm: arms[arm]["ece"])
    if lowest == FOCUS:
        return []
    ece, accuracy = percent(arms[lowest]["ece"]), percent(arms[lowest]["accuracy"])
    text = f"The lowest ECE of the students is not `{FOCUS}`'s but that of `{lowest}`: {ece} at {accuracy} accuracy."
    result = outcome(metrics["differences"][name][lowest]["ece"], True)
    return [_say(result if result in ("noise", "loss") else "note", text, name)]


def _selective(own: dict, name: str) -> list[dict]:
    """What answering only above the fitted threshold would do."""
    if "selective" not in own:
        return []
    fitted = own["selective"]
    goal = f"{100 * fitted['target_accuracy']:.0f} %"
    if fitted["threshold"] is None:
        return [_say("note", f"No confidence of `{FOCUS}` reaches {goal} accuracy on validation.", name)]
    text = (
        f"Answering only at confidence {fitted['threshold']:.3f} or more, fitted on validation for {goal} accuracy, "
    )
    if fitted["accuracy"] is None:
        return [_say("note", text + "it answers nothing here.", name)]
    answered = f"{percent(fitted['coverage'])} ({round(fitted['coverage'] * own['num_examples']):,} examples)"
    text += f"it answers {answered} and is right {percent(fitted['accuracy'])} of the time."
    return [_say("note", text, name)]


def _missing(arms: dict, omitted: dict[str, str]) -> list[dict]:
    """What the table lacks, and why where an arm was meant to be there."""
    sentences = [
        _say("warning", f"`{arm}` is left out: {reason}. Another `calibrate.method` serves every row.")
        for arm, reason in omitted.items()
    ]
    missing = [f"`{arm}`" for arm in ARMS if arm not in (*arms, *omitted, FOCUS)]
    if missing:
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
    impossible = [
        f"`{arm}` on `{name}` ({values['num_impossible_labels']:,})"
        for arm, sets in metrics["arms"].items()
        for name, values in sets.items()
        if values["num_impossible_labels"]
    ]
    sentences = []
    if impossible:
        text = f"Labels given probability 0, so that the NLL is infinite: {_join(impossible)}."
        sentences.append(_say("warning", text))
    text = "Each arm was trained once: the intervals tell the luck of the test examples, not that of the training."
    seeds = {
        len(v["seeds"]["ece"]["values"]) for sets in metrics["arms"].values() for v in sets.values() if "seeds" in v
    }
    if seeds:
        text = (
            f"Each student was trained from {max(seeds)} seeds: its figures are their means, ± is their standard "
            "deviation, and the intervals tell the luck of the test examples."
        )
    return [*sentences, _say("note", text)]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"
