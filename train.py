"""Train AVDiT on the toy world, a folder of clips or a file of latents [Alg. 2, App. B]. See `python train.py --help`.

train() is Alg. 2 as a loop. Below it stands what it uses, in this order: what a step draws, devices and processes,
optimizers, the run and its checkpoint, the log, the command line.
"""

import argparse
import copy
import csv
import importlib.util
import math
import os
import sys
import time
import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from avdit import PREDICTIONS, PRESETS, NoiseSchedule, parse_mixture, sample_timesteps, training_loss
from data import Media, kind_of

# The training recipe of each preset. Every entry is also a flag of the command line.
RECIPES = {
    "toy": {"mixture": "monl", "batch": 64, "steps": 3800, "optimizer": "muon", "lr": 4e-3, "warmup": 100,
            "ema": 0.995, "save_every": 100},
    "clips": {"mixture": "monl", "batch": 64, "steps": 10_000, "optimizer": "muon", "lr": 6e-3, "warmup": 100,
              "ema": 0.995, "save_every": 200},
    "paper": {"mixture": "monl", "batch": 256, "steps": 400_000, "optimizer": "adamw", "lr": 5e-4, "warmup": 5000,
              "ema": 0.9999, "save_every": 500},
}  # fmt: skip


def learning_rate(args, step):
    """A linear warm-up, then a cosine to zero [App. B]. A short run warms up for a tenth of its steps at most."""
    warm = min(1, (step + 1) / min(args.warmup, args.steps / 10))
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def train(args):
    """Alg. 2. Begins the run in args.out, or goes on from its checkpoint."""
    machine = Machine(args.device)
    machine.check(args.batch, args.accumulate)
    data = kind_of(args.data)(args.data, media_of(args))
    layout, run = data.layout, Run(args, data, machine)
    z = run.begin()  # latents of all training clips, (n, E)
    schedule = NoiseSchedule().to(machine.device)
    net = machine.share(run.model)
    net = torch.compile(net) if args.compile else net
    for step in range(run.step, args.steps):
        index, t, self_conditioning = draw(args, step, len(z), layout, schedule.T)  # lines 2 and 4
        run.set_learning_rate(learning_rate(args, step))
        run.model.zero_grad()
        for rows in machine.rows(args.batch, args.accumulate):
            eps = draw_noise(args.seed, step, rows, layout.E)  # line 3
            z0, t_rows, eps = machine.put(z[index[rows]], t[rows], eps)
            with precision(args.dtype, machine.device, layout):
                loss, error = training_loss(net, schedule, layout, z0, t_rows, eps, self_conditioning)  # lines 5 to 10
            (loss / args.accumulate).backward()  # line 11; DistributedDataParallel averages over processes
            run.log.add(error, t_rows, schedule.T)
            end_step(machine.device)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        for optimizer in run.optimizers.values():
            optimizer.step()
        average(run.ema, run.model, step, args.ema)
        end_step(machine.device)
        run.finish(step + 1)
    print(f"\ndone: {run.path}")


# --- What a step draws, and the average of the weights ----------------------------------------------------------------
# A draw depends on (seed, step, row of the batch) alone. So a resumed run, another number of processes and another device
# all see the same batches.


def draw(args, step, examples, layout, T):
    """-> index (B,) of the examples, t (B, S), and self-conditioning's coin, True at the paper's rate 0.9 [App. B]."""
    word = np.random.SeedSequence([args.seed, step]).generate_state(1)  # torch's generator takes 32 bits of a seed
    generator = torch.Generator().manual_seed(int(word[0]))
    index = torch.randint(examples, (args.batch,), generator=generator)
    t = sample_timesteps(args.mixture, layout, args.batch, T, generator)
    return index, t, torch.rand((), generator=generator).item() < 0.9


def draw_noise(seed, step, rows, E):
    """eps (len(rows), E) of these rows of the batch. Row r has the seed [seed, step, r + 1]; r + 1, because NumPy takes
    [seed, step, 0] for [seed, step]."""
    words = [np.random.SeedSequence([seed, step, row + 1]).generate_state(1) for row in rows.tolist()]
    return torch.stack([torch.randn(E, generator=torch.Generator().manual_seed(int(word[0]))) for word in words])


@torch.no_grad()
def average(ema, model, step, decay):
    """Exponential moving average of the weights [App. B]. The decay is lower at first, or a short run would be sampled
    from its untrained weights."""
    for slow, p in zip(ema.parameters(), model.parameters()):
        slow.lerp_(p, 1 - min(decay, (1 + step) / (10 + step)))


# --- Devices and processes. All calls of torch_xla in this project are here. ------------------------------------------

