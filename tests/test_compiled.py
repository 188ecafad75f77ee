"""The compiled step says what the uncompiled one says, for every toggle and form, and is kept on disk between runs."""

import copy
import os
import shutil

import pytest
import torch
from test_engine import make, some_prompts

import native
from infer import Engine
from inference import compiled, kernels
from inference.quantize import convert

# Between them the cases have every toggle that matters in a step. (toggles, dtype, quantize, for several requests?)
CASES = {
    "llama": (dict(pos="rope", n_kv_head=2, norm="rmsnorm", activation="swiglu", qk_norm="rms_gain", bias=False,
                   tie_weights=False), "float32", "", (False, True)),
    "gpt2": (dict(activation="gelu"), "float32", "int8", (True,)),
    "nanochat": (dict(pos="rope", rope_scaling="yarn", rope_factor=2.0, norm="rmsnorm_nogain", activation="relu2",
                      qk_norm="rms", norm_embed=True, logit_softcap=4.0), "bfloat16", "", (True,)),
    "multi-query": (dict(n_kv_head=1, logit_softcap=9.0), "float32", "int4", (False,)),
}
# Of logits: the steps between numbers in bfloat16; and with codes, one step more or less of 127 of an activation
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1, "int8": 2e-2, "int4": 2e-2}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads what a user has compiled. (The library of kernels is found before that, where it always lies.)"""
    if not kernels.available():
        pytest.skip(kernels.trouble())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def model_of(case, seed=0):
    toggles, dtype, quantize, _ = CASES[case]
    return convert(make(seed, n_layer=1, **toggles), getattr(torch, dtype), quantize)


def compiled_engine(case, seed=0, **options):
    """An Engine with the compiled steps of its case, and one of the same model without."""
    model = model_of(case, seed)
    engine = Engine(model, **options)
    for several in CASES[case][3]:
        engine.compiled[several] = compiled.compiled_step(model, engine.pool, several)
    return engine, Engine(model, **options)


def generate(engine, prompts, monkeypatch, **changes):
    """-> (the greedy tokens of all prompts, text so far -> the logits of the token that follows)"""
    seen = {}
    draw = Engine.draw

    def drawn(self, request, logits):
        seen[tuple(request.ids)] = logits
        draw(self, request, logits)

    monkeypatch.setattr(Engine, "draw", drawn)
    options = {"max_new_tokens": 13, "temperature": 0, **changes}
    found = [request.tokens for request in engine.generate(prompts, **options)]
    monkeypatch.setattr(Engine, "draw", draw)
    return found, seen


def compare(logits, exact, tolerance):
    """Of each text that both have, and they have most of them."""
    texts = logits.keys() & exact.keys()
    assert len(texts) > 0.5 * len(exact)
    for text in texts:
        torch.testing.assert_close(logits[text], exact[text], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_is_the_uncompiled_one(case, monkeypatch):
    """Tokens, and logits to within rounding, of one request alone and of several that end one after another."""
    _, dtype, quantize, ways = CASES[case]
    engine, plain = compiled_engine(case)
    prompts = some_prompts()
    for several in ways:
        batch = prompts if several else prompts[2:3]
        found, logits = generate(engine, batch, monkeypatch)
        expected, exact = generate(plain, batch, monkeypatch)
        assert found == expected or dtype == "bfloat16", "where two tokens are as likely, texts in bfloat16 part"
        compare(logits, exact, TOLERANCES[quantize or dtype])
    used = {rows > 1 for (rows, _, _), batch_pass in engine.passes.items() if batch_pass.compiled}
    assert used == set(ways) and not any(batch_pass.compiled for batch_pass in plain.passes.values())


@pytest.mark.slow
def test_the_next_run_reads_it_from_disk(monkeypatch):
    """Whatever its weights, the size of its cache and the number of its requests; also past the context."""
    compiled_engine("llama")
    monkeypatch.setattr(torch._inductor, "standalone_compile", None)
    prompts = some_prompts((2, 5, 1, 7, 3, 9))
    for options in ({"slide": True}, {"max_tokens": 16 * 20}, {"max_tokens": 48, "chunk": 5}):
        engine, plain = compiled_engine("llama", seed=1, **options)
        changes = {"max_new_tokens": 60} if "slide" in options else {}
        found, logits = generate(engine, prompts, monkeypatch, **changes)
        expected, exact = generate(plain, prompts, monkeypatch, **changes)
        assert found == expected and set(engine.compiled) == {False, True}
        compare(logits, exact, TOLERANCES["float32"])
    assert engine.compile(steps=compiled.STEPS_TO_READ)
    assert not engine.compile(steps=compiled.STEPS_TO_READ - 1)


@pytest.mark.slow
def test_weights_that_change_are_read(monkeypatch):
    """They are arguments of the compiled step, not constants in it."""
    engine, plain = compiled_engine("llama")
    prompts = some_prompts()
    before, _ = generate(engine, prompts, monkeypatch)
    with torch.no_grad():
        engine.model.transformer.ln_f.weight.mul_(-1)
    for each in (engine, plain):
        each.blocks.forget()
    found, _ = generate(engine, prompts, monkeypatch)
    assert found == generate(plain, prompts, monkeypatch)[0] != before


@pytest.mark.slow
@pytest.mark.parametrize("name, text", [("code", None), ("code", ""), ("names.json", None), ("names.json", "[\"x\"]")])
def test_a_damaged_file_is_one_reason_and_is_compiled_again(name, text, tmp_path, monkeypatch):
    engine, plain = compiled_engine("llama")
    step = compiled.Step(engine.model, engine.pool.size, engine.pool.kernel)
    kept = compiled.kept_at(step, engine.pool, False)
    whole = (kept / "code").read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "minichat" / kept.name
    shutil.copytree(kept, path)
    damaged = path / name
    if text is None and name == "code":
        damaged.write_bytes(whole[: len(whole) // 2])
    elif text is None:
        damaged.unlink()
    else:
        damaged.write_text(text, encoding="utf-8")
    engine.compiled.clear()
    with pytest.raises(RuntimeError) as error:
        engine.compile(several=False)
    assert "\n" not in str(error.value) and not engine.compiled and not path.exists()
    prompts = some_prompts()
    assert generate(engine, prompts, monkeypatch)[0] == generate(plain, prompts, monkeypatch)[0]
    monkeypatch.setattr(compiled, "build", lambda step, pool, several, path: shutil.copytree(kept, path))
    assert engine.compile(several=False)


def test_it_is_compiled_only_where_that_pays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.export, "export", None)
    engine = Engine(model_of("llama"))
    for steps in (10, compiled.STEPS_TO_COMPILE - 1):
        assert engine.compile(steps=steps, say=lambda line: pytest.fail(line)) is False
    assert not engine.compiled and not list((tmp_path / "minichat").iterdir())
    lines = []
    with pytest.raises(RuntimeError):
        engine.compile(steps=compiled.STEPS_TO_COMPILE, say=lines.append)
    assert lines == ["compiling the step of a token for one request, once: about a second for each layer"]


def name_of(engine, several=False):
    step = compiled.Step(engine.model, engine.pool.size, engine.pool.kernel)
    return compiled.kept_at(step, engine.pool, several).name


def test_everything_that_decides_what_is_compiled_is_in_the_name(monkeypatch):
    def engine_of(seed=0, dtype=torch.float32, quantize="", block=0, max_tokens=0, **toggles):
        return Engine(convert(make(seed, **toggles), dtype, quantize), block=block, max_tokens=max_tokens)

    engine = engine_of()
    names = [name_of(engine)]
    assert name_of(engine_of(seed=1, max_tokens=500)) == names[0], "another run of the same architecture"
    names.append(name_of(engine, several=True))
    changes = [dict(n_layer=1), dict(n_embd=64), dict(vocab_size=100), dict(logit_softcap=3.0), dict(norm_eps=1e-6),
               dict(tie_weights=False), dict(bias=False), dict(pos="rope"), dict(activation="relu2"), dict(block=8),
               dict(dtype=torch.bfloat16), dict(quantize="int8"), dict(quantize="int4"), dict(quantize="int4_64")]
    names += [name_of(engine_of(**change)) for change in changes]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        names.append(name_of(engine))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        names.append(name_of(engine))
    with monkeypatch.context() as patch:
        patch.setattr(native, "cpu_features", lambda: "flags: fpu")
        names.append(name_of(engine))
    kernel_names = []
    for _ in range(2):  # in another process a function lies at another address
        def flash(*args):
            pass

        engine.pool.kernel = flash
        kernel_names.append(name_of(engine))
    assert kernel_names[0] == kernel_names[1]
    assert len({*names, kernel_names[0]}) == len(names) + 1


def failing(*args, **options):
    raise ValueError("no such operator\nand much more")


@pytest.mark.parametrize("where", ["export", "compile", "cache", "compiler", "kernels"])
def test_where_it_fails_the_plain_step_serves(where, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if where == "kernels":
        monkeypatch.setattr(kernels, "find_library", lambda: (None, "no C++ compiler: apt install g++"))
    model = make(n_layer=1, pos="rope")
    engine = Engine(model)
    reason = "ValueError: no such operator"
    if where == "export":
        monkeypatch.setattr(torch.export, "export", failing)
    elif where == "compile":
        monkeypatch.setattr(torch._inductor, "standalone_compile", failing)
    elif where == "cache":
        (tmp_path / "minichat").touch()
        reason = "minichat"
    elif where == "compiler":
        monkeypatch.setattr(compiled, "can_compile", lambda device: "no C++ compiler found")
        reason = "no C++ compiler found"
    else:
        reason = "no C++ compiler: apt install g++"
    with pytest.raises(RuntimeError) as error:
        engine.compile()
    assert reason in str(error.value) and "\n" not in str(error.value) and not engine.compiled
    if where in ("export", "compile"):
        assert not list((tmp_path / "minichat").iterdir()), "nothing half made is left"
    prompts = some_prompts()
    expected = generate(Engine(copy.deepcopy(model), batched=False), prompts, monkeypatch)[0]
    assert generate(engine, prompts, monkeypatch)[0] == expected


def test_of_two_processes_that_compile_at_once_one_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = Engine(model_of("llama"))
    step = compiled.Step(engine.model, engine.pool.size, engine.pool.kernel)
    path = compiled.kept_at(step, engine.pool, False)

    class Artifact:
        def save(self, path, format):
            with open(path, "w") as file:
                file.write("second")

    def compile_while_another_does(*args, **options):
        path.mkdir()
        (path / "code").write_text("first")
        return Artifact()

    monkeypatch.setattr(torch._inductor, "standalone_compile", compile_while_another_does)
    compiled.build(step, engine.pool, False, path)
    assert os.listdir(path.parent) == [path.name] and (path / "code").read_text() == "first"
    shutil.rmtree(path)
    monkeypatch.setattr(torch._inductor, "standalone_compile", lambda *args, **options: Artifact())
    compiled.build(step, engine.pool, False, path)
    assert os.listdir(path.parent) == [path.name] and sorted(os.listdir(path)) == ["code", "names.json"]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("factor, reason", [(1.0, ""), (1.01, ""), (1.3, "differs from the plain one by 30% of the"),
                                            (torch.nan, "differs from the plain one by nan%")])
def test_a_step_that_was_compiled_wrongly_does_not_serve(factor, reason, several, monkeypatch):
    """A compiler can be wrong, and a file can be another one's: each step is compared before it serves."""
    engine = Engine(model_of("multi-query"))
    kept = []

    def build(step, pool, several, path):
        path.mkdir()
        kept.append(path)

    def run(tokens, cache):
        cache = cache._replace(rope=cache.rope or None)
        return factor * engine.model(tokens, cache=cache)[0][0].float()

    monkeypatch.setattr(compiled, "build", build)
    monkeypatch.setattr(compiled, "read", lambda step, path: run)
    monkeypatch.setattr(compiled, "kept_at", lambda *args: native.cache_folder() / "a_step")
    before = [t.clone() for t in (*engine.pool.keys, *engine.pool.values)]
    if reason:
        with pytest.raises(RuntimeError, match=reason):
            compiled.compiled_step(engine.model, engine.pool, several)
        assert not kept[0].exists()
    else:
        assert compiled.compiled_step(engine.model, engine.pool, several)
        kept[0].rmdir()
    assert all(map(torch.equal, before, (*engine.pool.keys, *engine.pool.values))), "requests may be running"
