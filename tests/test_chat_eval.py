"""Answers of chat models, right or wrong, ended or cut; choice by letter. Who knows scores 1, who guesses chance."""

import json
import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import checkpoint
from conversation import Template, add_template
from dataset import Tokens
from export import NoOptimizer
from infer import Engine
from inference import chat_tasks, letters
from inference.chat_tasks import draw_answers, figures, held_out, make_prompts, puzzle_questions, read_questions, table
from inference.letters import by_letter, open_letters
from inference.puzzles import KINDS, puzzles
from inference.sampling import Sampling
from inference.tasks import log_likelihoods
from model import GPT, GPTConfig
from tokenizer import CharTokenizer

ASCII = CharTokenizer("\n" + "".join(map(chr, range(32, 127))))
TOKENIZER = add_template(ASCII, "minichat")
TEMPLATE = Template(TOKENIZER)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Speaker:
    """In an engine's place: `answer` says what it answers to the last message of the user."""

    def __init__(self, answer, finish="stop"):
        self.answer = answer
        self.finish = finish
        self.samplings = []

    def generate(self, prompts, samplings):
        self.samplings = samplings
        requests = []
        for ids in prompts:
            text = self.answer(TEMPLATE.decode(ids)[-2]["content"])
            requests.append(SimpleNamespace(text=text, tokens=list(text), finish=self.finish))
        return requests


def ask_all(engine, questions, block_size=128, **sampling):
    sampling = Sampling(**{"max_new_tokens": 20, **sampling})
    return draw_answers(engine, make_prompts(TEMPLATE, questions, block_size, sampling.max_new_tokens), sampling)


# -----------------------------------------------------------------------------
# Right or wrong


@pytest.fixture(scope="module")
def asked():
    return puzzle_questions(500, seed=1)


def test_who_knows_the_answers_is_always_right(asked):
    answers = {question.messages[-1]["content"]: question.answer for question in asked}
    knows = Speaker(lambda question: f" {answers[question]}\n")
    result = figures(asked, ask_all(knows, asked))
    assert result["exact"] == result["contains"] == result["ended"] == 1.0 and result["checked"] == 500
    assert {kind: (row["items"], row["exact"]) for kind, row in result["kinds"].items()} == dict.fromkeys(
        ("sum", "spell", "count", "reverse", "copy"), (100, 1.0))


def test_who_guesses_is_right_by_chance(asked):
    """A right answer to another question of the kind: of 100 counts a quarter, 4 standard errors away is 43."""
    rng = random.Random(0)
    kinds = {question.messages[-1]["content"]: question.kind for question in asked}
    others = {}
    for question in asked:
        others.setdefault(question.kind, []).append(question.answer)
    guesses = Speaker(lambda question: rng.choice(others[kinds[question]]))
    result = figures(asked, ask_all(guesses, asked))
    assert 0.08 < result["kinds"]["count"]["exact"] < 0.43
    assert all(row["exact"] <= 0.08 for kind, row in result["kinds"].items() if kind != "count")
    assert result["exact"] < 0.12


def test_an_answer_is_exact_or_contains_what_is_expected():
    questions = [chat_tasks.Question("", [user("a")], "yes"), chat_tasks.Question("", [user("b")], "yes"),
                 chat_tasks.Question("", [user("c")], "yes"), chat_tasks.Question("", [user("d")])]
    speaker = Speaker({"a": "yes ", "b": "I say yes.", "c": "Yes", "d": "no"}.get, "length")
    result = figures(questions, ask_all(speaker, questions))
    assert result["items"] == 4 and result["checked"] == 3 and "kinds" not in result
    assert result["exact"] == pytest.approx(1 / 3) and result["contains"] == pytest.approx(2 / 3)
    assert result["ended"] == 0.0 and result["mean_tokens"] == (4 + 10 + 3 + 2) / 4
    shown = "\n".join(table(result))
    assert re.search(r"ended by themselves +0.0% ± +0.0% +mean length 4.8 tokens", shown)
    assert re.search(r"exact +33.3% ± 33.3%", shown) and "too long" not in shown


# -----------------------------------------------------------------------------
# Prompts


