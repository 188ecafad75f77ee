"""
One setting, called a key: its type, the range of its numbers, and its value from text on the command line.

configurator.py reads the keys of a script and uses Key.check for every value that a user gives.
"""

import difflib
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
SCALARS = {"bool": bool, "int": int, "float": float, "str": str}
TAKES = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a string"}
KIND = re.compile(r"S|tuple\[(S, \.\.\.|S(, S)*)\]".replace("S", "(bool|int|float|str)"))

# The interval that a number must lie in, by the name of its key: in all scripts, or in one as "script.name".
# An end that is "inf" means finite, and for a whole number at most 64 bits.
INTERVALS = {
    "[0, inf)": """batch_size bin_size block_size chunk context_iters context_start crowd drain eval_iters grad_clip
        init_std kv_memory limit max_queue mean grow
        logit_softcap loss_tolerance lr_decay_iters max_chars memory_tolerance min_chars min_lr mlp_width n_kv_head
        peak_flops permutations probe_interval rope_factor rows sample_tokens save_interval save_minutes seed seeds
        speed_tolerance spike_z temperature tokens_per_step top_k vocab_size warm_up warmup_iters watch
        weight_decay""",
    "[1, inf)": """aborts answer_lengths
        batches chat.rope_factor clients count eval_interval eval.batch_size gpu_batches gpu_pieces gpus
        gradient_accumulation_steps held_out kv_heads lengths log_interval max_iters max_new_tokens max_rewinds
        n_embd n_head n_layer new_tokens num_samples pp_size prefetch processes prompts reads rounds
        sample.rope_factor shape sizes tokens tp_size train.block_size train.rope_factor trials updates worlds
        keep_checkpoints longest max_body max_requests prompt_lengths reply_tokens requests""",
    "[2, inf)": "eval.lengths spike_window",
    "[2, 9]": "digits",
    "[3, 32]": "letters",
    "(0, inf)": "largest learning_rate muon_learning_rate norm_eps repetition_penalty rope_theta seconds timeout",
    "[0, 1]": "depths min_p",
    "(0, 1]": "efficiency threshold top_p wsd_decay_frac",
    "[0, 1)": "beta1 beta2 dropout muon_momentum reserve",
    "(0, 1)": "val_fraction",
    "[2, 32]": "alternatives",
    "[0, 3]": "zero_stage",
    "[0, 1024]": "threads workers",
    "[0, 65535]": "port",
    "[1, 1024]": "bench.workers loader_threads",
}
RANGES = {name: interval for interval, names in INTERVALS.items() for name in names.split()}

# Keys whose values are paths: a "~" at the start becomes the home folder, and an empty path is an error.
PATHS = set("""baseline config data dataset folders html init_from input into load models out out_dir paths plot png
    prompts reference runs tokenizer""".split())

QUOTED = re.compile(r"""[ \t]*(["'])((?:(?!\1).|\1\1)*)\1\s*(?=,|\Z)""", re.DOTALL)  # an element of a tuple


def fail(message) -> NoReturn:
    """End the run for a reason that the user can mend: one line on stderr, exit code 2.

    Under torchrun, rank 0 prints immediately, the first rank of each other machine after 3 seconds, all other ranks
    after 6. So an error of all ranks is printed once, because torchrun ends the ranks that still wait. An error of a
    single rank is printed all the same.
    """
    # a rank that is not a number counts as 0: the message may be about that very mistake
    seconds = 0
    for name in ("RANK", "LOCAL_RANK"):
        if os.environ.get(name, "").strip().lstrip("0").isdigit():
            seconds += 3
    time.sleep(seconds)
    print("error:", " ".join(str(message).splitlines()), file=sys.stderr)
    raise SystemExit(2)


def nearest(word, names, prefix=""):
    """The end of an error about an unknown word: the name that may have been meant, or ""."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


@dataclass
class Key:
    """A setting of a script, as configurator.read_keys finds it."""

    name: str
    kind: str  # bool, int, float, str, tuple[float, float] (exactly two) or tuple[float, ...] (any number)
    optional: bool  # the annotation allows None
    default: Any
    comment: str = ""
    heading: tuple[str, ...] = ()  # the comment lines above
    interval: str = ""  # that a number must lie in, such as "[0, 1)"; empty: any number

    def check(self, value, where, parse=False):
        """-> `value` in this key's type. With `parse`, `value` is text from the command line.

        Ends the run if it does not fit. The error begins with `where`, such as config.py:3 or --key.
        """
        try:
            if self.optional and (value is None or parse and value.lower() == "none"):
                return None
            result = as_kind(self.kind, parse_text(self.kind, value) if parse else value)
        except (ValueError, OverflowError):
            fail(f"{where}: {self.name} takes {self.accepted()}, not {value!r}")
        for number in result if isinstance(result, tuple) else (result,):
            if self.interval and not isinstance(number, (bool, str)):
                wrong = range_error(number, self.interval)
                place = "" if parse else f"{where}: "
                if wrong:
                    fail(f"{place}{self.name}={show(result)} must {wrong}")
        if self.name in PATHS and "str" in self.kind:
            return self.check_path(result, where, parse)
        return result

    def accepted(self):
        """The values that this key takes, in words."""
        words = TAKES.get(self.kind) or f"{self.kind}, such as {show(self.default)}"
        if self.kind == "tuple[str, ...]":
            example = show(self.default)
            words = f"""strings with commas between them ('", "' is one), such as {example}"""
        if self.optional:
            words += " or none"
        return words

    def check_path(self, value, where, parse):
        """`value`, a path or a tuple of paths, with ~ expanded. Ends the run for an empty path."""
        if isinstance(value, tuple):
            return tuple(self.check_path(part, where, parse) for part in value)
        if value == "" and parse:
            fail(f"--{self.name}= is empty: an unset variable?")
        if value == "" and self.default:
            fail(f"{where}: {self.name} is empty")
        parts = value.split(",") if self.name == "dataset" else [value]  # a mix a:0.7,b:0.3
        return ",".join(map(expand_home, parts))


def expand_home(path):
    """`path` with ~ or ~user at its start replaced by the home folder: a shell does not do it in --key=~/x."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        home = path.split("/")[0]
        fail(f"{path}: there is no home folder {home}; ./{path} is the file of that name")
    return expanded


