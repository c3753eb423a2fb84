"""Train AVDiT on the toy world, a folder of clips or a file of latents [Alg. 2, App. B]. `python train.py --help`

Every run is a resumed run: its first process writes step 0, and every process loads what OUT/ckpt.pt holds.
"""

import argparse
import copy
import csv
import importlib.util
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from avdit import PREDICTIONS, PRESETS, NoiseSchedule, loss_weights, parse_mixture, training_loss
from data import Media, Tokenizers, default_media, describe, draw, draw_noise, training_clips

# --- The command line -------------------------------------------------------------------------------------------------

DEVICES = ("auto", "cpu", "cuda", "mps", "xla")
FREE = ("device", "compile", "accumulate", "save_every", "out")  # these may differ when a run goes on


class Parser(argparse.ArgumentParser):
    """A user's mistake gets one line on stderr and exit status 2."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, epilog="In brackets: the default.", **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(str(message).split())}\n")

    @contextmanager
    def guarding(self, remedy):
        """What is wrong with the input or too large for the machine ends here; errors of ours keep their traceback."""
        try:
            yield
        except (ValueError, OSError) as why:
            self.error(why)
        except (MemoryError, RuntimeError) as why:
            if not isinstance(why, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(why):
                raise
            self.error(f"out of memory: {remedy}")


def number(kind, least, most):
    """An argument's type: an int or a float within bounds."""

    def read(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        return value

    read.__name__ = kind.__name__  # what argparse calls it
    return read


def make_parser():
    choice = Parser(add_help=False)  # the data decide the default of the preset, both the defaults of others
    choice.add_argument("--data", default="toy", help="toy, a folder of clips, or a .npz of latents (%(default)s)")
    data = choice.parse_known_args()[0].data
    default = "toy" if data == "toy" else "clips"
    choice.add_argument("--preset", default=default, choices=PRESETS, help="network, training settings (%(default)s)")
    preset, media = PRESETS[choice.parse_known_args()[0].preset], default_media(data)
    count = number(int, 1, 10**9)
    parser = Parser(description=__doc__.split("`")[0], parents=[choice])
    add = parser.add_argument
    add("--mixture", default=preset.mixture, help="monl, vanilla, pm, pt, ptm, task:a2v ..., sums: pt+pm (%(default)s)")
    add("--steps", type=count, default=preset.steps, help="optimizer steps (%(default)s)")
    add("--batch", type=number(int, 1, 2**16), default=preset.batch, help="examples a step, all in all (%(default)s)")
    add("--lr", type=number(float, 1e-12, 10), default=preset.lr, help="peak learning rate (%(default)s)")
    add("--optimizer", default=preset.optimizer, choices=("adamw", "muon"), help="muon: for matrices (%(default)s)")
    add("--prediction", default=preset.prediction, choices=PREDICTIONS, help="what it regresses (%(default)s)")
    add("--fps", type=number(int, 1, 240), default=media.fps, help="frames a second of a folder's clips (%(default)s)")
    add("--size", type=number(int, 32, 1024), default=media.size, help="their height and width (%(default)s)")
    add("--sample-rate", type=number(int, 1000, 192000), default=media.sample_rate, help="of their sound (%(default)s)")
    add("--device", default="auto", choices=DEVICES, help="where to compute (%(default)s)")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 where the chip has it")
    add("--compile", action="store_true", help="compile the network (needs a C++ compiler; pays on long runs)")
    add("--accumulate", type=count, default=1, help="parts a batch is computed in, to save memory (%(default)s)")
    add("--save-every", type=count, default=500, help="steps between checkpoints (%(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of weights and batches (%(default)s)")
    add("--out", default="runs/toy", help="folder of ckpt.pt and log.csv; a run found there goes on (%(default)s)")
    return parser


def media_of(args):
    return Media(args.fps, args.size, args.sample_rate)


# --- Where a run computes: all that is known here of torch.distributed and torch_xla ----------------------------------


def open_device(name):
    """-> torch.device. ValueError names those that are here."""
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
        chip = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        native = chip.get("avx512_bf16") or chip.get("amx_bf16")
    enabled = name == "bf16" or (name == "auto" and bool(native))
    # No cache of weights in bf16: torch 2.9 would fill it in the pass without gradient, and cut off the next one's.
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


class Machine:
    """One device; or one of several processes with a device each, started by torchrun, which share every batch and
    average their gradients; or one process that spreads every batch over all XLA devices (SPMD).

    rank    number of this process; only the first one prints and saves
    world   processes that share a batch; part: which part of it this one computes
    shards  devices that share a batch, so that each computes as many examples
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
        self.part = self.rank % self.world  # on a pod every host names all examples
        self.shards = self.world * (len(self.mesh.device_ids) if self.mesh else 1)
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
        if batch % (accumulate * self.shards):
            raise ValueError(f"--batch {batch} is not a multiple of --accumulate {accumulate} x {self.shards} devices")

    def rows(self, batch, accumulate):
        """The examples of a batch that this process computes, in turn."""
        return [part.chunk(self.world)[self.part] for part in torch.arange(batch).chunk(accumulate)]

    def put(self, *tensors):
        """Tensors (examples, ...) -> the same on the device; every XLA device holds its share of the examples."""
        tensors = [x.to(self.device) for x in tensors]
        if self.mesh:
            from torch_xla.distributed import spmd

            for x in tensors:
                spmd.mark_sharding(x, self.mesh, ("batch", *[None] * (x.ndim - 1)))
        return tensors

    def share(self, model):
        """The model, called so that processes average their gradients."""
        if self.world == 1:
            return model
        net = DistributedDataParallel(model, broadcast_buffers=False)
        net.prediction, net.peak = model.prediction, model.peak
        return net

    def total(self, x):
        """x summed over the processes, which wait for each other here. XLA's devices have the sum already."""
        x = x.clone()
        if dist.is_initialized() and x.device.type != "xla":
            dist.all_reduce(x)
        return x


# --- Optimizers -------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, its matrix made nearly orthogonal by Newton-Schulz rounds [Jordan et al. 2024], for matrices only.

    torch.optim.Muon computes in bf16: without bf16 instructions that makes a CPU's training step twice as long.
    """

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.01, "scale": 2.5})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95)  # Nesterov's
                update = update / update.norm().clamp(min=1e-7)
                wide = update if p.shape[0] <= p.shape[1] else update.mT
                for _ in range(3):
                    gram = wide @ wide.mT
                    wide = 3.4445 * wide + (-4.775 * gram + 2.0315 * gram @ gram) @ wide
                update = wide if p.shape[0] <= p.shape[1] else wide.mT
                rate = 0.2 * math.sqrt(max(p.shape)) * group["lr"]  # as large a step as AdamW's
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rate * update)


def make_optimizers(name, model):
    """-> {name: optimizer}. AdamW for all parameters [App. B]; or Muon for the blocks' matrices, AdamW for the rest.

    The paper gives no betas and no weight decay: these are ours. Muon's rate, 2.5 times AdamW's, and its three rounds
    in place of five were found by trial on the toy world.
    """
    rest, matrices = [], []
    for key, p in model.named_parameters():
        muon = name == "muon" and key.startswith("blocks.") and p.ndim == 2
        (matrices if muon else rest).append(p)
    fused = rest[0].device.type in ("cpu", "cuda")
    optimizers = {"adamw": torch.optim.AdamW([{"params": rest, "scale": 1}], betas=(0.9, 0.99), fused=fused)}
    return {**optimizers, "muon": Muon(matrices)} if matrices else optimizers


def learning_rate(args, step):
    """A linear warm-up, of a tenth of the run at most, times a cosine to zero [App. B]."""
    warm = min(1, (step + 1) / min(PRESETS[args.preset].warmup, args.steps / 10))
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))


@torch.no_grad()
def average(ema, model, step, decay):
    """Follow the weights: over the last 1 / (1 - decay) steps, but never over more than about the last ninth of them,
    or a short run would be sampled from its untrained weights."""
    for slow, p in zip(ema.parameters(), model.parameters()):
        slow.lerp_(p, 1 - min(decay, (1 + step) / (10 + step)))


# --- Progress ---------------------------------------------------------------------------------------------------------


class Log:
    """log.csv and the progress line: squared error where t > 0, by modality and by ten bins of noise level, since the
    last line. Without the weights of loss_weights, so that runs can be compared.

    The sums stay on the device between lines, so that no step waits for them. They and all lines travel in the
    checkpoint, and log.csv is written anew from them.
    """

    EVERY, BINS = 50, 10

    def __init__(self, path, layout, machine):
        self.path, self.layout, self.machine = path, layout, machine
        bins = [f"{name}_t{k * 100 + 1}_{k * 100 + 100}" for name in layout.names for k in range(self.BINS)]
        self.rows = [["step", "loss", *layout.names, *bins]]
        self.sums = torch.zeros(2, layout.S, self.BINS, device=machine.device)  # errors, counts of elements
        self.sizes = layout.sizes.to(machine.device)

    def state_dict(self):
        return {"sums": self.machine.total(self.sums), "rows": self.rows}

    def load_state_dict(self, state):
        self.rows = [list(row) for row in state["rows"]]
        if self.machine.part == 0:  # the sums are of all processes
            self.sums.copy_(state["sums"])

    def start(self, step):
        self.since = (step, time.monotonic())
        self.write_file()

    def write_file(self):
        if self.machine.rank == 0:
            with replacing(self.path) as other, other.open("w", newline="") as file:
                csv.writer(file).writerows(self.rows)

    def add(self, errors, t, T):
        """errors and t (B, S)."""
        weight = (t > 0) * self.sizes  # of elements
        share = F.one_hot((t - 1).clamp(min=0) * self.BINS // T, self.BINS) * weight[..., None]  # (B, S, BINS)
        self.sums[0] += (share * errors[..., None]).sum(0)
        self.sums[1] += share.sum(0)

    def write(self, step, steps):
        modalities = self.machine.total(self.sums).cpu().split(self.layout.lengths, 1)
        errors, counts = torch.stack([sums.sum(1) for sums in modalities], 1)  # (M, BINS) each
        self.sums.zero_()
        values = [errors.sum() / counts.sum(), *(errors.sum(1) / counts.sum(1)), *(errors / counts).flatten()]
        self.rows.append([str(step), *("" if v.isnan() else f"{v:.6f}" for v in values)])  # "": nothing was drawn there
        self.write_file()
        speed = (step - self.since[0]) / (time.monotonic() - self.since[1])
        left = round((steps - step) / speed)
        line = f"step {step}/{steps}  loss {values[0]:.4f}  {speed:.1f} steps/s  {left // 60}:{left % 60:02} left"
        print(f"\r{line:70}" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True)


# --- Checkpoints ------------------------------------------------------------------------------------------------------

FORMAT = 4  # a change that another version would misread adds one


@contextmanager
def replacing(path):
    """Atomically: write to the path this gives, and `path` has the old content or, at the end, the new."""
    other = path.with_name(path.name + ".partial")
    try:
        yield other
        os.replace(other, path)
    finally:
        other.unlink(missing_ok=True)


def save(path, state):
    with replacing(path) as other, other.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # or the new name may reach the disk before what it names


@contextmanager
def opened(path):
    """A checkpoint's dict. Nothing in the file is executed. ValueError where it is none, or damaged.

    An error in the block counts as damage too: only load inside it.
    """
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


def described(layout):
    return [asdict(m) for m in layout.modalities]


def on_cpu(x):
    """Nested dicts and lists with every tensor on the CPU: a file of XLA's tensors loads only where torch_xla is."""
    if isinstance(x, dict):
        return {k: on_cpu(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [on_cpu(v) for v in x]
    return x.cpu() if isinstance(x, torch.Tensor) else x


def save_run(ckpt, step, about, run, machine):
    """Write a checkpoint, once for all processes, which go on when it is there."""
    states = {name: part.state_dict() for name, part in run.items()}
    state = on_cpu(states) if machine.mesh or machine.rank == 0 else {}  # XLA's hosts must all do the same
    if machine.rank == 0:
        save(ckpt, {"format": FORMAT, "step": step, **about, **state})
    machine.total(torch.zeros(()))


def check_finite(run, machine, step):
    """FloatingPointError if the loss or the weights broke: such a run is not saved."""
    tensors = [machine.total(run["log"].sums), *run["model"].parameters()]
    if not torch.stack([x.isfinite().all() for x in tensors]).all():
        raise FloatingPointError(f"the loss or the weights are not finite at step {step}")


# --- Training ---------------------------------------------------------------------------------------------------------


def mark(z):
    """One number a clip, (n,), that tells these latents from others, to the rounding of other machines."""
    return z @ torch.randn(z.shape[1], generator=torch.Generator().manual_seed(0)) / z.shape[1] ** 0.5


def fit(tokenizers, model, clips):
    """Fit the tokenizers, bound the model's estimates of z0 by the largest |z| of each modality -> mark of the latents."""
    tokenizers.fit(clips)
    z = tokenizers.encode(clips)
    largest = {name: part.abs().max() for name, part in model.layout.unpack(z).items()}
    for name, value in largest.items():
        if value < 0.01:
            print(f"{name} is the same in all clips: there is nothing to learn of it", file=sys.stderr)
    bounds = [value.expand(n) for value, n in zip(largest.values(), model.layout.lengths)]  # for every segment
    model.z_max.copy_(model.layout.per_element(torch.cat(bounds)))
    return mark(z)


def begin(args, machine, layout, ckpt):
    """-> the parts of the run as ckpt holds them, what else it says, latents of all clips, the step.

    Creates ckpt where there is none.
    """
    preset, media = PRESETS[args.preset], media_of(args)
    torch.manual_seed(args.seed)
    model = preset.model(layout, args.prediction).to(machine.device)
    tokenizers, log = Tokenizers(args.data, layout, media), Log(ckpt.parent / "log.csv", layout, machine)
    run = {"model": model, "ema": copy.deepcopy(model), **make_optimizers(args.optimizer, model)}
    run |= {"tokenizers": tokenizers, "log": log}
    about = {"config": vars(args), "modalities": described(layout)}
    clips, fresh = None, machine.total(torch.tensor(int(machine.rank == 0 and not ckpt.exists()))) > 0
    if fresh:
        print(f"reading {args.data} ...", flush=True)
        clips, about["held"] = training_clips(args.data, layout, media)
        about["mark"] = fit(tokenizers, model, clips)
        run["ema"].load_state_dict(model.state_dict())
        ckpt.parent.mkdir(parents=True, exist_ok=True)
        save_run(ckpt, 0, about, run, machine)
    with opened(ckpt) as saved:
        step, before, now = saved["step"], saved["config"], vars(args)
        changed = [name for name in now if before[name] != now[name] and name not in FREE]
        alike = saved["modalities"] == about["modalities"]
        about |= {name: saved[name] for name in ("held", "mark")}
        if alike and not changed:
            for name, part in run.items():
                part.load_state_dict(saved[name])
    for name in changed:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{ckpt} is of a run with {flag} {before[name]}, not {now[name]}: use another --out")
    if not alike:
        raise ValueError(f"{ckpt} is of a run on other modalities than {args.data} has: use another --out")
    if step == args.steps:
        return run, about, None, step
    if not fresh:
        print(f"going on at step {step} of {ckpt}; reading {args.data} ...", flush=True)
        clips, _ = training_clips(args.data, layout, media)
    z = tokenizers.encode(clips)
    if len(z) != len(about["mark"]) or not torch.allclose(mark(z), about["mark"], atol=0.01):
        raise ValueError(f"{ckpt} is of a run on {len(about['mark'])} clips; the {len(z)} of {args.data} are not the same: "
                         "use another --out")  # fmt: skip
    return run, about, z, step


@contextmanager
def signals_noted():
    """A list that notes the first Ctrl-C or SIGTERM, so that the step under way is saved. A second one stops."""
    noted = []

    def note(number, frame):
        noted.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(args, layout):
    """Alg. 2, on whatever machine there is."""
    machine, preset, ckpt = Machine(args.device), PRESETS[args.preset], Path(args.out) / "ckpt.pt"
    machine.check(args.batch, args.accumulate)
    run, about, z, first = begin(args, machine, layout, ckpt)
    model, log, optimizers = run["model"], run["log"], [run[name] for name in ("adamw", "muon") if name in run]
    levels, schedule = NoiseSchedule(), NoiseSchedule().to(machine.device)  # the whole batch's weights need no device
    net = machine.share(model)
    net = torch.compile(net) if args.compile else net
    log.start(first)
    with signals_noted() as noted:
        for step in range(first, args.steps):
            # Alg. 2, lines 2 and 4
            index, t, self_conditioning = draw(args.seed, step, len(z), args.batch, args.mixture, layout, schedule.T)
            weight = loss_weights(levels, layout, t, preset.noise_power)
            for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
                group["lr"] = learning_rate(args, step) * group["scale"]
            model.zero_grad()
            for rows in machine.rows(args.batch, args.accumulate):
                eps = draw_noise(args.seed, step, rows, layout.E)  # line 3
                part = machine.put(z[index[rows]], t[rows], eps, weight[rows])
                with precision(args.dtype, machine.device):
                    loss, errors = training_loss(net, schedule, layout, *part, self_conditioning)
                (loss * machine.world).backward()  # line 11; parts add up, but processes average their gradients
                log.add(errors, part[1], schedule.T)
                end_step(machine.device)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            average(run["ema"], model, step, preset.ema)
            end_step(machine.device)
            done, stop = step + 1, machine.total(torch.tensor(len(noted))) > 0  # all processes after the same step
            line = done % log.EVERY == 0 or done == args.steps
            keep = done % args.save_every == 0 or done == args.steps or stop
            if line or keep:
                check_finite(run, machine, done)
            if line:
                log.write(done, args.steps)
            if keep:
                save_run(ckpt, done, about, run, machine)
            if stop and done < args.steps:
                raise KeyboardInterrupt("saved")
    print(f"\ndone: {ckpt}")


def main():
    parser = make_parser()
    args = parser.parse_args()
    try:
        with parser.guarding("use a smaller --batch, more --accumulate for the same, a smaller --size or fewer clips"):
            parse_mixture(args.mixture)  # before anything is read
            if args.compile and args.device == "xla":
                raise ValueError("--compile is for other devices: XLA compiles everything")
            train(args, describe(args.data, media_of(args)))
    except FloatingPointError as why:
        print(f"\n{why}; the last good checkpoint is {Path(args.out) / 'ckpt.pt'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as why:
        if os.environ.get("RANK", "0") == "0":
            how = "saved: the same command goes on from here" if why.args else "nothing new was saved"
            print(f"\nstopped, {how}", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
