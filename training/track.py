"""
Trackers: what metrics.jsonl gets goes to wandb, trackio or TensorBoard, too.

    tracker=wandb         wandb_project, wandb_run_name; offline by itself where there is no key or no network
    tracker=trackio       the same names, in trackio's own folder: trackio show
    tracker=tensorboard   out_dir/tensorboard: tensorboard --logdir out

A run never depends on one: what fails there is said once, and waits are bounded. A resumed run goes on under the same
id, which lies in out_dir/tracker_id. The packages are in the pip extra `track`.
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
SECONDS = 5  # for a server to answer at all; what wandb waits for at the start and the end are a few times this


class Tracker:
    """One tracker of one run, or none: kind "" does nothing. `warn` is called at most once, and nothing is raised."""

    def __init__(self, kind, run_dir, config, project, name, step=0, warn=print):
        """`step` updates were done before: above 0 a run that goes on."""
        self.kind, self.warn, self.where = kind, warn, ""
        self.send = self.end = None  # send(values, step), end(failed)
        if not kind:
            return
        begin = {"wandb": begin_wandb, "trackio": begin_trackio, "tensorboard": begin_tensorboard}[kind]
        begun = self.tried(lambda: begin(Path(run_dir), config, project, name, step))
        if begun:
            self.send, self.end, self.where = begun
            atexit.register(self.finish, failed=True)  # of an error that nobody expected

    def log(self, record):
        """A record of metrics.jsonl."""
        if self.send:
            values = flat(record)
            step = values.pop("step")
            self.tried(lambda: self.send(values, step))

    def finish(self, failed=False):
        """The run has ended."""
        if self.end:
            end, self.send, self.end = self.end, None, None
            self.tried(lambda: end(failed))

    def tried(self, call):
        try:
            return call()
        except Exception as e:
            self.send = None
            missing = isinstance(e, ModuleNotFoundError)
            why = f"{e.name} is not installed: pip install -e '.[track]'" if missing else one_line(e)
            self.warn(f"tracker={self.kind} does not work ({why}); everything is in metrics.jsonl")
            return None


def one_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "") or type(error).__name__


def flat(record):
    """A record of metrics.jsonl -> its finite numbers by one name each: grad_norms/embed, attn_entropy/layer_0."""
    found = {}
    for key, value in record.items():
        if isinstance(value, (list, tuple)):
            value = {f"layer_{i}": one for i, one in enumerate(value)}
        if isinstance(value, dict):
            found |= {f"{key}/{name}": one for name, one in flat(value).items()}
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[key] = value
    return found


def id_of(run_dir, resumed):
    """The id under which the tracker knows this run; a run that begins anew has a new one."""
    path = run_dir / "tracker_id"
    if not (resumed and path.exists()):
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


# -----------------------------------------------------------------------------
# wandb


def begin_wandb(run_dir, config, project, name, step):
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which goes over the network in offline mode, too
    import wandb

    mode, why = wandb_mode(wandb)
    wanted = {"console": "off", "silent": True, "init_timeout": 4.0 * SECONDS, "login_timeout": 4.0 * SECONDS,
              "finish_timeout": 4.0 * SECONDS}  # the last of newer versions
    settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})
    common = {"project": project, "name": name, "id": id_of(run_dir, step), "dir": os.fspath(run_dir), "config": config,
              "allow_val_change": True, "settings": settings}
    try:
        run = wandb.init(mode=mode, **common, **({"resume": "allow"} if mode == "online" else {}))
    except Exception as e:  # a wrong key, a server that is down
        if mode != "online":
            raise
        mode, why = "offline", one_line(e)
        wandb.teardown()  # its process still holds the run's id
        run = wandb.init(mode=mode, **common)
    run.define_metric("*", step_metric="step")

    def send(values, step):  # as a value: wandb's own count would refuse the steps that a resumed run repeats
        run.log({**values, "step": step})

    where = f"wandb {run.url}" if mode == "online" else f"wandb {mode} ({why}); wandb sync {Path(run.dir).parent}"
    return send, lambda failed: run.finish(exit_code=int(failed)), where


def wandb_mode(wandb):
    """-> ("online" | "offline" | another that WANDB_MODE asks for, why)"""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"], "as WANDB_MODE says"
    settings = wandb.setup().settings  # with those of the environment and of its files
    if not has_key(settings):
        return "offline", "no key: wandb login"
    if not reachable(settings.base_url):
        return "offline", f"no answer from {settings.base_url}"
    return "online", ""


def has_key(settings):
    """Whether wandb need not ask for a key: it is in its settings, the environment, or ~/.netrc."""
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError, TypeError):
            found = netrc.netrc(os.path.expanduser(path)).hosts
            if urlsplit(settings.base_url).hostname in found:
                return True
    return False


def reachable(url):
    """Whether a server answers, whatever it says. In a thread, as looking up its name heeds no time limit."""
    answered = threading.Event()

    def ask():
        with contextlib.suppress(Exception):
            try:
                urllib.request.urlopen(url, timeout=SECONDS).close()
            except urllib.error.HTTPError:
                pass  # an answer, too
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(SECONDS)


# -----------------------------------------------------------------------------
# trackio and TensorBoard


def begin_trackio(run_dir, config, project, name, step):
    import trackio

    with contextlib.redirect_stdout(io.StringIO()):
        run = trackio.init(project=project, name=f"{name}-{id_of(run_dir, step)}", config=config, resume="allow",
                           embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def end(failed):
        with contextlib.redirect_stdout(io.StringIO()):
            run.finish()

    return lambda values, step: run.log(values, step=step), end, f"trackio; trackio show --project {project}"


def begin_tensorboard(run_dir, config, project, name, step):
    if not importlib.util.find_spec("tensorboard"):
        raise ModuleNotFoundError(name="tensorboard")  # torch's own error does not name it
    from torch.utils.tensorboard import SummaryWriter

    folder = run_dir / "tensorboard"
    writer = SummaryWriter(os.fspath(folder), purge_step=step + 1 if step else None)  # what a resumed run repeats

    def send(values, step):
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return send, lambda failed: writer.close(), f"tensorboard --logdir {folder}"
