"""How fast: our transformer blocks against a DiT's usual ones, LTX-Video's, and the machine's own matrix products.

Everything in one process, contenders in turn, round after round; medians, and ratios within a round. `--help`
"""

import argparse
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which tells memory, talks
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from avdit import (
    PRESETS,
    AVDiT,
    Block,
    Layout,
    Modality,
    NoiseSchedule,
    av_modalities,
    generate,
    sample_timesteps,
    task_mask,
    training_loss,
)
from train import DEVICES, RECIPES, draw, draw_noise, make_optimizers, open_device, precision

try:
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
except ImportError:
    LTXVideoTransformerBlock = None


# --- Contenders: a stack of layers, called as AVDiT calls its blocks --------------------------------------------------


class Ours(nn.Module):
    def __init__(self, dim, depth, heads, layout):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))

    def forward(self, x, c, layout):
        for block in self.blocks:
            x = block(x, c, layout)
        return x


class DiTBlock(nn.Module):
    """adaLN-Zero as DiT has it: six vectors, here for every token."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c).chunk(6, -1)  # (B, L, d) each
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = rearrange(self.qkv(h), "b l (three h e) -> three b h l e", three=3, h=self.heads)
        h = self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l e -> b l (h e)"))
        x = x + gate1 * h
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    def __init__(self, dim, depth, heads, layout):
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(dim, heads) for _ in range(depth))
        self.register_buffer("segment", segment_of_token(layout))

    def forward(self, x, c, layout):
        c = c[:, self.segment]  # (B, L, d)
        for block in self.blocks:
            x = block(x, c)
        return x


class LTX(nn.Module):
    """LTX-Video's blocks with per-token timesteps: one modulation of six vectors for all layers, and a cross-attention
    (here to a single token) that ours lacks; RMS norms, also of queries and keys. No rotary embedding."""

    def __init__(self, dim, depth, heads, layout):
        super().__init__()
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(LTXVideoTransformerBlock(dim, heads, dim // heads, dim) for _ in range(depth))
        self.register_buffer("segment", segment_of_token(layout))

    def forward(self, x, c, layout):
        text, c = c[:, :1], self.ada(c[:, self.segment])
        for block in self.blocks:
            x = block(x, text, c)
        return x


def segment_of_token(layout):
    """(L,) index of the segment each token belongs to."""
    return layout.per_token(torch.arange(layout.S)[None, :, None])[0, :, 0]


def count_tokens(layout):
    return sum(m.N * m.P for m in layout.modalities)


def recipe_of(preset):
    return next(RECIPES[name] for name in PRESETS if PRESETS[name] is preset)


# --- Measuring --------------------------------------------------------------------------------------------------------


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def rounds(jobs, count, device):
    """Run {name: function} in turn, `count` times after one to warm up -> {name: [seconds]}."""
    times = {name: [] for name in jobs}
    for i in range(count + 1):
        for name, job in jobs.items():
            finish(device)
            start = time.perf_counter()
            job()
            finish(device)
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times, name, other):
    """Median over rounds of one job's time in units of another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[other]))


