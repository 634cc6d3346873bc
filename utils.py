"""What both stages share: errors, runtime, run directories, SSIM."""

import argparse
import contextlib
import datetime
import hashlib
import inspect
import json
import math
import os
import platform
import signal
import sys
import threading
import zlib
from dataclasses import MISSING, asdict, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import distributed

import modules
from modules import processes

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

FORMAT_VERSION = 4  # of config.json and checkpoint.pt; 4 has several optimizers
READABLE = range(1, FORMAT_VERSION + 1)
MOST_PIXELS = 1 << 26  # of a slice: a small file may ask for any number
STAGES = {  # name of a stage: its configuration and its network
    "vq_vae": (modules.VQVAEConfig, modules.VQVAE),
    "pixelcnn": (modules.PixelCNNConfig, modules.GatedPixelCNN),
}

# ------------------------------------------------------------------------------------------------
# Errors and arguments
# ------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend: one line that says which file, what is wrong, what to do."""


class Stopped(BaseException):
    """A signal ended a command that had time to save its work; args: its number, what to say.

    No `Exception`, as KeyboardInterrupt is none: it ends whatever is being tried.
    """


class Heedless:
    """A stream to write to, whether anybody reads or not: work is worth more than its report.

    Ctrl-C ends a `tee` behind a command before the command; a disk may be full of its messages.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run_main(main):
    """Run a command; a `UserError` becomes one line on stderr and exit status 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is not None:  # as it is where it was closed
            setattr(sys, name, Heedless(getattr(sys, name)))

    def stop(number, _):  # as Ctrl-C does: temporary files are removed, other processes ended
        raise Stopped(number, f"stopped; {again()} goes on from what was saved")

    try:
        signal.signal(signal.SIGTERM, stop)
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        number, text = stopped.args
        print(f"\n{text}", file=sys.stderr)
        sys.exit(128 + number)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error) or "the system has no more"
        print(
            f"error: out of memory ({reason}); in training try a smaller --batch_size, "
            "in decoding fewer --workers",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nstopped; {again()} goes on from what was saved", file=sys.stderr)
        sys.exit(130)


def first_line(error):
    return str(error).strip().split("\n")[0]


def is_out_of_memory(error):
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(w in first_line(error) for w in words)


def unusable(path, error, what):
    """What to raise where a file led to `error`; that is not always the fault of the file.

    Args:
        what: to say if it is, with {} for the reason.
    """
    if isinstance(error, UserError) or is_out_of_memory(error):
        return error
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"{path}: cannot be read ({error.strerror})")
    return UserError(f"{path}: {what.format(first_line(error) or type(error).__name__)}")


def again():
    """What goes on with a run: --fresh a second time would delete it."""
    return "the same command" + (", without --fresh," if "--fresh" in sys.argv else "")


@contextlib.contextmanager
def noted_signals():
    """A list to which the first Ctrl-C or SIGTERM adds its number; a second one acts as ever."""
    noted, before = [], {}

    def note(number, _):
        noted.append(number)
        if processes()[1] == 1:  # torchrun passes one signal on twice, and ends what hangs itself
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this update; once more to leave at once\n")
            restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()


