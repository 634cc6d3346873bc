"""Train one stage: `python train.py --mode vq_vae`, then `python train.py --mode pixelcnn`.

Stage 1 learns a discrete code for slices; stage 2 freezes it and learns how the codes are
distributed. The same command again continues an unfinished run: whatever is random in an update
follows from (seed, update), so the run that was stopped and the run that was not are the same.
With `torchrun --nproc_per_node=N` before it, the command trains on N devices.
"""

import argparse
import copy
import functools
import json
import math
import operator
import os
import pickletools
import re
import shutil
import sys
import zipfile
from pathlib import Path
from signal import SIGTERM

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dataset
import metrics
import plots
import utils
from modules import VQVAE, GatedPixelCNN, PixelCNNConfig, VectorQuantizer, VQVAEConfig
from utils import UserError

# What a preset sets for each stage; a flag of the same name beats it. `decay_to` is the last
# learning rate as a fraction of the first; `average` the decay of the averaged weights, 0 for none;
# `warm_up` the updates over which the rate rises; `clip` the largest norm of a gradient, 0 for any;
# `optimizer` that of the layers' weights, "muon" or "adam", which is the one of all else.
MODERN = dict(decay_to=0.02, warm_up=50, clip=1.0, beta2=0.99, optimizer="muon")
CLASSIC = dict(decay_to=1.0, warm_up=0, clip=0.0, beta2=0.999, average=0.0, optimizer="adam")
MUON_RATE = 2  # learning rate of Muon, in multiples of Adam's
PRESETS = {
    "demo": {
        "vq_vae": dict(
            model=dict(n_hiddens=96, n_residual_hiddens=96, n_residual_layers=2, embedding_dim=32,
                       n_embeddings=512, beta=0.25, downsample=8, codebook="ema",
                       diversity=0.01),
            train=dict(n_updates=700, batch_size=8, learning_rate=4e-3, log_interval=200,
                       loss="l1_ssim", average=0.0, **MODERN),
        ),
        "pixelcnn": dict(
            model=dict(n_channels=64, n_layers=10, kernel_size=3, dropout=0.1, mirror="auto",
                       summary=True, order="auto"),
            train=dict(n_updates=1600, batch_size=8, learning_rate=4e-3, log_interval=200,
                       average=0.0, **MODERN),
        ),
    },
    "base": {
        "vq_vae": dict(
            model=dict(n_hiddens=96, n_residual_hiddens=96, n_residual_layers=2, embedding_dim=32,
                       n_embeddings=512, beta=0.25, downsample=8, codebook="ema",
                       diversity=0.01),
            train=dict(n_updates=20000, batch_size=8, learning_rate=4e-3, log_interval=500,
                       loss="l1_ssim", average=0.0, **MODERN),
        ),
        "pixelcnn": dict(
            model=dict(n_channels=128, n_layers=15, kernel_size=3, dropout=0.2, mirror="auto",
                       summary=True, order="auto"),
            train=dict(n_updates=30000, batch_size=32, learning_rate=1e-3, log_interval=500,
                       average=0.999, **MODERN),
        ),
    },
    "classic": {
        "vq_vae": dict(
            model=dict(n_hiddens=128, n_residual_hiddens=32, n_residual_layers=2,
                       embedding_dim=64, n_embeddings=512, beta=0.25, downsample=4,
                       codebook="loss", diversity=0.0, stem="strided", revive=False),
            train=dict(n_updates=5000, batch_size=32, learning_rate=3e-4, log_interval=50,
                       loss="mse", **CLASSIC),
        ),
        "pixelcnn": dict(
            model=dict(n_channels=64, n_layers=15, kernel_size=3, dropout=0.0, mirror="none",
                       summary=False, order="rows"),
            train=dict(n_updates=5000, batch_size=32, learning_rate=3e-4, log_interval=50,
                       **CLASSIC),
        ),
    },
}
UNSHARED = "{}: not the same on all machines; choose a disk they share"
HIDDEN = 0.05  # chance each that label, depth, or both are hidden: one prior also learns "any"
PICKLED = re.compile(r"torch\._utils _rebuild_tensor_v2|torch \w+Storage|collections OrderedDict")
MAY_CHANGE = {"n_updates", "log_interval", "patience", "learning_rate"}  # in a run that goes on


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def parser():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=utils.HelpFormatter, allow_abbrev=False
    )
    stages = list(PRESETS["demo"])
    run = p.add_argument_group("run")
    run.add_argument("--mode", "-mode", choices=stages, required=True, help="stage to train")
    text = "settings to start from (default: demo; of stage 2: those of stage 1)"
    run.add_argument("--preset", choices=list(PRESETS), help=text)
    run.add_argument("--run_dir", metavar="DIR", help="where the run lives (default: runs/PRESET)")
    run.add_argument(
        "--fresh", action="store_true", help="start over, deleting this stage's results"
    )
    run.add_argument(
        "--dry_run", action="store_true", help="print the resolved configuration as JSON and stop"
    )
    dataset.add_data_arguments(p, suppress_default=True)

    def add(group, name, text, **options):
        """A flag whose default is the preset's: named in its help, stage 1 / stage 2."""
        values = []
        for preset, of_stage in PRESETS.items():
            settings = [of_stage[s]["model"] | of_stage[s]["train"] for s in stages]
            shown = "/".join(f"{s[name]}" for s in settings if name in s)
            values += [f"{preset} {shown}"] if shown else []
        group.add_argument(f"--{name}", help=f"{text} (default: {', '.join(values)})", **options)

    count = {"type": utils.at_least(1), "metavar": "N"}
    real = {"type": utils.at_least(0.0, float), "metavar": "X"}
    both = p.add_argument_group("training, both stages (defaults: stage 1 / stage 2)")
    add(both, "n_updates", "updates", **count)
    add(both, "batch_size", "slices per update, and per device under torchrun", **count)
    add(both, "learning_rate", "peak learning rate", **real)
    add(both, "log_interval", "updates between validations", **count)
    both.add_argument(
        "--patience", type=utils.at_least(0), metavar="N", default=0,
        help="stop after N validations without a better one; 0 never stops early",
    )
    utils.add_seed(both)
    one = p.add_argument_group("stage 1, the VQ-VAE")
    add(one, "n_hiddens", "channels", **count)
    add(one, "n_residual_hiddens", "channels inside a residual block", **count)
    add(one, "n_residual_layers", "residual blocks per resolution", **count)
    add(one, "embedding_dim", "D, length of a codebook vector", **count)
    add(one, "n_embeddings", "K, size of the codebook", **count)
    add(one, "beta", "weight of the commitment term", **real)
    text = "what moves the codes: averages of the vectors they stand for, or the paper's loss term"
    add(one, "codebook", text, choices=["ema", "loss"])
    add(one, "diversity", "weight of the term that asks for all codes to be used alike", **real)
    add(one, "downsample", "f, pixels per code and axis", type=int, choices=[4, 8, 16])
    text = "1 - SSIM + |x - y|, 1 - SSIM, |x - y|, or its square"
    add(one, "loss", text, choices=["l1_ssim", "ssim", "l1", "mse"])
    two = p.add_argument_group("stage 2, the gated PixelCNN")
    add(two, "n_channels", "channels of each stack", **count)
    add(two, "n_layers", "gated layers", **count)
    add(two, "kernel_size", "odd; codes from side to side", **count)
    add(two, "dropout", "share of activations hidden in training", **real)
    text = "half of the grid also seen flipped, as bodies are even; auto takes the evener axis"
    add(two, "mirror", text, choices=["auto", "none", "rows", "columns"])
    text = "draw row after row, or column after column; auto lets each cross the middle of the body"
    add(two, "order", text, choices=["auto", "rows", "columns"])
    runtime = utils.add_runtime_arguments(p)
    runtime.add_argument(
        "--compile", action="store_true", help="compile the network: a slow start, faster updates"
    )
    return p


