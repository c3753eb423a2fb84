"""Train AVDiT on the toy world, a folder of clips or a file of latents [Alg. 2, App. B]. `python train.py --help`"""

import argparse
import csv
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from avdit import PRESETS, NoiseSchedule, av_modalities, parse_mixture, sample_timesteps, training_loss
from data import FPS, RATE, SIZE, in_chunks, is_latents, load_clips, make_tokenizers, read_latents


def flag(default, note, choices=None):
    """A dataclass field that parse() turns into a command-line flag. [] takes several values."""
    start = {"default_factory": list} if default == [] else {"default": default}
    return field(**start, metadata={"note": note, "choices": choices})


@dataclass
class Config:
    """Every setting of a run. None: as the preset or the data says."""

    data: str = flag("toy", "toy, a folder of clips, or a .npz of latents")
    preset: str = flag("toy", "size of the network and its training settings", tuple(PRESETS))
    mixture: str = flag("monl", "noise levels: monl, vanilla, pm, pt, ptm, task:a2v ..., sums a+b, weights a*2+b")
    steps: int = flag(None, "optimizer steps (default: the preset's)")
    batch: int = flag(None, "examples a step, over all processes and accumulation (default: the preset's)")
    lr: float = flag(None, "peak learning rate (default: the preset's)")
    optimizer: str = flag(None, "adamw, or muon for the blocks' matrices (default: the preset's)", ("adamw", "muon"))
    prediction: str = flag(None, "what the network regresses (default: the preset's)", ("eps", "v"))
    fps: int = flag(None, "frames a second of a folder's clips (default 8)")
    size: int = flag(None, "height and width of a folder's clips, a multiple of 16 (default 64)")
    sample_rate: int = flag(None, "samples a second of a folder's sound (default 16000)")
    device: str = flag("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "precision of products; auto: bf16 where the chip has it", ("auto", "fp32", "bf16"))
    compile: bool = flag(False, "compile the network (needs a C++ compiler; pays on long runs)")
    accumulate: int = flag(1, "parts a batch is computed in, to save memory")
    save_every: int = flag(500, "steps between checkpoints")
    seed: int = flag(0, "seed of weights and batches")
    out: str = flag("runs/toy", "folder of ckpt.pt and log.csv")
    resume: bool = flag(False, "continue from the checkpoint in --out, if there is one")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(fail(message))


def fail(message):
    """One line on stderr -> exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def parse(config_class, about):
    """Read the command line into a dataclass made of flag()s; --help shows each field's note."""
    parser = Parser(description=about, allow_abbrev=False)
    for f in fields(config_class):
        name, note = "--" + f.name.replace("_", "-"), f.metadata["note"]
        if f.type is bool:
            parser.add_argument(name, action="store_true", help=note)
        elif f.type is list:
            parser.add_argument(name, nargs="+", action="extend", default=[], help=note)
        else:
            note += "" if f.default is None else f" (default {f.default})"
            parser.add_argument(name, type=f.type, default=f.default, choices=f.metadata["choices"], help=note)
    return config_class(**vars(parser.parse_args()))


def open_device(name):
    """-> torch.device. ValueError names those that are here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(k for k in here if here[k])
    if not here[name]:
        raise ValueError(f"no {name} here: use {', '.join(k for k in here if here[k])} or auto")
    return torch.device(name)


def precision(name, device):
    """-> context manager of a forward pass: bf16 products if asked for, or if "auto" finds that the chip has them."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        chip = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        native = chip.get("avx512_bf16") or chip.get("amx_bf16")
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16" or (name == "auto" and bool(native)))


def complete(config):
    """Check a Config and fill in what the preset and the data decide -> modalities. ValueError says what is wrong."""
    preset = PRESETS[config.preset]
    for name in ("steps", "batch", "lr", "optimizer", "prediction"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(preset, name))
    parse_mixture(config.mixture)
    media = {"fps": 8, "size": 64, "sample_rate": 16000}
    if config.data == "toy" or is_latents(config.data):
        if any(getattr(config, name) is not None for name in media):
            raise ValueError(f"--fps, --size and --sample-rate are for a folder of clips, not for {config.data}")
        media = {"fps": FPS, "size": SIZE, "sample_rate": RATE}
    elif not Path(config.data).is_dir():
        raise ValueError(f"--data {config.data} is neither toy nor a folder nor a .npz file")
    for name, value in media.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    for name in ("steps", "batch", "lr", "accumulate", "save_every", "fps", "size", "sample_rate"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(config, name)}")
    if config.batch % config.accumulate:
        raise ValueError(f"--batch {config.batch} does not divide into --accumulate {config.accumulate} parts")
    if config.size % 16:
        raise ValueError(f"--size {config.size} is not a multiple of 16")
    if is_latents(config.data):
        return read_latents(config.data)[1]
    if config.data == "toy":
        return PRESETS["toy"].modalities
    # Real clips need more components than the ball to be recognised: these are wide.
    return av_modalities(config.fps, 2 * (config.size // 16,), 192, 1 / config.fps, 96)


def draw(config, modalities, examples, T, step):
    """Everything random in a step: which examples, their timesteps and noise, the coin of self-conditioning.

    A function of (seed, step) alone, for the whole global batch: a resumed run sees the batches it would have seen.
    """
    word = np.random.SeedSequence([config.seed, step]).generate_state(1)  # torch's generator keeps 32 bits of a seed
    g = torch.Generator().manual_seed(int(word[0]))
    index = torch.randint(examples, (config.batch,), generator=g)
    t = sample_timesteps(config.mixture, modalities, config.batch, T, g)
    eps = {m.name: torch.randn(config.batch, *m.shape, generator=g) for m in modalities}
    return index, t, eps, torch.rand((), generator=g).item() < 0.9  # the paper's self-conditioning rate [App. B]


def make_optimizers(config, model, device):
    """-> {name: optimizer}. AdamW for all parameters [App. B]; or Muon for the blocks' matrices, AdamW for the rest.

    Muon takes 2.5 times the learning rate, and three Newton-Schulz rounds for its five: by trial on the toy world.
    """
    rest, matrices = [], []
    for name, p in model.named_parameters():
        muon = config.optimizer == "muon" and name.startswith("blocks.") and p.ndim == 2
        (matrices if muon else rest).append(p)
    fused = device.type in ("cpu", "cuda")
    optimizers = {"adamw": torch.optim.AdamW(rest, betas=(0.9, 0.99), fused=fused)}
    if matrices:
        group = {"params": matrices, "scale": 2.5}
        optimizers["muon"] = torch.optim.Muon([group], weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw")
    return optimizers


def learning_rate(config, step):
    """Linear warm-up, then a cosine to zero [App. B]."""
    warm = min(1, (step + 1) / PRESETS[config.preset].warmup)
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


class Log:
    """log.csv and the progress line: loss by modality and by ten bins of noise level since the last line.

    The sums stay on the device between lines, so that no step waits for them, and travel in the checkpoint.
    """

    EVERY, BINS = 50, 10

    def __init__(self, path, modalities, device):
        self.path, self.elements = path, torch.tensor([m.P * m.channels for m in modalities])[:, None]
        bins = [f"{m.name}_t{k * 100 + 1}_{k * 100 + 100}" for m in modalities for k in range(self.BINS)]
        self.header = ["step", "loss", *(m.name for m in modalities), *bins]
        self.sums = torch.zeros(2, len(modalities), self.BINS, device=device)  # errors, counts

    def state_dict(self):
        return {"sums": self.sums.cpu()}

    def load_state_dict(self, state):
        self.sums.copy_(state["sums"])

    def open(self, step):
        """Start log.csv, or drop the lines a resumed run will write again."""
        rows = [row for row in csv.reader(self.path.open()) if row[0].isdigit() and int(row[0]) <= step] if step else []
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([self.header, *rows])
        self.since = (step, time.monotonic())

    def add(self, errors, t, T):
        """errors and t: dicts (B, N_m)."""
        for i, m in enumerate(errors):
            share = F.one_hot((t[m] - 1).clamp(min=0) * self.BINS // T, self.BINS) * (t[m] > 0)[..., None]
            self.sums[0, i] += (share * errors[m][..., None]).sum((0, 1))
            self.sums[1, i] += share.sum((0, 1))

    def check(self, step):
        if not self.sums.isfinite().all():
            raise FloatingPointError(f"the loss is not finite at step {step}; the last good checkpoint is kept")

    def write(self, step, steps):
        self.check(step)
        errors, counts = self.sums.cpu().clone()  # on a CPU .cpu() is the tensor itself
        self.sums.zero_()
        loss = (errors * self.elements).sum() / (counts * self.elements).sum()
        values = [loss, *(errors.sum(1) / counts.sum(1)), *(errors / counts).flatten()]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([step, *("" if v.isnan() else f"{v:.6f}" for v in values)])  # "": nothing there
        speed = (step - self.since[0]) / (time.monotonic() - self.since[1])
        left = round((steps - step) / speed)
        line = f"step {step}/{steps}  loss {loss:.4f}  {speed:.1f} steps/s  {left // 60}:{left % 60:02} left"
        print(f"\r{line:70}" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True)


def save(path, state):
    """Atomically: a run killed while saving keeps its last good checkpoint."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load(path):
    """A checkpoint's dict. Nothing in the file is executed. ValueError says what is wrong with it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as why:  # torch.load raises many kinds on a file that is no checkpoint
        raise ValueError(f"{path} is not a checkpoint that can be read ({type(why).__name__})") from None
    missing = {"model", "ema", "step", "config", "modalities", "tokenizers"} - set(state)
    if missing:
        raise ValueError(f"{path} is no checkpoint of train.py: {', '.join(sorted(missing))} missing")
    return state


def prepare(config, modalities):
    """Load the clips, fit the tokenizers, encode everything once -> latents, tokenizers."""
    print(f"reading {config.data} ...", flush=True)
    clips = load_clips(config.data, "train", modalities, config.fps, config.size, config.sample_rate)
    tokenizers = make_tokenizers(config.data, modalities, config.size, config.sample_rate)
    for m, tokenizer in tokenizers.items():
        tokenizer.fit(clips[m][:1024])
    return {m: in_chunks(tokenizer.encode, clips[m]) for m, tokenizer in tokenizers.items()}, tokenizers


def restore(config, path, parts):
    """Fill the parts from the checkpoint at `path` -> its step; 0 where --resume finds none."""
    if not config.resume or not path.exists():
        if config.resume:
            print(f"nothing saved in {config.out}: starting fresh")
        return 0
    state = load(path)
    for name, now in asdict(config).items():
        before = state["config"].get(name)
        if before != now and name not in ("resume", "device", "save_every", "out", "compile"):
            raise ValueError(f"--resume: {path} was trained with {name} {before}, not {now}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    print(f"resuming at step {state['step']}")
    return state["step"]


def train(config, modalities):
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    device = open_device(config.device)
    preset, schedule = PRESETS[config.preset], NoiseSchedule().to(device)
    latents, tokenizers = prepare(config, modalities)
    z_max = {m: tokenizer.z_max.item() for m, tokenizer in tokenizers.items()}
    torch.manual_seed(config.seed)
    model = preset.model(modalities, config.prediction).to(device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(preset.ema))
    optimizers = make_optimizers(config, model, device)
    log = Log(out / "log.csv", modalities, device)
    parts = {"model": model, "ema": ema, **optimizers, "tokenizers": tokenizers, "log": log}
    first = restore(config, out / "ckpt.pt", parts)
    log.open(first)
    net = torch.compile(model) if config.compile else model
    for step in range(first, config.steps):
        index, t, eps, self_conditioning = draw(config, modalities, len(latents["video"]), schedule.T, step)
        for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
            group["lr"] = learning_rate(config, step) * group.get("scale", 1)
        model.zero_grad()
        for rows in torch.arange(config.batch).chunk(config.accumulate):
            z0 = {m: z[index[rows]].to(device) for m, z in latents.items()}
            t_rows, eps_rows = ({m: x[rows].to(device) for m, x in xs.items()} for xs in (t, eps))
            with precision(config.dtype, device):
                loss, errors = training_loss(
                    net, schedule, z0, t_rows, eps_rows, self_conditioning=self_conditioning, z_max=z_max,
                    noise_power=preset.noise_power, return_errors=True,
                )  # fmt: skip
            (loss / config.accumulate).backward()
            log.add(errors, t_rows, schedule.T)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        ema.update_parameters(model)
        done = step + 1
        if done % log.EVERY == 0 or done == config.steps:
            log.write(done, config.steps)
        if done % config.save_every == 0 or done == config.steps:
            log.check(done)
            state = {name: part.state_dict() for name, part in parts.items()}
            about = {"step": done, "config": asdict(config), "modalities": [asdict(m) for m in modalities]}
            save(out / "ckpt.pt", {**state, **about})
    print(f"\ndone: {out / 'ckpt.pt'}")


def main():
    config = parse(Config, __doc__.split("`")[0])
    try:
        modalities = complete(config)
        train(config, modalities)
    except (ValueError, OSError) as why:
        return fail(why)
    except FloatingPointError as why:
        print(f"\n{why}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; --resume continues from {config.out}/ckpt.pt", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
