"""Does a test fail when a line of avdit.py is wrong? Change one thing at a time, run the fast tests, and see.

First the mistakes that someone who forks this would most likely make, by hand. Then a seeded sample of all operators,
constants, indices, comparisons and choices of the file, but for what only prints (tour) and the toy preset, whose sizes
are choices. Every result goes to OUT as soon as it is known, and the command goes on where it stopped. Exit status 1 if
fewer than 95 % of the mutants that are not equivalent die. `python tests/mutants.py --help`
"""

import argparse
import ast
import csv
import os
import random
import signal
import sys
import types
from itertools import islice
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FAST = {  # module -> its fast tests: the sooner one fails, the better, so the fastest files come first
    "avdit": [
        "test_scale.py",
        "test_sampling.py",
        "test_method.py",
        "test_exact.py",
        "-k",
        "not ddpm-1000 and not batch",
    ],
    "data": ["test_data.py"],
    "train": [
        "test_scripts.py",
        "test_lost.py",
        "-k",
        "average or learning_rate or muon or bounded or changed or constant",
    ],
    "sample": ["test_scripts.py", "-k", "average or own_part or former_run"],
}
PAIRS = [
    (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq),
    (ast.In, ast.NotIn), (ast.Is, ast.IsNot), (ast.And, ast.Or), (ast.BitAnd, ast.BitOr),
]  # fmt: skip
SWAP = {**dict(PAIRS), **{b: a for a, b in PAIRS}, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv}