def resolve(args):
    """Preset, then flags -> {"model": ..., "train": ...} of the stage to train."""
    settings = copy.deepcopy(PRESETS[args.preset][args.mode])
    for part in settings.values():
        for name in part:
            if getattr(args, name, None) is not None:
                part[name] = getattr(args, name)
    for name in {name for part in PRESETS[args.preset].values() for name in _settings(part)}:
        if name not in _settings(settings) and getattr(args, name, None) is not None:
            text = f"note: --{name} is not a setting of --mode {args.mode}; ignored"
            print(text, file=sys.stderr)
    settings["train"] |= {"patience": args.patience, "seed": args.seed}
    return settings


def _settings(parts):
    return parts["model"] | parts["train"]


def main():
    args = parser().parse_args()
    run_dir = Path(args.run_dir or f"runs/{args.preset or 'demo'}")
    is_needed = not args.dry_run or (run_dir / "vq_vae" / "model.safetensors").exists()
    first = None
    if args.mode == "pixelcnn" and is_needed:
        first = utils.load_config(run_dir, "vq_vae")
    args.preset = args.preset or (first["preset"] if first else "demo")
    if args.preset not in PRESETS:
        raise UserError(f"{run_dir}: of an unknown preset, {args.preset}; name one with --preset")
    settings = resolve(args)
    arguments = utils.data_arguments(args, dataset.load, first and first["data"]["arguments"])
    if args.dry_run:
        given = {"mode": args.mode, "preset": args.preset, "run_dir": str(run_dir)}
        print(json.dumps(given | {"data": arguments} | settings, indent=2))
        return
    compiler = os.environ.get("CXX", "g++")
    if args.compile and not shutil.which(compiler):
        raise UserError(f"--compile: there is no compiler {compiler}; install one or leave it out")
    with utils.joined(args.device) as device:
        args.precision = utils.pick_precision(args.precision, device)
        utils.announce(arguments)
        if args.mode == "vq_vae" and "image_size" in arguments:  # refused before a cache is written
            size, f = arguments["image_size"], settings["model"]["downsample"]
            check_size(arguments["data"], size, f)
        with utils.first_goes_first():
            data = dataset.load(**arguments)
        print(data.describe())
        if utils.processes()[1] > len(data["validate"]):
            raise UserError("torchrun: more processes than slices to validate with; start fewer")
        args.data_arguments = {  # the others are a matter of this machine
            name: arguments[name] for name in arguments if name not in ("cache_dir", "workers")
        }
        with utils.only_one(run_dir / ".vq_vae.lock"):  # stage 2 needs stage 1 to stay as it is
            if args.mode == "vq_vae":
                train_vq_vae(args, run_dir, settings, data, device)
                return
            if utils.load_config(run_dir, "vq_vae") != first:
                raise UserError(f"{run_dir}: stage 1 was trained anew meanwhile; start again")
            with utils.only_one(run_dir / ".pixelcnn.lock"):
                train_pixelcnn(args, run_dir, settings, data, device, first)


