"""
Settings of a script: defaults <- config files <- --key=value, in the order of the command line; later wins.

    out_dir = "out"              # where checkpoints and metrics go
    compile: bool | None = None  # torch.compile; none: where it pays

    if __name__ == "__main__":
        c = Settings(configure(globals()))
        main(c)  # which reads c.out_dir, c.compile

    python train.py config/small.py --out_dir=runs/1 --compile

A key is a line like these: at module level, above the first `def`, `class` or call of `configure`, binding a lowercase
name that does not begin with _ to a literal (`5 * 8` is one): bool, int, float, str, None, or a tuple of such. Its
default is the value it has at the call, its type the annotation's, else the default's. The comment behind it, with
those below in the same column, is its help; comment lines above it are a heading.

A config file is Python, run in a namespace of its own. Every name it binds must be a key, except modules, functions,
classes, names it imports, names in CAPITALS and names that begin with _. A run is trained and sampled with the same
file: a script beside train.py ignores train.py's keys there, if it has none of that name. A number must lie in its
range (INTERVALS). Whatever a user gets wrong is one line on stderr and exit code 2.
"""

import ast
import contextlib
import difflib
import io
import math
import os
import re
import sys
import time
import tokenize
import traceback
import types
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Any, NoReturn

BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
SCALARS = {"bool": bool, "int": int, "float": float, "str": str}
TAKES = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a string"}
KIND = re.compile(r"S|tuple\[(S, \.\.\.|S(, S)*)\]".replace("S", "(bool|int|float|str)"))
# The interval that each number must lie in, by its key's name: for all scripts, or for one as "script.name". A key that
# is not here takes any finite number. An "inf" that is an end means finite, and for a whole number at most 64 bits.
INTERVALS = {
    "[0, inf)": """batch_size bin_size block_size context_iters context_start crowd eval_iters grad_clip limit
        logit_softcap loss_tolerance lr_decay_iters max_chars memory_tolerance min_chars min_lr n_kv_head peak_flops
        permutations probe_interval rope_factor rows sample_tokens save_interval save_minutes seed seeds
        speed_tolerance spike_z temperature tokens_per_step top_k vocab_size warm_up warmup_iters watch
        weight_decay""",
    "[1, inf)": """batches eval_interval eval.batch_size gpu_batches gpu_pieces gpus gradient_accumulation_steps
        kv_heads lengths log_interval max_iters max_new_tokens max_rewinds n_embd n_head n_layer new_tokens
        num_samples pp_size prefetch processes prompts reads rounds sample.rope_factor shape sizes tokens tp_size
        train.block_size train.rope_factor trials updates worlds keep_checkpoints""",
    "[2, inf)": "eval.lengths spike_window",
    "(0, inf)": "largest learning_rate muon_learning_rate norm_eps repetition_penalty rope_theta timeout",
    "[0, 1]": "depths min_p",
    "(0, 1]": "efficiency threshold top_p wsd_decay_frac",
    "[0, 1)": "beta1 beta2 dropout muon_momentum reserve",
    "(0, 1)": "val_fraction",
    "[2, 32]": "alternatives",
    "[0, 3]": "zero_stage",
    "[0, 1024]": "threads workers",
    "[1, 1024]": "bench.workers loader_threads",
}
RANGES = {name: interval for interval, names in INTERVALS.items() for name in names.split()}

# Two ways to say one thing: the one that is set later overrides the other, as if that had not been set. In one config
# file, or both on the command line, they must agree.
ALTERNATIVES = [("tokens_per_step", "gradient_accumulation_steps")]

# Keys whose values are paths. "~" at the start is the home folder.
PATHS = set("""baseline config data dataset folders html init_from input into models out out_dir paths plot png prompts
    reference runs tokenizer""".split())

QUOTED = re.compile(r"""[ \t]*(["'])((?:(?!\1).|\1\1)*)\1\s*(?=,|\Z)""", re.DOTALL)  # a part of a tuple
LITERAL = (ast.Constant, ast.Tuple, ast.List, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context)


def fail(message) -> NoReturn:
    """End the run for a reason that the user can mend: one line on stderr, exit code 2.

    Under torchrun rank 0 says it at once. The others wait, the first of each machine less than the rest: torchrun ends
    them meanwhile if one before them ended so, and what all would say is said once; what one alone has is said, too.
    """
    # A rank that is no number (a user's mistake, which may be the message) counts as 0.
    after = [os.environ.get(name, "").strip().lstrip("0").isdigit() for name in ("RANK", "LOCAL_RANK")]
    time.sleep(3 * sum(after))
    print("error:", " ".join(str(message).splitlines()), file=sys.stderr)
    raise SystemExit(2)