def test_an_answer_gets_the_room_that_the_context_has():
    """A prompt begins as the template says; the oldest turns go, a long last message leaves the answer less room."""
    turns = [user("x" * 40), assistant("y"), user("What?")]
    questions = [chat_tasks.Question("", messages) for messages in ([user("Hi")], turns, [user("z" * 50)],
                                                                    [user("z" * 61)], [user("z" * 62)])]
    prompts = make_prompts(TEMPLATE, questions, 64, 20)
    assert prompts[0] == (TEMPLATE.encode([user("Hi")], reply=True)[0], 20)
    assert prompts[1] == (TEMPLATE.encode(turns[2:], reply=True)[0], 20)
    assert prompts[2].room == 65 - len(prompts[2].ids) < 20
    assert make_prompts(TEMPLATE, questions[1:2], 128, 20)[0].ids == TEMPLATE.encode(turns, reply=True)[0]
    edge = 64 - len(TEMPLATE.encode([user("")], reply=True)[0])  # letters that leave room for one token
    assert make_prompts(TEMPLATE, [chat_tasks.Question("", [user("z" * edge)]), questions[0]], 64, 20)[0].room == 1
    too_long = [chat_tasks.Question("", [user("z" * (edge + 1))], "a"), questions[0]._replace(answer="a")]
    assert make_prompts(TEMPLATE, too_long, 64, 20)[0] is None
    result = figures(too_long, ask_all(Speaker(lambda question: "a"), too_long, 64))
    assert result["too_long"] == 1 and result["exact"] == 0.5 and result["ended"] == 1.0
    assert any("too long to ask" in line for line in table(result))
    with pytest.raises(ValueError, match="every question is longer"):
        make_prompts(TEMPLATE, too_long[:1], 64, 20)
    with pytest.raises(ValueError, match="q.jsonl:3: cannot encode 'é'"):
        make_prompts(TEMPLATE, [chat_tasks.Question("q.jsonl:3", [user("é")])], 64, 20)


def test_each_answer_has_its_own_seed_and_room(asked):
    speaker = Speaker(lambda question: "a")
    ask_all(speaker, asked[:3], seed=7, temperature=0.5)
    assert [sampling.seed for sampling in speaker.samplings] == [7, 8, 9]
    assert all(sampling.temperature == 0.5 for sampling in speaker.samplings)


# -----------------------------------------------------------------------------
# Files of conversations


def test_conversations_of_a_file(tmp_path):
    path = write(tmp_path / "c.jsonl", {"messages": [user("Hi"), assistant(" Hello "), user("Who?"), assistant("Me")]},
                 [user("Hi"), assistant("Hello")], [{"role": "system", "content": "s"}, user("Hi")])
    questions = read_questions(path)
    assert [question.answer for question in questions] == ["Me", "Hello", None]
    assert [[message["content"] for message in question.messages] for question in questions] == [
        ["Hi", " Hello ", "Who?"], ["Hi"], ["s", "Hi"]]
    assert questions[1].where.endswith("c.jsonl:2") and len(read_questions(path, 2)) == 2
    digests = {chat_tasks.questions_sha256(part) for part in (questions, questions[:2], read_questions(path)[:2])}
    assert len(digests) == 2


@pytest.mark.parametrize("line, named", [
    ("{", "c.jsonl:2 is not JSON"), ("3", "c.jsonl:2 is no conversation"), ('{"text": "a"}', "c.jsonl:2"),
    (json.dumps([assistant("a")]), "no user's message"), (json.dumps([user("a"), assistant(" ")]), "empty"),
    (json.dumps([{"role": "robot", "content": "a"}]), "robot"), (json.dumps([user(None)]), "no content"),
    (json.dumps([{"role": "system", "content": "a"}]), "no user's message"),
])
def test_a_line_that_is_no_conversation_is_named(line, named, tmp_path):
    path = write(tmp_path / "c.jsonl", [user("a")])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=named):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no conversations"):
        read_questions(path)


# -----------------------------------------------------------------------------
# Conversations of a dataset


@pytest.fixture
def puzzle_rows(tmp_path, call_script):
    folder = tmp_path / "puzzles"
    code, _, err = call_script("data/puzzles/prepare.py", "--count=40", "--held_out=30", "--block_size=48",
                               f"--kinds={','.join(KINDS)}", f"--out_dir={folder}")
    assert code == 0, err
    return folder


def test_held_out_conversations_are_those_of_the_rows(puzzle_rows):
    """All of them, in the order of the rows, without padding; nothing of the answers."""
    tokens = Tokens(puzzle_rows, "val")
    questions = held_out(tokens, TEMPLATE)
    assert all(len(question.messages) == 1 and question.answer is None for question in questions)
    found = {question.messages[0]["content"] for question in questions}
    assert found == {puzzle.question for puzzle in puzzles(30, "val")}
    assert held_out(tokens, TEMPLATE, 7) == questions[:7]


