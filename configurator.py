"""
Settings of a script: plain lines at its top, then config files, then --key=value; later wins.

To add a setting, write one line among those at the top of the script, with a default and a comment:

    out_dir = "out"              # where checkpoints and metrics go
    compile: bool | None = None  # torch.compile; none: wherever it helps

That is all: the line is on the command line, in --help and in the record of the run, and `c` holds its value.

    if __name__ == "__main__":
        c = Settings(configure(globals()))
        main(c)  # which reads c.out_dir and c.compile

    python train.py config/small.py --out_dir=runs/1 --compile

A setting (or key) is above the first `def`, `class` or call of `configure`. Its name is lowercase and does not begin
with _. Its default is a literal (`5 * 8` is one): bool, int, float, str, None, or a tuple of these. Its type comes from
the annotation, or else from the default. Its help is the comment on its line, with the comments below in the same
column; comment lines above it are a heading. In a script of this project, a number also needs a range: add its name to
INTERVALS in keys.py.

A config file is Python, run in a namespace of its own. It sets keys by plain assignment. It may also bind modules,
functions, classes, imported names, names in CAPITALS and names that begin with _. Any other name must be a key. The
config file of a run also serves for sampling from it: a script ignores keys that only the train.py beside it has.
A mistake of the user's is one line on stderr and exit code 2.
"""

import ast
import os
import re
import sys
import tokenize
import traceback
import types
from itertools import dropwhile, takewhile
from typing import NoReturn

from files import keep_printing
from keys import BOOLS, KIND, Key, expand_home, fail, kind_of, nearest, range_of, show

# Pairs of keys that say the same thing in two ways. The key that is set later overrides the other, as if nobody had set
# that. But if one config file, or the command line, sets both keys, both stay, and they must agree.
ALTERNATIVES = [("tokens_per_step", "gradient_accumulation_steps")]

LITERAL = (ast.Constant, ast.Tuple, ast.List, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop,
           ast.expr_context)


class Settings:
    """The settings of a script, each an attribute: c.batch_size.

    They never change: c.changed(batch_size=4) gives a changed copy. dict(c) gives a plain dict.
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
        """A copy with these values. Raises AttributeError for an unknown name."""
        for name in values:
            getattr(self, name)
        return Settings({**self, **values})


# -----------------------------------------------------------------------------
# Reading the keys of a script


def setting_lines(tree):
    """Yield (name, statement) for each setting of a script's syntax tree."""
    for node in tree.body:
        calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
        called = [getattr(function, "id", getattr(function, "attr", "")) for function in calls]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return
        if "configure" in called:
            return
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not node.value:
            continue
        targets = getattr(node, "targets", None) or [node.target]
        name = ast.unparse(targets[0])
        plain = len(targets) == 1 and re.fullmatch(r"[^\W_A-Z][^\WA-Z]*", name)
        if plain and all(isinstance(n, LITERAL) for n in ast.walk(node.value)):
            yield name, node


def comment_of(node, lines):
    """The comment on a statement's last line, with the comments below it in the same column."""
    line, *below = lines[node.end_lineno - 1 :]
    end = len(line.encode()[: node.end_col_offset].decode())  # ast counts bytes
    column = line.find("#", end)
    if column < 0:
        return ""
    below = takewhile(lambda text: text.lstrip()[:1] == "#" and text.find("#") == column, below)
    return " ".join(text[column:].lstrip("# ").rstrip() for text in (line, *below))


def heading_of(node, lines):
    """The comment lines above a statement, without the rules (`# ----`)."""
    above = dropwhile(lambda line: not line.strip(), reversed(lines[: node.lineno - 1]))
    block = takewhile(lambda line: line.startswith("#"), above)
    return tuple(line.strip("#-= ") for line in block if re.match(r"#(?! fmt:).*\w", line))[::-1]


