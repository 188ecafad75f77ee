"""
Read a model to start from: a run, nanoGPT's ckpt.pt, a Hugging Face folder, a .gguf, or a name on the Hub.

    model, tokenizer, state = read_model("gpt2")

train.py starts from it (--init_from=gpt2) and export.py makes a run of it. No pickle and no template is executed.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError

import checkpoint
from configurator import fail
from foreign.gguf_files import GGUF, gguf_template, gguf_tokenizer, read_gguf
from foreign.hugging_face import MASKS, find_template, read_folder, read_tokenizer
from foreign.names import refuse_lfs_pointer
from foreign.templates import with_template
from model import GPT, GPTConfig
from tokenizer import load_tokenizer

GPT2_VOCAB = 50257
NANOGPT_VOCAB = 50304  # GPT-2's, padded
TABLES = ("transformer.wte.weight", "lm_head.weight")  # a row for each token, and perhaps rows that pad
NEW_ROW_NOISE = 0.02  # of new rows, as a share of the table's standard deviation


def read_model(name, which="latest", tokenizer_path="", template=""):
    """The model in a run's folder, a ckpt.pt of nanoGPT, a Hugging Face folder, a .gguf, or the Hub's of that name.

    `which`: the checkpoint of a run, latest, best or a step. `tokenizer_path`: the tokenizer of a model from elsewhere;
    empty: the one that comes with the model. `template`: one of conversation.TEMPLATES; empty: the model's own, if it
    is known. -> (GPT, tokenizer or None, state): the state of a run's checkpoint, or a dict of step and val_loss.
    Raises ValueError and OSError.
    """
    source = Path(name) if Path(name).exists() else from_hub(str(name))
    if source.is_dir() and (checkpoint.steps(source) or not (source / "config.json").exists()):
        if template:
            raise ValueError(f"template={template!r} is for a model from elsewhere, and {source} is a run")
        return read_run(source, which)
    try:
        return read_foreign(source, tokenizer_path, template)
    except KeyError as error:
        raise ValueError(f"{source}: lacks {error}") from None
    except (TypeError, AttributeError, SafetensorError) as error:  # a field of another type than it should be
        raise ValueError(f"{source}: {error}") from None


def read_run(source, which):
    """read_model for the folder of a run, or of one checkpoint."""
    folder, state = checkpoint.find(source, which, warn=warn)
    run = checkpoint.run_of(folder)
    model = GPT(checkpoint.config_of(state, folder))
    checkpoint.load_model(model, folder)
    tokenizer = load_tokenizer(run) if (run / "tokenizer.json").exists() else None
    return model, tokenizer, state


def read_foreign(source, tokenizer_path, template):
    """read_model for a model from elsewhere."""
    state = {"step": 0, "val_loss": None}
    file = GGUF(source) if source.suffix == ".gguf" else None
    packed = {}
    if file:
        config, tensors, packed = read_gguf(file)
    elif source.is_dir():
        config, tensors = read_folder(source)
    else:
        config, tensors, state["step"], state["val_loss"] = from_nanogpt(source)
    if tokenizer_path:
        tokenizer, added = load_tokenizer(tokenizer_path), 0
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only {config.vocab_size:,}")
    else:
        tokenizer, added = tokenizer_with(source, file, config.vocab_size)
    if not tokenizer:
        if template:
            raise ValueError(f"template={template!r} needs a tokenizer: --tokenizer=FOLDER names one")
        return with_codes(build(config, tensors), packed), None, state
    known = tokenizer.vocab_size - added  # tokens that the model has learned
    tokenizer = with_template(tokenizer, template_with(source, file), template, warn)
    model = build(replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size)), tensors, config.vocab_size)
    add_rows(model, known, tokenizer.vocab_size)
    if tokenizer.vocab_size > known:  # the tables have rows that the file has not
        packed = {name: p for name, p in packed.items() if name not in TABLES}
    return with_codes(model, packed), tokenizer, state


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def build(config, tensors, rows_needed=None):
    """The GPT that holds `tensors`, whose tables may have more or fewer rows of padding, but at least `rows_needed`
    (the vocabulary's). Raises ValueError."""
    model = GPT(config)
    params = dict(model.named_parameters())
    names = set(tensors)
    if config.tie_weights:
        names.discard("lm_head.weight")
    for name in sorted(params.keys() | names):
        if name not in params or name not in names:
            where = "only in the file" if name in names else "not in the file"
            raise ValueError(f"{name} is {where}: it holds another model")
        p = params[name]
        tensor = tensors[name]
        rows = min(len(p), len(tensor))  # to copy
        rows_least = max(len(p), len(tensor))
        if name in TABLES:
            rows_least = rows_needed or config.vocab_size
        if p.shape[1:] != tensor.shape[1:] or rows < rows_least:
            raise ValueError(f"{name} is {tuple(tensor.shape)} in the file and {tuple(p.shape)} in the model")
        with torch.no_grad():
            p[:rows].copy_(tensor[:rows])
            p[rows:].zero_()
    return model


def with_codes(model, packed):
    """Tell each linear layer of `model` which matrix of `packed`, {name: Packed}, its weight was made from:
    quantize.convert takes the codes, if it rounds to as many bits. -> the model"""
    for name, layer in model.named_modules():
        own = f"{name}.weight"
        if own == "lm_head.weight" and model.config.tie_weights:
            own = "transformer.wte.weight"
        if isinstance(layer, nn.Linear) and own in packed:
            layer.packed = packed[own]
    return model


# -----------------------------------------------------------------------------
# New tokens


def new_rows(table, old, new, generator):
    """Make the rows [old:new] of `table` (rows, n_embd) those of tokens that a model has not learned: the mean of the
    rows before, plus noise that tells them apart.

    So a new token has about the probability of an average one (Hewitt 2021, "Initializing New Word Embeddings for
    Pretrained Language Models"). A row of zeros would have logit 0, above those of all tokens that are seldom right.
    generator: a torch.Generator on the CPU.
    """
    with torch.no_grad():
        learned = table[:old].float()
        noise = torch.randn(new - old, table.size(1), generator=generator).to(table.device)
        table[old:new] = (learned.mean(0) + NEW_ROW_NOISE * learned.std() * noise).to(table.dtype)


def add_rows(model, old, new):
    """new_rows for the tables of a model. The same each time, so that an export can be repeated."""
    generator = torch.Generator().manual_seed(0)
    params = dict(model.named_parameters())  # a tied head is there once
    for name in TABLES:
        if name in params and new > old:
            new_rows(params[name], old, new, generator)


# -----------------------------------------------------------------------------
# Where a model comes from


def from_nanogpt(path):
    """A ckpt.pt -> (GPTConfig, name -> tensor, steps done, validation loss). Raises ValueError."""
    refuse_lfs_pointer(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a file that is damaged or asks to run something
        raise ValueError(f"{path} is refused ({str(error).splitlines()[0]})") from None
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise ValueError(f'{path} is not a checkpoint of nanoGPT: it lacks "model" or "model_args"')
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    sizes = {name: saved["model_args"][name] for name in names if name in saved["model_args"]}
    if GPT2_VOCAB < sizes.get("vocab_size", 0) <= NANOGPT_VOCAB:
        sizes["vocab_size"] = GPT2_VOCAB
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()
               if not name.endswith(MASKS)}
    loss = saved.get("best_val_loss")
    if loss is not None:
        loss = float(loss)  # nanoGPT saves a tensor
    return GPTConfig(**sizes, activation="gelu"), tensors, saved.get("iter_num", 0), loss


def from_hub(name):
    """The folder of a model of the Hub: its weights as safetensors, its configuration and vocabulary."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        fail(f"{name} is neither a file nor a folder; to load it from the Hub: pip install huggingface-hub")
    try:
        files = ["config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
                 "chat_template.jinja", "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # no network, no such model: their errors have no class in common
        fail(f"{name} is neither a file nor a folder, and the Hub does not have it ({type(error).__name__}: {error})")


# -----------------------------------------------------------------------------
# What comes with a model


def tokenizer_with(source, file, most):
    """The tokenizer that comes with a model from elsewhere: beside it, or in its GGUF `file`. -> (tokenizer, how many
    bytes it has that the model has not), or (None, 0).

    A tokenizer of another kind, or of more than `most` tokens, is skipped with a warning: the weights are good without
    it."""
    folder = source if source.is_dir() else source.parent
    try:
        if file:
            tokenizer, added = gguf_tokenizer(file)
        else:
            tokenizer, added = read_tokenizer(folder, source.is_dir(), warn)
        if tokenizer and tokenizer.vocab_size - added > most:
            raise ValueError(f"it has {tokenizer.vocab_size:,} tokens, the model only {most:,}")
        return tokenizer, added
    except FileNotFoundError:
        return None, 0
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error
        if not isinstance(error, ValueError):
            damaged = source if file else folder / "tokenizer.json"
            reason = f"{damaged} is damaged: {type(error).__name__}: {error}"
        warn(f"the model comes without its tokenizer ({reason}): --tokenizer=FOLDER names one")
        return None, 0


def template_with(source, file):
    """The chat template that comes with a model from elsewhere -> templates.Found or None."""
    if file:
        return gguf_template(file)
    return find_template(source) if source.is_dir() else None
