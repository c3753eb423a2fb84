"""Train AVDiT on the toy world, a folder of clips or a file of latents [Alg. 2, App. B]. `python train.py --help`"""

import argparse
import csv
import importlib.util
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from avdit import PRESETS, NoiseSchedule, av_modalities, parse_mixture, sample_timesteps, training_loss
from data import FPS, RATE, SIZE, in_chunks, is_latents, load_clips, make_tokenizers, read_latents


def flag(default, note, choices=None, within=None):
    """A dataclass field that parse() turns into a command-line flag. [] takes several values; within: (least, most)."""
    start = {"default_factory": list} if default == [] else {"default": default}
    return field(**start, metadata={"note": note, "choices": choices, "within": within})


DEVICES = ("auto", "cpu", "cuda", "mps", "xla")
COUNT, SEEDS = (1, 10**9), (0, 2**63 - 1)


@dataclass
class Config:
    """Every setting of a run. None: as the preset or the data says."""

    data: str = flag("toy", "toy, a folder of clips, or a .npz of latents")
    preset: str = flag("toy", "size of the network and its training settings", tuple(PRESETS))
    mixture: str = flag("monl", "noise levels: monl, vanilla, pm, pt, ptm, task:a2v ..., sums a+b, weights a*2+b")
    steps: int = flag(None, "optimizer steps (default: the preset's)", within=COUNT)
    batch: int = flag(None, "examples a step, of all processes and parts (default: the preset's)", within=(1, 2**16))
    lr: float = flag(None, "peak learning rate (default: the preset's)", within=(1e-12, 10))
    optimizer: str = flag(None, "adamw, or muon for the blocks' matrices (default: the preset's)", ("adamw", "muon"))
    prediction: str = flag(None, "what the network regresses (default: the preset's)", ("eps", "v"))
    fps: int = flag(None, "frames a second of a folder's clips (default 8)", within=(1, 240))
    size: int = flag(None, "height and width of a folder's clips, a multiple of 16 (default 64)", within=(16, 1024))
    sample_rate: int = flag(None, "samples a second of a folder's sound (default 16000)", within=(1000, 192000))
    device: str = flag("auto", "where to compute", DEVICES)
    dtype: str = flag("auto", "precision of products; auto: bf16 where the chip has it", ("auto", "fp32", "bf16"))
    compile: bool = flag(False, "compile the network (needs a C++ compiler; pays on long runs)")
    accumulate: int = flag(1, "parts a batch is computed in, to save memory", within=COUNT)
    save_every: int = flag(500, "steps between checkpoints", within=COUNT)
    seed: int = flag(0, "seed of weights and batches", within=SEEDS)
    out: str = flag("runs/toy", "folder of ckpt.pt and log.csv")
    resume: bool = flag(False, "continue from the checkpoint in --out, if there is one")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(fail(message))


def fail(message):
    """One line on stderr -> exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def out_of_memory(why, remedy):
    """The same where that is what an error says. Other errors are ours, and keep their traceback."""
    if not isinstance(why, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(why):
        raise why
    return fail(f"out of memory: {remedy}")


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
    config = config_class(**vars(parser.parse_args()))
    for f in fields(config_class):
        value, within = getattr(config, f.name), f.metadata["within"]
        if within and value is not None and not within[0] <= value <= within[1]:
            parser.error(f"--{f.name.replace('_', '-')} must be from {within[0]} to {within[1]}, not {value}")
    return config


# ---------------------------------------------------------------------------------------
# Where a run computes: all that is known here of torch.distributed and torch_xla
# ---------------------------------------------------------------------------------------


def open_device(name):
    """-> torch.device. ValueError names those that are here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here["xla"] = importlib.util.find_spec("torch_xla") is not None  # after the CPU: auto never takes it
    if name == "auto":
        name = next(k for k in here if here[k])
    if not here[name]:
        raise ValueError(f"no {name} here: use {', '.join(k for k in here if here[k])} or auto")
    if name == "xla":
        import torch_xla

        return torch_xla.device()
    return torch.device(name)