def peak_memory(job, device):
    """Bytes by which a job's allocations at their highest exceed those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        total += e.nbytes()
        peak = max(peak, total)
    return peak


class Products(TorchDispatchMode):
    """Writes down every matrix product of what runs inside it, to run them again alone."""

    def __init__(self, found=()):
        super().__init__()
        self.list = list(found)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.list.append([(x.shape, x.stride(), x.dtype, x.device) for x in args[-2:]])
        return f(*args, **(kwargs or {}))

    def split(self):
        """-> those of linear layers, those of attention, which come in batches."""
        return (Products(pair for pair in self.list if len(pair[0][0]) == n) for n in (2, 3))

    @property
    def flops(self):
        return sum(2 * a[0].numel() * b[0][-1] for a, b in self.list)

    def replay(self):
        """-> a job that does these products and nothing else, each operand in a place of its own."""
        keys = {key for pair in self.list for key in pair}
        made = {k: torch.empty_strided(*k[:2], dtype=k[2], device=k[3]).normal_() for k in keys}

        def job():
            for a, b in self.list:
                torch.matmul(made[a], made[b])

        return job


def counted(job):
    """The products of a job, with attention done by plain matrix products so that its own are among them."""
    with sdpa_kernel(SDPBackend.MATH), Products() as products:
        job()
    return products


def report(title, jobs, count, device):
    """Time jobs, the first of which is ours, in turn with our products alone, and print a line a job."""
    ours = next(iter(jobs))
    products = counted(jobs[ours])
    linear, batched = products.split()
    times = rounds({**jobs, "linear": linear.replay(), "batched": batched.replay()}, count, device)
    rate = {k: p.flops / statistics.median(times[k]) / 1e9 for k, p in {ours: products, "linear": linear}.items()}
    alone = statistics.median((a + b) / c for a, b, c in zip(times["linear"], times["batched"], times[ours]))
    for name, job in jobs.items():
        line = f"{title:44} {name:5} {ratio(times, ours, name):6.2f} {peak_memory(job, device) / 2**20:7.0f}"
        if name == ours:
            line += f" {products.flops / 1e9:7.1f} {rate[ours]:8.0f} {rate[ours] / rate['linear']:6.2f} {alone:6.2f}"
        print(line, flush=True)


# --- Cases ------------------------------------------------------------------------------------------------------------


class Case:
    """One size of network and data, with the contenders' jobs on it."""

    def __init__(self, preset, layout, depth, batch, device, dtype, compiled=False):
        dim, heads = preset.dim, preset.heads
        self.layout, self.dim, self.optimizer = layout, dim, recipe_of(preset)["optimizer"]
        self.device, self.dtype = device, dtype
        torch.manual_seed(0)
        kinds = {"ours": Ours, "DiT": DiT, "LTX": LTX} if LTXVideoTransformerBlock else {"ours": Ours, "DiT": DiT}
        self.stacks = {k: kind(dim, depth, heads, layout).to(device) for k, kind in kinds.items()}
        if compiled:
            self.stacks = {k: torch.compile(stack) for k, stack in self.stacks.items()}
        L = count_tokens(layout)
        self.x, self.c = (torch.randn(batch, n, dim, device=device, requires_grad=True) for n in (L, layout.S))
        self.grad = torch.randn(batch, L, dim, device=device)
        self.z0, self.eps = torch.randn(2, batch, layout.E, device=device)
        self.schedule = NoiseSchedule().to(device)
        self.t = sample_timesteps("monl", layout, batch, self.schedule.T).to(device)

    def forward(self, stack):
        def job():
            with torch.no_grad(), precision(self.dtype, self.device):
                stack(self.x, self.c, self.layout)

        return job

    def backward(self, stack):
        def job():
            stack.zero_grad()
            with precision(self.dtype, self.device):
                out = stack(self.x, self.c, self.layout)
            out.backward(self.grad)

        return job

    def model(self, stack):
        model = AVDiT(self.layout, self.dim, 0, 1, "v").to(self.device)
        model.blocks.append(stack)
        return model

    def training_step(self, stack):
        model, inputs = self.model(stack), (self.schedule, self.layout, self.z0, self.t, self.eps)
        optimizers = make_optimizers(self.optimizer, model)

        def job():
            model.zero_grad()
            with precision(self.dtype, self.device):
                loss, _ = training_loss(model, *inputs, self_conditioning=True)
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.step()

        return job

    def sampling_step(self, stack):
        model, given = self.model(stack), task_mask("joint", self.layout)

        def job():
            generate(model, self.schedule, self.layout, self.z0, given, steps=1, sampler="ddim")

        return job

    def report(self, title, kind, count):
        report(title, {k: kind(self, stack) for k, stack in self.stacks.items()}, count, self.device)


def growth(toy, count, device, dtype):
    """How the training of our blocks at toy width grows: time and products, both in units of the first line's."""
    sizes = {  # batch, segments, tokens of a segment
        "batch 16, 64 tokens, 16 segments": (16, 16, 4),
        "batch 1": (1, 16, 4),
        "batch 4": (4, 16, 4),
        "batch 64": (64, 16, 4),
        "tokens x 2": (16, 16, 8),
        "tokens x 4": (16, 16, 16),
        "segments x 4, tokens as many": (16, 64, 1),
    }
    jobs, flops = {}, {}
    for name, (batch, segments, tokens) in sizes.items():
        modality = Modality("all", (tokens,), 8, tuple(range(segments + 1)))
        case = Case(toy, Layout([modality]), toy.depth, batch, device, dtype)
        jobs[name] = case.backward(case.stacks["ours"])
        flops[name] = counted(jobs[name]).flops
    base, times = next(iter(sizes)), rounds(jobs, count, device)
    print(f"\n{'how cost grows, blocks, training':50} {'time':>6} {'GFLOP':>7}")
    for name in sizes:
        print(f"{name:50} {ratio(times, name, base):6.2f} {flops[name] / flops[base]:7.2f}")


def data_share(toy, count, device, dtype):
    """What train.py does for a batch before the network sees it: clips are encoded once, before the first step."""
    layout, args = Layout(toy.modalities), argparse.Namespace(seed=0, batch=RECIPES["toy"]["batch"], mixture="monl")
    case, z = Case(toy, layout, toy.depth, args.batch, device, dtype), torch.randn(4096, layout.E)

    def batch():
        index, t, _ = draw(args, 0, len(z), layout, case.schedule.T)
        eps = draw_noise(args.seed, 0, torch.arange(args.batch), layout.E)
        return [x.to(device) for x in (z[index], t, eps)]

    times = rounds({"batch": batch, "step": case.training_step(case.stacks["ours"])}, count, device)
    print(f"\ndrawing a batch of the toy world: {ratio(times, 'batch', 'step'):.1%} of a training step")


