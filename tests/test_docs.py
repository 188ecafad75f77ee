"""The README and the pages: the tree names every file, commands are right and run, figures are docs/results'."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_house import FLOOR, ROOMS, ROOT, SCRIPTS, imports, present, read

from ablate import read_experiment
from configurator import read_file, read_keys
from foreign import pretrained
from model import GPT, GPTConfig

README = ROOT / "README.md"
MEASURED = ROOT / "docs" / "measured.md"
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in (
    "data", "training", "chat", "inference", "serving", "evaluating", "measured", "from_nanogpt", "gpu", "scaling",
    "reproduce"))]
FOREIGN = {"chat_sft.py", "nanogpt_bench.py", "local_elastic_agent.py"}  # files of other projects that the pages name


# -----------------------------------------------------------------------------
# What a page says


def section(text, heading):
    """The text under a heading, to the next one of its level or above; "" where there is none."""
    found = re.search(rf"^(#+) {heading}\s*$(.*?)(?=^#{{1,2}} |\Z)", text, re.M | re.S | re.I)
    return found.group(2) if found else ""


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def quoted(text):
    """Code within lines; blocks of code are no part of it."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchor(heading):
    """GitHub's name for a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def tree(text):
    """The lines of the tree, {name: what it is for}. Several names share a line; an indented line continues one."""
    lines = {}
    names = []
    for line in "".join(blocks(section(text, "The tree"), "text")).splitlines():
        match = re.match(r"(\S.*?)  +(.*)", line)
        if match:
            names = match[1].split(", ")
            lines.update({name: match[2] for name in names})
        else:
            lines.update({name: lines[name] + " " + line.strip() for name in names})
    return lines


def in_room(line):
    """Names of a room's files in its line of the tree: those with what they do in parentheses."""
    return set(re.findall(r"(\w+) \(", line))


def unnamed(text, files):
    """What of `files` the tree does not name: files and folders at the root, and files of rooms, which the docstring of
    the room's __init__.py may name instead."""
    lines = tree(text)
    named = {name.removesuffix("/") for name in lines}
    missed = {file.split("/")[0] for file in files} - named
    for file in files:
        room, _, name = file.partition("/")
        if room in ROOMS and name != "__init__.py" and room in named:
            init = ROOT / room / "__init__.py"
            also = read(init) if init.exists() else ""
            stem = name.removesuffix(".py")
            known = in_room(lines[f"{room}/"]) | set(re.findall(r"[\w.]+\.\w+", lines[f"{room}/"]))
            if not known & {stem, name} and not re.search(rf"\b{stem}\b", also):
                missed.add(file)
    return sorted(missed)


def missing(text, root):
    """Files and folders that the tree names and scripts that the rest of the text names, which are not there. In the
    line of a folder, names may be those within it."""
    wanted = []  # (folders where it may lie, name)
    for entry, line in tree(text).items():
        wanted.append(([root], entry))
        folders = [root]
        if entry.endswith("/"):
            folders.append(root / entry)
        for name in re.findall(r"(?<![\w>/])[\w.-][\w./-]*\.(?:py|sh|html|ipynb)\b|[\w.-]+/(?= )", line):
            wanted.append((folders, name))
        if entry.rstrip("/") in ROOMS:
            wanted += [([root / entry], f"{name}.py") for name in in_room(line)]
    names = [name for name in quoted(text) if re.fullmatch(r"[\w./-]+\.(py|sh)", name)]
    wanted += [([root], name) for name in names if name not in FOREIGN and name != "prepare.py"]  # of any dataset
    return sorted({name for folders, name in wanted if not any((folder / name).exists() for folder in folders)})