# ------------------------------------------------------------------------------------------------
# Stage 1
# ------------------------------------------------------------------------------------------------


def train_vq_vae(args, run_dir, settings, data, device):
    model_config = configure(VQVAEConfig, settings["model"])
    check_size(data.name, data.size, model_config.downsample)
    config = make_config(args, settings, model_config, data)
    torch.manual_seed(args.seed)
    model = VQVAE(model_config).to(device, memory_format=torch.channels_last)
    train, validate = data["train"], data["validate"]
    compute = functools.partial(utils.autocast, device, args.precision)
    share = utils.share(len(validate))
    network = as_trained(model, args, device)

    def loss_of(indices):
        x = train.batch(indices[utils.share(len(indices))])
        x = x.to(device, memory_format=torch.channels_last)
        with compute():
            y, _, losses = network(x)
        losses["reconstruction"] = reconstruction_loss(x, y.float(), settings["train"]["loss"])
        return losses

    def score(model):
        with compute():
            parts = [
                (utils.ssim(x, y), metrics.psnr((x - y).square().mean((1, 2, 3))), codes)
                for x, y, codes in metrics.reconstruct(model, validate, device, share=share)
            ]
        ssim, psnr, codes = (utils.gathered(torch.cat(p)) for p in zip(*parts, strict=True))
        figures = {"ssim": float(ssim.mean()), "psnr": float(psnr.mean())}
        return figures | metrics.usage(codes, model_config.n_embeddings)

    best = ("ssim", operator.gt)
    fit(args, run_dir / "vq_vae", config, model, len(train), loss_of, score, best)


def reconstruction_loss(x, y, kind):
    """x, y: (B, 1, H, W) -> scalar, as --loss says it."""
    if kind in ("mse", "l1"):
        return {"mse": F.mse_loss, "l1": F.l1_loss}[kind](y, x)
    loss = 1 - utils.ssim(x, y).mean()
    return loss + F.l1_loss(y, x) if kind == "l1_ssim" else loss


def check_size(name, size, downsample):
    """Raise UserError unless `downsample` divides the size, and SSIM's window of 7 fits into it."""
    if any(n % downsample or n < 7 for n in size):
        fits = [max(round(n / downsample), 2) * downsample for n in size]
        raise UserError(
            f"{name}: slices of {size[0]} x {size[1]} are too small or do not divide by "
            f"{downsample} (--downsample); crop or pad them with --image_size {fits[0]} {fits[1]}"
        )