DEVICES = ("auto", "cpu", "cuda", "mps", "xla")


def open_device(name):
    """-> torch.device. Raises ValueError with the devices of this machine if it lacks this one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    here = [found.type] if found and found.type in DEVICES else []
    here += ["cpu"] + ["xla"] * bool(importlib.util.find_spec("torch_xla"))  # auto never takes xla
    name = here[0] if name == "auto" else name
    if name not in here:
        raise ValueError(f"no {name} here: use {', '.join(here)} or auto")
    if name == "xla":
        import torch_xla

        return torch_xla.device()
    return torch.device(name)


def end_step(device):
    """XLA records operations until this call, which compiles them as one program if they are new, and runs them."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


@contextmanager
def precision(name, device, layout):
    """The precision of a forward pass: "fp32", "bf16" products, or "auto": bf16 if the chip has instructions for it."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "xla":
        from torch_xla import runtime

        native = runtime.device_type() != "CPU"
    else:
        chip = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        native = chip.get("avx512_bf16") or chip.get("amx_bf16")
    enabled = name == "bf16" or (name == "auto" and bool(native))
    with ExitStack() as stack:
        # autocast must not cache weights in bf16: the pass without gradient would fill the cache, and the weights of the
        # pass with gradient would be cut off from it.
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False))
        if enabled and device.type == "cpu" and sum(m.N * m.P for m in layout.modalities) < 512:
            # PyTorch's fused attention is slow there. The plain one keeps L^2 numbers per head and layer.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


class Machine:
    """One device; or several processes with a device each, started by torchrun, which share every batch and average
    their gradients; or one process that spreads every batch over all XLA devices (SPMD).

    rank   number of this process; only process 0 prints and saves
    world  number of processes that share a batch
    """

    def __init__(self, name):
        self.rank = int(os.environ.get("RANK", "0"))  # torchrun sets it
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.mesh = None
        if name == "xla" and self.world > 1:
            raise ValueError("--device xla spreads one process over all devices: start it without torchrun")
        if name == "xla" and importlib.util.find_spec("torch_xla"):
            from torch_xla import runtime
            from torch_xla.distributed import spmd

            runtime.use_spmd()  # must come before the first tensor on the device
            count = runtime.global_runtime_device_count()
            self.mesh = spmd.Mesh(range(count), (count,), ("batch",))
            self.rank = runtime.process_index()  # of a pod's hosts, each of which names all examples
            if runtime.process_count() > 1:
                import torch_xla.distributed.xla_backend  # noqa: F401  (registers xla://)

                dist.init_process_group("gloo", init_method="xla://")
        self.device = open_device(name)
        if self.world > 1:
            if self.device.type == "cuda":
                local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
                if local >= count:
                    raise ValueError(f"--nproc_per_node is more than the {count} GPUs here")
                torch.cuda.set_device(local)
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def check(self, batch, accumulate):
        devices = self.world * (len(self.mesh.device_ids) if self.mesh else 1)
        if batch % (accumulate * devices):
            raise ValueError(f"--batch {batch} is not a multiple of --accumulate {accumulate} x {devices} devices")

    def rows(self, batch, accumulate):
        """The rows of a batch that this process computes, one tensor per micro-batch."""
        return [part.chunk(self.world)[self.rank % self.world] for part in torch.arange(batch).chunk(accumulate)]

    def put(self, *tensors):
        """Tensors (examples, ...) -> the same on the device. With SPMD each XLA device holds its share of the examples."""
        tensors = [x.to(self.device) for x in tensors]
        if self.mesh:
            from torch_xla.distributed import spmd

            for x in tensors:
                spmd.mark_sharding(x, self.mesh, ("batch", *[None] * (x.ndim - 1)))
        return tensors

    def share(self, model):
        """The model; with several processes, wrapped so that they average their gradients."""
        if self.world == 1:
            return model
        net = DistributedDataParallel(model, broadcast_buffers=False)
        net.prediction = model.prediction  # training_loss reads it
        return net

    def total(self, x):
        """x summed over the processes, which wait for each other here. XLA's devices have the sum already."""
        x = x.clone()
        if dist.is_initialized() and x.device.type != "xla":
            dist.all_reduce(x)
        return x


