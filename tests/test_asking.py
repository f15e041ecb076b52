"""How systems are asked: a model that was never told to stop ends with the line, and no answer is computed twice."""
from __future__ import annotations

import json

import pytest
from tiny import tiny_model

from finetune_accel.core import asking
from finetune_accel.core.asking import ask, stops
from finetune_accel.core.kept_answers import KeptAnswers

TRAIN = [{"prompt": f"lamp {i}", "response": f"on {i}"} for i in range(8)]
ITEMS = [{"id": str(i), "group": str(i), "prompt": f"lamp {i}", "response": f"on {i}"} for i in range(6)]
PROMPTS = [[{"role": "user", "content": item["prompt"]}] for item in ITEMS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folders of one tiny model, with its chat template and without."""
    folders = {name: tiny_model(tmp_path_factory.mktemp("models") / name, ["lamp on 1 2 3\n\n"] * 9) for name in ("taught", "plain")}
    for path in (folders["plain"] / "chat_template.jinja", folders["plain"] / "tokenizer_config.json"):
        if path.name.endswith("json"):
            path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}))
        else:
            path.unlink(missing_ok=True)
    return folders


def test_only_a_model_without_template_ends_with_the_line(models):
    assert stops(models["taught"], TRAIN) == [] and stops(models["plain"], TRAIN) == ["\n"]
    assert stops(models["plain"], [*TRAIN, {"prompt": "poem", "response": "a\nb"}]) == [], "answers of several lines must not be cut"


def test_answers_end_where_they_are_told_and_are_kept(models, tmp_path, monkeypatch):
    asked, load = [], asking.load_engine
    monkeypatch.setattr(asking, "load_engine", lambda name, folder: asked.append(name) or load(name, folder))
    free = ask(models["plain"], PROMPTS, ITEMS, "base", "m", "supervised", KeptAnswers(tmp_path, "m", 60))
    letter = next(character for text in free.texts for character in text if text.strip())
    cut = ask(models["plain"], PROMPTS, ITEMS, "base", "m", "supervised", KeptAnswers(tmp_path, "m", 60, stop=[letter]))
    assert cut.texts == [text.split(letter)[0] for text in free.texts] and cut.texts != free.texts
    assert (free.asked, cut.asked, asked) == (6, 6, ["reference", "reference"])
    again = ask(models["plain"], PROMPTS, ITEMS, "base", "m", "supervised", KeptAnswers(tmp_path, "m", 60, stop=[letter]))
    assert (again.texts, again.asked, len(asked)) == (cut.texts, 0, 2)


def test_in_a_chat_a_prompt_without_room_gets_an_empty_answer(models, tmp_path):
    long = [{"role": "user", "content": "lamp " * 2000}]
    answers = ask(models["taught"], [PROMPTS[0], long], ITEMS[:2], "base", "m", "chat", KeptAnswers(tmp_path, "m", 8))
    assert answers.finish[1] == "no room" and answers.texts[1] == "" and answers.finish[0] != "no room"