HAND = [  # module, what is there, what a tired student makes of it
    # where things lie
    ("avdit", "torch.full((n,), k) for n, k in zip(", "torch.full((n,), 0) for n, k in zip("),
    ("avdit", "part.repeat_interleave(m.P * m.channels, -1)", "part.repeat(*[1] * (x.ndim - 1), m.P * m.channels)"),
    # noise levels
    ("avdit", "torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])", "(1 - beta).cumprod(0)"),
    ("avdit", "beta = torch.linspace(beta_min, beta_max, T, dtype=torch.float64)",
     "beta = torch.linspace(beta_min, beta_max, T).double()"),
    # the timestep vector
    ("avdit", "return torch.bucketize((layout.starts + layout.ends) / 2, boundaries, right=True)",
     "return torch.bucketize(layout.starts.float(), boundaries.float(), right=False)"),
    ("avdit", "t_ref[:, :1].expand_as(t_ref),  # t^(m,n)", "t_ref[:1, :1].expand_as(t_ref),  # t^(m,n)"),
    ("avdit", '"pm": lambda t_ref, layout: t_ref[:, layout.first]',
     '"pm": lambda t_ref, layout: t_ref[:, :1].expand_as(t_ref)'),
    ("avdit", "t_ref[:, coincident(layout)]",
     "t_ref[:, (torch.arange(layout.S) - layout.first) % layout.lengths[0]]"),
    ("avdit", '"ptm": lambda t_ref, layout: t_ref,', '"ptm": lambda t_ref, layout: t_ref[:, layout.first],'),
    ("avdit", "choice = torch.randint(len(names), (batch,), generator=generator)",
     "choice = torch.randint(len(names), (1,), generator=generator).expand(batch)"),
    # the network
    ("avdit", "unflatten(1, (m.N, m.P))", "unflatten(1, (m.P, m.N)).transpose(1, 2)"),
    ("avdit", "shift, scale = affine_m[:, :, None].chunk(2, -1)", "scale, shift = affine_m[:, :, None].chunk(2, -1)"),
    ("avdit", "sinusoid(t, self.dim)", "sinusoid(t / 1000, self.dim)"),
    ("avdit", "z0_prev.clamp(-self.z_max, self.z_max)", "z0_prev"),
    ("avdit", "z0_prev.clamp(-self.z_max, self.z_max)", "z0_prev.clamp(-self.z_max.max(), self.z_max.max())"),
    # training
    ("avdit", "torch.where(t > 0, schedule.s[t]", "torch.where(t >= 0, schedule.s[t]"),
    ("avdit", " * layout.sizes.to(t.device)", ""),
    ("avdit", "weight = loss_weights(schedule, layout, t) if weight is None else weight",
     "weight = loss_weights(schedule, layout, t)"),
    ("avdit", '"v": a * eps - s * z0', '"v": s * z0 - a * eps'),
    ("avdit", "        with torch.no_grad():\n            z0_prev",
     "        with torch.enable_grad():\n            z0_prev"),
    ("avdit", "torch.where(clean, z0_prev, z0_prev.clamp(", "torch.where(clean, 0, z0_prev.clamp("),
    # samplers
    ("avdit", "a_next / a * (z", "a / a_next * (z"),
    ("avdit", "a_next / a * (z", "a * (z"),
    ("avdit", "beta / s.clamp(min=1e-8) * eps_hat", "beta / a * eps_hat"),
    ("avdit", "torch.where(layout.per_element(t_next) > 0, beta.sqrt() * noise_like(z, generator), 0)",
     "beta.sqrt() * noise_like(z, generator)"),
    ("avdit", "return a_next * z0_hat +", "return a_next * z0_hat.clamp(-3, 3) +"),
    ("avdit", "(after - now) / (now - before) / 2, 0)", "(after - now) / (now - before), 0)"),
    ("avdit", "ratio = torch.where(t_next > 0, (after - now)", "ratio = torch.where(t_next >= 0, (after - now)"),
    ("avdit", "eps_hat - a / s.clamp(min=1e-8) * change", "eps_hat"),
    # sampling
    ("avdit", "torch.linspace(schedule.T, 0, steps + 1,", "torch.linspace(schedule.T, 1, steps + 1,"),
    ("avdit", "z = torch.where(held, z0, z)  # line 6",
     "z = torch.where(held, schedule.a[tau] * z0 + schedule.s[tau] * noise_like(z, generator), z)  # line 6"),
    ("avdit", "t, t_next = torch.where(given, 0, tau), torch.where(given, 0, tau_next)  # lines 2 and 5",
     "t, t_next = tau.expand_as(given), tau_next.expand_as(given)"),
    ("avdit", "z0_prev, last = torch.where(held, z0, z0_hat), (t, z0_hat)", "last = (t, z0_hat)"),
    ("avdit", "z0_prev, last = torch.where(held, z0, z0_hat), (t, z0_hat)", "z0_prev, last = z0_hat, (t, z0_hat)"),
    # guidance
    ("avdit", "(1 + guidance) * cond - guidance * uncond", "guidance * cond - (1 + guidance) * uncond"),
    ("avdit", "(1 + guidance) * cond - guidance * uncond", "guidance * cond + (1 - guidance) * uncond"),
    ("avdit", "for cond, uncond in halves]", "for uncond, cond in halves]"),
    ("avdit", "torch.where(dropped, schedule.T, t)", "t"),
    ("avdit", "torch.where(gone, 0, z0_prev)", "z0_prev"),
    ("avdit", "torch.where(gone, noise_like(z, generator), z)", "torch.where(gone, noise_like(z, generator) + 0.00635 * z, z)"),
    ("avdit", "dropped = given & layout.of(", "dropped = layout.of("),
    # the baselines
    ("avdit", "t, t_next = tau.expand_as(given), tau_next.expand_as(given)",
     "t, t_next = torch.where(given, 0, tau), torch.where(given, 0, tau_next)"),
    ("avdit", "torch.where(held, truth, z)", "torch.where(held, clean, z)"),
    ("avdit", "a, s = schedule.scales(layout, t_next)", "a, s = schedule.scales(layout, tau.expand_as(given))"),
    ("avdit", "z_next.detach(), z0_hat.detach(),", "z_next.detach(), torch.where(held, z0, z0_hat).detach(),"),
    ("avdit", "strength * s * torch.autograd.grad(", "strength * torch.autograd.grad("),
    ("avdit", "z_next - strength * s", "z_next + strength * s"),
    # what a step sees, and what it does
    ("data", "SeedSequence([seed, step])", "SeedSequence([seed, 0])"),
    ("data", "SeedSequence([seed, step, 1])", "SeedSequence([seed, 0, 1])"),
    ("data", "for row in rows.tolist()]", "for row in range(len(rows))]"),
    ("train", 'average(run["ema"], model, step, preset.ema)',
     'average(run["ema"], model, step, preset.ema) if step == first else None'),
    ("train", "1 - min(decay, (1 + step) / (10 + step))", "1 - decay"),
    ("train", "1 - min(decay, (1 + step) / (10 + step))", "1 - (1 + step) / (10 + step)"),
    ("train", "min(1, (step + 1) / min(PRESETS[args.preset].warmup, args.steps / 10))", "1"),
    ("train", "min(PRESETS[args.preset].warmup, args.steps / 10)", "PRESETS[args.preset].warmup"),
    ("train", "model.layout.per_element(torch.cat(bounds))", "torch.cat(bounds).max()"),
    ("train", "or not torch.allclose(mark(z), about[\"mark\"], atol=0.01)", ""),
    ("train", "if value < 0.01:", "if value < 0:"),
    ("train", "p.grad.lerp(momentum, 0.95)", "momentum"),
    ("train", "math.sqrt(max(p.shape))", "math.sqrt(min(p.shape))"),
    ("train", "update / update.norm().clamp(min=1e-7)", "update / update.norm(dim=1, keepdim=True).clamp(min=1e-7)"),
    ("sample", 'load_state_dict(saved["ema"])', 'load_state_dict(saved["model"])'),
    ("sample", "self.shared | (given & self.layout.within(0, seconds - k * self.step))", "self.shared"),
    ("sample", "self.shared | (given & self.layout.within(0, seconds - k * self.step))", "self.shared | given"),
    ("sample", "torch.where(layout.per_element(trained.shared), layout.pack(latents), z0[k])", "layout.pack(latents)"),
    ("sample", "trained.window(clips, k)) for k in range(windows)]", "trained.window(clips)) for k in range(windows)]"),
    ("sample", "                path.unlink()\n", "                pass\n"),
    ("sample", "path.stem.isdecimal() or", "True or"),
    # folders of clips
    ("data", '"-protocol_whitelist", "fd", "-fd", "0", "-i", "fd:"', '"-i", f"file:{Path(path).absolute()}"'),
    ("data", 'r"^  Stream', 'r"Stream'),
    ("data", "min(iw\\\\,ih/sar):min(ih\\\\,iw*sar)", "min(iw\\\\,ih):min(ih\\\\,iw)"),
    ("data", "first_pts=0", "osf=flt"),
    ("data", "phase = 1 if left @ right >= 0 else -1", "phase = 1"),
    ("data", "audio.abs().max() < 1e-4", "False"),
    ("data", "rank[name] % 10 == 0", "sorted(rank).index(name) % 10 == 0"),
    ("data", "0 < len(held) < len(rank)", "0 < len(held)"),
    ("data", ">= count:\n            break", ">= 10**9:\n            break"),
    ("data", "torch.randperm(len(x), generator=generator)[:clips]", "torch.arange(len(x))[:clips]"),
    ("data", "generator=generator) < share", "generator=generator) < 2"),
    ("data", "rank = int((scale[:rank] > 1e-5 * x.norm()).sum())", "pass"),
    ("data", "flat.mean(0, dtype=torch.float64)", "flat[:1024].mean(0)"),
]  # fmt: skip

