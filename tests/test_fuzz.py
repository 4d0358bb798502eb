"""Whatever is thrown at what reads files, templates and names: a documented error, and nothing else.

The default suite throws a few hundred cases at each, the slow one 10,000; both count them. A case must not crash, run
code, leave the run folder, or put markup into a page or a token into a log.
"""

import html.parser
import json
import re
import shutil
from collections import defaultdict
from contextlib import suppress
from functools import reduce
from operator import getitem

import datasets
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from first_trl.cache.format import MANIFEST, SEAL, render_manifest
from first_trl.cache.reader import CacheError, open_cache
from first_trl.files import file_digest
from first_trl.hub.card import build_card
from first_trl.log import recording
from first_trl.recipe import RecipeError, load_recipe
from first_trl.redaction import redacted
from first_trl.report.verdict import verdict
from first_trl.report.writing import measure, pages
from first_trl.settings import TaskConfig
from first_trl.templates import render_template
from tests.cache_samples import make_rows, write_cache
from tests.test_card import facts, measured
from tests.test_recipe import RECIPE, make_project
from tests.test_report import CALIBRATION, answers

CASES = [200, pytest.param(10_000, marks=pytest.mark.slow)]
KEYS = st.text(max_size=6)


def nested(leaves):
    return st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=6)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = nested(SCALARS)
WRITTEN = ["${A}", "${A:-x}", "$${", "../x", "{a.b}", "{a[0]}", "json", "a/b", "~", "1e-4", "hf_" + "a" * 20]
VALUES = nested(SCALARS | st.sampled_from(WRITTEN))
MARKUP = """<script> </pre> </script> <!-- --> &lt; ' " ` ``` | --- [a](javascript:b) ![x](y) {{ }} {{7*7}} \\ x
<img/src=x/onerror=y>""".split()
MARKUP += ["\n# h", "\n---\n", "{% raw %}", "<img src=x onerror=y>"]
HOSTILE = st.text(max_size=40) | st.lists(st.sampled_from(MARKUP), max_size=8).map("".join)


def _paths(value, path=()):
    """Every path into the recipe's values."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, (*path, key))


PATHS = [path for path in _paths(yaml.safe_load(RECIPE)) if path]


def _with_value(path: tuple, value) -> str:
    """The recipe with another value at a path."""
    tree = yaml.safe_load(RECIPE)
    reduce(getitem, path[:-1], tree)[path[-1]] = value
    return yaml.safe_dump(tree)


WORDS = ["--", "--sft.learning_rate", "--arms.x.y", "--a.b.c", "--task", "--datasets.test.x", "1", "[", "{a: b}"]


def throw(cases, strategy, act):
    """Run `act` over that many examples; returns how many were run."""
    count = 0

    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(strategy)
    def run(case):
        nonlocal count
        count += 1
        act(case)

    run()
    assert count >= cases
    print(f"{count} cases")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The files that the recipe names, in a folder beside which nothing may appear."""
    return make_project(tmp_path / "project", monkeypatch)


def check_recipe(folder, text, overrides=()):
    (folder / "fuzz.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe("fuzz.yaml", overrides)
    except RecipeError as error:
        assert "hf_aaaa" not in str(error)
        return
    inside = recipe.run_folder.resolve().is_relative_to((folder / recipe.output_dir).resolve())
    assert inside and recipe.run_folder.resolve() != (folder / recipe.output_dir).resolve()
    assert all("/" not in arm and ".." not in arm for arm in [*recipe.arms, *recipe.datasets.test])
    recipe.write_resolved("again.yaml")
    assert load_recipe("again.yaml") == recipe


@pytest.mark.parametrize("cases", CASES)
def test_no_recipe_and_no_override_escapes_its_checks(cases, project):
    edits = st.tuples(st.integers(0, 900), st.integers(0, 5), st.text(max_size=6))
    changed = st.builds(_with_value, st.sampled_from(PATHS), VALUES)
    cut = st.builds(lambda text, edit: text[: edit[0]] + edit[2] + text[edit[0] + edit[1] :], changed, edits)
    texts = st.one_of(changed, cut, st.binary(max_size=80))
    words = st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=4)
    before = {path.name for path in project.parent.iterdir()}
    throw(cases, st.tuples(texts, words), lambda case: check_recipe(project, *case))
    assert {path.name for path in project.parent.iterdir()} == before