class LastingFile(io.FileIO):
    """A file descriptor to print to. It drops what it cannot write: the reader is gone, the disk is full, the terminal
    was closed. A run does not end for want of somebody to tell."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def keep_printing(product=False):
    """Have stdout and stderr take every text, as UTF-8, and outlive their readers; not stdout if it is `product`."""
    with contextlib.suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed ones: the next file must not take their place
            pass
        os.close(fd)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif not hasattr(stream, "reconfigure"):  # a notebook's
            continue
        elif (product and name == "stdout") or os.name == "nt" or not is_descriptor(stream, fd):
            stream.reconfigure(encoding="utf-8", errors="replace")  # a Windows code page cannot print every text
        elif not isinstance(getattr(stream.buffer, "raw", None), LastingFile):
            lasting = io.BufferedWriter(LastingFile(fd, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(lasting, encoding="utf-8", errors="replace",
                                                line_buffering=stream.line_buffering or name == "stderr",
                                                write_through=stream.write_through))


def is_descriptor(stream, fd):
    try:
        return stream.fileno() == fd
    except (OSError, ValueError):  # a test's capture has none
        return False


class Settings:
    """The settings of one call of a script, each an attribute: c.batch_size.

    They never change: `c.changed(batch_size=4)` gives a changed copy. dict(c) gives them as a plain dict.
    """

    def __init__(self, values):
        self.__dict__.update(values)

    def __setattr__(self, name, value):
        raise AttributeError(f"settings do not change: c.changed({name}=...) gives a changed copy")

    def __getattr__(self, name):
        raise AttributeError(f"there is no setting {name}{nearest(name, self.__dict__)}")

    def __getitem__(self, name):
        return self.__dict__[name]

    def keys(self):
        return self.__dict__.keys()

    def changed(self, **values):
        """A copy with these values. Raises AttributeError for a name that is no setting."""
        for name in values:
            getattr(self, name)
        return Settings({**self, **values})


@dataclass
class Key:
    name: str
    kind: str  # bool, int, float, str, tuple[float, float] (just two) or tuple[float, ...] (any number)
    optional: bool  # the annotation allows None
    default: Any
    comment: str = ""
    heading: tuple[str, ...] = ()  # the comment lines above
    interval: str = ""  # what a number must lie in, as "[0, 1)"; empty: not checked

    def check(self, value, where, parse=False):
        """`value` (with `parse`: what this text from the command line spells) in this key's type, or the end."""
        try:
            if self.optional and (value is None or parse and value.lower() == "none"):
                return None
            result = typed(self.kind, spelled(self.kind, value) if parse else value)
        except (ValueError, OverflowError):
            takes = TAKES.get(self.kind) or f"{self.kind}, such as {show(self.default)}"
            if self.kind == "tuple[str, ...]":
                takes = f"""strings with commas between them ('", "' is one), such as {show(self.default)}"""
            fail(f"{where}: {self.name} takes {takes}{' or none' * self.optional}, not {value!r}")
        for number in result if isinstance(result, tuple) else (result,):
            if self.interval and not isinstance(number, (bool, str)) and (wrong := outside(number, self.interval)):
                fail(f"{'' if parse else where + ': '}{self.name}={show(result)} must {wrong}")
        if self.name in PATHS and "str" in self.kind:
            result = self.check_path(result, where, parse)
        return result

    def check_path(self, value, where, parse):
        """`value`, a path or several, with ~ expanded to the home folder. Ends the run for an empty path."""
        if isinstance(value, tuple):
            return tuple(self.check_path(part, where, parse) for part in value)
        if value == "" and (parse or self.default):
            fail(f"--{self.name}= is empty: an unset variable?" if parse else f"{where}: {self.name} is empty")
        parts = value.split(",") if self.name == "dataset" else [value]  # a mix a:0.7,b:0.3
        return ",".join(map(at_home, parts))