# --- Optimizers -------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Muon [Jordan et al. 2024], for matrices: Nesterov momentum, made nearly orthogonal by Newton-Schulz iterations.

    torch.optim.Muon always computes in bf16, which doubles the step's time on a CPU without bf16 instructions.
    """

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.01, "lr_scale": 2.5})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95)
                update = update / update.norm().clamp(min=1e-7)
                wide = update if p.shape[0] <= p.shape[1] else update.mT
                for _ in range(3):
                    gram = wide @ wide.mT
                    wide = 3.4445 * wide + (-4.775 * gram + 2.0315 * gram @ gram) @ wide
                update = wide if p.shape[0] <= p.shape[1] else wide.mT
                rate = 0.2 * math.sqrt(max(p.shape)) * group["lr"]  # gives updates the size of AdamW's
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rate * update)


def make_optimizers(name, model):
    """-> {name: optimizer}. "adamw" is AdamW for all parameters [App. B]. "muon" is Muon for the matrices of the blocks
    and AdamW for the rest. The paper gives no betas and no weight decay, so these are ours; Muon's rate (2.5 times
    AdamW's) and its 3 iterations (5 are usual) were found by trial on the toy world."""
    rest, matrices = [], []
    for key, p in model.named_parameters():
        is_matrix = name == "muon" and key.startswith("blocks.") and p.ndim == 2
        (matrices if is_matrix else rest).append(p)
    fused = rest[0].device.type in ("cpu", "cuda")
    optimizers = {"adamw": torch.optim.AdamW([{"params": rest, "lr_scale": 1}], betas=(0.9, 0.99), fused=fused)}
    return {**optimizers, "muon": Muon(matrices)} if matrices else optimizers


# --- A run and its checkpoint -----------------------------------------------------------------------------------------

FORMAT = 5  # a change that another version would misread adds one
FREE = ("device", "compile", "accumulate", "save_every", "out")  # settings that may differ when a run goes on


class Run:
    """Everything that a checkpoint holds, and when it is written. Every run is a resumed run: process 0 writes step 0,
    then every process loads the checkpoint."""

    def __init__(self, args, data, machine):
        self.args, self.data, self.machine, self.path = args, data, machine, Path(args.out) / "ckpt.pt"
        sample_timesteps(args.mixture, data.layout, 1, 2)  # a mixture may name a modality that the data lack
        torch.manual_seed(args.seed)
        self.model = PRESETS[args.preset].model(data.layout, args.prediction).to(machine.device)
        self.ema = copy.deepcopy(self.model)
        self.optimizers = make_optimizers(args.optimizer, self.model)
        self.tokenizers = data.tokenizers()
        self.log = Log(self.path.parent / "log.csv", data.layout, machine)
        self.parts = {"model": self.model, "ema": self.ema, **self.optimizers, "tokenizers": self.tokenizers, "log": self.log}
        self.about = {"config": vars(args), "modalities": [asdict(m) for m in data.layout.modalities]}

    def begin(self):
        """Load the checkpoint, and write it first if there is none -> latents of the training clips, (n, E)."""
        clips, fresh = None, self.machine.total(torch.tensor(int(self.machine.rank == 0 and not self.path.exists()))) > 0
        if fresh:
            print(f"reading {self.args.data} ...", flush=True)
            clips, self.about["held_out"] = self.data.training_clips()
            self.about["clips"] = len(next(iter(clips.values())))
            self.tokenizers.fit(clips)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.save(0)
        self.load()
        self.log.start(self.step)
        if self.step == self.args.steps:
            return torch.empty(0)
        if not fresh:
            print(f"going on at step {self.step} of {self.path}; reading {self.args.data} ...", flush=True)
            clips, _ = self.data.training_clips()
        z = self.tokenizers.encode(clips)
        if len(z) != self.about["clips"]:
            raise ValueError(f"{self.path} is of a run on {self.about['clips']} clips, but {self.args.data} has {len(z)} "
                             "now: use another --out")  # fmt: skip
        for name, part in self.data.layout.unpack(z).items():
            if part.abs().max() < 0.01:
                print(f"{name} is the same in all clips: there is nothing to learn about it", file=sys.stderr)
        return z

    def load(self):
        """Refuses a checkpoint of other settings before it loads any weights."""
        with opened(self.path) as saved:
            now, before = vars(self.args), saved["config"]
            changed = [name for name in now if before[name] != now[name] and name not in FREE]
            alike = saved["modalities"] == self.about["modalities"]
            if alike and not changed:
                self.step, self.about = saved["step"], {**self.about, "held_out": saved["held_out"], "clips": saved["clips"]}
                for name, part in self.parts.items():
                    part.load_state_dict(saved[name])
        for name in changed:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{self.path} is of a run with {flag} {before[name]}, not {now[name]}: use another --out")
        if not alike:
            raise ValueError(f"{self.path} is of a run on other modalities than {self.args.data} has: use another --out")

    def save(self, step):
        """Write the checkpoint, once for all processes, which go on when it is there."""
        on_disk = self.machine.rank == 0
        if on_disk or self.machine.mesh:  # all hosts of a pod must take part in copying from the devices
            state = on_cpu({name: part.state_dict() for name, part in self.parts.items()})
        if on_disk:
            with replacing(self.path) as path, path.open("wb") as file:
                torch.save({"format": FORMAT, "step": step, **self.about, **state}, file)
                file.flush()
                os.fsync(file.fileno())  # or the new name may reach the disk before the content
        self.machine.total(torch.zeros(()))

    def set_learning_rate(self, lr):
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

    def finish(self, step):
        """After each step: a line of the log and a checkpoint, when it is time. A checkpoint always has a line, so that
        a resumed run has the same log. FloatingPointError stops a run that has broken before it is saved."""
        saves = step % self.args.save_every == 0 or step == self.args.steps
        if saves or step % self.log.EVERY == 0:
            tensors = [self.machine.total(self.log.sums), *self.model.parameters()]
            if not torch.stack([x.isfinite().all() for x in tensors]).all():
                raise FloatingPointError(f"the loss or the weights are not finite at step {step}")
            self.log.write(step, self.args.steps)
        if saves:
            self.save(step)