# ------------------------------------------------------------------------------------------------
# Stage 2
# ------------------------------------------------------------------------------------------------


def train_pixelcnn(args, run_dir, settings, data, device, first):
    if data.fingerprint != first["data"]["fingerprint"]:
        raise UserError(
            f"{run_dir}: stage 1 learned from other data ({_named(first['data'])}, not {data.name} "
            f"{data.size[0]} x {data.size[1]}); leave out --data, or choose another --run_dir"
        )
    compute = functools.partial(utils.autocast, device, args.precision)
    vq_vae = utils.load_model(run_dir, "vq_vae", device)
    with utils.first_goes_first():
        codes = {
            name: metrics.split_codes(run_dir, data, name, vq_vae, device)
            for name in dataset.SPLITS
        }
    train, validate = (
        tuple(torch.from_numpy(x) for x in (codes[s], data[s].labels, data[s].positions))
        for s in ("train", "validate")
    )
    directory = run_dir / "pixelcnn"
    if goes_on(directory, args):  # one of before there were summaries does without
        settings["model"]["summary"] = utils.read_config(directory)["model"]["summary"]
    for name in ("mirror", "order"):
        if settings["model"][name] == "auto":
            settings["model"][name] = auto(name, args, directory, data["train"])
    model_config = configure(
        PixelCNNConfig,
        {
            "n_embeddings": first["model"]["n_embeddings"],
            "size": codes["train"].shape[1:],
            "n_classes": len(data.classes),
            **settings["model"],
        },
    )
    config = make_config(args, settings, model_config, data)
    config["vq_vae"] = vq_vae.file_hash
    torch.manual_seed(args.seed)
    model = GatedPixelCNN(model_config)
    model.start_from(vq_vae.quantizer.codebook.cpu())
    model = model.to(device, memory_format=torch.channels_last)
    network = as_trained(model, args, device)
    share = utils.share(len(validate[0]))

    def loss_of(indices):
        own = utils.share(len(indices))
        batch, label, depth = (tensor[indices[own]].to(device) for tensor in train)
        chance = torch.rand(len(indices), device=device)[own] / HIDDEN
        label = torch.where(chance < 2, -1, label)
        depth = torch.where((chance >= 1) & (chance < 3), -1, depth)
        with compute():
            logits = network(batch, label, depth)
        return {"bits_per_code": metrics.bits(logits, batch).mean()}

    def score(model):
        with compute():
            own = metrics.code_bits(model, *(x[share] for x in validate), device)
        every = utils.gathered(torch.from_numpy(own))
        return {"bits_per_code": float(every.mean(dtype=torch.float64))}

    best = ("bits_per_code", operator.lt)
    fit(args, directory, config, model, len(train[0]), loss_of, score, best)


def goes_on(directory, args):
    return (directory / "checkpoint.pt").exists() and not args.fresh


def auto(name, args, directory, split):
    """What "auto" stands for: what a run that goes on has, else what suits the evener axis."""
    if goes_on(directory, args):
        return utils.read_config(directory)["model"][name]
    axis = evener_axis(split)
    return axis if name == "mirror" else {"rows": "columns", "columns": "rows"}[axis]