def at_home(path):
    """`path` with a ~ or ~user at its start expanded to the home folder: a shell leaves it in --key=~/x."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        fail(f"{path}: there is no home folder {path.split('/')[0]}; ./{path} is the file of that name")
    return expanded


def range_of(script, name):
    """The interval for a key of one of this project's scripts; "" for a script elsewhere, whose names are its own."""
    home = os.path.dirname(os.path.realpath(__file__))
    if not os.path.realpath(script).startswith(os.path.join(home, "")):
        return ""
    stem = os.path.splitext(os.path.basename(script))[0]
    return RANGES.get(f"{stem}.{name}") or RANGES.get(name, "(-inf, inf)")


def outside(number, interval):
    """What `number` must be to lie in `interval`, or "" where it does."""
    least, most = map(float, interval[1:-1].split(","))
    above = number >= least if interval[0] == "[" else number > least
    below = number <= most if interval[-1] == "]" else number < most
    if above and below and (isinstance(number, float) or abs(number) < 2**63):
        return ""
    if math.isfinite(most):
        return f"lie in {interval}"
    floor = f"at least {least:g}" if interval[0] == "[" else f"above {least:g}"
    if isinstance(number, int):
        return f"be {floor}" if not above else "have at most 63 bits"
    if not math.isfinite(number):
        return f"be {floor} and finite" if math.isfinite(least) else "be finite"
    return f"be {floor}"


def typed(kind, value):
    """`value` as `kind`, or ValueError. Changed only where nothing is lost, so that 1 and 1.0 leave the same record."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()  # a numpy number's Python value, an array's list
    if kind.startswith("tuple") and isinstance(value, (tuple, list)):
        kinds = element_kinds(kind, len(value))
        return tuple(typed(k, v) for k, v in zip(kinds, value, strict=True))
    if isinstance(value, bool):  # which Python counts among the ints
        fits = kind == "bool"
    elif kind == "int":
        fits = isinstance(value, int) or isinstance(value, float) and value.is_integer()
    else:
        fits = kind == "float" and isinstance(value, (int, float)) or kind == "str" and isinstance(value, str)
    if not fits:
        raise ValueError
    return SCALARS[kind](value)


def spelled(kind, text):
    """The Python value that `text` spells, or ValueError. A string is the text as it stands."""
    if kind.startswith("tuple"):
        blank = " \t" if "str" in kind else None  # a newline may be a string; around a number it is white space
        text = text.strip(blank)
        if not text:
            raise ValueError  # an empty tuple is (), nothing at all is a slip
        if text[0] + text[-1] in ("()", "[]"):
            text = text[1:-1].strip(blank)
        parts = split_parts(text, blank)
        return tuple(spelled(k, part) for k, part in zip(element_kinds(kind, len(parts)), parts, strict=True))
    if kind == "int" and re.search(r"[.e]", text.lower()):  # 1e6, which `typed` makes an int, or not
        return float(text)
    return BOOLS.get(text.lower(), text) if kind == "bool" else SCALARS[kind](text)


def split_parts(text, blank):
    """The parts of `text` between its commas, without the `blank` characters around each. A part in quotes is what
    stands between them, commas, newlines and blanks included; a quote within is doubled. One comma may follow the
    last part."""
    parts, at = [], 0
    while text[at:].strip(blank):
        if quoted := QUOTED.match(text, at):
            quote = quoted[1]
            parts.append(quoted[2].replace(2 * quote, quote))
            at = quoted.end() + 1
        else:
            part = text[at:].partition(",")[0]
            if not part.strip(blank) and blank:
                raise ValueError  # a comma of its own is in quotes
            parts.append(part.strip(blank))
            at += len(part) + 1
    return parts


def element_kinds(kind, count):
    kinds = kind.removeprefix("tuple[").removesuffix("]").split(", ")
    return kinds[:1] * count if kinds[-1] == "..." else kinds


def kind_of(value):
    if not isinstance(value, (tuple, list)):
        return type(value).__name__
    kinds = {kind_of(v) for v in value} or {"str"}  # () holds strings unless an annotation says otherwise
    return f"tuple[{'float' if kinds == {'int', 'float'} else '|'.join(kinds)}, ...]"


def show(value):
    """`value` as one would type it after --key=."""
    if isinstance(value, tuple):
        return ",".join(show_part(part) for part in value) or "()"
    text = "none" if value is None else str(value)
    return text if text.isprintable() and " " not in text else repr(text)


def show_part(value):
    """An element of a tuple, in quotes where `spelled` would read it otherwise."""
    text = str(value)
    if isinstance(value, str) and not re.fullmatch(r"[^\s,\"'()\[\]]+", text):
        return '"' + text.replace('"', '""') + '"'
    return text


def nearest(word, names, prefix=""):
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def settings(tree):
    """(name, statement) of each line that is a key."""
    for node in tree.body:
        called = [getattr(n.func, "id", getattr(n.func, "attr", "")) for n in ast.walk(node) if isinstance(n, ast.Call)]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or "configure" in called:
            return
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            names = [ast.unparse(target) for target in getattr(node, "targets", None) or [node.target]]
            plain = re.fullmatch(r"[^\W_A-Z][^\WA-Z]*", names[0]) and len(names) == 1
            if plain and all(isinstance(n, LITERAL) for n in ast.walk(node.value)):
                yield names[0], node


def comment_of(node, lines):
    """The comment behind a statement, with those below it in the same column."""
    line, *below = lines[node.end_lineno - 1 :]
    column = line.find("#", len(line.encode()[: node.end_col_offset].decode()))  # ast counts bytes
    below = takewhile(lambda line: line.lstrip()[:1] == "#" and line.find("#") == column, below)
    return " ".join(line[column:].lstrip("# ").rstrip() for line in (line, *below)) if column >= 0 else ""


def heading_of(node, lines):
    """The comment lines above a statement, less the rules (`# ----`)."""
    above = dropwhile(lambda line: not line.strip(), reversed(lines[: node.lineno - 1]))
    block = takewhile(lambda line: line.startswith("#"), above)
    return tuple(line.strip("#-= ") for line in block if re.match(r"#(?! fmt:).*\w", line))[::-1]


def read_keys(script, namespace=None):
    """name -> Key in source order. Defaults are those in `namespace`, or without one the source's."""
    with tokenize.open(script) as file:
        source = file.read()
    keys, lines = {}, source.split("\n")
    for name, node in settings(ast.parse(source)):
        literal = eval(compile(ast.Expression(node.value), script, "eval"))  # names and calls nothing
        default = literal if namespace is None else namespace.get(name, literal)
        allowed = ast.unparse(node.annotation).split(" | ") if isinstance(node, ast.AnnAssign) else [kind_of(default)]
        kinds = [kind for kind in allowed if kind != "None"]
        where = f"{os.path.basename(script)}:{node.lineno}"
        if len(kinds) != 1 or not KIND.fullmatch(kinds[0]):
            fail(f"{where}: {name} needs a type, such as `{name}: int | None = ...` or `tuple[str, ...]`")
        keys[name] = Key(name, kinds[0], "None" in allowed, default, comment_of(node, lines), heading_of(node, lines),
                         range_of(script, name))
        keys[name].default = keys[name].check(default, where)
    return keys


