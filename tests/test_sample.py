"""Text from a checkpoint, as a user gets it from the command line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import infer
from export import NoOptimizer
from model import GPT, GPTConfig
from tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parents[1]
CUT = "\n---------------\n"  # after each sample


@pytest.fixture
def sample(tiny_run, call_script):
    """sample(...) -> (exit code, stdout, stderr) on the tiny run, 30 tokens from "To be" unless told otherwise."""

    def sample(*args, **kwargs):
        usual = [f"--out_dir={tiny_run}", "--num_samples=1", "--max_new_tokens=30", "--start=To be", "--device=cpu"]
        return call_script("sample.py", *usual, *args, **kwargs)

    return sample


def test_greedy_is_the_same_on_every_run_and_in_another_process(tiny_run, run_script, sample):
    args = ["--temperature=0", "--max_new_tokens=100"]
    code, out, _ = sample(*args)
    assert code == 0 and out.startswith("To be") and out.endswith(CUT) and len(out) > 60
    assert sample(*args, "--seed=99")[1] == out
    done = run_script("sample.py", f"--out_dir={tiny_run}", "--num_samples=1", "--start=To be", *args)
    assert done.returncode == 0 and done.stdout == out
    assert "cpu (no GPU found)" in done.stderr or sys.platform == "darwin"  # CUDA is hidden, and not missed


def test_the_seed_decides(sample):
    texts = [sample(f"--seed={seed}")[1] for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_each_sample_has_the_next_seed(sample):
    together = sample("--seed=5", "--num_samples=3")[1]
    assert together == "".join(sample(f"--seed={seed}")[1] for seed in (5, 6, 7))
    assert len(set(together.split(CUT)[:-1])) == 3


def test_the_ways_to_choose(sample):
    """top_k=1 is greedy, and so is a small enough top_p; a temperature changes what is drawn."""
    greedy = sample("--temperature=0")[1]
    assert sample("--top_k=1", "--temperature=5")[1] == greedy
    assert sample("--top_p=0.001")[1] == greedy
    hot, cold = sample("--temperature=3", "--top_k=0")[1], sample("--temperature=0.3", "--top_k=0")[1]
    assert hot != cold
    assert sample("--top_k=3", "--top_p=0.9")[0] == 0


def test_the_prompt_comes_from_the_command_line_a_file_or_stdin(sample, tmp_path):
    (tmp_path / "prompt.txt").write_text("not to be", encoding="utf-8")
    said = sample("--start=not to be")[1]
    assert said.startswith("not to be") and 20 < len(said.removesuffix(CUT)) <= len("not to be") + 30
    assert sample(f"--start=FILE:{tmp_path / 'prompt.txt'}")[1] == said
    assert sample("--start=-", stdin=b"not to be")[1] == said
    assert sample("--start=-", stdin=b"not to be\n")[1] == said  # what echo adds is not part of it
    assert sample("--start=-", stdin=b"not to be\n\n")[1].startswith("not to be\n")


def test_an_empty_prompt_is_the_beginning_of_a_text(sample):
    for how in (["--start="], ["--start=-"]):
        code, out, _ = sample(*how)
        assert code == 0 and len(out.removesuffix(CUT)) > 20


def test_it_says_what_it_reads(sample, tiny_run):
    _, out, err = sample("--ckpt=3")
    where, device, speed = err.splitlines()
    assert re.fullmatch(rf"{re.escape(str(tiny_run / 'ckpt' / 'step_00000003'))}: step 3, val loss \d\.\d{{4}}", where)
    assert re.fullmatch(r"cpu \(asked for\), (float32|bfloat16) \(.+\)", device)
    assert speed.endswith("tokens/s") and "step" not in out
    assert "step 6" in sample()[2] and "step 6" in sample("--ckpt=latest")[2]


def test_a_damaged_latest_is_passed_over(sample, tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "ckpt" / "step_00000006" / "model.safetensors").write_bytes(b"no")
    code, out, err = sample(f"--out_dir={run}")
    assert code == 0 and out == sample("--ckpt=3")[1]  # the warning is not in the text
    assert "step_00000006" in err.splitlines()[0] and "step 3" in err.splitlines()[1]


@pytest.fixture
def broken(tiny_run, tmp_path, monkeypatch):
    """Works in a folder with runs that cannot be used, and prompts."""
    (tmp_path / "empty").mkdir()
    half = Path(shutil.copytree(tiny_run, tmp_path / "half"))
    shutil.rmtree(half / "ckpt" / "step_00000003")
    (half / "ckpt" / "step_00000006" / "state.json").unlink()
    untold = Path(shutil.copytree(tiny_run, tmp_path / "untold"))
    (untold / "tokenizer.json").unlink()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "argument, named",
    [("--temperature=-1", "temperature=-1"), ("--temperature=nan", "temperature=nan"), ("--top_k=-3", "top_k=-3"),
     ("--top_p=0", "top_p=0"), ("--top_p=1.5", "top_p=1.5"), ("--num_samples=0", "num_samples"),
     ("--max_new_tokens=0", "max_new_tokens"), ("--start=To bé", "'é'"), ("--start=FILE:none.txt", "none.txt"),
     ("--start=FILE:latin.txt", "latin.txt"), ("--start=FILE:empty", "empty"), ("--out_dir=empty", "empty"),
     ("--out_dir=missing", "missing"), ("--out_dir=half", "half"), ("--out_dir=half/ckpt/step_00000006", "half"),
     ("--out_dir=untold", "tokenizer"), ("--ckpt=nonsense", "nonsense"), ("--ckpt=5", "5"),
     ("--init_from=gpt2", "init_from=gpt2"), ("--device=tpu", "tpu"), ("--dtype=int8", "int8"),
     ("--temprature=1", "--temperature"), ("--seed=one", "seed")],
)
def test_errors_are_named_before_anything_is_written(sample, broken, argument, named):
    code, out, err = sample(argument)
    assert code == 2 and out == ""
    *said, last = err.splitlines()
    assert last.startswith("error: ") and named in last
    assert all(line.startswith("warning: ") for line in said)  # a checkpoint that was passed over


def test_stdin_that_is_not_text(sample):
    code, out, err = sample("--start=-", stdin=b"\xff\xfe")
    assert code == 2 and out == "" and err.startswith("error: --start=-") and err.count("\n") == 1


def test_no_traceback_in_a_process_of_its_own(run_script, tmp_path):
    done = run_script("sample.py", f"--out_dir={tmp_path}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_help(call_script):
    code, out, err = call_script("sample.py", "--help")
    assert code == 0 and "--temperature=0.8" in out and err == ""


def test_a_reader_that_has_enough(tiny_run):
    """python sample.py | head -c 10"""
    command = [sys.executable, str(ROOT / "sample.py"), f"--out_dir={tiny_run}", "--max_new_tokens=3000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        err = process.stderr.read().decode()
    assert "Traceback" not in err and "Error" not in err and "ignored" not in err
    assert process.returncode == 0
    assert "tokens/s" not in err  # it stopped there, and not after ten times 3,000 tokens


def test_a_file_of_prompts_and_an_interactive_session(sample, tmp_path):
    alone = [sample(f"--start={text}")[1] for text in ("To be", "or not")]
    (tmp_path / "prompts.txt").write_text("To be\nor not\n", encoding="utf-8")
    assert sample(f"--prompts={tmp_path / 'prompts.txt'}")[1] == "".join(alone)
    code, out, err = sample("--interactive", stdin=b"To be\n\xc3\xa9\nor not\n")
    assert code == 0 and out == "".join(alone), "a prompt that cannot be encoded is an error, and the session continues"
    assert err.count("> ") == 4 and "cannot encode" in err
    (tmp_path / "none.txt").write_bytes(b"")
    code, out, err = sample(f"--prompts={tmp_path / 'none.txt'}")
    assert code == 2 and "has no line" in err and out == ""


def test_a_cache_where_it_fits_and_a_stop_string(sample):
    """Within the context of 16 the engine draws, past it the plain way: the same text as far as both go."""
    short = sample("--start=To", "--max_new_tokens=12")[1].removesuffix(CUT)
    long = sample("--start=To", "--max_new_tokens=40")[1]
    assert long.startswith(short) and len(short) > 5
    stop = short[-3:]
    out = sample("--start=To", "--max_new_tokens=12", f"--stop={stop}")[1]
    assert out == short[: short.index(stop, 2)] + CUT
    assert sample("--start=To", "--max_new_tokens=40", f"--stop={stop}")[1] == out


def test_other_weights_and_ways_to_choose(sample):
    for more in ("--quantize=int8", "--dtype=bfloat16", "--min_p=0.2", "--repetition_penalty=1.3"):
        code, out, err = sample("--max_new_tokens=10", more)
        assert code == 0 and out.startswith("To be") and out.endswith(CUT), err
    for more, named in (("--quantize=int3", "int3"), ("--min_p=2", "min_p"), ("--repetition_penalty=0", "repetition")):
        code, out, err = sample(more)
        assert code == 2 and named in err and err.count("\n") == 1 and out == ""


# -----------------------------------------------------------------------------
# Runs on other alphabets, or without one


@pytest.fixture
def other_run(tmp_path):
    """other_run(tokenizer, size) is the folder of a run with this tokenizer, or None, and so many ids."""

    def make(tokenizer, size):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=size, n_layer=1, n_head=1, n_embd=16))
        state = {"step": 1, "val_loss": None, "model": vars(model.config), "config": {"dataset": ""}}
        checkpoint.save(tmp_path / "run", model, NoOptimizer(), state)
        if tokenizer:
            tokenizer.save(tmp_path / "run")
        return tmp_path / "run"

    return make


FEW = ("--num_samples=1", "--max_new_tokens=4", "--device=cpu")


@pytest.mark.parametrize("chars", ["ACGT", "01"])
def test_a_text_without_line_ends_is_sampled_from_its_first_character(chars, other_run, call_script):
    run = other_run(CharTokenizer(chars), len(chars) + 2)
    code, out, err = call_script("sample.py", f"--out_dir={run}", *FEW)
    assert code == 0 and out.startswith(chars[0]) and "--start=" in err
    code, out, err = call_script("sample.py", f"--out_dir={run}", "--start=\n", *FEW)  # asked for
    assert code == 2 and "--start" in err.splitlines()[-1] and out == ""


def test_a_run_without_a_tokenizer_takes_one(other_run, call_script, tmp_path):
    run = other_run(None, 64)
    code, out, err = call_script("sample.py", f"--out_dir={run}", *FEW)
    assert code == 2 and "--tokenizer=" in err and "tokenizer.json" in err
    CharTokenizer("\n" + "".join(map(chr, range(33, 90)))).save(tmp_path)
    code, out, err = call_script("sample.py", f"--out_dir={run}", f"--tokenizer={tmp_path}", *FEW)
    assert code == 0 and out.startswith("\n")
    CharTokenizer("".join(map(chr, range(33, 120)))).save(tmp_path)
    code, out, err = call_script("sample.py", f"--out_dir={run}", f"--tokenizer={tmp_path}", *FEW)
    assert code == 2 and "another model's" in err


@pytest.mark.parametrize("special, tokens", [("true", 3), ("false", 9)])
def test_names_of_special_tokens_are_plain_text_unless_asked_for(special, tokens, other_run, call_script, monkeypatch):
    run = other_run(CharTokenizer("\nab<|eos>"), 11)
    prompts, submit = [], infer.Engine.submit

    def noted(self, ids, *args, **options):
        prompts.append(ids)
        return submit(self, ids, *args, **options)

    monkeypatch.setattr(infer.Engine, "submit", noted)
    code, out, err = call_script("sample.py", f"--out_dir={run}", "--start=a<|eos|>b", f"--special={special}", *FEW)
    assert code == 0, err
    assert [len(ids) for ids in prompts] == [tokens] and (10 in prompts[0]) == (special == "true")


def test_an_interactive_session_is_utf_8_whatever_the_locale(other_run, run_script):
    run = other_run(CharTokenizer("\né"), 4)
    done = run_script("sample.py", f"--out_dir={run}", "--interactive", *FEW, input="é\n".encode(), LC_ALL="C",
                      PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert done.returncode == 0 and done.stdout.startswith("é"), done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_a_full_disk_under_the_samples_is_one_line(tiny_run):
    command = [sys.executable, str(ROOT / "sample.py"), f"--out_dir={tiny_run}", *FEW]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(b"error: the samples cannot be written")
