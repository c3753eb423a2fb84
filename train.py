"""Train AVDiT on the toy world, a folder of clips or a file of latents [Alg. 2, App. B]. See `python train.py --help`.

train() is Alg. 2 as a loop. Below it: what a step draws, the optimizers, checkpoint and log, devices, command line."""

import argparse
import atexit
import copy
import importlib.util
import math
import os
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from avdit import PREDICTIONS, PRESETS, AVDiT, NoiseSchedule, sample_timesteps, training_loss
from data import Media, kind_of, open_data

# The training recipe of each preset. Every entry is also a flag.
RECIPES = {
    "toy": {"batch": 64, "steps": 2500, "optimizer": "muon", "lr": 4e-3, "warmup": 100, "ema": 0.995},
    "clips": {"batch": 64, "steps": 10_000, "optimizer": "muon", "lr": 6e-3, "warmup": 100, "ema": 0.995},
    "paper": {"batch": 256, "steps": 400_000, "optimizer": "adamw", "lr": 5e-4, "warmup": 5000, "ema": 0.9999},
}


def learning_rate(args, step):
    """A linear warm-up, then a cosine to zero [App. B]. A short run warms up for a tenth of its steps at most."""
    warm = min(1, (step + 1) / min(args.warmup, args.steps / 10))
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def train(args):
    """Alg. 2. Begins the run in args.out, or goes on from its checkpoint."""
    machine = Machine(args.device)
    micro_batches = machine.rows(args.batch, args.accumulate)
    data = open_data(args.data, Media(args.fps, args.size, args.sample_rate))
    layout, run = data.layout, Run(args, data, machine)
    z = run.begin()  # latents of all training clips, (n, E)
    schedule = NoiseSchedule().to(machine.device)
    if args.compile and not machine.mesh:  # XLA always compiles
        for block in run.model.blocks:
            block.compile(fullgraph=True)  # one program, which all blocks share
    net = machine.share(run.model)
    for step in range(run.step, args.steps):
        index, t, self_conditioning = draw(args, step, len(z), layout, schedule.T)  # lines 2 and 4
        run.set_learning_rate(learning_rate(args, step))
        run.model.zero_grad()
        for rows in micro_batches:
            eps = draw_noise(args.seed, step, rows, layout.E)  # line 3
            z0, t_rows, eps = machine.put(z[index[rows]], t[rows], eps)
            with precision(args.dtype, machine.device):
                loss, error = training_loss(net, schedule, layout, z0, t_rows, eps, self_conditioning)  # lines 5 to 11
            (loss / args.accumulate).backward()  # DistributedDataParallel averages over processes
            run.log.add(error, t_rows)
            flush(machine.device)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        for optimizer in run.optimizers.values():
            optimizer.step()
        update_ema(run.ema, run.model, step, args.ema)
        flush(machine.device)
        run.after_step(step + 1)
    print(f"done: {run.path}")


# --- What a step draws, and the average of the weights ----------------------------------------------------------------
# A draw depends on the seed, the step and the row alone: a resumed run, more processes, another device draw the same.