def read_file(path, keys, ignored=None):
    """The keys that a config file sets, checked. Those of `ignored`, the keys of another script, are only checked."""
    folder, file = os.path.split(path)
    if not os.path.isfile(path):
        others = [f for f in os.listdir(folder or ".") if f.endswith(".py")] if os.path.isdir(folder or ".") else []
        fail(f"no config file {path}{nearest(file, others, os.path.join(folder, ''))}")
    scope, lines = {"__name__": "config", "__file__": path}, {}
    try:
        with tokenize.open(path) as source:
            tree = ast.parse(source.read(), path)
        from_elsewhere = any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in ast.walk(tree))
        imported = {alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)
                    for alias in n.names}
        stores = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        lines = {n.id: f":{n.lineno}" for n in sorted(stores, key=lambda n: n.lineno)}
        exec(compile(tree, path, "exec", dont_inherit=True), scope)
    except (Exception, SystemExit) as e:
        here = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = here[-1] if here else getattr(e, "lineno", None)
        fail(f"{path}{f':{line}' if line else ''}: {type(e).__name__}: {e.msg if isinstance(e, SyntaxError) else e}")
    values = {}
    for name, value in scope.items():
        where = path + lines.get(name, "")
        if name in keys:
            values[name] = keys[name].check(value, where)
        elif ignored and name in ignored:
            ignored[name].check(value, where)
        elif name not in lines and (name in imported or from_elsewhere):
            continue  # such as pi, from math
        elif not (name[0] == "_" or name.isupper() or callable(value) or isinstance(value, types.ModuleType)):
            fail(f"{where}: unknown key {name}{nearest(name, keys) or '; a name of its own begins with _'}")
    return values