def evener_axis(split):
    """"rows" or "columns", in which slices are more like their mirror images; blurred, and some."""
    some = np.unique(np.linspace(0, len(split) - 1, 256).round().astype(int))
    apart = {"rows": 0.0, "columns": 0.0}
    for i in some:
        x = split.batch([i])
        patch = [max(1, n // 16) for n in x.shape[2:]]
        for axis, name in enumerate(apart, 2):
            apart[name] += F.avg_pool2d(x - x.flip(axis), patch).abs().sum().item()
    return min(apart, key=apart.get)


# ------------------------------------------------------------------------------------------------
# What both stages share
# ------------------------------------------------------------------------------------------------


def configure(kind, values):
    """A model's configuration, its complaints as a `UserError`."""
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def as_trained(model, args, device):
    """The network as the training calls it: compiled, its gradients averaged over processes."""
    if not utils.is_agreed(utils.architecture(model.config)):
        raise UserError(UNSHARED.format(args.run_dir))
    if utils.processes()[1] > 1:
        model = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            static_graph=True,  # the last layer's vertical stack leads nowhere
        )
    if args.compile:  # but for the quantiser, which moves buffers that the gradient still needs
        VectorQuantizer.forward = torch.compiler.disable(VectorQuantizer.forward)
        model = torch.compile(model)
    return model


def make_config(args, settings, model_config, data):
    """What goes into config.json: all that is needed to rebuild, repeat and judge a run."""
    return {
        "format_version": utils.FORMAT_VERSION,
        "stage": args.mode,
        "preset": args.preset,
        "model": utils.architecture(model_config),
        "train": settings["train"],
        "processes": utils.processes()[1],
        "precision": args.precision,
        "data": {
            "name": data.name,
            "is_phantom": data.is_phantom,
            "layout": data.layout,
            "size": list(data.size),
            "classes": data.classes,
            "fingerprint": data.fingerprint,
            "arguments": args.data_arguments,
            "report": data.report,
        },
        "versions": utils.versions(),
    }


def _named(data):
    return f"{data['name']} {data['size'][0]} x {data['size'][1]}"


def fit(args, directory, config, model, n_train, loss_of, score, best):
    """Train `model`, validating, logging and saving every `log_interval` updates.

    Args:
        directory: of the stage; config.json, log.jsonl, curves.png, checkpoint.pt and
            model.safetensors (the best weights so far) are written there.
        n_train: number of training slices.
        loss_of: indices (B,) into the training split, of all processes together -> dict of scalar
            losses of this one's share, minimised together.
        score: model -> dict of validation figures.
        best: name of the figure that decides, and whether one value of it beats another.
    """
    options = config["train"]
    key, beats = best
    if goes_on(directory, args):
        stored = utils.read_config(directory)["train"]  # presets change from version to version
        for name in ("n_updates", "log_interval", "optimizer", "average"):
            if getattr(args, name, None) is None:
                options[name] = stored[name]
    optimizers = make_optimizers(model, options, config["precision"])
    averaged = copy.deepcopy(model) if options["average"] else model
    # drawn: slices so far; skipped: updates without a finite gradient; in_a_row: the last of them
    state = {"update": 0, "drawn": 0, "best": None, "best_update": 0, "skipped": 0, "in_a_row": 0}
    batch_size = utils.processes()[1] * options["batch_size"]
    save(clear, directory, args.fresh)
    utils.wait_for_all()
    running = []  # losses since the last validation
    log = resume(directory, config, model, averaged, optimizers, state, running)
    if not utils.is_agreed(state["update"]):
        raise UserError(UNSHARED.format(directory))
    if is_done(log, state, options):
        value = "none" if state["best"] is None else f"{state['best']:.4f}"
        print(
            f"{directory} is finished: {state['update']} updates, best validation {key} "
            f"{value}; --fresh starts over, more --n_updates or --patience go on"
        )
        return
    utils.wait_for_all()
    save(utils.write_json, directory / "config.json", config)
    everything = directory, config, log, model, averaged, optimizers, state, running
    if state["update"] == 0:
        save(save_checkpoint, *everything)
    shown = {}
    diverged = (
        f"{directory}: {{}} at update {{}}; what was saved is good, and {utils.again()} goes on "
        "from it; give it a lower --learning_rate"
    )

    def validate():
        averaged.eval()
        figures = score(averaged)
        if not math.isfinite(figures[key]):
            raise UserError(diverged.format(f"{key} is {figures[key]}", state["update"]))
        mean = {k: float(np.mean([r[k] for r in running if k in r])) for k in running[-1]}
        running.clear()
        entry = {"update": state["update"], "data": utils.data_name(config)}
        log.append(entry | {"skipped": state["skipped"], "train": mean, "validate": figures})
        for name in ("ssim", "used", "bits_per_code"):
            if name in figures:
                shown[f"val {name}"] = f"{figures[name]:.4g}"
        if state["best"] is None or beats(figures[key], state["best"]):
            state["best"], state["best_update"] = figures[key], state["update"]
            save(utils.save_model, averaged, directory / "model.safetensors")
        if "used" in figures and is_collapsing(**figures):
            bar.write(
                f"warning: the codebook collapses: after {state['update']} updates "
                f"{figures['used']} of {figures['size']} codes are in use, perplexity "
                f"{figures['perplexity']:.1f}"
            )

    total = {"total": options["n_updates"], "initial": state["update"], "unit": "update"}
    with tqdm(**total, desc=args.mode) as bar, utils.noted_signals() as signals:
        while not is_done(log, state, options):
            update = state["update"]
            torch.manual_seed(hash((options["seed"], update)) % 2**63)
            rate = learning_rate(update, options)
            model.train()
            losses = loss_of(batch_indices(n_train, batch_size, state["drawn"], options["seed"]))
            is_finite = step(model, optimizers, sum(losses.values()), rate, options["clip"])
            *values, told = utils.mean_of_all([v.item() for v in losses.values()] + [len(signals)])
            state["in_a_row"] = 0 if is_finite else state["in_a_row"] + 1
            state["skipped"] += not is_finite
            if state["in_a_row"] == 10:
                raise UserError(diverged.format("10 updates without a finite gradient", update))
            if is_finite:
                running.append(dict(zip(losses, values, strict=True)))
            if averaged is not model:
                average(averaged, model, min(options["average"], (update + 1) / (update + 10)))
            state["update"] += 1
            state["drawn"] += batch_size
            bar.update()
            if pace := bar.format_dict["rate"]:
                shown["img/s"] = f"{pace * batch_size:.0f}"
            is_last = state["update"] == options["n_updates"]
            is_due = running and (is_last or state["update"] % options["log_interval"] == 0)
            if is_due:
                validate()
            bar.set_postfix(loss=f"{sum(values):.3f}", **shown)
            if is_due or told or (is_last and state["best"] is not None):
                save(save_checkpoint, *everything)
            if told and not is_done(log, state, options):
                text = f"{directory}: saved at update {state['update']}; {utils.again()} goes on"
                raise utils.Stopped((signals or [SIGTERM])[0], f"{text} from there")
    if state["best"] is None:
        raise UserError(diverged.format("no finite gradient", state["update"]))
    best_so_far = f"{state['best']:.4f} at update {state['best_update']}"
    lost = f"; {state['skipped']} updates without a finite gradient" if state["skipped"] else ""
    print(f"{directory}: best validation {key} {best_so_far}{lost}")


def step(model, optimizers, loss, rate, clip):
    """Move the weights down the gradient of a loss; False, and nothing moved, if it is not finite.

    Args:
        rate: learning rate. clip: largest norm of the gradient, 0 for any.
    """
    model.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    is_finite = bool(torch.isfinite(norm))
    if is_finite:
        for optimizer in optimizers:
            (group,) = optimizer.param_groups
            group["lr"] = group["share"] * rate
            optimizer.step()
    return is_finite


class Muon(torch.optim.Optimizer):
    """Moves all directions of a weight alike: along the polar factor of the mean gradient.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon; steps are as long as Adam's (Liu et al.
    2025, arXiv 2502.16982, eq. 4). A weight (N, ...) is taken for the matrix (N, M). Those of one
    shape are worked out at once; `torch.optim.Muon`, one by one, takes nearly twice as long.
    """

    MOMENTUM = 0.95

    def __init__(self, weights, precision):
        super().__init__(weights, {"lr": 1.0})
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        of_shape = {}
        for weight in group["params"]:
            if weight.grad is not None:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
                mean = self.state[weight]["momentum"].lerp_(weight.grad, 1 - self.MOMENTUM)
                matrix = weight.grad.lerp(mean, self.MOMENTUM).flatten(1).to(self.dtype)
                of_shape.setdefault(matrix.shape, []).append((weight, matrix))
        for shape, pairs in of_shape.items():
            weights, matrices = zip(*pairs, strict=True)
            length = 0.2 * max(shape) ** 0.5
            for weight, u in zip(weights, polar(torch.stack(matrices)), strict=True):
                weight.add_(u.view(weight.shape), alpha=-length * group["lr"])


def polar(x, n_steps=5):
    """Matrices (B, N, M) -> about U V^T of each one's singular value decomposition U S V^T.

    Newton-Schulz steps with the coefficients of Jordan et al., which leave S at 0.7 to 1.2, but for
    what is near 0.
    """
    if x.shape[1] > x.shape[2]:
        return polar(x.mT, n_steps).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(n_steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), x,
                          beta=3.4445)  # fmt: skip
    return x