def end_step(device):
    """XLA only records operations; this runs them, as one program, compiled if it is new."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


def precision(name, device):
    """-> context manager of a forward pass: bf16 products if asked for, or if "auto" finds that the chip has them."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "xla":
        from torch_xla import runtime

        native = runtime.device_type() != "CPU"
    else:
        chip = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        native = chip.get("avx512_bf16") or chip.get("amx_bf16")
    enabled = name == "bf16" or (name == "auto" and bool(native))
    # No cache of weights in bf16: torch 2.9 would fill it in the pass without gradient, and cut off the next one's.
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


class Machine:
    """One device; or one of several processes with a device each, started by torchrun, which share every batch and
    average their gradients; or one process that spreads every batch over all XLA devices (SPMD).

    rank   number of this process; the first one speaks and saves for all
    world  processes that share a batch
    parts  into how many equal parts a batch is divided
    """

    def __init__(self, name):
        self.rank = int(os.environ.get("RANK", "0"))  # from torchrun
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.mesh = None
        if name == "xla" and self.world > 1:
            raise ValueError("--device xla spreads one process over all devices: start it without torchrun")
        if name == "xla" and importlib.util.find_spec("torch_xla"):
            from torch_xla import runtime
            from torch_xla.distributed import spmd

            runtime.use_spmd()  # before the first tensor is on the device
            devices = runtime.global_runtime_device_count()
            self.mesh = spmd.Mesh(range(devices), (devices,), ("batch",))
            self.rank = runtime.process_index()  # of a pod's hosts
            if runtime.process_count() > 1:
                import torch_xla.distributed.xla_backend  # noqa: F401  (knows xla://)

                dist.init_process_group("gloo", init_method="xla://")
        self.device = open_device(name)
        self.parts = self.world * (len(self.mesh.device_ids) if self.mesh else 1)
        if self.world > 1:
            if self.device.type == "cuda":
                local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
                if local >= count:
                    raise ValueError(f"--nproc_per_node is more than the {count} GPUs here")
                torch.cuda.set_device(local)
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def rows(self, batch, accumulate):
        """The examples of a batch that this process computes, in turn."""
        mine = self.rank % self.world  # on a pod every host names all examples
        return [part.chunk(self.world)[mine] for part in torch.arange(batch).chunk(accumulate)]

    def put(self, xs):
        """Dict of tensors (examples, ...) -> the same on the device; every XLA device holds its share of them."""
        xs = {m: x.to(self.device) for m, x in xs.items()}
        if self.mesh:
            from torch_xla.distributed import spmd

            for x in xs.values():
                spmd.mark_sharding(x, self.mesh, ("batch", *[None] * (x.ndim - 1)))
        return xs

    def share(self, model):
        """The model, called so that processes average their gradients."""
        if self.world == 1:
            return model
        net = DistributedDataParallel(model)
        net.prediction = model.prediction
        return net

    def agree(self, tokenizer):
        """Take the first process's: the same fit elsewhere may differ by rounding, and so by whole directions."""
        for x in tokenizer.state_dict().values() if dist.is_initialized() else ():
            dist.broadcast(x, 0)

    def total(self, x):
        """Sum x over the processes, in place."""
        if dist.is_initialized():
            dist.all_reduce(x)
        return x


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
    if config.compile and config.device == "xla":
        raise ValueError("--compile is for other devices: XLA compiles everything")
    if config.size % 16:
        raise ValueError(f"--size {config.size} is not a multiple of 16")
    hops, rest = divmod(config.sample_rate, 8 * config.fps)  # a sound segment lasts a frame, and has 8 hops
    if not is_latents(config.data) and (rest or hops < 8):
        nearest = 8 * config.fps * max(8, hops + (2 * rest > 8 * config.fps))
        raise ValueError(f"--sample-rate {config.sample_rate} does not divide by 8 x --fps {config.fps}: use {nearest}")
    if is_latents(config.data):
        return read_latents(config.data)[1]
    if config.data == "toy":
        return PRESETS["toy"].modalities
    # Real clips need more components than the ball to be recognised: these are wide.
    return av_modalities(config.fps, 2 * (config.size // 16,), 192, 1 / config.fps, 96)


def draw(config, modalities, examples, T, step):
    """What is random in a step but the noise -> index (batch,), t, the coin of self-conditioning.

    A function of (seed, step) alone, for the whole batch: a resumed run, another number of processes and another device
    see the batches they would have seen.
    """
    word = np.random.SeedSequence([config.seed, step]).generate_state(1)  # torch's generator keeps 32 bits of a seed
    g = torch.Generator().manual_seed(int(word[0]))
    index = torch.randint(examples, (config.batch,), generator=g)
    t = sample_timesteps(config.mixture, modalities, config.batch, T, g)
    return index, t, torch.rand((), generator=g).item() < 0.9  # the paper's self-conditioning rate [App. B]


def draw_noise(config, modalities, step, rows):
    """eps of the batch's examples `rows`, each from (seed, step, its number): nobody draws what others need."""
    words = np.random.SeedSequence([config.seed, step, 1]).generate_state(config.batch)
    eps = {m.name: torch.empty(len(rows), *m.shape) for m in modalities}
    for i, row in enumerate(rows.tolist()):
        g = torch.Generator().manual_seed(int(words[row]))
        for m in modalities:
            torch.randn(m.shape, generator=g, out=eps[m.name][i])
    return eps


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

    def __init__(self, path, modalities, machine):
        self.path, self.machine = path, machine
        self.elements = torch.tensor([m.P * m.channels for m in modalities])[:, None]
        bins = [f"{m.name}_t{k * 100 + 1}_{k * 100 + 100}" for m in modalities for k in range(self.BINS)]
        self.header = ["step", "loss", *(m.name for m in modalities), *bins]
        self.sums = torch.zeros(2, len(modalities), self.BINS, device=machine.device)  # errors, counts

    def state_dict(self):
        return {"sums": self.sums}

    def load_state_dict(self, state):
        if self.machine.world == 1 or not self.machine.rank:  # they are of all processes
            self.sums.copy_(state["sums"])

    def open(self, step):
        """Start log.csv, or drop the lines a resumed run will write again, and one that was cut off."""
        self.since = (step, time.monotonic())
        if self.machine.rank:
            return
        rows = csv.reader(self.path.open()) if step and self.path.exists() else []
        rows = [row for row in rows if len(row) == len(self.header) and row[0].isdigit() and int(row[0]) <= step]
        with replacing(self.path) as partial, partial.open("w", newline="") as file:
            csv.writer(file).writerows([self.header, *rows])

    def add(self, errors, t, T):
        """errors and t: dicts (B, N_m)."""
        for i, m in enumerate(errors):
            share = F.one_hot((t[m] - 1).clamp(min=0) * self.BINS // T, self.BINS) * (t[m] > 0)[..., None]
            self.sums[0, i] += (share * errors[m][..., None]).sum((0, 1))
            self.sums[1, i] += share.sum((0, 1))

    def gather(self, step):
        """Leave the sums over all processes with the first one. FloatingPointError if a loss was not finite."""
        sums = self.machine.total(self.sums) if self.machine.world > 1 else self.sums
        if not sums.isfinite().all():
            raise FloatingPointError(f"the loss is not finite at step {step}")
        if self.machine.world > 1 and self.machine.rank:
            self.sums.zero_()

    def write(self, step, steps):
        errors, counts = self.sums.cpu().clone()  # on a CPU .cpu() is the tensor itself
        self.sums.zero_()
        if self.machine.rank:
            return
        loss = (errors * self.elements).sum() / (counts * self.elements).sum()
        values = [loss, *(errors.sum(1) / counts.sum(1)), *(errors / counts).flatten()]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([step, *("" if v.isnan() else f"{v:.6f}" for v in values)])  # "": nothing there
        speed = (step - self.since[0]) / (time.monotonic() - self.since[1])
        left = round((steps - step) / speed)
        line = f"step {step}/{steps}  loss {loss:.4f}  {speed:.1f} steps/s  {left // 60}:{left % 60:02} left"
        print(f"\r{line:70}" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True)


# ---------------------------------------------------------------------------------------
# Nothing is lost: checkpoints
# ---------------------------------------------------------------------------------------

FORMAT = 1  # of checkpoints: a change that an older reader would misread adds one


@contextmanager
def replacing(path):
    """Atomically: write to the path this gives, and `path` has the old content or, at the end, the new."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save(path, state):
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # or the new name may reach the disk before what it names


def on_cpu(x):
    """Nested dicts and lists with every tensor on the CPU, which any machine can load."""
    if isinstance(x, dict):
        return {k: on_cpu(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [on_cpu(v) for v in x]
    return x.cpu() if isinstance(x, torch.Tensor) else x


@contextmanager
def reading(path):
    """Whatever fails because a checkpoint's contents do not fit becomes one ValueError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError) as why:
        raise ValueError(f"{path} is damaged or does not fit this version ({why}): train again") from None


def load(path):
    """A checkpoint's dict. Nothing in the file is executed. ValueError says what is wrong with it and what to do."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not look at the checksums
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}: train.py writes one, --ckpt names it") from None
    except Exception as why:  # torch.load raises many kinds on a file that is no checkpoint
        raise ValueError(f"{path} cannot be read as a checkpoint: it is another kind of file, damaged, or holds code, "
                         f"which is not run ({type(why).__name__}); use another or train again") from None  # fmt: skip
    if not isinstance(state, dict) or not {"model", "ema", "step", "config", "modalities"} <= set(state):
        raise ValueError(f"{path} is not a checkpoint of train.py: name the ckpt.pt that it wrote")
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} has format {state.get('format')}, this version reads {FORMAT}: "
                         "train again, or use the version that wrote it")  # fmt: skip
    return state


def fill(config, parts, saved):
    """Load the parts of a run from its checkpoint."""
    with reading(Path(config.out) / "ckpt.pt"):
        for name, part in parts.items():
            part.load_state_dict(saved[name])


def prepare(config, modalities, machine, saved):
    """Load the clips, fit the tokenizers or take the saved run's, encode everything once -> latents, tokenizers."""
    print(f"reading {config.data} ...", flush=True)
    clips = load_clips(config.data, "train", modalities, config.fps, config.size, config.sample_rate)
    tokenizers = make_tokenizers(config.data, modalities, config.size, config.sample_rate)
    if saved:
        fill(config, {"tokenizers": tokenizers}, saved)
    for m, tokenizer in tokenizers.items() if not saved else ():
        tokenizer.fit(clips[m][:1024])
        machine.agree(tokenizer)
    return {m: in_chunks(tokenizer.encode, clips[m]) for m, tokenizer in tokenizers.items()}, tokenizers


def find(config, path, modalities):
    """The checkpoint that --resume continues from, or None. ValueError where it is of another run than config's."""
    if not path.exists():
        print(f"nothing saved in {config.out}: starting fresh")
        return None
    state = load(path)
    with reading(path):
        for name, now in asdict(config).items():
            before = state["config"][name]
            if before != now and name not in ("resume", "device", "save_every", "out", "compile", "accumulate"):
                raise ValueError(f"--resume: {path} was trained with {name} {before}, not {now}")
        if state["modalities"] != described(modalities):
            raise ValueError(f"--resume: {path} was trained on other modalities than {config.data} has")
    return state


def described(modalities):
    return [asdict(m) for m in modalities]


def check_weights(model, step):
    """FloatingPointError if they are broken: then they are never written."""
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise FloatingPointError(f"the weights are not finite at step {step}")


def checkpoint(step, config, modalities, parts):
    """-> all that a run is at this step."""
    about = {"format": FORMAT, "step": step, "config": asdict(config), "modalities": described(modalities)}
    return {**on_cpu({name: part.state_dict() for name, part in parts.items()}), **about}


@contextmanager
def signals_noted():
    """A list that Ctrl-C and SIGTERM add to, in place of stopping at once: the step under way can end and be saved."""
    noted = []
    before = {s: signal.signal(s, lambda number, _: noted.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def begin(config, modalities, machine):
    """-> latents of all clips, the parts of a checkpoint, the first step."""
    out, preset = Path(config.out), PRESETS[config.preset]
    if config.batch % (config.accumulate * machine.parts):
        among = f"--accumulate {config.accumulate} parts on {machine.parts} devices"
        raise ValueError(f"--batch {config.batch} does not divide into {among}")
    out.mkdir(parents=True, exist_ok=True)
    ckpt = out / "ckpt.pt"
    saved = find(config, ckpt, modalities) if config.resume else None
    first = saved["step"] if saved else 0
    if machine.total(torch.tensor(first)) != first * machine.total(torch.tensor(1)):
        raise ValueError(f"the processes do not see the same {ckpt}: --out must be a folder that they share")
    torch.manual_seed(config.seed)
    model = preset.model(modalities, config.prediction).to(machine.device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(preset.ema))
    log = Log(out / "log.csv", modalities, machine)
    parts = {"model": model, "ema": ema, **make_optimizers(config, model, machine.device), "log": log}
    if saved:
        fill(config, parts, saved)
        print(f"resuming at step {first}")
    latents, parts["tokenizers"] = prepare(config, modalities, machine, saved)
    if ckpt.exists() and not saved and not machine.rank:
        earlier = out / f"earlier-{len(list(out.glob('earlier-*.pt'))) + 1}"
        for old in (ckpt, log.path):
            if old.exists():
                old.replace(earlier.with_suffix(old.suffix))
        print(f"kept an earlier run's checkpoint and log as {earlier}.pt, .csv")
    log.open(first)
    return latents, parts, first


def train(config, modalities):
    machine, preset, ckpt = Machine(config.device), PRESETS[config.preset], Path(config.out) / "ckpt.pt"
    device, schedule = machine.device, NoiseSchedule().to(machine.device)
    latents, parts, first = begin(config, modalities, machine)
    model, log, optimizers = parts["model"], parts["log"], [parts[k] for k in ("adamw", "muon") if k in parts]
    z_max = {m: tokenizer.z_max.item() for m, tokenizer in parts["tokenizers"].items()}
    net = machine.share(model)
    net = torch.compile(net) if config.compile else net
    with signals_noted() as noted:
        for step in range(first, config.steps):
            index, t, self_conditioning = draw(config, modalities, len(latents["video"]), schedule.T, step)
            t_batch = {m: x.to(device) for m, x in t.items()}
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate(config, step) * group.get("scale", 1)
            model.zero_grad()
            for rows in machine.rows(config.batch, config.accumulate):
                z0 = machine.put({m: z[index[rows]] for m, z in latents.items()})
                t_rows = machine.put({m: x[rows] for m, x in t.items()})
                eps = machine.put(draw_noise(config, modalities, step, rows))
                with precision(config.dtype, device):
                    loss, errors = training_loss(
                        net, schedule, z0, t_rows, eps, self_conditioning=self_conditioning, z_max=z_max,
                        noise_power=preset.noise_power, t_batch=t_batch, return_errors=True,
                    )  # fmt: skip
                (loss * machine.world).backward()  # parts' losses add up, but processes average their gradients
                log.add(errors, t_rows, schedule.T)
                end_step(device)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            parts["ema"].update_parameters(model)
            end_step(device)
            done, last = step + 1, step + 1 == config.steps
            stop = machine.total(torch.tensor(len(noted))) > 0  # all processes after the same step
            if done % log.EVERY == 0 or last:
                log.gather(done)
                log.write(done, config.steps)
            if done % config.save_every == 0 or last or stop:
                log.gather(done)
                check_weights(model, done)
                if machine.mesh or not machine.rank:  # XLA's hosts must all do the same on their devices
                    state = checkpoint(done, config, modalities, parts)
                if not machine.rank:
                    save(ckpt, state)
                machine.total(torch.zeros(()))  # nobody goes on, or away, before it is saved
            if stop and not last:
                raise KeyboardInterrupt("saved")
    print(f"\ndone: {ckpt}")
    if dist.is_initialized():
        dist.destroy_process_group()


def main():
    config = parse(Config, __doc__.split("`")[0])
    ckpt = Path(config.out) / "ckpt.pt"
    try:
        train(config, complete(config))
    except (ValueError, OSError) as why:
        return fail(why)
    except (MemoryError, RuntimeError) as why:
        return out_of_memory(why, "use a smaller --batch, or more --accumulate for the same")
    except FloatingPointError as why:
        kept = f"the last good checkpoint is {ckpt}" if ckpt.exists() else "nothing was saved"
        print(f"\n{why}; {kept}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as why:
        if os.environ.get("RANK", "0") == "0":
            how = "saved: the same command with --resume continues" if why.args else "nothing new was saved"
            print(f"\nstopped, {how}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