@contextlib.contextmanager
def only_one(path):
    """Hold the lock file `path`, or raise a UserError that names the process which holds it.

    Where a file system has no locks the block runs without one.
    """
    if fcntl is None or processes()[0] > 0:  # no such locks on this system, or not ours to hold
        yield
        return
    make_folder(path.parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # a stranger's link leads anywhere
    try:
        file = open(os.open(path, flags), "rb+", buffering=0)  # noqa: SIM115, closed below
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read(300).decode("utf8", "replace").strip() or "that has just started"
            text = f"{path.parent}: process {who} is at work here; wait for it, or choose another"
            raise UserError(f"{text} folder") from None
        except OSError as error:
            text = f"note: {path.parent} cannot be locked ({error.strerror}); take care that no"
            print(text, "other process is at work there", file=sys.stderr)
        file.truncate(0)
        with contextlib.suppress(OSError):  # a full disk is no reason not to say so properly later
            file.write(f"{os.getpid()} of {platform.node()}".encode())
        try:
            yield
        finally:
            file.truncate(0)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help line that does not name it, and leaves room for the flags."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=100)

    def _get_help_string(self, action):
        is_set = action.default is not None and action.default is not False
        if not is_set or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def at_least(minimum, kind=int):
    """An argparse type: a number not below `minimum`."""

    def parse(text):
        value = kind(text)
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {minimum}")
        return value

    parse.__name__ = kind.__name__
    return parse


def data_arguments(args, load, stored=None):
    """Arguments of `load`: those a run was trained with, if any, beaten by the flags in `args`."""
    known = inspect.signature(load).parameters
    given = {name: value for name, value in vars(args).items() if name in known}
    if given.get("data", "phantom") != "phantom":
        given["data"] = os.path.abspath(given["data"])  # so that a run can be used from anywhere
    return {"data": "phantom"} | (stored or {}) | given


def announce(arguments):
    """Say before anything else that the data are not patients, where they are not."""
    if arguments["data"] == "phantom":
        print("PHANTOM: the built-in synthetic pelvis; no slice is of a patient", flush=True)


def data_name(config):
    """The data a run was made with, for logs, titles and file headers."""
    return "PHANTOM (synthetic)" if config["data"]["is_phantom"] else config["data"]["name"]


# ------------------------------------------------------------------------------------------------
# Runtime: device, precision, versions
# ------------------------------------------------------------------------------------------------


def add_seed(group):
    text = "of everything random but the split"
    group.add_argument("--seed", type=_seed, metavar="N", default=0, help=text)


def _seed(text):
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to {2**31 - 1}")
    return value


def generator(seed, i):
    """The i-th random generator of a seed, on the CPU; no two of one seed are alike.

    torch takes only the lowest 32 bits of a generator's seed.
    """
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed((start + i) % 2**32)


def add_runtime_arguments(parser, precision=True):
    """--device, and --precision where the command lets the user choose it; returns the group."""
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute"
    )
    if precision:
        group.add_argument(
            "--precision",
            choices=["auto", "fp32", "bf16"],
            default="auto",
            help="arithmetic in training; auto is bf16 where the hardware has it",
        )
    return group


def pick_device(name):
    """"auto" -> cuda, mps or cpu, whichever is there first; others must be there."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: this machine has no such device; try --device auto")
    return torch.device(name)


def pick_precision(name, device):
    """"auto" -> "bf16" where the hardware computes in it, else "fp32"."""
    if name == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    return name


def autocast(device, precision):
    """The autocast context of a precision, "fp32" or "bf16"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _has_bf16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return False


@contextlib.contextmanager
def joined(name):
    """Join the processes that torchrun started, if it did, and yield the device of this one.

    All but the first keep silent.
    """
    device = pick_device(name)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    # takes the group that is there as it is imported for a default: were that ours, it would never
    # be destroyed, and a process whose gloo threads outlive its interpreter aborts
    import torch.distributed.nn  # noqa: F401

    backend = "gloo"
    if device.type == "cuda":
        there = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= there:
            raise UserError(f"torchrun: more processes than the {there} devices of this machine")
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=datetime.timedelta(hours=4))
    try:
        with contextlib.ExitStack() as stack:
            if processes()[0] > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield device
    finally:
        distributed.destroy_process_group()


def wait_for_all():
    if processes()[1] > 1:
        distributed.barrier()


@contextlib.contextmanager
def first_goes_first():
    """The first process runs the block before the others do: they find what it has written.

    If it fails the others end without a word: it has said why.
    """
    rank, n_processes = processes()
    is_well = torch.zeros(1, dtype=torch.int64)
    if rank > 0:
        distributed.broadcast(is_well, 0)
        if not is_well:
            sys.exit(2)
    try:
        yield
        is_well += 1
    finally:
        if rank == 0 and n_processes > 1:
            distributed.broadcast(is_well, 0)