def test_the_beginning_of_a_conversation():
    system = {"role": "system", "content": "s"}
    talk = [system, user("a"), assistant("b"), user("c")]
    assert chat_tasks.beginning(talk) == talk[:2] and chat_tasks.beginning(talk[1:]) == talk[1:2]
    assert chat_tasks.beginning([system, assistant("b"), user("c")]) == []


# -----------------------------------------------------------------------------
# A model that has learned six conversations, and one that has not


TALKS = [("What is 12 + 34?", "46"), ("Reverse abc.", "cba"), ("Who are you?", "A model."), ("Copy xyz.", "xyz"),
         ("Spell cat.", "c a t"), ("Good night.", "Good night, good night!")]


@pytest.fixture(scope="module")
def models():
    """{name: GPT}: one is trained on TALKS until it knows them."""
    config = GPTConfig(block_size=48, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_embd=48, pos="rope")
    torch.manual_seed(0)
    models = {"knows": GPT(config), "untrained": GPT(config).eval()}
    x = torch.zeros(len(TALKS), 48, dtype=torch.long)
    y = torch.full_like(x, -1)
    for row, (question, answer) in enumerate(TALKS):
        ids, learned = TEMPLATE.encode([user(question), assistant(answer)])
        for at, token in enumerate(ids[:48]):
            x[row, at] = token
            if learned[at]:
                y[row, at - 1] = token
    model = models["knows"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(x, y)[1].backward()
        optimizer.step()
    model.eval()
    return models


def test_a_model_that_has_learned_the_answers_gives_them_and_ends(models):
    questions = [chat_tasks.Question("", [user(question)], answer) for question, answer in TALKS]
    for name, share in (("knows", 1.0), ("untrained", 0.0)):
        engine = Engine(models[name], TOKENIZER)
        answers = ask_all(engine, questions, 48, max_new_tokens=25, temperature=0.0, stop_tokens=TEMPLATE.stops)
        result = figures(questions, answers)
        assert result["exact"] == share, answers
        if name == "knows":
            assert result["ended"] == 1.0 and [answer.tokens for answer in answers] == [len(a) for _, a in TALKS]
        else:
            assert result["ended"] < 0.5


def save_run(folder, model, tokenizer, dataset=""):
    state = {"step": 3, "val_loss": None, "model": vars(model.config), "config": {"dataset": str(dataset)}}
    checkpoint.save(folder, model, NoOptimizer(), state)
    tokenizer.save(folder)
    return f"--out_dir={folder}"


def test_the_script_scores_a_file_and_puzzles(models, tmp_path, call_script):
    run = save_run(tmp_path / "run", models["knows"], TOKENIZER)
    path = write(tmp_path / "c.jsonl", *([user(question), assistant(answer)] for question, answer in TALKS))
    code, out, err = call_script("eval.py", "chat", run, f"--data={path}", "--max_new_tokens=25", "--device=cpu")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["exact"] == result["ended"] == 1.0 and result["checked"] == 6, err
    assert result["temperature"] == 0 and result["step"] == 3 and len(result["items_sha256"]) == 64
    assert "6 conversations of" in out and "greedy" in out and re.search(r"exact +100.0%", out)

    args = ["chat", run, "--task=puzzles", "--limit=20", "--kinds=copy,count", "--max_new_tokens=8", "--device=cpu"]
    code, out, err = call_script("eval.py", *args)
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["kinds"].keys() == {"copy", "count"} and result["items"] == 20, err
    assert result["exact"] < 0.5
    again = json.loads(call_script("eval.py", *args, "--seed=1337")[1].splitlines()[-1])
    other = json.loads(call_script("eval.py", *args, "--seed=1")[1].splitlines()[-1])
    assert again == result and other["items_sha256"] != result["items_sha256"]


def test_the_script_answers_held_out_conversations(models, puzzle_rows, tmp_path, call_script):
    """With the loss of the dataset that the model was trained on."""
    run = save_run(tmp_path / "run", models["untrained"], TOKENIZER, puzzle_rows)
    code, out, err = call_script("eval.py", "chat", run, "--limit=12", "--device=cpu", "--temperature=1")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["items"] == 12 and result["temperature"] == 1 and "exact" not in result, err
    assert 3 < result["loss"] < 7 and result["dataset_sha256"]
    assert "answers to 12 conversations of" in out and "temperature 1" in out


def test_what_cannot_be_evaluated_is_one_line(models, tiny_run, tiny_dataset, tmp_path, call_script):
    run = save_run(tmp_path / "run", models["untrained"], TOKENIZER)
    questions = write(tmp_path / "c.jsonl", [user("a")])
    tokens = save_run(tmp_path / "plain", models["untrained"], TOKENIZER, tiny_dataset)
    for args, named in (
        (["chat", f"--out_dir={tiny_run}"], "no chat template"),
        (["letters", f"--out_dir={tiny_run}"], "no chat template"),
        (["chat", run, "--task=mmlu"], "task='mmlu' is no task of eval.py chat"),
        (["chat", run, "--task=puzzles", f"--data={questions}"], "give one of them"),
        (["chat", run, "--task=puzzles", "--limit=9000"], "too few different sum"),
        (["chat", run, "--task=puzzles", "--kinds=chess"], "kinds=chess"),
        (["chat", run, f"--data={tmp_path}/gone.jsonl"], "gone.jsonl"),
        (["chat", tokens], "another tokenizer"), (["letters", run], "--data=FILE.jsonl, or --task, one of arc_easy"),
        (["letters", run, "--task=puzzles"], "task='puzzles' is not one of arc_easy, arc_challenge, mmlu"),
        (["letters", run, f"--data={questions}"], "c.jsonl:1 is not of the form of"),
    ):
        code, _, err = call_script("eval.py", *args, "--device=cpu")
        assert code == 2 and named in err and len(err.splitlines()) == 1, (args, err)


def test_a_dataset_without_conversations_is_named():
    plain = SimpleNamespace(parts=[(SimpleNamespace(row_size=0), 1)], folder="data/text")
    with pytest.raises(ValueError, match="data/text has no conversations: --dataset names a chat dataset"):
        held_out(plain, TEMPLATE)


# -----------------------------------------------------------------------------
# By letter


QUESTION = {"context": "Which one is hot?", "choices": ["ice", "fire", "snow"], "answer": 1}
HUB = {
    "arc_easy": {"question": "Which one is hot?", "answerKey": "2",
                 "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]}},
    "mmlu": {"question": "Which one is hot?", "choices": ["ice", "fire", "snow"], "answer": 1, "subject": "physics"},
}
HUB["arc_challenge"] = HUB["arc_easy"]
ASKED = ("Multiple Choice question: Which one is hot?\n- ice=A\n- fire=B\n- snow=C\n\n"
         "Respond only with the letter of the correct answer.")


class Stub(nn.Module):
    """A model whose logits after ids (B, T) are what `rule` says of each row: (T, vocab_size)."""

    def __init__(self, rule, block_size=256):
        super().__init__()
        self.rule = rule
        self.config = GPTConfig(vocab_size=TOKENIZER.vocab_size, block_size=block_size, pos="rope")
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, idx):
        assert idx.size(1) <= self.config.block_size
        return torch.stack([self.rule(row) for row in idx]), None


def many_items(tmp_path, count=300):
    rng = random.Random(0)
    rows = []
    for i in range(count):
        options = [f"option {n} of {i}" for n in range(rng.choice((2, 4, 10)))]
        rows.append({"context": f"Question {i}?", "choices": options, "answer": rng.randrange(len(options))})
    return rows, open_letters("", str(write(tmp_path / "q.jsonl", *rows)))


@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "mmlu", ""])
def test_a_row_is_asked_with_lettered_options(task, tmp_path, monkeypatch):
    """From a file, and from the Hub, whose datasets are named. Options that ARC numbers get letters too."""
    row = HUB.get(task, QUESTION)
    item, = open_letters(task, str(write(tmp_path / "q.jsonl", row)))
    assert item.pairs == [(ASKED, "A"), (ASKED, "B"), (ASKED, "C")] and item.answer == 1
    if task:
        asked = []
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
            load_dataset=lambda *args, split: asked.append((*args, split)) or [row] * 5))
        items = open_letters(task, "", 3)
        assert [one.pairs for one in items] == [item.pairs] * 3
        assert asked == [{"arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"), "mmlu": ("cais/mmlu", "all", "test"),
                          "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test")}[task]]