def keys_of_train(script):
    """The keys of the train.py beside `script`; none where there is no other script of that name."""
    beside = os.path.join(os.path.dirname(os.path.abspath(script)), "train.py")
    if os.path.basename(script) == "train.py" or not os.path.isfile(beside):
        return {}
    return read_keys(beside)


def print_help(namespace, keys, verb, verbs, paths):
    print((namespace.get("__doc__") or "").strip().split("\n\n")[0])
    words = ["|".join(verbs)] * bool(verb) + ["config/FILE.py ..."] + [f"{paths.upper()} ..."] * bool(paths)
    usage = " ".join(f"[{word}]" for word in [*words, "--key=value ..."])
    print(f"\nusage: python {os.path.basename(namespace['__file__'])} {usage}")
    width = min(40, max((len(f"--{key.name}={show(key.default)}") for key in keys.values()), default=0))
    for i, key in enumerate(keys.values()):
        if key.heading or i == 0:
            print("", *key.heading, sep="\n")
        print(f"  {f'--{key.name}={show(key.default)}':{width}}   {key.comment}".rstrip())


def refuse(word, keys, verbs=()) -> NoReturn:
    """A word of the command line that means nothing here, and what may have been meant."""
    name, equals, text = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    positive = name.removeprefix("no_")
    if name in keys:
        mend = f"; did you mean --{name}{equals}{text}?"
    elif positive in keys and keys[positive].kind == "bool":
        mend = f"; did you mean --{positive}=false?"
    elif word.startswith("-"):
        mend = nearest(name, keys, "--") or "; --help lists the keys"
    elif os.path.isfile(word + ".py"):
        mend = f"; did you mean {word}.py?"
    elif word.lower() in BOOLS:
        mend = f"; a boolean takes its value as --key={word}"
    else:
        mend = nearest(word, verbs) or f"; expected {', '.join([*verbs, 'config/FILE.py or --key=value'])}"
    fail(f"unknown key {word.partition('=')[0]}{mend}" if word.startswith("-") else f"unexpected word {word!r}{mend}")


def configure(namespace, argv=None, *, verb="", verbs=(), paths="", given=None, also="",
              product=False):
    """
    Resolve the keys of the script whose globals are `namespace`, write them back there and return them as a plain dict,
    in source order. `verb` names the key that the first bare word fills, with one of `verbs`; `paths` the tuple of
    strings that takes the other bare words. A word that ends in .py is a config file. The names of the keys that any of
    these sets, if only to its default, are added to the set `given`. `also` is a script whose keys are taken too, but
    only returned. From here on a print never fails (keep_printing), except to the stdout of a script whose output is
    its `product`: nobody may be reading it any more.
    """
    keep_printing(product)
    own = read_keys(namespace["__file__"], namespace)
    keys = {**own, **{name: key for name, key in (read_keys(also) if also else {}).items() if name not in own}}
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print_help(namespace, keys, verb, verbs, paths)
        raise SystemExit(0)
    values, bare, verb_open = {}, [], bool(verb)
    source, sources = 0, {}  # which config file set a key, in their order, or the command line between them
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            if name not in keys:
                refuse(word, keys)
            if not equals and keys[name].kind == "bool":
                text = "true"
            elif not equals:
                if not words or words[0].startswith("--"):
                    fail(f"--{name} needs a value: --{name}=VALUE")
                text = words.pop(0)
            values[name] = keys[name].check(text, f"--{name}", parse=True)
            sources[name] = source
        elif word.endswith(".py"):
            read = read_file(at_home(word), keys, keys_of_train(namespace["__file__"]))
            values |= read
            sources |= dict.fromkeys(read, source + 1)
            source += 2
        elif verb_open and word in verbs:
            values[verb], verb_open = word, False
        elif paths and not verb_open and not word.startswith("-"):
            bare.append(word)
            values[paths] = keys[paths].check(tuple(bare), word)
        else:
            refuse(word, keys, verbs if verb_open else ())
    for pair in ALTERNATIVES:
        there = sorted((name for name in pair if values.get(name)), key=sources.get)
        if len(there) == 2 and sources[there[0]] < sources[there[1]]:
            del values[there[0]]
    if given is not None:
        given.update(values)
    values = {name: key.default for name, key in keys.items()} | values
    if verb and values[verb] not in (*verbs, keys[verb].default):
        fail(f"{verb} is one of {', '.join(verbs)}, not {values[verb]!r}")
    namespace.update({name: values[name] for name in own})
    return values