PIECES = (
    "{ } {{ }} [ ] . !r !s : :>9 text trap list dict 0 a __class__ __globals__ __init__ {text.__class__} {trap[0]} é"
)
FIELD = st.lists(st.sampled_from([*PIECES.split(), "{dict[a]}", "\n"]), max_size=12).map("".join)


class Watched(str):
    """Text that remembers being asked for anything but its own characters."""

    touched: list[str] = []

    def __getattribute__(self, name):
        Watched.touched.append(name)
        return super().__getattribute__(name)

    def __format__(self, spec):
        Watched.touched.append("__format__")
        return "formatted"


class Trap:
    """An object of a dataset row that must never be looked into."""

    def __getattribute__(self, name):
        if name == "__class__":  # type(x) does not come here; isinstance may
            return object.__getattribute__(self, name)
        Watched.touched.append(name)
        return object.__getattribute__(self, name)


def check_template(template):
    Watched.touched.clear()
    row = {"text": "plain", "list": [Trap(), "x"], "dict": {"0": Trap(), "a": "y"}, "trap": Trap(), "w": Watched("w")}
    try:
        text = render_template(template, row)
    except ValueError:
        text = ""
    assert isinstance(text, str) and "object at" not in text and "<class" not in text and "built-in" not in text
    assert Watched.touched == []
    with suppress(ValueError):  # refused, which is as good as taken: what counts is what was touched
        TaskConfig(prompt=template, completion=" {text}")
    assert Watched.touched == []


@pytest.mark.parametrize("cases", CASES)
def test_no_template_reaches_an_object(cases):
    throw(
        cases, st.one_of(FIELD, st.text(max_size=30), st.text(alphabet="{}[]().!:_ab0", max_size=20)), check_template
    )


def test_a_subclass_of_text_is_refused_before_its_own_formatting_runs():
    Watched.touched.clear()
    with pytest.raises(ValueError, match="Watched"):
        render_template("{text}", {"text": Watched("x")})
    assert "__format__" not in Watched.touched


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "arrow")
        write_cache(folder / "good", make_rows(3))
        shutil.copytree(folder / "good", folder / "bad")
        (outside,) = (folder / "good").glob("*.parquet")
        shutil.copy(outside, folder / "outside.parquet")
        yield folder, (folder / "good" / MANIFEST).read_bytes(), outside.read_bytes()


def check_cache_folder(folder):
    """Open it; whatever it is, the only way to fail is a CacheError, and nothing is read or written elsewhere."""
    try:
        cache = open_cache(folder / "bad")
    except CacheError:
        return
    assert len(list(cache.dataset)) == cache.manifest["totals"]["rows"]
    assert all("/" not in shard["name"] or (folder / "bad" / shard["name"]).resolve().is_relative_to(folder / "bad")
               for shard in cache.manifest["shards"])  # fmt: skip
    shutil.rmtree(folder / "arrow", ignore_errors=True)


PLACES = ["../outside.parquet", "/etc/passwd", "train-000000.parquet", "a/../../outside.parquet", "", ".", "\0"]


@pytest.mark.parametrize("cases", CASES)
def test_no_manifest_is_believed_or_crashes_the_reader(cases, small_cache):
    folder, content, _ = small_cache
    manifest = json.loads(content)
    keys = sorted(manifest)
    sealed = st.tuples(st.sampled_from(keys), JSON)
    inner = st.tuples(st.sampled_from(sorted(manifest["shards"][0])), JSON | st.sampled_from(PLACES))
    edits = st.tuples(st.integers(0, len(content)), st.integers(0, 9), st.binary(max_size=9))

    def act(case):
        kind, change = case
        if kind == "bytes":
            at, length, new = change
            text = content[:at] + new + content[at + length :]
        else:
            altered = json.loads(content)
            (altered if kind == "entry" else altered["shards"][0])[change[0]] = change[1]
            altered.pop(SEAL, None)
            try:
                text = render_manifest(altered)  # sealed anew, as somebody who means harm would
            except ValueError:  # NaN, which no manifest can hold
                text = json.dumps(altered).encode()
        (folder / "bad" / MANIFEST).write_bytes(text)
        check_cache_folder(folder)

    kinds = {"bytes": edits, "entry": sealed, "shard": inner}
    throw(cases, st.one_of(*(st.tuples(st.just(kind), change) for kind, change in kinds.items())), act)
    (folder / "bad" / MANIFEST).write_bytes(content)
    assert len(open_cache(folder / "bad").dataset) == 3