# Mutants that no test can kill, because nothing changes: as main() names them -> why.
EQUIVALENT = {
    "mean = a_next / a * (z - beta / s.clamp(min=1e-8) * eps_hat) | 1e-08 -> 2e-08": "s is 0, and beta with it, or at least 0.01",
    "z0_hat, eps_hat = z0_hat + change, eps_hat - a / s.clamp(min=1e-8) * change  # z = a z0_hat + s eps_hat again | "
    "1e-08 -> 2e-08": "the same, and change is 0 where s is",
    "return weight / weight.sum().clamp(min=1e-8) | 1e-08 -> 2e-08": "all weights are 0, or their sum is at least 0.01",
    "starts = (0, *range(1, frames + 1, 4)) | 1 -> 2 (again)": "the same starts for every 1 + 4 k frames",
    "count = int(frames / fps / segment + 1e-6) | 1e-06 -> 2e-06": "a tolerance",
    "return (self.starts >= start - 1e-6) & (self.ends <= end + 1e-6) | 1e-06 -> 2e-06": "a tolerance",
    "return (self.starts >= start - 1e-6) & (self.ends <= end + 1e-6) | 1e-06 -> 2e-06 (again)": "a tolerance",
    "return (self.starts >= start - 1e-6) & (self.ends <= end + 1e-6) | self.ends <= end + 1e-06 -> "
    "self.ends < end + 1e-06": "differs where an edge is off by exactly the tolerance",
    "return (self.starts >= start - 1e-6) & (self.ends <= end + 1e-6) | self.starts >= start - 1e-06 -> "
    "self.starts > start - 1e-06": "the same",
    "return torch.cat([latents[name].flatten(1) for name in self.names], -1) | -1 -> --1": "flatten(1) leaves two axes",
    "return {m.name: part.unflatten(-1, m.shape) for m, part in parts} | -1 -> --1": "z has two axes",
    "parts = zip(self.modalities, z.split([math.prod(m.shape) for m in self.modalities], -1)) | -1 -> --1": "the same",
    "return torch.cat([part.flatten(2).mean(-1) for part in self.unpack(x).values()], -1) | -1 -> --1": "the same",
    "with torch.set_grad_enabled(strength > 0): | strength > 0 -> strength >= 0": "keeps a graph that nothing uses",
    "z = torch.where(held, truth, z).requires_grad_(strength > 0) | strength > 0 -> strength >= 0": "no graph is kept",
    "t, t_next = torch.where(given, 0, tau), torch.where(given, 0, tau_next)  # lines 2 and 5 | 0 -> 1 (again)": "where a step leads the given part is never used",
    "error = torch.where(held, z_next - truth, 0).square().sum() | 0 -> 1": "adds a constant, which has no gradient",
    "clean = torch.where(held, z0, 0) | 0 -> 1": "what lies there is never used",
}


