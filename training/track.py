"""
Trackers: send what metrics.jsonl gets to wandb, trackio or TensorBoard as well.

    tracker=wandb         wandb_project, wandb_run_name; offline by itself where there is no key or no network
    tracker=trackio       the same names, in trackio's own folder: trackio show
    tracker=tensorboard   out_dir/tensorboard: tensorboard --logdir out

A run never depends on its tracker: a failure is one warning, and every wait has a limit. A resumed run keeps its id,
which is in out_dir/tracker_id. The packages are in the pip extra `track`.
"""

import atexit
import contextlib
import importlib.util
import io
import math
import netrc
import os
import threading
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from urllib.parse import urlsplit

TRACKERS = ("", "wandb", "trackio", "tensorboard")
SECONDS = 5  # how long a server may take to answer; at its start and end wandb may wait a few times as long


class Tracker:
    """The tracker of a run; kind "" does nothing. It calls `warn` at most once, and never raises."""

    def __init__(self, kind, run_dir, config, project, name, step=0, warn=print):
        """`step` is the number of updates so far: above 0 the run is resumed."""
        self.kind = kind
        self.warn = warn
        self.where = ""  # where to look at it, for people
        self.send = None  # send(values, step)
        self.end = None  # end(failed)
        if not kind:
            return
        kinds = {"wandb": begin_wandb, "trackio": begin_trackio, "tensorboard": begin_tensorboard}
        begun = self.try_call(lambda: kinds[kind](Path(run_dir), config, project, name, step))
        if begun:
            self.send, self.end, self.where = begun
            atexit.register(self.finish, failed=True)  # after an error that nobody expected

    def log(self, record):
        """Send a record of metrics.jsonl."""
        if self.send:
            values = flat(record)
            step = values.pop("step")
            self.try_call(lambda: self.send(values, step))

    def finish(self, failed=False):
        """Close the tracker at the end of the run, once."""
        end = self.end
        self.send = None
        self.end = None
        if end:
            self.try_call(lambda: end(failed))

    def try_call(self, call):
        """-> the result of `call`. After an error, it warns, returns None, and sends no more records."""
        try:
            return call()
        except Exception as e:
            self.send = None
            reason = one_line(e)
            if isinstance(e, ModuleNotFoundError):
                reason = f"{e.name} is not installed: pip install -e '.[track]'"
            self.warn(f"tracker={self.kind} does not work ({reason}); everything is in metrics.jsonl")
            return None


def one_line(error):
    """The first line of an error's message that is not empty, or else the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def flat(record):
    """The finite numbers in a record of metrics.jsonl, each with a name such as grad_norms/embed, attn_entropy/layer_0.
    """
    numbers = {}
    for key, value in record.items():
        if isinstance(value, (list, tuple)):
            value = {f"layer_{i}": item for i, item in enumerate(value)}
        if isinstance(value, dict):
            numbers |= {f"{key}/{name}": item for name, item in flat(value).items()}
        elif isinstance(value, (int, float)) and math.isfinite(value):
            numbers[key] = value
    return numbers


def id_of(run_dir, resumed):
    """The id by which the tracker knows this run. A resumed run keeps its id; any other gets a new id."""
    path = run_dir / "tracker_id"
    if not (resumed and path.exists()):
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


# -----------------------------------------------------------------------------
# wandb


def begin_wandb(run_dir, config, project, name, step):
    """-> (send(values, step), end(failed), where a person can look at it). Raises wandb's errors."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports use the network even in offline mode
    import wandb

    mode, reason = wandb_mode(wandb)
    options = {"project": project, "name": name, "id": id_of(run_dir, step), "dir": os.fspath(run_dir),
               "config": config, "allow_val_change": True, "settings": wandb_settings(wandb)}
    try:
        run = wandb.init(mode=mode, **options, **({"resume": "allow"} if mode == "online" else {}))
    except Exception as e:  # a wrong key, a server that is down
        if mode != "online":
            raise
        mode = "offline"
        reason = one_line(e)
        wandb.teardown()  # its process still holds the run's id
        run = wandb.init(mode=mode, **options)
    run.define_metric("*", step_metric="step")

    def send(values, step):
        run.log({**values, "step": step})  # a value: wandb's own count would refuse steps that a resumed run repeats

    def end(failed):
        run.finish(exit_code=int(failed))

    if mode == "online":
        where = f"wandb {run.url}"  # offline, asking for the URL causes a warning
    else:
        where = f"wandb {mode} ({reason}); wandb sync {Path(run.dir).parent}"
    return send, end, where


def wandb_settings(wandb):
    """Silent, and with a limit for every wait. Older versions of wandb do not know finish_timeout."""
    seconds = 4.0 * SECONDS
    wanted = {"console": "off", "silent": True, "init_timeout": seconds, "login_timeout": seconds,
              "finish_timeout": seconds}
    known = {key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}
    return wandb.Settings(**known)


def wandb_mode(wandb):
    """-> (mode, reason): "online", "offline", or whatever the environment variable WANDB_MODE says."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"], "as WANDB_MODE says"
    settings = wandb.setup().settings  # includes the environment's and those of its files
    if not has_key(settings):
        return "offline", "no key: wandb login"
    if not reachable(settings.base_url):
        return "offline", f"no answer from {settings.base_url}"
    return "online", ""


def has_key(settings):
    """Whether wandb finds a key without asking for one: in its settings, the environment, or ~/.netrc."""
    variables = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if settings.api_key or any(os.environ.get(name) for name in variables):
        return True
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError, TypeError):
            hosts = netrc.netrc(os.path.expanduser(path)).hosts
            if urlsplit(settings.base_url).hostname in hosts:
                return True
    return False


def reachable(url):
    """Whether a server answers, whatever it answers. A thread asks, because looking up a name has no time limit."""
    answered = threading.Event()

    def ask():
        with contextlib.suppress(Exception):
            try:
                urllib.request.urlopen(url, timeout=SECONDS).close()
            except urllib.error.HTTPError:
                pass  # an error is an answer
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(SECONDS)


# -----------------------------------------------------------------------------
# trackio and TensorBoard


def begin_trackio(run_dir, config, project, name, step):
    """As begin_wandb. trackio's own lines are not shown."""
    import trackio

    with contextlib.redirect_stdout(io.StringIO()):
        run = trackio.init(project=project, name=f"{name}-{id_of(run_dir, step)}", config=config, resume="allow",
                           embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def send(values, step):
        run.log(values, step=step)

    def end(failed):
        with contextlib.redirect_stdout(io.StringIO()):
            run.finish()

    return send, end, f"trackio; trackio show --project {project}"


def begin_tensorboard(run_dir, config, project, name, step):
    """As begin_wandb."""
    if not importlib.util.find_spec("tensorboard"):
        raise ModuleNotFoundError(name="tensorboard")  # torch's own error does not name the package
    from torch.utils.tensorboard import SummaryWriter

    folder = run_dir / "tensorboard"
    purge_step = step + 1 if step else None  # a resumed run repeats the steps from here on
    writer = SummaryWriter(os.fspath(folder), purge_step=purge_step)

    def send(values, step):
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    def end(failed):
        writer.close()

    return send, end, f"tensorboard --logdir {folder}"