def make_optimizers(model, options, precision):
    """Adam, and Muon if the layers' weights have it, each with its `share` of the learning rate."""
    layers = []
    if options["optimizer"] == "muon":
        kinds = nn.Conv2d, nn.ConvTranspose2d, nn.Linear
        layers = [layer.weight for layer in model.modules() if isinstance(layer, kinds)]
    own = {id(weight) for weight in layers}
    others = [weight for weight in model.parameters() if id(weight) not in own]
    betas = (0.9, options["beta2"])
    optimizers = [torch.optim.AdamW(others, betas=betas, weight_decay=0.0, fused=True)]
    optimizers += [Muon(layers, precision)] if layers else []
    for optimizer, share in zip(optimizers, (1, MUON_RATE), strict=False):
        optimizer.param_groups[0]["share"] = share
    return optimizers


def clear(directory, is_fresh):
    """Remove what a killed process left half written and, if the run starts over, all the rest."""
    try:
        old = directory.with_name(f".{directory.name}.old")
        if is_fresh and directory.exists():
            if not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)  # at once, so that a kill leaves a run or none
        if old.is_symlink():  # to another disk, say; what it leads to may be anything
            old.unlink()
        elif old.exists():
            shutil.rmtree(old)
        for path in (*directory.glob(".*.tmp"), *directory.parent.glob("codes/.*.tmp")):
            path.unlink(missing_ok=True)
    except OSError as error:
        message = f"{error.filename or directory}: cannot be deleted ({error.strerror or error})"
        raise UserError(message) from error