def broken_links(path):
    """Links of a page to files and headings that are not there."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", read(path)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, heading = target.partition("#")
        there = path.parent / file if file else path
        if not there.exists():
            wrong.append(target)
        elif heading and heading not in map(anchor, re.findall(r"^#+ (.*)$", read(there), re.M)):
            wrong.append(target)
    return wrong


def commands(text):
    """Each simple command in the ```sh blocks, and each `python ...` or `./...` within a line, as words."""
    lines = [token for token in quoted(text) if token.startswith(("python ", "./"))]
    for block in (*blocks(text, "sh"), *lines):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
            lexer.whitespace_split = True
            words = []
            for word in (*lexer, ";"):
                if set(word) <= set(";&|<>"):
                    while words and re.fullmatch(r"\w+=.*", words[0]):
                        words = words[1:]  # VARIABLE=value in front
                    if words:
                        yield words
                    words = []
                else:
                    words.append(word)


def faults(words, root):
    """What is wrong with a command: a file that is not there, a key or a value that is not taken."""
    if words[0].startswith("./") and not os.access(root / words[0], os.X_OK):
        return [f"{words[0]} cannot be run"]
    if words[0] == "./run_all.sh":
        verbs = re.findall(r"^ +([\w-]+)\)", read(root / "run_all.sh"), re.M)
        return [f"{verb} is no verb of it" for verb in words[1:2] if verb not in verbs]
    files = [word for word in words if re.fullmatch(r"[\w./-]+\.py", word)]
    wrong = [f"no file {file}" for file in files if not (root / file).is_file()]
    if wrong or not re.fullmatch(r"(.*/)?python[\d.]*", words[0]) or len(words) < 2 or words[1] not in files:
        return wrong
    also = read_keys(root / "train.py") if words[1] in ("plan.py", "ablate.py") else {}
    keys = {**also, **read_keys(root / words[1])}
    try:
        for file in files[1:]:
            if words[1] == "ablate.py":  # an experiment is no list of keys
                read_experiment(os.fspath(root / file), also)
            else:
                read_file(os.fspath(root / file), keys)
        for word in words[2:]:
            name, equals, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and name != "help":
                if name not in keys:
                    wrong.append(f"no key {word}")
                elif equals:
                    keys[name].check(value, word, parse=True)
    except SystemExit:
        wrong.append("a config or value is refused (the reason is on stderr)")
    return wrong


# -----------------------------------------------------------------------------
# The README and its tree


def test_the_readme_is_short_and_shows_one_picture_at_once():
    lines = read(README).splitlines()
    assert len(lines) <= 160
    pictures = [number for number, line in enumerate(lines) if line.startswith("![")]
    assert len(pictures) == 1 and pictures[0] < 20 and "(docs/loss.png)" in lines[pictures[0]]


def test_the_tree_names_every_file():
    assert not unnamed(read(README), present())


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", read(README)))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_that_a_page_names_is_there(page):
    text = read(page)
    if page.name == "from_nanogpt.md":  # its first column has nanoGPT's files
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    assert not [name for name in missing(text, ROOT) if name != "mine.py"]
    assert not broken_links(page)


def test_the_tree_goes_up_the_floors():
    """It says: each imports only from lines above it."""
    order = [name.removesuffix(".py") for name in tree(read(README)) if ROOT / name in SCRIPTS]
    assert sorted(order) == [path.stem for path in SCRIPTS]
    assert [FLOOR[name] for name in order] == sorted(FLOOR[name] for name in order)
    for i, name in enumerate(order):
        below = imports(ROOT / f"{name}.py") & set(order[i:])
        assert not below, f"{name}.py imports {below}, which the tree has below it"


# -----------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_commands_are_right(page):
    wrong = {" ".join(words): faults(words, ROOT) for words in commands(read(page))}
    assert not {command: why for command, why in wrong.items() if why}


def test_the_pages_have_commands():
    """Negative control of the test above."""
    assert {"./run_all.sh", "python", "torchrun"} <= {words[0] for words in commands(read(README))}
    for page in PAGES:
        if page.name != "inference.md":
            assert len(list(commands(read(page)))) >= 1, page.name


# these have their own tests with less to do
SLOW = ("-m", "bench.py", "ablate.py", "notebooks/execute.py", "tests/beside_llama_cpp.py", "tests/new_tokens.py")
# models that take minutes, or a download
TRAINED = ("chat_shakespeare", "puzzles", "smollm2", "out/10m", "owt_124m.py", "shakespeare_char_demo",
           "out/fp8_")
RUN = ("README", "data", "training", "inference", "evaluating", "measured")  # in this order, in one copy


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    """In a fresh copy, page after page, as they stand; except set-up, what takes long, and what has to be filled in.
    Then the Python of these pages, where what it imports is installed."""
    for name in present():
        if not name.startswith("tests/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    pages = [page for page in PAGES if page.stem in RUN]
    ran = []
    plays = False
    for words in (words for page in pages for words in commands(read(page))):
        to_fill_in = any(re.search(r"(^|=)[A-Z_]+$", word) for word in words)
        needs_model = any(name in word for word in words[2:] for name in TRAINED)
        if words[0] != "python" or words[1] in SLOW or to_fill_in or needs_model or words in ran:
            continue
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, encoding="utf-8")
        if done.returncode and "no text to prepare" in done.stderr:
            pytest.skip("neither the text nor a package index can be reached")
        plays |= "another text than Tiny Shakespeare" in done.stdout
        judged = any(word.startswith("--baseline=") for word in words)  # 1: the machine is slower, not the loss worse
        ended = done.returncode == 0 or judged and done.returncode == 1 and not re.search("WORSE .*loss", done.stdout)
        refused = judged and plays and "another dataset" in done.stderr
        assert ended or refused, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        ran.append(words)
    assert {"data/shakespeare_char/prepare.py", "train.py", "sample.py", "eval.py"} <= {words[1] for words in ran}
    for cell in (cell for page in pages for cell in blocks(read(page), "python") if "datatrove" not in cell):
        done = subprocess.run([sys.executable, "-c", cell], cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, f"{cell}\n{done.stderr}"


# -----------------------------------------------------------------------------
# docs/from_nanogpt.md


@pytest.fixture(scope="module")
def nanogpts_folder(tmp_path_factory, tiny_dataset, tiny_run):
    """A folder with what somebody who comes from nanoGPT has: a run, datasets, a checkpoint, a config file; and a small
    GPT-2 as the Hub gives it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("nanogpt")
    shutil.copytree(tiny_run, folder / "out" / "shakespeare_char_cpu")
    shutil.copytree(tiny_dataset, folder / "data" / "shakespeare_char")
    (folder / "prompt.txt").write_text("To be, or not to be\n" * 20)
    (folder / "mine.py").write_text("learning_rate = 1e-3\n")

    chars = sorted(set("To be, or not to be"))
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=len(chars), bias=False,
                       activation="gelu")
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    (folder / "out-shakespeare").mkdir()
    torch.save({"model": GPT(config).state_dict(), "model_args": {name: getattr(config, name) for name in names},
                "iter_num": 5, "best_val_loss": 2.5}, folder / "out-shakespeare" / "ckpt.pt")

    (folder / "data" / "nanogpt").mkdir()
    for split in ("train", "val"):
        (np.arange(400, dtype=np.uint16) % len(chars)).tofile(folder / "data" / "nanogpt" / f"{split}.bin")
    meta = {"vocab_size": len(chars), "stoi": {c: i for i, c in enumerate(chars)}, "itos": dict(enumerate(chars))}
    (folder / "data" / "nanogpt" / "meta.pkl").write_bytes(pickle.dumps(meta))

    sizes = dict(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=64)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder / "hub")
    return folder


def lines_of_tables(text):
    """The last cell of every row, as code."""
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("| ")]
    return [line for row in rows for line in re.findall(r"`([^`]+)`", row[-2])]


def test_every_row_for_nanogpts_users_has_a_line():
    text = read(ROOT / "docs" / "from_nanogpt.md")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| nanoGPT")]
    assert len(lines_of_tables(text)) == len(rows)
    first = " ".join(row.split("|")[1] for row in rows)
    for name in ("from_pretrained crop_block_size configure_optimizers estimate_mfu get_num_params get_batch "
                 "estimate_loss ckpt.pt meta.pkl max_iters eval_iters always_save_checkpoint generate compile "
                 "wandb_log DDP top_k").split():
        assert name in first, name


def test_the_python_lines_for_nanogpts_users_run(nanogpts_folder, monkeypatch):
    monkeypatch.chdir(nanogpts_folder)
    monkeypatch.setattr(pretrained, "from_hub", lambda name: nanogpts_folder / "hub")
    text = read(ROOT / "docs" / "from_nanogpt.md")
    (setup,) = blocks(text, "python")
    lines = [line for line in lines_of_tables(text) if not line.startswith("python ")]
    assert len(lines) > 15
    names = {}
    for line in (setup, *lines):
        line = line.replace('read_keys("train.py")', f"read_keys({str(ROOT / 'train.py')!r})")
        exec(compile(line, line, "exec"), names)
    assert names["longer"].shape[1] == names["idx"].shape[1] + 8 and 0 < names["mfu"] < 1
    assert names["text"] and names["x"].shape == (4, 16) and names["loss"] > 0


@pytest.mark.slow
def test_the_commands_for_nanogpts_users_run(nanogpts_folder, call_script, monkeypatch):
    """Of train.py each with a small model and few steps."""
    monkeypatch.chdir(nanogpts_folder)
    text = read(ROOT / "docs" / "from_nanogpt.md")
    short = ["--threads=1", "--eval_interval=2", "--warmup_iters=1", "--compile=false"]
    ran = 0
    for number, words in enumerate(map(shlex.split, lines_of_tables(text))):
        if words[0] != "python" or "--dry_run" in words or "gpt2" in words:
            continue  # the Hub's GPT-2 is a Python line, and an experiment has tests of its own
        command = [str(ROOT / word) if word.startswith("config/") else word for word in words[2:]]
        if words[1] == "train.py":
            given = {word.split("=")[0] for word in words}
            less = {"--max_iters": 2, "--eval_iters": 1, "--batch_size": 2, "--block_size": 16, "--device": "cpu"}
            if "--init_from=out-shakespeare/ckpt.pt" in words:
                less["--dataset"] = "data/nanogpt"
            else:
                less |= {"--dataset": "data/shakespeare_char", "--n_layer": 1, "--n_head": 2, "--n_embd": 16}
            command += short + [f"{key}={value}" for key, value in less.items() if key not in given]
            command.append(f"--out_dir=out/{number}")
        code, out, err = call_script(words[1], *command)
        assert code == 0, f"{shlex.join(words)}\n{out}\n{err}"
        ran += 1
    assert ran > 15


# -----------------------------------------------------------------------------
# Figures


def above(text, name):
    """The rows of a page that link to results/NAME, and the commands of the block above them."""
    found = re.split(r"^```sh\n", text, flags=re.M)[1:]  # each begins with a block
    parts = [part for part in found if f"results/{name})" in part]
    assert len(parts) == 1, f"{name} is under {len(parts)} blocks of commands"
    rows = [line for line in parts[0].splitlines() if line.startswith("|") and f"results/{name})" in line]
    return rows, list(commands("```sh\n" + parts[0].split("\n```", 1)[0] + "\n```\n"))


def made(words, result):
    """Whether a command gives the settings that a result was made with."""
    if result["benchmark"] == "layouts":
        return words[-1] == "tests/layouts.py" and f"--nproc_per_node={result['ranks']}" in words
    if words[1:3] != ["bench.py", result["benchmark"]]:
        return False
    keys = read_keys(ROOT / "bench.py")
    values = {name: key.default for name, key in keys.items() if name in ("config", "seeds", "processes", "overrides")}
    for word in words[3:]:
        name, _, value = word.removeprefix("--").partition("=")
        values[name] = keys[name].check(value, word, parse=True)
    held = {"processes": 1, **result["settings"]}
    if held.get("device") == "auto":  # on a machine without a GPU
        held["device"] = values.get("device")
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return all(held[name] == value for name, value in plain.items())


def test_the_figures_are_those_of_the_results():
    """Each figure stands in its table of docs/measured.md as in docs/results, under the command it came from."""
    results = sorted((ROOT / "docs" / "results").glob("*.txt"))
    results = [path for path in results if not path.name.startswith("gpu_")]  # what tests/on_gpu.sh says of a card
    assert results
    for path in results:
        result = json.loads(read(path).splitlines()[-1])
        rows, block = above(read(MEASURED), path.name)
        assert rows, f"{path.name} is in no row"
        assert sum(made(words, result) for words in block) == 1, f"{path.name}: its command does not stand above it"
        holds = {"train": holds_train, "data": holds_data, "loader": holds_loader, "infer": holds_infer,
                 "activations": holds_activations, "layouts": holds_layouts, "scaling": holds_scaling,
                 "zero": holds_zero, "monitor": holds_monitor, "turns": holds_turns, "sft": holds_sft,
                 "serve": holds_serve}
        holds[result["benchmark"]](rows, result)
        runs = result.get("runs") or [result["machine"]]
        assert not any(run["dirty"] for run in runs) and len({run["commit"] for run in runs}) == 1


def test_the_figures_of_a_step_are_those_of_its_log():
    """It is no .txt: its checkout had an untracked link, so it calls itself dirty."""
    text = read(ROOT / "docs" / "results" / "step.log")
    result = json.loads(text.splitlines()[-1])
    rows, block = above(read(MEASURED), "step.log")
    assert sum(made(words, result) for words in block) == 1
    assert text.startswith("$ python bench.py step ")
    holds_step(rows, result)


def test_every_row_links_to_its_result():
    for line in read(MEASURED).splitlines():
        if re.match(r"\|.*\d", line) and not line.startswith(("| weights", "| model |")):
            assert re.search(r"\(results/[\w.]+\)", line), line


def unproven(line):
    """Figures of a row of the README that do not stand in the section of docs/measured.md that it links to."""
    heading = re.search(r"docs/measured\.md#([\w-]+)", line)[1]
    parts = re.split(r"^## ", read(MEASURED), flags=re.M)
    proof = next(part for part in parts if anchor(part.splitlines()[0]) == heading)
    return [figure for figure in re.findall(r"\d+\.\d+(?:e-\d+)?", line) if figure not in proof]


def test_the_readmes_figures_are_those_of_the_pages():
    rows = [line for line in section(read(README), "How good it is").splitlines() if "](docs/measured.md#" in line]
    rows = [line for line in rows if line.startswith("|")]
    assert len(rows) == 5
    for line in rows:
        assert not unproven(line), line
    assert unproven(rows[0].replace("1.8555", "1.8742")) == ["1.8742"]


def holds_train(rows, result):
    loss, seconds, n = result["val_loss"], result["train_s"], len(result["runs"])
    assert len(rows) == 1 and rows[0].startswith(f"| `{result['settings']['config']}`")
    spread = f" ± {loss['stdev']:.4f}" if n > 1 else ""  # of one run there is none
    assert f"| {loss['mean']:.4f}{spread} ({n}) |" in rows[0]
    assert f"| {seconds['mean']:.1f} s |" in rows[0]
    if rows[0].count("|") == 7:  # the table of many processes has two columns more
        speed = sum(run["tok_per_s"] for run in result["runs"]) / n
        assert f"| {speed:,.0f} | {result['settings']['processes']} |" in rows[0]


def holds_step(rows, result):
    """A row for each form: speed and memory beside nanoGPT's; and one for each kind of operation."""
    for row in result["rows"]:
        speeds = f"{row['tok_per_s']:.1f} | {row['nanogpt_tok_per_s']:.1f} | {row['ratio']:.2f}"
        figures = f"| {row['weights']} | {speeds} | {row['mem_gb']:.2f} | {row['nanogpt_mem_gb']:.2f} |"
        assert any(line.startswith(figures) for line in rows), figures
    for row in result["operations"]:
        figures = f"| {row['weights']} | {row['kind']} | {row['share']:.1f} | {row['ms']:.0f} |"
        assert any(line.startswith(figures) for line in rows), figures


def holds_data(rows, result):
    """A row for each case that the table has, and one for the memory by size of the corpus."""
    cases = {row["what"]: row for row in result["rows"]}
    shown = [row for line in rows for what, row in cases.items() if line.startswith(f"| {what} |")]
    assert len(shown) >= 3
    for row in shown:
        ratio = result["ratios"].get(row["what"], 1.0)
        figures = f"| {row['what']} | {row['MB/s']:.1f} MB/s | {ratio:.2f} | {row['peak MB']:.0f} MB |"
        assert any(line.startswith(figures) for line in rows), figures
    memory = ", ".join(f"{row['peak MB']:.0f} MB for {row['corpus MB']} MB" for row in result["memory"])
    assert any(memory in line for line in rows), memory


def holds_loader(rows, result):
    speed = result["tokens_per_s"]
    figures = f"| {speed['minichat'] / 1e6:.2f} | {speed['nanoGPT'] / 1e6:.2f} | {result['waiting']:.2%} |"
    assert rows[0].startswith(f"| `{result['settings']['config']}` {figures}"), figures


def holds_infer(rows, result):
    """A row for each form and number of heads: tokens/s by batch and prompt, then what is beside it."""
    for other in result["others"]:
        which = ("model", "form", "kv_heads")
        ours = [row for row in result["rows"] if all(row.get(key) == other.get(key) for key in which)]
        figures = [f"{row['tok_per_s']:.1f}" for row in ours]
        if "gain" in other:
            figures.append(f"{other['gain']:.2f}")
        if "linear_bandwidth" in other:
            figures += [f"{other['linear_bandwidth']:.2f}", f"{other['linear_share']:.2f}"]
        beside = [key for key in sorted(other) if key.startswith(("llama", "plain, prompt", "transformers"))]
        if "model" not in other:
            beside = [key for key in beside if not key.endswith(", first ms")]
        figures += [f"{other[key]:.1f}" for key in beside]
        named = f"{other['model']}, " if "model" in other else ""
        line = f"| {named}{other['form']}, {other['kv_heads']} heads | " + " | ".join(figures) + " |"
        assert any(row.startswith(line) for row in rows), line


def holds_activations(rows, result):
    for row in result["rows"]:
        line = (f"| {row['checkpointing']} | {row['activations_mb']:.0f} MB | {row['of_none_%']:.0f}% | "
                f"{row['step_s']:.1f} s |")
        assert any(found.startswith(line) for found in rows), line
    assert len({row["gradients"] for row in result["rows"]}) == 1


def holds_layouts(rows, result):
    """How far the layouts are from one process at most, by what is compared."""
    right = [row for row in result["rows"] if row["layout"] != "wrong scale"]
    most = [max(row[key] for row in right) for key in ("grads", "losses", "norms", "state", "val")]
    line = f"| {result['ranks']} | {len(right)} | " + " | ".join(f"{figure:.1e}" for figure in most) + " |"
    assert any(found.startswith(line) for found in rows), line
    assert all(row["same start"] and row["scattered"] for row in right)


def cells(row, columns):
    """A row as bench.py prints it."""
    def cell(value):
        if value is None:
            return "n/a"
        return f"{value:.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
    return "| " + " | ".join(cell(row[column]) for column in columns.split()) + " |"


def holds_scaling(rows, result):
    """Each row of the table is one of the grid, and each number of processes has a row."""
    columns = ("length batch processes micro_batches tok_per_s mfu_% peak_mb step_ms data_ms forward_ms backward_ms "
               "comm_ms optim_ms strong_% weak_%")
    shown = [row for row in result["rows"] if any(line.startswith(cells(row, columns)) for line in rows)]
    assert len(shown) == len(rows), "a row that is not the grid's"
    assert {row["processes"] for row in shown} == {row["processes"] for row in result["rows"]}


def holds_zero(rows, result):
    """At the optimizer's step each rank holds what theory says, within a twentieth."""
    columns = "processes layout weights_mb gradients_mb optimizer_mb theory_mb of_theory_% peak_mb plan_mb"
    for row in result["rows"]:
        assert any(line.startswith(cells(row, columns)) for line in rows), cells(row, columns)
        assert row["of_theory_%"] == pytest.approx(100, abs=5)


def holds_serve(rows, result):
    """Each part that was measured has its rows."""
    assert not result["failed"]
    for line in serve_lines(result):
        assert any(row.startswith(line) for row in rows), line


def serve_lines(result):
    """The rows of docs/measured.md for the parts of one run of bench.py serve."""
    model = result["model"]
    lines = []
    for row in result.get("closed", []):
        columns = [row[name] for name in ("http_tok_per_s", "engine_tok_per_s", "http_%", "gain")]
        lines.append(f"| {model} | {row['clients']} | " + " | ".join(f"{value:.1f}" for value in columns) + " |")

    def add(name, *values):
        lines.append(f"| {model}: {name} | " + " / ".join(values) + " |")

    def percentiles(figures):
        return [f"{figures[name]:.1f}" for name in ("p50", "p95", "p99", "max")]

    if idle := result.get("idle"):
        add("first token of single requests, over HTTP", *percentiles(idle["first_ms"]))
        add("first token of single requests, engine alone", *percentiles(idle["engine_first_ms"]))
    if load := result.get("load"):
        add("first token at 70% load", *percentiles(load["first_ms"]))
        add("gap between events at 70% load", *percentiles(load["gap_ms"]))
    if overload := result.get("overload"):
        add("refusal (429) at ten times the load", *percentiles(overload["refused_ms"]))
        add("`/health` at ten times the load", *percentiles(overload["health_ms"]))
        add("answers at ten times the load, % of full speed", f"{overload['of_full_%']:.1f}")
    if mixed := result.get("mixed"):
        add("mixed requests, of which lost", f"{mixed['calls']:,}", str(mixed["lost"]))
        add("whole texts, of which not the engine's own", f"{mixed['texts']:,}", str(mixed["wrong_texts"]))
        add("free blocks after them, of all", str(mixed["blocks_free"]), str(mixed["blocks_total"]))
        add("memory after them, growth, in MB", f"{mixed['memory_mb']:.1f}", f"{mixed['memory_growth_mb']:.1f}")
    if aborts := result.get("aborts"):
        add("clients that left, of all; free blocks, of all", f"{aborts['left']:,}", f"{aborts['calls']:,}",
            str(aborts["blocks_free"]), str(aborts["blocks_total"]))
    if kill := result.get("kill"):
        add("streams cut by kill -9, of all; files changed", *(str(kill[name]) for name in
                                                              ("cut", "streams", "files_changed")))
    for row in result.get("peers", []):
        if row["tok_per_s"] is not None:
            lines.append(f"| {row['server']} | {row['clients']} | {row['tok_per_s']:.1f} | "
                         f"{row['latency_p50_ms']:.0f} ms |")
    return lines


def holds_monitor(rows, result):
    """What logging and probes take of a step is below 2%."""
    without, configured = (row["median_ms"] for row in result["rows"])
    assert f"| {without:.1f} ms | {configured:.1f} ms | {result['share']:.2%} |" in rows[0]
    assert result["share"] < 0.02


def holds_turns(rows, result):
    """With 800 tokens of history the first token comes in at most a third of the time."""
    for row in result["rows"]:
        figures = (f"| {row['form']} | {row['history']} | {row['cold_ms']:.0f} ms | {row['warm_ms']:.0f} ms | "
                   f"{row['warm_share']:.2f} |")
        assert any(line.startswith(figures) for line in rows), figures
        assert row["history"] < 800 or row["warm_share"] < 1 / 3


def holds_sft(rows, result):
    for row in result["rows"]:
        figures = f"| {row['trainer']}, {row['form']} | {row['tok_per_s']:.0f} |"
        assert any(line.startswith(figures) for line in rows), figures


def test_figures_of_a_log_stand_in_it():
    """A log begins with its command, and may have more of them. They stand above its rows, whose figures are lines of
    the log."""
    logs = sorted(path for kind in ("chat", "quant") for path in (ROOT / "docs" / "results").glob(f"{kind}_*.log"))
    assert logs
    for path in logs:
        text = read(path)
        assert text.startswith("$ ")
        rows, block = above(read(MEASURED), path.name)
        for line in text.splitlines():
            if line.startswith("$ "):
                assert shlex.split(line.removeprefix("$ ")) in block, line
        for row in rows:
            figures = re.findall(r"\d+\.\d+|\b\d+ of (?:these )?\d+", row.split("[output]")[0])
            assert figures and not [figure for figure in figures if figure not in text], row


def test_a_wrong_figure_is_seen():
    names = ("tok_per_s", "peak_mb", "step_ms", "data_ms", "forward_ms", "backward_ms", "optim_ms")
    numbers = dict.fromkeys(names, 1.0)
    grid = {**numbers, "length": 64, "batch": 4, "mfu_%": None, "comm_ms": None, "micro_batches": 2}
    grid = {"rows": [{**grid, "processes": n, "strong_%": 100.0, "weak_%": None} for n in (1, 2)]}
    lines = [f"| 64 | 4 | {n} | 2 | 1.0 | n/a | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | n/a | 1.0 | 100.0 | n/a | [x](y) |"
             for n in (1, 2)]
    holds_scaling(lines, grid)
    for wrong in (lines[:1], [*lines, lines[0].replace("100.0", "101.0")]):
        with pytest.raises(AssertionError):
            holds_scaling(wrong, grid)
    parts = dict.fromkeys(("weights_mb", "gradients_mb", "optimizer_mb", "theory_mb", "peak_mb", "plan_mb"), 2.0)
    row = {"processes": 2, "layout": "ZeRO-1", **parts, "of_theory_%": 99.0}
    line = "| 2 | ZeRO-1 | 2.0 | 2.0 | 2.0 | 2.0 | 99.0 | 2.0 | 2.0 | [x](y) |"
    holds_zero([line], {"rows": [row]})
    for wrong, of_theory in ((line.replace("ZeRO-1", "ZeRO-2"), 99.0), (line.replace("99.0", "94.0"), 94.0)):
        with pytest.raises(AssertionError):
            holds_zero([wrong], {"rows": [{**row, "of_theory_%": of_theory}]})


EXAMPLE = """
# x
`missing.py` is run with `python train.py --nothing=1`.
## The tree
```text
train.py           trains, writes metrics.jsonl
config/            shakespeare_char_cpu.py, none.py
training/          guard (bad steps), ghost (none)
                   and probe (inside)
gone.py, LICENSE   some/ and tests/test_gone.py
```
## Use
```sh
./run_all.sh demo && python train.py config/shakespeare_char_cpu.py \\
    --max_iters=10   # a short one
THREADS=1 python train.py --learning_rate=fast
python train.py --learnin_rate=1
python train.py config/gone.py
./run_all.sh fly; ./gone.sh
echo "a; b" | python sample.py --start=- --num_samples 3
```
"""


def test_the_tests_of_pages_see_what_is_wrong(tmp_path):
    files = ["train.py", "config/a.py", "LICENSE", "model.py", "tests/test_model.py", ".ci/run", "training/guard.py",
             "training/probe.py", "training/nothing.py"]
    assert unnamed(EXAMPLE, files) == [".ci", "model.py", "tests", "training/nothing.py"]
    assert missing(EXAMPLE, ROOT) == ["ghost.py", "gone.py", "missing.py", "none.py", "some/", "tests/test_gone.py"]
    found = {" ".join(words): faults(words, ROOT) for words in commands(EXAMPLE)}
    assert [command for command, why in found.items() if not why] == [
        "./run_all.sh demo",
        "python train.py config/shakespeare_char_cpu.py --max_iters=10",
        "echo a; b",
        "python sample.py --start=- --num_samples 3",
    ]
    assert len(found) == 10 and found["python train.py --learnin_rate=1"] == ["no key --learnin_rate=1"]

    page = tmp_path / "page.md"
    page.write_text("# One thing\n[a](page.md#one-thing) [b](#two) [c](gone.md) [d](https://example.org)\n")
    assert broken_links(page) == ["#two", "gone.md"]
    table = "```sh\npython bench.py train --seeds=1\n```\n| a | [x](results/a.txt) |\n"
    rows, block = above(table, "a.txt")
    assert rows == ["| a | [x](results/a.txt) |"]
    settings = {"config": "config/shakespeare_char_cpu.py", "seeds": [1], "overrides": []}
    assert made(block[0], {"benchmark": "train", "settings": settings})
    assert not made(block[0], {"benchmark": "train", "settings": {**settings, "overrides": ["dtype=float32"]}})
    assert not made(block[0], {"benchmark": "train", "settings": {**settings, "seeds": [2]}})