def range_of(script, name):
    """The interval for a key of one of this project's scripts; "" for a script elsewhere."""
    home = os.path.dirname(os.path.realpath(__file__))
    if not os.path.realpath(script).startswith(os.path.join(home, "")):
        return ""
    stem = os.path.splitext(os.path.basename(script))[0]
    return RANGES.get(f"{stem}.{name}") or RANGES.get(name, "(-inf, inf)")


def range_error(number, interval):
    """What `number` must do to lie in `interval`, such as "be at least 1"; "" if it does."""
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
    if math.isfinite(number):
        return f"be {floor}"
    return f"be {floor} and finite" if math.isfinite(least) else "be finite"


def as_kind(kind, value):
    """`value` as `kind`. Raises ValueError if the conversion would lose something; 1 and 1.0 give the same record."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()  # a Python number, or the list of an array
    if kind.startswith("tuple") and isinstance(value, (tuple, list)):
        kinds = element_kinds(kind, len(value))
        return tuple(as_kind(k, v) for k, v in zip(kinds, value, strict=True))
    if isinstance(value, bool):  # first, as bool is a subclass of int
        fits = kind == "bool"
    elif kind == "int":
        fits = isinstance(value, int) or isinstance(value, float) and value.is_integer()
    elif kind == "float":
        fits = isinstance(value, (int, float))
    else:
        fits = kind == "str" and isinstance(value, str)
    if not fits:
        raise ValueError
    return SCALARS[kind](value)


def parse_text(kind, text):
    """The Python value that `text` spells. A string is the text itself. Raises ValueError."""
    if kind.startswith("tuple"):
        return parse_tuple(kind, text)
    if kind == "int" and re.search(r"[.e]", text.lower()):  # 1e6; as_kind refuses 1.5
        return float(text)
    if kind == "bool":
        return BOOLS.get(text.lower(), text)
    return SCALARS[kind](text)


def parse_tuple(kind, text):
    """The tuple that `text` spells, with or without brackets around it. An empty tuple is (). Raises ValueError."""
    blank = " \t" if "str" in kind else None  # a newline may be a string; around a number it is white space
    text = text.strip(blank)
    if not text:
        raise ValueError
    if text[0] + text[-1] in ("()", "[]"):
        text = text[1:-1].strip(blank)
    parts = split_parts(text, blank)
    kinds = element_kinds(kind, len(parts))
    return tuple(parse_text(k, part) for k, part in zip(kinds, parts, strict=True))


def split_parts(text, blank):
    """The parts of `text` between its commas, stripped of `blank` characters. One comma may follow the last part.

    Quotes around a part protect its commas, newlines and blanks; a doubled quote inside stands for one.
    """
    parts = []
    at = 0
    while text[at:].strip(blank):
        quoted = QUOTED.match(text, at)
        if quoted:
            quote = quoted[1]
            parts.append(quoted[2].replace(2 * quote, quote))
            at = quoted.end() + 1
            continue
        part = text[at:].partition(",")[0]
        if not part.strip(blank) and blank:
            raise ValueError  # nothing between two commas
        parts.append(part.strip(blank))
        at += len(part) + 1
    return parts


def element_kinds(kind, count):
    """The kind of each of the `count` elements of a tuple of this kind."""
    kinds = kind.removeprefix("tuple[").removesuffix("]").split(", ")
    return kinds[:1] * count if kinds[-1] == "..." else kinds


def kind_of(value):
    """The kind of a default that has no annotation."""
    if not isinstance(value, (tuple, list)):
        return type(value).__name__
    kinds = {kind_of(v) for v in value} or {"str"}  # () holds strings unless an annotation says otherwise
    element = "float" if kinds == {"int", "float"} else "|".join(kinds)
    return f"tuple[{element}, ...]"


def show(value):
    """`value` as a user would type it after --key=."""
    if isinstance(value, tuple):
        return ",".join(show_part(part) for part in value) or "()"
    text = "none" if value is None else str(value)
    return text if text.isprintable() and " " not in text else repr(text)


def show_part(value):
    """An element of a tuple as a user would type it: in quotes if parse_text would change it without them."""
    text = str(value)
    if isinstance(value, str) and not re.fullmatch(r"[^\s,\"'()\[\]]+", text):
        return '"' + text.replace('"', '""') + '"'
    return text