def draw(args, step, examples, layout, T):
    """-> index (B,) of the examples, t (B, S), and self-conditioning's coin, True at the paper's rate 0.9 [App. B]."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([args.seed, step]).generate_state(1)[0]))
    index = torch.randint(examples, (args.batch,), generator=generator)
    t = sample_timesteps(args.mixture, layout, args.batch, T, generator)
    return index, t, torch.rand((), generator=generator).item() < 0.9


def draw_noise(seed, step, rows, E):
    """eps (len(rows), E) of these rows of the batch. [seed, step, 0] would seed like draw()'s [seed, step]."""
    words = [np.random.SeedSequence([seed, step, row + 1]).generate_state(1) for row in rows.tolist()]
    return torch.stack([torch.randn(E, generator=torch.Generator().manual_seed(int(word[0]))) for word in words])


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Moving average of the weights [App. B]. The decay is lower at first, so that untrained weights are forgotten."""
    for slow, p in zip(ema.parameters(), model.parameters()):
        slow.lerp_(p, 1 - min(decay, (1 + step) / (10 + step)))


# --- Optimizers -------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), for matrices: Nesterov momentum, made nearly orthogonal by Newton-Schulz iterations.
    torch.optim.Muon always computes in bf16, in which a CPU without bf16 instructions takes 15 times as long."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.01, "lr_scale": 2.5})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
                tall, update = p.shape[0] > p.shape[1], p.grad.lerp(momentum, 0.95)
                x = (update.mT if tall else update) / update.norm().clamp(min=1e-7)
                for _ in range(3):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
                rate = 0.2 * math.sqrt(max(p.shape)) * group["lr"]  # gives updates the size of AdamW's
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rate * (x.mT if tall else x))


def make_optimizers(name, model):
    """-> {name: optimizer}. "adamw" is AdamW [App. B]; "muon" is Muon for the matrices of the blocks and AdamW for the
    rest. The paper gives no betas and no weight decay, so these are ours. Muon's rate, 2.5 times AdamW's, and its 3
    iterations, where 5 are usual, were found by trial on the toy world."""
    rest, matrices = [], []
    for key, p in model.named_parameters():
        is_matrix = name == "muon" and key.startswith("blocks.") and p.ndim == 2
        (matrices if is_matrix else rest).append(p)
    fused = rest[0].device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW([{"params": rest, "lr_scale": 1}], betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    return {"adamw": adamw, "muon": Muon(matrices)} if matrices else {"adamw": adamw}


# --- A run, its checkpoint and its log --------------------------------------------------------------------------------

FORMAT = 7  # of a checkpoint: increment it when what a checkpoint holds changes its meaning
FREE = ("data", "device", "compile", "accumulate", "save_every", "out")  # settings that may differ when a run goes on


class Run:
    """Everything that a checkpoint holds, and when it is written. `ema` is the average of the model's weights. Every
    run is a resumed run: rank 0 writes step 0, then every process loads the checkpoint."""

    def __init__(self, args, data, machine):
        self.args, self.data, self.machine, self.path = args, data, machine, Path(args.out) / "ckpt.pt"
        if not sample_timesteps(args.mixture, data.layout, batch=64, T=2).any():  # a trial; it also raises ValueError
            raise ValueError(f"--mixture {args.mixture} gives all that {args.data} has and leaves nothing to train")
        torch.manual_seed(args.seed)
        self.model = AVDiT(data.layout, args.dim, args.depth, args.heads, args.prediction).to(machine.device)
        self.ema = copy.deepcopy(self.model)
        self.optimizers = make_optimizers(args.optimizer, self.model)
        self.tokenizers = data.tokenizers()
        self.log = Log(self.path.parent / "log.csv", data.layout, machine)
        self.parts = {"model": self.model, "ema": self.ema, "tokenizers": self.tokenizers, "log": self.log}
        self.parts |= self.optimizers
        self.about = {"config": vars(args), "modalities": [asdict(m) for m in data.layout.modalities]}

    def begin(self):
        """Load the checkpoint, and write it first if there is none -> latents of the training clips, (n, E)."""
        exists = self.machine.total(torch.tensor(int(self.machine.rank == 0 and self.path.exists()))) > 0  # on rank 0
        if exists:
            self.load()
            print(f"going on at step {self.step} of {self.path}")
        print(f"reading {self.args.data} ...", flush=True)
        clips, held_out, checksum = self.data.training_clips()
        if not exists:
            self.tokenizers.fit(clips)
            self.about |= {"held_out": held_out, "checksum": checksum}
            self.save(0)
            self.load()
        z = self.tokenizers.encode(clips)
        if checksum != self.about["checksum"]:
            raise FileExistsError(f"{self.path} is of other clips than {self.args.data}: use another --out")
        self.log.began = (self.step, time.monotonic())
        return z

    def load(self):
        """Refuses a checkpoint of other settings before any weight of this run changes."""
        with opened(self.path) as saved:
            for name, now in vars(self.args).items():
                before, flag = saved["config"][name], "--" + name.replace("_", "-")
                if before != now and name not in FREE:
                    raise FileExistsError(f"{self.path} is of a run with {flag} {before}, not {now}: use another --out")
            if saved["modalities"] != self.about["modalities"]:
                raise FileExistsError(f"{self.path} is of a run on other modalities: use another --out")
            self.step = saved["step"]
            self.about |= {name: saved[name] for name in ("held_out", "checksum")}
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
        self.log.write_file()

    def save(self, step):
        """Rank 0 writes the checkpoint; the others wait."""
        if self.machine.rank == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state = tree_map_only(torch.Tensor, torch.Tensor.cpu, state)  # XLA's would load only with torch_xla
            with replacing(self.path) as path, path.open("wb") as file:
                if step == 0 and self.path.exists():
                    raise FileExistsError(f"another run has written {self.path} in the meantime: use another --out")
                torch.save({"format": FORMAT, "step": step, **self.about, **state}, file)
                file.flush()
                os.fsync(file.fileno())  # or the new name may reach the disk before the content
        self.machine.total(torch.zeros(()))

    def set_learning_rate(self, lr):
        for group in (group for optimizer in self.optimizers.values() for group in optimizer.param_groups):
            group["lr"] = lr * group["lr_scale"]

    def after_step(self, step):
        """Log and save when due. A save also logs, because a checkpoint has no unfinished sums. Stops a broken run."""
        saves = step % self.args.save_every == 0 or step == self.args.steps
        if saves or step % self.log.EVERY == 0:
            tensors = [self.machine.total(self.log.sums), *self.model.parameters()]
            if not torch.stack([x.isfinite().all() for x in tensors]).all():
                raise FloatingPointError(f"not finite at step {step}: the last good checkpoint is {self.path}")
            self.log.write(step, self.args.steps)
        if saves:
            self.save(step)


@cache
def alone(folder):
    """Makes a folder, or refuses one that another process writes to. The system ends the lock with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fcntl = importlib.import_module("fcntl")
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(f"another run writes to {folder}: use another --out") from None
    except (ImportError, OSError):  # Windows, and some shared file systems, have no such lock
        pass