@pytest.mark.parametrize("change", [
    {"context": 3}, {"choices": ["a"]}, {"choices": [*"abcdefghijk"]}, {"choices": "abc"}, {"choices": ["a", " ", "c"]},
    {"answer": 3}, {"answer": True}, {"answer": "B"},
])
def test_a_row_of_another_form_is_named(change, tmp_path):
    path = write(tmp_path / "q.jsonl", QUESTION, {**QUESTION, **change})
    with pytest.raises(ValueError, match=r"q.jsonl:2 is not of the form of .*\(inference/letters.py shows it\)"):
        open_letters("", str(path))
    with pytest.raises(ValueError, match="q.jsonl:1 is not of the form of mmlu"):
        open_letters("mmlu", str(path))


def test_who_knows_the_letters_scores_1_and_who_guesses_scores_chance(tmp_path):
    """Chance is the mean of 1/2, 1/4 and 1/10; of 300 items 4 standard errors are 0.11."""
    rows, items = many_items(tmp_path)
    right = {row["context"]: "ABCDEFGHIJ"[row["answer"]] for row in rows}
    beginning = TEMPLATE.encode([user("")], reply=True)[0][-1]  # the assistant's

    def knows(ids):
        logits = torch.zeros(len(ids), TOKENIZER.vocab_size)
        text = TOKENIZER.decode(ids.tolist())
        letter = right[re.search(r"question: (.*)\n", text)[1]]
        logits[ids == beginning, TOKENIZER.encode(letter)[0]] = 5.0
        return logits

    result = by_letter(Stub(knows, 512), TEMPLATE, items, 16)
    assert result["acc"] == 1.0 and result["cut"] == 0 and result["items"] == 300
    generator = torch.Generator().manual_seed(0)
    guess = Stub(lambda ids: torch.randn(len(ids), TOKENIZER.vocab_size, generator=generator), 512)
    result = by_letter(guess, TEMPLATE, items, 16)
    assert result["chance"] == pytest.approx(sum(1 / len(row["choices"]) for row in rows) / 300)
    assert abs(result["acc"] - result["chance"]) < 0.11
    always = Stub(lambda ids: nn.functional.one_hot(torch.full_like(ids, TOKENIZER.encode("B")[0]),
                                                    TOKENIZER.vocab_size).float(), 512)
    assert by_letter(always, TEMPLATE, items, 16)["acc"] == sum(row["answer"] == 1 for row in rows) / 300