@pytest.mark.parametrize("cases", CASES)
def test_no_parquet_file_crashes_the_reader(cases, small_cache):
    folder, manifest_bytes, content = small_cache
    (shard,) = (folder / "bad").glob("*.parquet")

    def act(edits):
        damaged = bytearray(content)
        for at, new in edits:
            damaged[at : at + len(new)] = new
        shard.write_bytes(damaged)
        manifest = json.loads(manifest_bytes)
        manifest["shards"][0] |= {"bytes": len(damaged), "sha256": file_digest(shard)}  # or it would not be decoded
        manifest.pop(SEAL)
        (folder / "bad" / MANIFEST).write_bytes(render_manifest(manifest))
        check_cache_folder(folder)

    throw(cases, st.lists(st.tuples(st.integers(0, len(content)), st.binary(min_size=1, max_size=8)), min_size=1), act)
    shard.write_bytes(content)
    (folder / "bad" / MANIFEST).write_bytes(manifest_bytes)


class Tags(html.parser.HTMLParser):
    """The tags of a page, with the names of their attributes, in order."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *(name for name, _ in attributes)))

    def handle_comment(self, data):
        self.found.append("comment")


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0\0\0\1\0"


@pytest.mark.parametrize("cases", CASES)
def test_no_name_or_answer_becomes_markup_of_the_report(cases):
    predictions = {"armname": {"setname": answers(40, 1.0)}, "first": {"setname": answers(40, 1.0)}}
    metrics = measure(predictions, CALIBRATION, set(), 10, 0, 0)
    metrics["summary"], metrics["selection"] = verdict(metrics), {"best": "first"}
    content = json.dumps(metrics)

    def render(name):
        inside = json.dumps(name)[1:-1]
        named = json.loads(content.replace("setname", inside).replace("armname", "x" + inside))
        return pages(named, defaultdict(lambda: PNG), {"name": name, "recipe": {"prompt": name}})["index.html"]

    plain = Tags(render("plain")).found
    assert len(plain) > 40

    def act(name):
        found = [tag for tag in Tags(render(name)).found if tag != ("code",)]  # names between backticks are set so
        assert found == [tag for tag in plain if tag != ("code",)]

    throw(cases, HOSTILE.filter(lambda name: not {"armname", "setname"} & {name}), act)


def prose_of(card):
    body = card.split("\n---\n\n", 1)[1]
    return "".join(re.split(r"^(`{3,})(?:\w+)?\n.*?\n\1$", body, flags=re.MULTILINE | re.DOTALL)[::2])


@pytest.mark.parametrize("cases", CASES)
def test_no_name_or_template_becomes_markup_of_the_card(cases):
    def card_of(name):
        sets = {name: {"hub_id": None, "config": None, "split": None, "revision": None, "out_of_domain": False}}
        return build_card(
            facts(
                title=name,
                base_model=name,
                base_is_local=True,
                test_sets=sets,
                figures={name: measured(0.5, 0.1)},
                sentences=[{"kind": "win", "set": "x", "text": f"{name} `x`"}],
                fields={"prompt": name, "row": {}},
                recipe={"task": {"prompt": name, "choices": [name, "b"]}},
            )
        )

    plain = prose_of(card_of("plain"))

    def act(name):
        card = card_of(name)
        ModelCard(card)
        prose = prose_of(card)
        assert prose.count("<") == plain.count("<")
        assert len(re.findall(r"^#", prose, re.M)) == len(re.findall(r"^#", plain, re.M))
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\]\(", prose)) == len(re.findall(r"(?<!\\)(?:\\\\)*\]\(", plain))

    throw(cases, HOSTILE, act)


TOKEN = "hf_" + "aZ09" * 8


@pytest.mark.parametrize("cases", CASES)
def test_no_token_gets_into_a_log(cases, tmp_path):
    around = st.text(max_size=12).map(lambda text: re.sub(r"\w", "-", text))

    def act(case):
        before, after = case
        assert TOKEN not in redacted(before + TOKEN + after)
        with recording(tmp_path / "log.txt", quiet=True):
            print(before + TOKEN + after)

    throw(cases, st.tuples(around, around), act)
    assert TOKEN not in (tmp_path / "log.txt").read_text(encoding="utf-8", errors="replace")