@contextmanager
def replacing(path):
    """Yields a path to write to. `path` keeps its old content until the block ends well, then has the new one."""
    alone(path.parent.absolute())
    other = path.with_name(path.name + ".partial")
    try:
        yield other
        os.replace(other, path)
    finally:
        other.unlink(missing_ok=True)


@contextmanager
def opened(path):
    """Yields a checkpoint's dict; nothing in the file is executed. If the block cannot use it, it counts as damaged."""
    with open(path, "rb") as file:
        try:
            if zipfile.ZipFile(file).testzip():  # torch.load does not look at the checksums
                raise zipfile.BadZipFile("a checksum is wrong")
            file.seek(0)
            state = dict(torch.load(file, map_location="cpu", weights_only=True))
            if state["format"] != FORMAT:
                raise ValueError(f"it has format {state['format']}, this version reads {FORMAT}")
            yield state
        except (MemoryError, torch.OutOfMemoryError, FileExistsError):
            raise
        except Exception as why:  # reading raises many kinds
            raise ValueError(f"{path} is no checkpoint of this version, is damaged, or holds code, which is not run "
                             f"({type(why).__name__}: {why}): use another, or train again") from None  # fmt: skip


class Log:
    """log.csv and the progress line: the unweighted mean squared error where t > 0 since the last line, of all and by
    modality. The sums stay on the device, so no step waits for them. The checkpoint holds all lines of log.csv."""

    EVERY = 50  # steps per line

    def __init__(self, path, layout, machine):
        self.path, self.layout, self.machine = path, layout, machine
        self.lines = [["step", "mse", *layout.names]]
        self.sums = torch.zeros(2, layout.E, device=machine.device)  # over examples: squared errors; their number

    def state_dict(self):
        return {"lines": self.lines}

    def load_state_dict(self, state):
        self.lines = [list(line) for line in state["lines"]]

    def write_file(self):
        if self.machine.rank == 0:
            with replacing(self.path) as path:
                path.write_text("".join(",".join(line) + "\n" for line in self.lines), encoding="utf-8")

    def add(self, error, t):
        """Squared errors (B, E) at the timesteps t (B, S)."""
        noisy = self.layout.per_element(t > 0)
        self.sums += torch.stack([(error * noisy).sum(0), noisy.sum(0)])

    def write(self, step, steps):
        sums = self.machine.total(self.sums).cpu()
        self.sums.zero_()
        parts = [x.flatten(1).sum(1) for x in (sums, *self.layout.unpack(sums).values())]  # of all, then by modality
        values = [error / count for error, count in parts]
        self.lines.append([str(step), *("" if v.isnan() else f"{v:.6f}" for v in values)])  # "" where nothing was drawn
        self.write_file()
        speed = (step - self.began[0]) / (time.monotonic() - self.began[1])
        minutes, seconds = divmod(round((steps - step) / speed), 60)
        print(f"step {step}/{steps}  mse {values[0]:.4f}  {speed:.1f} steps/s  {minutes}:{seconds:02} left", flush=True)


# --- Devices and processes. All calls of torch_xla in this project are here. ------------------------------------------

DEVICES, DTYPES = ("auto", "cpu", "cuda", "mps", "xla"), ("auto", "fp32", "bf16")


def open_device(name):
    """-> torch.device. Raises ValueError, listing this machine's devices, if `name` is not one of them."""
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


def flush(device):
    """XLA records operations until this call, which compiles them as one program if they are new, and runs them."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


def precision(name, device):
    """The precision of a forward pass: "fp32", "bf16" (autocast), or "auto": bf16 if the chip has its instructions."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # TPUs have it, MPS is not tried
        chip = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        native = device.type == "xla" or chip.get("avx512_bf16") or chip.get("amx_bf16")
    enabled = name == "bf16" or (name == "auto" and bool(native))
    # No cache: the pass with gradient would reuse the bf16 weights of self-conditioning's pass, which have no gradient.
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