def paper_step(preset, device, dtype, compiled, count):
    """The paper preset's training step as train.py does it: products, memory, what App. B's run takes; on a GPU, time."""
    layout, schedule = Layout(preset.modalities), NoiseSchedule().to(device)
    model = preset.model(layout).to(device)
    ema, optimizer = AveragedModel(model), make_optimizers("adamw", model)["adamw"]
    kept = 5 * sum(p.nbytes for p in model.parameters())  # they, their average, gradients, AdamW's two moments
    print(f"\npaper preset, training step: GiB of weights, their average, gradients, AdamW: {kept / 2**30:.1f}")

    def step(batch):
        def job():
            z0, eps = torch.randn(2, batch, layout.E, device=device)
            t = sample_timesteps("monl", layout, batch, schedule.T).to(device)
            model.zero_grad()
            with precision(dtype, device):
                loss, _ = training_loss(model, schedule, layout, z0, t, eps, self_conditioning=True)
            loss.backward()
            optimizer.step()
            ema.update_parameters(model)

        return job

    flops, recipe = counted(step(1)).flops, recipe_of(preset)  # after this, all that is kept is there
    examples = 3.9 / 4 * recipe["batch"] * recipe["steps"]  # 3 or, at a rate of 0.9, 4 passes forward or like it
    print(f"{flops / 1e12:.2f} TFLOP an example; {recipe['steps']} steps of batch {recipe['batch']}: "
          f"{flops * examples / 1e18:.0f} EFLOP, {flops * examples / 1e14 / 86400:.0f} days at 100 TFLOP/s")  # fmt: skip
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for batch in (1, 2, 4) if device.type == "cpu" else (16, 32):
        print(f"  batch {batch}: {peak_memory(step(batch), device) / 2**30:.1f} GiB more", end="", flush=True)
        if device.type == "cuda":
            times = rounds({"step": step(batch), "product": partial(torch.matmul, square, square)}, count, device)
            seconds, product = (statistics.median(times[name]) for name in ("step", "product"))
            rate, best = batch * flops / seconds / 1e12, 2 * 8192**3 / product / 1e12
            print(f", {1e3 * seconds:.0f} ms, {rate / best:.2f} of the {best:.0f} TFLOP/s of an 8192 x 8192 product, "
                  f"App. B in {seconds / batch * examples / 86400:.1f} days", end="")  # fmt: skip
        print()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", default="auto", choices=DEVICES[:-1], help="where to compute (%(default)s)")
    add("--dtype", default="fp32", choices=("fp32", "bf16"), help="precision of products (%(default)s)")
    add("--compile", action="store_true", help="compile the contenders' layers")
    add("--paper", action="store_true", help="the paper preset's training step, nothing else")
    add("--rounds", type=int, default=11, help="how often each job runs (%(default)s)")
    args = parser.parse_args()
    device, toy, paper = open_device(args.device), PRESETS["toy"], PRESETS["paper"]
    print(f"torch {torch.__version__}, {device}, {args.dtype}, {torch.get_num_threads()} threads")
    if args.paper:
        return paper_step(paper, device, args.dtype, args.compile, args.rounds)
    print("in this order")
    print("  time     ours as a share of this contender's: below 1, ours is faster")
    print("  memory   MiB at the highest, beyond weights and data")
    print("  GFLOP    of all matrix products, attention's among them, and GFLOP/s")
    print("  linear   that rate as a share of what the linear layers' products reach when nothing else is done")
    print("  alone    the time of all products done one by one, as a share of ours (fused attention can beat it)\n")
    print(f"{'':50} {'time':>6} {'memory':>7} {'GFLOP':>7} {'GFLOP/s':>8} {'linear':>6} {'alone':>6}")
    rest = device, args.dtype, args.compile
    case = Case(paper, Layout(paper.modalities), 2, 1, *rest)
    case.report("paper width, blocks, training", Case.backward, args.rounds)
    case.report("paper width, blocks, forward", Case.forward, args.rounds)
    case.report("paper width, whole training step", Case.training_step, args.rounds)
    for layout in (Layout(toy.modalities), Layout(av_modalities(8, (4, 4), 64, 0.04, 64))):
        tokens, case = count_tokens(layout), Case(toy, layout, toy.depth, RECIPES["toy"]["batch"], *rest)
        case.report(f"toy width, {tokens} tokens, blocks, training", Case.backward, args.rounds)
        case.report(f"toy width, {tokens} tokens, training step", Case.training_step, args.rounds)
        case.report(f"toy width, {tokens} tokens, sampling step", Case.sampling_step, args.rounds)
    growth(toy, args.rounds, device, args.dtype)
    data_share(toy, args.rounds, device, args.dtype)


if __name__ == "__main__":
    main()