def read_keys(script, namespace=None):
    """Name -> Key for the settings of a script, in source order. Defaults come from `namespace`, or else the source."""
    with tokenize.open(script) as file:
        source = file.read()
    keys = {}
    lines = source.split("\n")
    for name, node in setting_lines(ast.parse(source)):
        default = eval(compile(ast.Expression(node.value), script, "eval"))  # a literal: it calls nothing
        if namespace is not None:
            default = namespace.get(name, default)
        if isinstance(node, ast.AnnAssign):
            allowed = ast.unparse(node.annotation).split(" | ")
        else:
            allowed = [kind_of(default)]
        kinds = [kind for kind in allowed if kind != "None"]
        where = f"{os.path.basename(script)}:{node.lineno}"
        if len(kinds) != 1 or not KIND.fullmatch(kinds[0]):
            fail(f"{where}: {name} needs a type, such as `{name}: int | None = ...` or `tuple[str, ...]`")
        key = Key(name, kinds[0], "None" in allowed, default, comment_of(node, lines),
                  heading_of(node, lines), range_of(script, name))
        key.default = key.check(default, where)
        keys[name] = key
    return keys


def keys_of_train(script):
    """The keys of the train.py beside `script`; none if there is no other script of that name."""
    beside = os.path.join(os.path.dirname(os.path.abspath(script)), "train.py")
    if os.path.basename(script) == "train.py" or not os.path.isfile(beside):
        return {}
    return read_keys(beside)


# -----------------------------------------------------------------------------
# Config files


def read_file(path, keys, ignored=None):
    """Name -> checked value of the keys that a config file sets. Keys of `ignored`, another script's, are only checked.
    """
    if not os.path.isfile(path):
        fail(f"no config file {path}{nearest_config(path)}")
    scope, lines, imported = run_config(path)
    values = {}
    for name, value in scope.items():
        where = f"{path}:{lines[name]}" if name in lines else path
        if name in keys:
            values[name] = keys[name].check(value, where)
        elif ignored and name in ignored:
            ignored[name].check(value, where)
        elif name not in lines and imported & {name, "*"}:
            continue  # such as pi, from math
        elif not is_own_name(name, value):
            mend = nearest(name, keys) or "; a name of its own begins with _"
            fail(f"{where}: unknown key {name}{mend}")
    return values


def nearest_config(path):
    """The end of an error about a missing config file: the name that the user may have meant, or ""."""
    folder, file = os.path.split(path)
    if not os.path.isdir(folder or "."):
        return ""
    others = [name for name in os.listdir(folder or ".") if name.endswith(".py")]
    return nearest(file, others, os.path.join(folder, ""))


def run_config(path):
    """Runs a config file. -> (its namespace, {name: line of its last assignment}, names imported from modules)"""
    scope = {"__name__": "config", "__file__": path}
    try:
        with tokenize.open(path) as source:
            tree = ast.parse(source.read(), path)
        exec(compile(tree, path, "exec", dont_inherit=True), scope)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)  # the line of the config file, not of a library
        inside = [frame.lineno for frame in frames if frame.filename == path]
        line = inside[-1] if inside else getattr(error, "lineno", None)
        where = f"{path}:{line}" if line else path
        message = error.msg if isinstance(error, SyntaxError) else error
        fail(f"{where}: {type(error).__name__}: {message}")
    lines = {}
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names}  # "*" for all of a module
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = max(node.lineno, lines.get(node.id, 0))
    return scope, lines, imported


def is_own_name(name, value):
    """Whether a config file may bind a name that is no key."""
    return name[0] == "_" or name.isupper() or callable(value) or isinstance(value, types.ModuleType)


# -----------------------------------------------------------------------------
# The command line


def print_help(namespace, keys, verb, verbs, paths):
    """The first paragraph of the script's docstring, its usage, and every key with its default and comment."""
    print((namespace.get("__doc__") or "").strip().split("\n\n")[0])
    words = ["config/FILE.py ..."]
    if verb:
        words.insert(0, "|".join(verbs))
    if paths:
        words.append(f"{paths.upper()} ...")
    words.append("--key=value ...")
    usage = " ".join(f"[{word}]" for word in words)
    print(f"\nusage: python {os.path.basename(namespace['__file__'])} {usage}")
    flags = {name: f"--{name}={show(key.default)}" for name, key in keys.items()}
    width = min(40, max(map(len, flags.values()), default=0))
    for i, key in enumerate(keys.values()):
        if key.heading or i == 0:
            print("", *key.heading, sep="\n")
        print(f"  {flags[key.name]:{width}}   {key.comment}".rstrip())