class Machine:
    """One device; or `world` processes with a device each, started by torchrun, which share every batch and average
    gradients; or one process that spreads every batch over all XLA devices (SPMD). Only rank 0 prints and saves."""

    def __init__(self, name):
        self.rank, self.world, self.mesh = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1")), None
        if name == "xla" and self.world > 1:
            raise ValueError("--device xla spreads one process over all devices: start it without torchrun")
        if name == "xla" and importlib.util.find_spec("torch_xla"):
            from torch_xla import runtime
            from torch_xla.distributed import spmd

            runtime.use_spmd()  # must come before the first tensor on the device
            count = runtime.global_runtime_device_count()
            self.mesh = spmd.Mesh(range(count), (count,), ("batch",))
        self.device = open_device(name)
        if self.world > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        if self.rank:
            sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115

    def rows(self, batch, accumulate):
        """The rows of a batch for this process, one tensor per micro-batch. Raises ValueError if sizes would differ."""
        devices = self.world * (len(self.mesh.device_ids) if self.mesh else 1)
        if batch % (accumulate * devices):
            raise ValueError(f"--batch {batch} is not a multiple of --accumulate {accumulate} x {devices} devices")
        return [part.chunk(self.world)[self.rank] for part in torch.arange(batch).chunk(accumulate)]

    def put(self, *tensors):
        """Tensors (examples, ...) -> the same on the device. With SPMD each XLA device holds some of the examples."""
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
        net = DistributedDataParallel(model)
        net.prediction = model.prediction  # predict() reads it
        return net

    def total(self, x):
        """x summed over the processes, which wait for each other here. XLA's devices have the sum already."""
        x = x.clone()
        if dist.is_initialized() and x.device.type != "xla":
            dist.all_reduce(x)
        return x


# --- The command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A user's mistake gets one line on stderr and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(str(message).split())}\n")

    @contextmanager
    def guarding(self, remedy):
        """Turns wrong input (ValueError, OSError), broken numbers, lack of memory and Ctrl-C into such a line."""
        sys.stdout = sys.stdout or open(os.devnull, "w")  # it may be closed  # noqa: SIM115
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may have characters that it cannot print
        try:
            yield
        except KeyboardInterrupt:
            self.exit(130, "stopped: the same command goes on or begins anew\n")
        except (ValueError, OSError, FloatingPointError) as why:
            self.error(why)
        except (MemoryError, RuntimeError) as why:
            memory = isinstance(why, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(why)
            if not memory and not isinstance(why.__context__, OSError):
                raise
            self.error(f"out of memory: {remedy}" if memory else why.__context__)  # torch.save hides a full disk


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
    """--data sets the default preset, and both set the other defaults, so these two are read first."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default="toy", type=expanduser, help="toy, a folder of clips or a .npz (%(default)s)")
    kind = kind_of(first.parse_known_args()[0].data)
    first.add_argument("--preset", default=kind.preset, choices=PRESETS, help="network and recipe (%(default)s)")
    preset = first.parse_known_args()[0].preset
    network, recipe, count = PRESETS[preset], RECIPES[preset], number(int, 1, 10**9)
    parser = Parser(description=__doc__.split(" See")[0], parents=[first], allow_abbrev=False)
    add = parser.add_argument
    add("--mixture", default="monl", help="monl, vanilla, pm, pt, ptm, task:a2v ..., or sums: pt+pm (%(default)s)")
    add("--prediction", default=network.prediction, choices=PREDICTIONS, help="what to regress (%(default)s)")
    add("--dim", type=count, default=network.dim, help="width of the network (%(default)s)")
    add("--depth", type=count, default=network.depth, help="its layers (%(default)s)")
    add("--heads", type=count, default=network.heads, help="attention heads of a layer (%(default)s)")
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
    add("--dtype", default="auto", choices=DTYPES, help="auto: bf16 if the chip has it (%(default)s)")
    add("--compile", action="store_true", help="compile the blocks; on a CPU this needs a C++ compiler")
    add("--accumulate", type=count, default=1, help="micro-batches per step, to save memory (%(default)s)")
    add("--save-every", type=count, default=100, help="steps between checkpoints (%(default)s)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of weights and batches (%(default)s)")
    add("--out", default="runs/toy", type=expanduser, help="folder of the run, which goes on there (%(default)s)")
    parser.set_defaults(**recipe)
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    with parser.guarding("use a smaller --batch, more --accumulate for the same, a smaller --size or fewer clips"):
        train(args)


if __name__ == "__main__":
    main()