@pytest.mark.parametrize("batch_size, most", [(1, 2**26), (7, 2**26), (7, 40_000)])
def test_batches_and_the_general_way_change_nothing(batch_size, most, tmp_path, monkeypatch):
    """Prompts of unequal length, one longer than the context. A letter of several tokens has their sum."""
    monkeypatch.setattr(letters, "MOST_LOGITS", most)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=100, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_embd=16, pos="rope"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    model.eval()
    prompts = [TEMPLATE.encode([user(text)], reply=True)[0] for text in ("a", "b" * 40, "c" * 150, "d" * 7)]
    choices = [[[5], [6]], [[7], [8], [9]], [[5], [6]], [[1], [2]]]
    found = letters.letter_scores(model, prompts, choices, batch_size)
    for prompt, options, scores in zip(prompts, choices, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt[-100:]]))[0][0, -1].double()
        assert scores == pytest.approx([logits.log_softmax(-1)[option].item() for option, in options], rel=1e-5)
    choices[1] = [[7], [8, 9], [9]]
    general = letters.letter_scores(model, prompts, choices, batch_size)
    assert general[0] == pytest.approx(found[0], rel=1e-5) and general[1][0] == pytest.approx(found[1][0], rel=1e-5)
    (both, _), = log_likelihoods(model, [(prompts[1] + [8, 9], 2)], 1)
    assert general[1][1] == pytest.approx(both, rel=1e-5) and both < found[1][1]


def test_letters_that_cannot_be_asked_are_named(tmp_path):
    items = open_letters("", str(write(tmp_path / "q.jsonl", QUESTION, {**QUESTION, "context": "ü?"})))
    stub = Stub(lambda ids: torch.zeros(len(ids), TOKENIZER.vocab_size), 64)
    with pytest.raises(ValueError, match="q.jsonl:2: cannot encode 'ü'"):
        by_letter(stub, TEMPLATE, items, 4)
    assert by_letter(stub, TEMPLATE, items[:1], 4)["cut"] == 1


def test_the_script_scores_letters(models, tmp_path, call_script):
    run = save_run(tmp_path / "run", models["untrained"], TOKENIZER)
    rows, _ = many_items(tmp_path, 12)
    code, out, err = call_script("eval.py", "letters", run, f"--data={tmp_path / 'q.jsonl'}", "--device=cpu")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["items"] == 12 and 0 < result["chance"] < 1 and len(result["items_sha256"]) == 64, err
    assert re.search(r"acc 0\.\d{4} ± 0\.\d{4}  chance 0\.\d{3}  cut 12", out)