@contextmanager
def replacing(path):
    """Yields a path to write to. `path` keeps its old content until the block ends well, then has the new one."""
    other = path.with_name(path.name + ".partial")
    try:
        yield other
        os.replace(other, path)
    finally:
        other.unlink(missing_ok=True)


@contextmanager
def opened(path):
    """Yields a checkpoint's dict. Nothing in the file is executed. Raises ValueError if the file is no checkpoint, is
    damaged, or if anything goes wrong in the block, which should only load from it."""
    with open(path, "rb") as file:
        try:
            if zipfile.ZipFile(file).testzip():  # torch.load does not look at the checksums
                raise zipfile.BadZipFile("a checksum is wrong")
            file.seek(0)
            state = dict(torch.load(file, map_location="cpu", weights_only=True))
            if state["format"] != FORMAT:
                raise ValueError(f"it has format {state['format']}, this version reads {FORMAT}")
            yield state
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as why:  # reading raises many kinds
            raise ValueError(f"{path} is no checkpoint of this version, is damaged, or holds code, which is not run "
                             f"({type(why).__name__}: {why}): use another, or train again") from None  # fmt: skip


def on_cpu(x):
    """Nested dicts and lists with every tensor on the CPU. A file of XLA tensors would load only with torch_xla."""
    if isinstance(x, dict):
        return {k: on_cpu(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [on_cpu(v) for v in x]
    return x.cpu() if isinstance(x, torch.Tensor) else x


# --- The log ----------------------------------------------------------------------------------------------------------


class Log:
    """log.csv and the progress line: the mean squared error of the prediction where t > 0 since the last line, as a whole,
    by modality, and by modality and quarter of the noise levels. It has no loss weights, so runs can be compared.

    The sums stay on the device between lines, so no step waits for them. All lines travel in the checkpoint, and log.csv
    is written anew from them.
    """

    EVERY, BINS = 50, 4  # steps per line

    def __init__(self, path, layout, machine):
        self.path, self.layout, self.machine = path, layout, machine
        bins = [f"{name}_t{k * 250 + 1}_{k * 250 + 250}" for name in layout.names for k in range(self.BINS)]
        self.lines = [["step", "mse", *layout.names, *bins]]
        self.sums = torch.zeros(2, layout.S, self.BINS, device=machine.device)  # squared errors; counts of elements

    def state_dict(self):
        return {"lines": self.lines}

    def load_state_dict(self, state):
        self.lines = [list(line) for line in state["lines"]]

    def start(self, step):
        self.began = (step, time.monotonic())
        self.write_file()

    def write_file(self):
        if self.machine.rank == 0:
            with replacing(self.path) as path, path.open("w", newline="") as file:
                csv.writer(file).writerows(self.lines)

    def add(self, error, t, T):
        """Squared errors (B, E) at the timesteps t (B, S)."""
        bins = F.one_hot((t - 1).clamp(min=0) * self.BINS // T, self.BINS) * (t > 0)[..., None]  # (B, S, BINS)
        parts = [part.flatten(2) for part in self.layout.unpack(error).values()]  # (B, N_m, elements of a segment)
        sums, sizes = torch.cat([x.sum(-1) for x in parts], -1), torch.cat([torch.ones_like(x).sum(-1) for x in parts], -1)
        self.sums += torch.stack([(bins * x[..., None]).sum(0) for x in (sums, sizes)])

    def write(self, step, steps):
        modalities = self.machine.total(self.sums).cpu().split(self.layout.lengths, 1)
        errors, counts = torch.stack([sums.sum(1) for sums in modalities], 1)  # (M, BINS) each
        self.sums.zero_()
        values = [errors.sum() / counts.sum(), *(errors.sum(1) / counts.sum(1)), *(errors / counts).flatten()]
        self.lines.append([str(step), *("" if v.isnan() else f"{v:.6f}" for v in values)])  # "" where nothing was drawn
        self.write_file()
        speed = (step - self.began[0]) / (time.monotonic() - self.began[1])
        left = round((steps - step) / speed)
        line = f"step {step}/{steps}  mse {values[0]:.4f}  {speed:.1f} steps/s  {left // 60}:{left % 60:02} left"
        print(f"\r{line:70}" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True)


# --- The command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A user's mistake gets one line on stderr and exit status 2."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, epilog="Defaults stand in brackets.", **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(str(message).split())}\n")

    @contextmanager
    def guarding(self, remedy):
        """Turns wrong input and lack of memory into such a line. Other errors keep their traceback."""
        try:
            yield
        except (ValueError, OSError) as why:
            self.error(why)
        except (MemoryError, RuntimeError) as why:
            if not isinstance(why, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(why):
                raise
            self.error(f"out of memory: {remedy}")


def number(kind, least, most):
    """The type of an argument: an int or a float within bounds."""

    def read(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        return value

    read.__name__ = kind.__name__  # argparse prints it
    return read


def make_parser():
    """The data choose the default preset, and both choose the other defaults. So these two flags are read first."""
    first = Parser(add_help=False)
    first.add_argument("--data", default="toy", help="toy, a folder of clips, or a .npz of latents (%(default)s)")
    kind = kind_of(first.parse_known_args()[0].data)
    first.add_argument("--preset", default=kind.preset, choices=PRESETS, help="network and recipe (%(default)s)")
    preset = first.parse_known_args()[0].preset
    recipe, count = RECIPES[preset], number(int, 1, 10**9)
    parser = Parser(description=__doc__.split(" See")[0], parents=[first])
    add = parser.add_argument
    add("--mixture", help="monl, vanilla, pm, pt, ptm, task:a2v ..., or a sum such as pt+pm (%(default)s)")
    add("--prediction", default=PRESETS[preset].prediction, choices=PREDICTIONS, help="what to regress (%(default)s)")
    add("--batch", type=number(int, 1, 2**16), help="examples per step, over all devices (%(default)s)")
    add("--steps", type=count, help="training steps (%(default)s)")
    add("--optimizer", choices=("adamw", "muon"), help="muon: Muon for the blocks' matrices (%(default)s)")
    add("--lr", type=number(float, 1e-12, 10), help="peak learning rate (%(default)s)")
    add("--warmup", type=count, help="steps of linear warm-up, at most a tenth of all (%(default)s)")
    add("--ema", type=number(float, 0, 1), help="decay of the averaged weights that are sampled (%(default)s)")
    add("--fps", type=number(int, 1, 240), default=kind.media.fps, help="frames per second of clips (%(default)s)")
    add("--size", type=number(int, 32, 1024), default=kind.media.size, help="their height and width (%(default)s)")
    add("--sample-rate", type=number(int, 1000, 192000), default=kind.media.sample_rate, help="in Hz (%(default)s)")
    add("--device", default="auto", choices=DEVICES, help="where to compute (%(default)s)")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 if the chip has it (%(default)s)")
    add("--compile", action="store_true", help="compile the network, which needs a C++ compiler")
    add("--accumulate", type=count, default=1, help="micro-batches per step, to save memory (%(default)s)")
    add("--save-every", type=count, help="steps between checkpoints (%(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of weights and batches (%(default)s)")
    add("--out", default="runs/toy", help="folder of ckpt.pt and log.csv; a run found there goes on (%(default)s)")
    parser.set_defaults(**recipe)
    return parser


def media_of(args):
    return Media(args.fps, args.size, args.sample_rate)


def main():
    parser = make_parser()
    args = parser.parse_args()
    try:
        with parser.guarding("use a smaller --batch, more --accumulate for the same, a smaller --size or fewer clips"):
            parse_mixture(args.mixture)  # before anything is read
            if args.compile and args.device == "xla":
                raise ValueError("--compile is for other devices: XLA always compiles")
            train(args)
    except FloatingPointError as why:
        print(f"\n{why}; the last good checkpoint is {Path(args.out) / 'ckpt.pt'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nstopped: the same command goes on from the last checkpoint, at most {args.save_every} steps back",
                  file=sys.stderr)  # fmt: skip
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
