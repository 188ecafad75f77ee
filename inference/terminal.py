"""
What chat.py reads from a keyboard or a pipe, what it prints to a terminal or a file, and how a script ends whose output
is its product.
"""

import contextlib
import os
import signal
import sys

from configurator import fail
from device import memory_is_full
from files import close_stdout, decode_text

FENCE = b'"""'
# Characters that a terminal obeys instead of showing: the control characters C0 and C1, except line end and tab; DEL
CONTROL = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})


def is_terminal(file):
    """Whether an open file is a terminal; None, a file that was closed when Python started, is none."""
    return file is not None and file.isatty()


def show(text):
    """Print a piece of an answer."""
    print(text.translate(CONTROL) if is_terminal(sys.stdout) else text, end="", flush=True)


def note(text):
    """Print to stderr, dim on a terminal with colours, what is no answer."""
    text = text.translate(CONTROL)
    if is_terminal(sys.stderr) and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        text = f"\033[2m{text}\033[0m"
    print(text, file=sys.stderr)


def complain(error):
    """Print an error that does not end the program, as one line."""
    print("error:", " ".join(str(error).splitlines()).translate(CONTROL), file=sys.stderr)


@contextlib.contextmanager
def ends_in_one_line(product, advice):
    """Around a script whose output is its `product`, in words: Ctrl-C and a reader that is gone end it quietly, a full
    disk and a full memory with one line. `advice`: what takes less memory."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # | head
        close_stdout()
    except OSError as e:  # a full disk under it
        close_stdout()
        fail(f"{product} cannot be written: {e.strerror or e}")
    except (MemoryError, RuntimeError) as e:
        if full := memory_is_full(e):
            fail(f"{full}: {advice}")
        raise


class Keyboard:
    """Reads messages. Ctrl-C ends the reading by KeyboardInterrupt. At any other time it is only noted in `pressed`, so
    that no step of the engine is left half done."""

    def __init__(self):
        self.reading = False
        self.begun = False  # part of a message was typed
        self.pressed = False  # Ctrl-C, and nothing has answered to it yet
        self.terminated = False  # by SIGTERM
        self.readline = self.import_readline()
        if is_terminal(sys.stdin):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # read_message names what is not UTF-8

    def import_readline(self):
        """readline, which from then on edits what input() reads, or None. Where there is no terminal it would print."""
        if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
            return None
        try:
            import readline
        except ImportError:  # Windows
            return None
        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")  # lines that are pasted arrive as one
        return readline

    @contextlib.contextmanager
    def signals(self):
        """Within, Ctrl-C does what the class says, and SIGTERM ends the program in order: the terminal recovers."""
        earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGINT, self.interrupt)
        signal.signal(signal.SIGTERM, self.terminate)
        try:
            yield
        finally:
            if self.terminated:  # a second SIGTERM must not cut the end short
                earlier[signal.SIGTERM] = signal.SIG_IGN
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def terminate(self, number, frame):
        self.terminated = True
        sys.exit(128 + number)

    def interrupt(self, number, frame):
        if self.reading:
            self.begun |= bool(self.readline and self.readline.get_line_buffer())
            raise KeyboardInterrupt
        self.pressed = True

    def read_line(self, mark):
        """The next line as bytes, without its end; several lines if they were pasted. Raises EOFError."""
        if not is_terminal(sys.stdin):
            line = sys.stdin.buffer.readline() if sys.stdin else b""
        elif is_terminal(sys.stdout):
            return input(mark).encode("utf-8", "surrogateescape")
        else:
            print(mark, end="", flush=True, file=sys.stderr)
            line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return line.removesuffix(b"\n").removesuffix(b"\r")

    def read_lines(self):
        """The lines of the next message, and whether it was a block, whose first line cannot be a command."""
        lines = [self.read_line("> ")]
        self.begun = True
        block = lines[0].strip() == FENCE
        if block:
            lines = []
        with contextlib.suppress(EOFError):  # the end of the input ends a message too
            while block or (lines[-1].endswith(b"\\") and b"\n" not in lines[-1]):
                if not block:
                    lines[-1] = lines[-1].removesuffix(b"\\")
                line = self.read_line("... ")
                if block and line.strip() == FENCE:
                    break
                lines.append(line)
        return lines, block

    def read_message(self):
        """-> (text, whether it is a command). Raises EOFError, KeyboardInterrupt, and ValueError for bytes that are not
        UTF-8."""
        self.begun = False
        try:
            self.reading = True
            if self.pressed:  # after the last answer, and before this line
                raise KeyboardInterrupt
            lines, block = self.read_lines()
        finally:
            self.reading = self.pressed = False
        text = decode_text(b"\n".join(lines), "the message")
        return text, text.startswith("/") and not block