def share(n):
    """This process's part of n things, as a slice."""
    rank, n_processes = processes()
    return slice(n * rank // n_processes, n * (rank + 1) // n_processes)


def gathered(x):
    """Tensors (n, ...), one from each process -> all of them, in order, on the CPU of each."""
    x, n_processes = x.cpu(), processes()[1]
    if n_processes == 1:
        return x
    parts = [None] * n_processes
    distributed.all_gather_object(parts, x)
    return torch.cat(parts)


def mean_of_all(values):
    """Numbers, as many from each process -> the mean of each over the processes."""
    n_processes = processes()[1]
    if n_processes == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(total)
    return (total / n_processes).tolist()


def is_agreed(value):
    """Whether all processes have the same value, of what JSON can hold."""
    number = zlib.crc32(json.dumps(value, sort_keys=True).encode())
    return len(set(gathered(torch.tensor([number])).tolist())) == 1


def versions():
    """Versions of what a number may depend on."""
    packages = ("torch", "numpy", "scikit-image", "scipy", "nibabel", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


# ------------------------------------------------------------------------------------------------
# Run directories: RUN/vq_vae and RUN/pixelcnn, each with config.json and model.safetensors
# ------------------------------------------------------------------------------------------------


def write_atomically(path, write):
    """Call `write(temporary_path)`, then move it to `path`: a reader sees all of it or none."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a stranger's link leads anywhere
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a power cut may leave the new name without its content
        os.replace(temporary, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        text = f"{path}: cannot be written ({first_line(error)}); is the disk full?"
        raise UserError(text) from error
    finally:
        with contextlib.suppress(OSError):  # there is none to remove where nothing can be written
            temporary.unlink()


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{path}: cannot be made ({error.strerror}); choose another folder"
        raise UserError(message) from error


def write_json(path, value):
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        message = f"{path}: cannot be read ({error}); train this stage again with --fresh"
        raise UserError(message) from error


def save_model(model, path):
    """The weights alone; with config.json beside them, all that `load_model` needs."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    packed = safetensors.torch.save(tensors)  # save_file would hide the file from other users
    write_atomically(path, lambda temporary: temporary.write_bytes(packed))


def load_config(run_dir, stage):
    """The config.json of a trained stage.

    Raises:
        UserError: the stage has not been trained in `run_dir`, or its files are not ours.
    """
    directory = Path(run_dir) / stage
    if not all((directory / name).exists() for name in ("config.json", "model.safetensors")):
        raise UserError(
            f"{run_dir}: no trained {stage} here{_others(run_dir, stage)}; "
            f"run: python train.py --mode {stage} --run_dir {run_dir}"
        )
    return read_config(directory)


def read_config(directory):
    """The config.json of a stage's directory; a UserError if it is not as this code writes it.

    What a run has no word for, since it is older, is as the default of its model says; its
    optimizer was Adam.
    """
    path = directory / "config.json"
    config = read_json(path)
    check_format(path, config.get("format_version") if isinstance(config, dict) else None)
    if not _is_ours(config) or config.get("stage") != directory.name:
        raise UserError(f"{path}: not as this code writes it; train this stage again with --fresh")
    older = {f.name: f.default for f in fields(STAGES[directory.name][0])}
    config["model"] = {k: v for k, v in older.items() if v is not MISSING} | config["model"]
    config["train"] = {"optimizer": "adam"} | config["train"]
    return config


def check_format(path, found):
    """Raise a UserError unless `found` is a format version that this code reads."""
    if type(found) is not int or found not in READABLE:
        raise UserError(
            f"{path}: format version {found}, this code reads {READABLE[0]} to {READABLE[-1]}; "
            "update the code or train again with --fresh"
        )


def _is_ours(config):
    """Whether a config.json, perhaps from a stranger, has the entries that other code relies on."""
    kinds = {"preset": str, "precision": str, "model": dict, "train": dict, "data": dict}
    of_data = {"name": str, "layout": str, "fingerprint": str, "is_phantom": bool, "size": list,
               "classes": list, "arguments": dict}  # fmt: skip
    of_train = {"batch_size": int, "n_updates": int, "log_interval": int,
                "learning_rate": (int, float), "average": (int, float)}  # fmt: skip
    stage, data, model = (config.get(key) for key in ("stage", "data", "model"))
    if not _has(config, kinds) or not _has(data, of_data) or not _has(config["train"], of_train):
        return False
    train = {"optimizer": "adam"} | config["train"]
    is_ours = train["optimizer"] in ("adam", "muon") and 0 <= train["average"] < 1
    if not is_ours or min(train["n_updates"], train["log_interval"]) < 1:
        return False
    kinds = {"data": str, "image_size": list, "split_seed": int, "split_policy": str, "plane": str,
             "group_regex": str, "slices": int, "skip_unreadable": bool}  # fmt: skip
    arguments, numbers = data["arguments"], [n for n in model.values() if type(n) in (int, float)]
    if not _fits(stage, model) or not all(
        isinstance(x, kinds.get(key, ())) for key, x in arguments.items()
    ):
        return False
    sizes = data["size"], arguments.get("image_size", data["size"])
    is_ours = all(
        len(size) == 2 and all(type(n) is int for n in size) and math.prod(size) <= MOST_PIXELS
        for size in sizes
    )
    is_ours &= all(n in range(1, 1 << 16) for n in data["size"])
    is_ours &= all(isinstance(name, str) for name in data["classes"])
    is_ours &= all(n < 1 << 16 for n in numbers) and isinstance(config.get("processes", 1), int)
    is_ours &= all(model[key] in range(1001) for key in model if key.endswith("_layers"))
    if stage == "pixelcnn":
        return is_ours and isinstance(config.get("vq_vae"), str)
    is_ours &= model.get("downsample") in (4, 8, 16) and "n_embeddings" in model
    return is_ours and not any(n % model["downsample"] for n in data["size"])


def _has(part, kinds):
    """Whether a dict has an entry of each kind."""
    return isinstance(part, dict) and all(isinstance(part.get(k), kinds[k]) for k in kinds)


def _fits(stage, model):
    """Whether every entry of a configuration has the type that its dataclass says."""
    if stage not in list(STAGES):  # it may be no string
        return False
    kinds = {field.name: field.type for field in fields(STAGES[stage][0])}
    kinds |= {name: (int, float) for name, kind in kinds.items() if kind is float}
    kinds |= {"size": list}
    return all(isinstance(value, kinds.get(name, ())) for name, value in model.items())


def _others(run_dir, stage):
    found = Path(run_dir).parent.glob(f"*/{stage}/model.safetensors")
    there = sorted(str(path.parent.parent) for path in found)
    return f" (there is one in {', '.join(there)})" if there else ""


def load_model(run_dir, stage, device="cpu"):
    """The trained network of a run.

    Args:
        run_dir: the run's directory, such as "runs/demo".
        stage: "vq_vae" or "pixelcnn".
    Returns:
        `modules.VQVAE` or `modules.GatedPixelCNN` in eval mode, with `.config`, and `.file_hash`,
        which tells its weights from others.
    Raises:
        UserError: the stage is not there, or its files are damaged or do not belong together.
    """
    config = load_config(run_dir, stage)
    path = Path(run_dir) / stage / "model.safetensors"
    make_config, make_model = STAGES[stage]
    try:
        with torch.device("meta"):  # nothing is allocated for sizes that the file does not have
            model = make_model(make_config(**config["model"]))
        content = path.read_bytes()  # once: a training may put other weights there meanwhile
        tensors = safetensors.torch.load(content)
        if any(t.dtype != tensors[name].dtype for name, t in model.state_dict().items()):
            raise ValueError("numbers of another kind")
        model.load_state_dict(tensors, assign=True)
    except Exception as error:
        what = "does not fit config.json beside it or is damaged ({}); train this stage again with"
        raise unusable(path, error, what + " --fresh") from error
    model.file_hash = short_hash(content)
    return model.to(device).eval()


def check_unpacked(archive, most):
    """Raise ValueError if a zip archive, perhaps a stranger's, unpacks to over `most` times it."""
    size = os.fstat(archive.fp.fileno()).st_size
    if sum(entry.file_size for entry in archive.infolist()) > most * size:
        raise ValueError("compressed")


def short_hash(content):
    return hashlib.sha256(content).hexdigest()[:16]


def architecture(config):
    """The JSON form of a model's configuration."""
    return json.loads(json.dumps(asdict(config)))


# ------------------------------------------------------------------------------------------------
# SSIM
# ------------------------------------------------------------------------------------------------


def ssim(x, y, data_range=1.0, window=7):
    """Structural similarity (Wang et al. 2004), the number `skimage.metrics.structural_similarity`
    gives by default: uniform window, sample covariance, mean over the windows inside the image.

    Differentiable, and finite on constant images.

    Args:
        x, y: (B, 1, H, W), at least `window` pixels along each side.
        data_range: largest minus smallest possible value.
    Returns:
        (B,) of at most 1, in float64 if x is, else in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, y = x[:, 0].to(dtype), y[:, 0].to(dtype)
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

        def mean(a):  # along one axis, then the other: thrice as fast as F.avg_pool2d on a CPU
            for axis in (1, 2):
                n = a.shape[axis] - window + 1
                a = sum(a.narrow(axis, i, n) for i in range(window)) / window
            return a

        mx, my = mean(x), mean(y)
        unbiased = window**2 / (window**2 - 1)
        vxy = unbiased * (mean(x * y) - mx * my)
        # x^2 + y^2 at once: only the sum of the two variances is needed
        v = unbiased * (mean(x * x + y * y) - mx * mx - my * my)
        s = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (v + c2))
        return s.mean((1, 2))


def to_uint8(images):
    """Images in [0, 1], clipped -> uint8, for pictures."""
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