def places(tree):
    """Every (node, attribute, new value) that is one mutant."""
    skip = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.If)) and "tour()" in ast.unparse(node):
            skip.update(ast.walk(node))
        if isinstance(node, ast.Dict) and node.keys and getattr(node.keys[0], "value", None) == "toy":
            skip.update(ast.walk(node.values[0]))
    for node in ast.walk(tree):
        if node in skip:
            continue
        if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAP:
            yield node, "op", SWAP[type(node.op)]()
        elif isinstance(node, ast.UnaryOp):  # undo it by doing it twice
            yield node, "operand", ast.UnaryOp(node.op, node.operand)
        elif isinstance(node, ast.Compare):
            for i, op in enumerate(node.ops):
                yield node, "ops", [*node.ops[:i], SWAP[type(op)](), *node.ops[i + 1 :]]
        elif isinstance(node, ast.IfExp):
            yield node, "test", ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.where":
            yield node, "args", [node.args[0], *node.args[:0:-1]]
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "value", not node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            yield node, "value", node.value + 1 if isinstance(node.value, int) or not node.value else node.value * 2


def mutants(source):
    """All mutants: name -> source. A name is its line and what changed in it, and outlives a change of other lines."""
    tree, lines, found = ast.parse(source), source.splitlines(), {}
    for node, attribute, value in list(places(tree)):
        kept, before = getattr(node, attribute), ast.unparse(node)
        setattr(node, attribute, value)
        name = f"{lines[node.lineno - 1].strip()} | {before} -> {ast.unparse(node)}"
        found[name + " (again)" * sum(known.startswith(name) for known in found)] = ast.unparse(tree)
        setattr(node, attribute, kept)
    return found


def start(name, source):
    """Run the fast tests on a mutant of a module in a child process, which has torch already -> its number."""
    child = os.fork()
    if child:
        return child
    signal.alarm(120)  # a mutant that never ends is killed
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.modules[name] = module = types.ModuleType(name)
    module.__file__ = str(ROOT / f"{name}.py")
    status = 1
    try:
        exec(compile(source, module.__file__, "exec"), module.__dict__)  # noqa: S102
        os.chdir(ROOT / "tests")
        status = pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *FAST[name]])
    finally:
        os._exit(status)


def fates(todo, jobs):
    """{key: (module, source)} -> (key, "killed" or "survived") of each as soon as it is known, `jobs` at a time."""
    waiting, running = iter(todo.items()), {}
    while True:
        for key, mutant in islice(waiting, jobs - len(running)):
            running[start(*mutant)] = key
        if not running:
            return
        child, status = os.wait()
        yield running.pop(child), "killed" if status else "survived"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("`")[0])
    add = parser.add_argument
    add("--count", type=int, default=300, help="places to change (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the sample (%(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="mutants at a time (one a core)")
    add("--out", type=Path, default=Path("runs/mutants.csv"), help="results (%(default)s)")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)  # threads do not outlive a fork
    source = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in FAST}
    every = {key: ("avdit", text) for key, text in mutants(source["avdit"]).items()}
    sampled = random.Random(args.seed).sample(sorted(every), min(args.count, len(every)))
    by_hand = {}
    for name, old, new in HAND:
        if source[name].count(old) != 1:
            sys.exit(f"not once in {name}.py: {old}")
        by_hand[f"{name}: {old} -> {new}"] = (name, source[name].replace(old, new))
    for key in EQUIVALENT.keys() - every.keys():
        sys.exit(f"EQUIVALENT names what is no mutant: {key}")
    for name, result in fates({name: (name, source[name]) for name in FAST}, args.jobs):
        if result != "survived":
            sys.exit(f"the tests of {name}.py fail as it stands")
    known = dict(csv.reader(args.out.open())) if args.out.exists() else {}
    wanted = {**by_hand, **{key: every[key] for key in sampled}}
    for key, result in fates({key: mutant for key, mutant in wanted.items() if key not in known}, args.jobs):
        known[key] = result
        with args.out.open("a", newline="") as file:
            csv.writer(file).writerow([key, result])
        print(f"{result:8} {key}", flush=True)
    worst = 1
    for title, keys in (("by hand", by_hand), ("sampled", sampled)):
        alive = [key for key in keys if known[key] == "survived" and key not in EQUIVALENT]
        equivalent = sum(key in EQUIVALENT for key in keys)
        share = 1 - len(alive) / max(1, len(keys) - equivalent)
        print(f"{title}: {len(keys)} mutants, {equivalent} equivalent, {share:.1%} of the others killed")
        print("".join(f"  alive: {key}\n" for key in alive), end="")
        worst = min(worst, share)
    return worst < 0.95


if __name__ == "__main__":
    sys.exit(main())