def refuse(word, keys, verbs=()) -> NoReturn:
    """Ends the run for an unknown word of the command line, and says what the user may have meant."""
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
        expected = ", ".join([*verbs, "config/FILE.py or --key=value"])
        mend = nearest(word, verbs) or f"; expected {expected}"
    if word.startswith("-"):
        fail(f"unknown key {word.partition('=')[0]}{mend}")
    fail(f"unexpected word {word!r}{mend}")


class CommandLine:
    """Reads the words of a command line, from first to last, into `values`: name -> checked value."""

    def __init__(self, words, keys, script, verb, verbs, paths):
        self.words = list(words)
        self.keys = keys
        self.script = script
        self.verb = verb    # the key that the first bare word fills, with one of verbs
        self.verbs = verbs
        self.paths = paths  # the key that takes the other bare words
        self.values = {}
        self.bare = []
        self.sources = {}   # name -> number of the source that set it
        self.source = 0     # number of the source: config files are odd, the words between two files are even

    def read(self):
        """Read all words. -> values"""
        verb_is_open = bool(self.verb)
        while self.words:
            word = self.words.pop(0)
            if word.startswith("--"):
                self.read_flag(word)
            elif word.endswith(".py"):
                self.read_config(word)
            elif verb_is_open and word in self.verbs:
                self.values[self.verb] = word
                verb_is_open = False
            elif self.paths and not verb_is_open and not word.startswith("-"):
                self.bare.append(word)
                self.values[self.paths] = self.keys[self.paths].check(tuple(self.bare), word)
            else:
                refuse(word, self.keys, self.verbs if verb_is_open else ())
        self.drop_overridden()
        return self.values

    def read_flag(self, word):
        """Read --key=value, --key value, or --key alone for a boolean, which never takes the next word."""
        name, equals, text = word[2:].partition("=")
        if name not in self.keys:
            refuse(word, self.keys)
        if not equals and self.keys[name].kind == "bool":
            text = "true"
        elif not equals:
            if not self.words or self.words[0].startswith("--"):
                fail(f"--{name} needs a value: --{name}=VALUE")
            text = self.words.pop(0)
        self.values[name] = self.keys[name].check(text, f"--{name}", parse=True)
        self.sources[name] = self.source

    def read_config(self, path):
        values = read_file(expand_home(path), self.keys, keys_of_train(self.script))
        self.values |= values
        self.sources |= dict.fromkeys(values, self.source + 1)
        self.source += 2

    def drop_overridden(self):
        """Drop the earlier of two ALTERNATIVES, unless one source has set both."""
        for pair in ALTERNATIVES:
            names = sorted((name for name in pair if self.values.get(name)), key=self.sources.get)
            if len(names) == 2 and self.sources[names[0]] < self.sources[names[1]]:
                del self.values[names[0]]


def configure(namespace, argv=None, *, verb="", verbs=(), paths="", given=None, also="", product=False):
    """
    Resolve the settings of the script whose globals are `namespace`, write them back there, and return them as a plain
    dict in source order. `argv` is the command line, sys.argv[1:] if None.

    A word that ends in .py is a config file. `verb` names the key that the first bare word fills, with one of `verbs`.
    `paths` names the tuple of strings that takes the other bare words. `given` is a set, to which the name of every key
    is added that the user set, even if to its default. `also` is another script: its keys are accepted as well, but
    only returned.

    From here on, a print never fails (files.keep_printing). The exception is the stdout of a script whose output is its
    `product`: that script ends when its reader is gone.
    """
    keep_printing(product)
    own = read_keys(namespace["__file__"], namespace)
    others = read_keys(also) if also else {}
    keys = {**own, **{name: key for name, key in others.items() if name not in own}}
    words = sys.argv[1:] if argv is None else argv
    if "--help" in words or "-h" in words:
        print_help(namespace, keys, verb, verbs, paths)
        raise SystemExit(0)
    values = CommandLine(words, keys, namespace["__file__"], verb, verbs, paths).read()
    if given is not None:
        given.update(values)
    values = {name: key.default for name, key in keys.items()} | values
    if verb and values[verb] not in (*verbs, keys[verb].default):
        fail(f"{verb} is one of {', '.join(verbs)}, not {values[verb]!r}")
    namespace.update({name: values[name] for name in own})
    return values