def save(write, *args):
    """Call `write(*args)` in one process only."""
    if utils.processes()[0] == 0:
        write(*args)


def is_collapsing(used, size, perplexity, **_):
    """Whether a split of varied slices uses less of the codebook than a healthy one would."""
    return used < max(2, 0.1 * size) or perplexity < max(1.5, 0.04 * size)


def is_done(log, state, options):
    """Whether all updates are made, or `patience` validations in a row were not the best."""
    stale = sum(entry["update"] > state["best_update"] for entry in log)
    patient = not options["patience"] or stale < options["patience"]
    return state["update"] >= options["n_updates"] or not patient


def learning_rate(update, options):
    """Linear warm-up, then a cosine from the peak to `decay_to` of it at the last update."""
    done = update / options["n_updates"]
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    decay = options["decay_to"] + (1 - options["decay_to"]) * cosine
    return options["learning_rate"] * min(1, (update + 1) / max(1, options["warm_up"])) * decay


def batch_indices(n, batch_size, drawn, seed):
    """(B,) indices into n slices: the next of an endless row of shuffled epochs, after `drawn`."""
    places = np.arange(drawn, drawn + batch_size)
    return np.array([_shuffled(n, place // n, seed)[place % n] for place in places])


@functools.lru_cache(maxsize=2)
def _shuffled(n, epoch, seed):
    return np.random.default_rng([seed, epoch]).permutation(n)


@torch.no_grad()
def average(averaged, model, decay):
    """Move each averaged weight towards the model's by 1 - decay."""
    for a, b in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        if a.dtype.is_floating_point:
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)


def save_checkpoint(directory, config, log, model, averaged, optimizers, state, running):
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    utils.write_atomically(directory / "log.jsonl", lambda path: path.write_text(lines))
    if log:
        plots.curves(log, directory / "curves.png", config)
    checkpoint = {
        "format_version": utils.FORMAT_VERSION,
        "model": model.state_dict(),
        "averaged": averaged.state_dict() if averaged is not model else None,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "state": dict(state),
        "log": log,
        "running": running,
    }
    utils.write_atomically(
        directory / "checkpoint.pt", lambda path: torch.save(checkpoint, path)
    )


def resume(directory, config, model, averaged, optimizers, state, running):
    """Load the checkpoint of an unfinished run, if there is one, and return its log.

    Fills in model, averaged, optimizers, state, and running.

    Raises:
        UserError: the directory holds a run with other settings or other data.
    """
    path = directory / "checkpoint.pt"
    if not path.exists():
        if (directory / "model.safetensors").exists():
            raise UserError(
                f"{directory}: trained, but without {path.name} to go on from; --fresh starts over"
            )
        return []
    compare(directory, utils.read_config(directory), config)
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        utils.check_format(path, checkpoint["format_version"])
        check_history(checkpoint)
        model.load_state_dict(checkpoint["model"])
        if averaged is not model:
            averaged.load_state_dict(checkpoint["averaged"])
        states = checkpoint.get("optimizers") or [checkpoint["optimizer"]]  # one before format 4
        for optimizer, stored in zip(optimizers, states, strict=True):
            load_moments(optimizer, stored)
        state |= checkpoint["state"]
        running += checkpoint.get("running", [])
        return checkpoint["log"]
    except Exception as error:
        raise utils.unusable(path, error, "damaged ({}); start over with --fresh") from error


def compare(directory, stored, config):
    """Raise UserError unless a run with the configuration `stored` may go on with `config`."""
    if stored["precision"] != config["precision"]:
        raise UserError(
            f"{directory}: holds a run in {stored['precision']}; continue it with --precision "
            f"{stored['precision']}, or start over with --fresh"
        )
    now, before = config["processes"], stored.get("processes", 1)
    batch_sizes = [c["train"]["batch_size"] for c in (config, stored)]
    may_change = MAY_CHANGE | ({"batch_size"} if now != before else set())
    for part in ("model", "train", "data"):
        for name in config[part]:
            if name in may_change or (part == "data" and name != "fingerprint"):
                continue
            old, new = stored[part].get(name), config[part][name]
            if old != new:
                if name == "fingerprint":
                    name, old, new = "data", _named(stored["data"]), _named(config["data"])
                raise UserError(
                    f"{directory}: holds a run with {name} {old}, not {new}; continue it with the "
                    f"same settings, start over with --fresh, or choose another --run_dir"
                )
    if stored.get("vq_vae") != config.get("vq_vae"):
        raise UserError(
            f"{directory}: this prior was trained on the codes of another VQ-VAE than the one now "
            f"in {directory.parent}; start it over with --fresh"
        )
    rates = [c["train"]["learning_rate"] for c in (config, stored)]
    if rates[0] != rates[1]:
        print(f"note: goes on with a learning rate of {rates[0]:g}, after {rates[1]:g}")
    if now * batch_sizes[0] != before * batch_sizes[1]:
        print(
            f"note: an update is of {now} x {batch_sizes[0]} slices from here on, after {before} x "
            f"{batch_sizes[1]}; --batch_size is what each process takes"
        )


def load_moments(optimizer, stored):
    """Load the moments of an optimizer, perhaps a stranger's; ValueError if they do not fit."""
    (own,) = optimizer.param_groups
    is_muon = isinstance(optimizer, Muon)
    names = {"momentum"} if is_muon else {"step", "exp_avg", "exp_avg_sq"}
    for i, moments in stored["state"].items():
        if moments.keys() != names:
            raise ValueError("moments of another kind")
        for name, moment in moments.items():
            like = moment.new_empty(()) if name == "step" else own["params"][i]
            if (moment.shape, moment.dtype) != (like.shape, like.dtype):
                raise ValueError("moments of other weights")
            # a stranger's may repeat one number, which the optimizer would write beyond
            moments[name] = torch.empty_like(like).copy_(moment)
    settings = {name: own[name] for name in own if name != "params"}
    optimizer.load_state_dict(stored)
    (group,) = optimizer.param_groups
    group |= settings


def check_archive(path):
    """Raise ValueError unless a checkpoint, perhaps a stranger's, is packed as torch.save does.

    What torch.load takes for harmless could still ask for any amount of memory.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        file.seek(0)
        if file.read(4) != b"PK\x03\x04" or min(entry.header_offset for entry in entries):
            raise ValueError("something before the archive")
        utils.check_unpacked(archive, most=1)
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                for code, argument, _ in pickletools.genops(archive.read(entry)):
                    if code.name == "STACK_GLOBAL" or (
                        code.name == "GLOBAL" and not PICKLED.fullmatch(argument)
                    ):
                        raise ValueError(f"{argument} in it")


def check_history(checkpoint):
    """Raise ValueError unless a checkpoint, perhaps a stranger's, tells of a run as ours do."""

    def are_counts(*values):
        return all(type(n) is int and 0 <= n < 1 << 48 for n in values)

    def are_figures(values):
        names = values.keys() if isinstance(values, dict) else set()
        return names & plots.TITLES.keys() and all(
            isinstance(name, str) and (isinstance(value, float) or are_counts(value))
            for name, value in values.items()
        )

    state, log, running = checkpoint["state"], checkpoint["log"], checkpoint.get("running", [])
    entries = {"update", "data", "skipped", "train", "validate"}
    is_ours = (
        all(isinstance(name, str) for name in state)
        and are_counts(*(value for name, value in state.items() if name != "best"))
        and {"update", "drawn", "best_update"} <= state.keys()
        and (isinstance(state["best"], float) if log else state["best"] is None)
        and all(are_figures(losses) for losses in running)
        and all(e.keys() <= entries and isinstance(e.get("data", ""), str) for e in log)
        and all(are_counts(entry["update"], entry.get("skipped", 0)) for entry in log)
        and all(are_figures(e[part]) for e in log for part in ("train", "validate"))
        and len({(tuple(e["train"]), tuple(e["validate"])) for e in log}) <= 1
    )
    if not is_ours:
        raise ValueError("not the history of a run")


if __name__ == "__main__":
    utils.run_main(main)
