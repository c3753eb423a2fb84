"""Does a test fail when a line of avdit.py is wrong? Change one thing at a time, run the fast tests, and see.

First the mistakes that someone who forks this would most likely make, by hand. Then a seeded sample of all operators, constants, indices, comparisons and choices of the file, but for what only prints (tour) and
the toy preset, whose sizes are choices. Every result goes to OUT as soon as it is known, and the command goes on where
it stopped. Exit status 1 if fewer than 95 % of the mutants that are not equivalent die. `python tests/mutants.py --help`
"""

import argparse
import ast
import csv
import os
import random
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FAST = {
    "avdit": [
        "test_method.py",
        "test_sampling.py",
        "test_exact.py",
        "test_scale.py",
        "-k",
        "not ddpm-1000 and not batch",
    ],
    "train": ["test_scripts.py", "-k", "average or learning_rate or depend"],
    "sample": ["test_scripts.py", "-k", "average"],
}
PAIRS = [
    (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq),
    (ast.In, ast.NotIn), (ast.Is, ast.IsNot), (ast.And, ast.Or), (ast.BitAnd, ast.BitOr),
]  # fmt: skip
SWAP = {**dict(PAIRS), **{b: a for a, b in PAIRS}, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv}

HAND = [  # module, what is there, what a tired student makes of it
    ("avdit", "torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])", "(1 - beta).cumprod(0)"),
    ("avdit", "beta = torch.linspace(beta_min, beta_max, T, dtype=torch.float64)",
     "beta = torch.linspace(beta_min, beta_max, T).double()"),
    ("avdit", "return a * eps - s * z0 if", "return s * z0 - a * eps if"),
    ("avdit", "torch.multinomial(torch.tensor(list(weights.values())), batch, replacement=True, generator=generator)",
     "torch.multinomial(torch.tensor(list(weights.values())), 1, generator=generator).expand(batch)"),
    ("avdit", '"ptm": own,', '"ptm": own[:, :1].expand(-1, m.N),'),
    ("avdit", '"pm": own[:, :1]', '"pm": first[:, :1]'),
    ("avdit", "correspondence(m, modalities[0])]", "torch.arange(m.N) % modalities[0].N]"),
    ("avdit", "return torch.bucketize(modality.midpoints, inner, right=True)",
     "return torch.bucketize(torch.tensor(modality.edges[:-1]), inner.float(), right=False)"),
    ("avdit", "unflatten(1, (m.N, m.P))", "unflatten(1, (m.P, m.N)).transpose(1, 2)"),
    ("avdit", "shift1, scale1, shift2, scale2 = self.ada(c)", "scale1, shift1, scale2, shift2 = self.ada(c)"),
    ("avdit", "sinusoid(t[m.name], self.dim)", "sinusoid(t[m.name] / 1000, self.dim)"),
    ("avdit", "        with torch.no_grad():\n            z0_hat", "        with torch.enable_grad():\n            z0_hat"),
    ("avdit", "torch.where(x > 0, schedule.s[x]", "torch.where(x >= 0, schedule.s[x]"),
    ("avdit", "for x in (t, t_batch or t))", "for x in (t, t))"),
    ("avdit", "== 0, z_t[m], z0_hat[m])", "== 0, z0_hat[m], z0_hat[m])"),
    ("avdit", "a_next / a * (z", "a * (z"),
    ("avdit", "beta / s.clamp(min=1e-8) * eps_hat", "beta / a * eps_hat"),
    ("avdit", "torch.where(per_segment(t_next, z) > 0, beta.sqrt() * noise, 0)", "beta.sqrt() * noise"),
    ("avdit", "return clean if monl else", "return clean if False else"),
    ("avdit", "(1 + s) * c - s * u", "s * c - (1 + s) * u"),
    ("avdit", "(1 + s) * c - s * u", "s * c + (1 - s) * u"),
    ("avdit", "torch.where(dropped[m].flatten(1), T, t[m])", "t[m]"),
    ("avdit", "torch.where(dropped[m], 0, z0_prev[m])", "z0_prev[m]"),
    ("avdit", "levels(taus[i]), levels(taus[i + 1])", "levels(taus[i]), levels(taus[min(i + 1, steps - 1)])"),
    ("avdit", "        z0_prev = self_condition(z0_hat, z, t, z_max)\n        z, last", "        z, last"),
    ("avdit", "(after - now) / (now - before) / 2, 0)", "(after - now) / (now - before), 0)"),
    ("avdit", "eps_hat - a / s.clamp(min=1e-8) * change", "eps_hat"),
    ("avdit", "ratio = torch.where(t_next > 0, (after - now)", "ratio = torch.where(t_next >= 0, (after - now)"),
    ("avdit", "both = [c and {m: torch.cat([c[m], u[m]])", "both = [c and {m: torch.cat([u[m], c[m]])"),
    ("avdit", "return a_next * z0_hat +", "return a_next * z0_hat.clamp(-3, 3) +"),
    ("avdit", "shared = first[:, :1].expand(-1, m.N)", "shared = first[:1, :1].expand(batch, m.N)"),
    ("avdit", "{m: torch.where(dropped[m], noise[m], z[m]) for m in z}, t,",
     "{m: torch.where(dropped[m], noise[m] + 0.00635 * z[m], z[m]) for m in z}, t,"),
    ("avdit", "clamp(-z_max[m], z_max[m])", "clamp(-max(z_max.values()), max(z_max.values()))"),
    ("avdit", "strength * schedule.scales(t_next[m], z[m])[1] * grad[m]", "-strength * grad[m]"),
    ("train", 'parts["ema"].update_parameters(model)', 'parts["ema"].update_parameters(model) if step == first else None'),
    ("train", "[config.seed, step])", "[config.seed, 0])"),
    ("train", "[config.seed, step, 1]", "[config.seed, 0, 1]"),
    ("train", "int(words[row])", "int(words[i])"),
    ("train", "min(1, (step + 1) / PRESETS[config.preset].warmup)", "1"),
    ("sample", 'state["ema"].items() if k.startswith("module.")', 'state["model"].items()'),
]  # fmt: skip

# Mutants that no test can kill, because nothing changes: as main() names them -> why.
EQUIVALENT = {
    "mean = a_next / a * (z - beta / s.clamp(min=1e-8) * eps_hat) | 1e-08 -> 2e-08": "s is 0 or at least 0.01",
    "z0_hat, eps_hat = z0_hat + change, eps_hat - a / s.clamp(min=1e-8) * change  # still z = a z0_hat + s eps_hat | "
    "1e-08 -> 2e-08": "the same, and change is 0 where s is",
    "loss = total / count.clamp(min=1e-8) | 1e-08 -> 2e-08": "count is 0, and total with it, or at least 0.01",
    "weight = -1.0 | 1.0 -> 2.0": "as little a positive number",
    "starts = (0, *range(1, frames + 1, 4)) | 1 -> 2 (again)": "the same starts for every 1 + 4 k frames",
    "count = int(frames / fps / segment + 1e-6) | 1e-06 -> 2e-06": "a tolerance",
    "return (edges[:-1] >= start - 1e-6) & (edges[1:] <= end + 1e-6) | 1e-06 -> 2e-06": "a tolerance",
    "return (edges[:-1] >= start - 1e-6) & (edges[1:] <= end + 1e-6) | 1e-06 -> 2e-06 (again)": "a tolerance",
    "return (edges[:-1] >= start - 1e-6) & (edges[1:] <= end + 1e-6) | edges[1:] <= end + 1e-06 -> "
    "edges[1:] < end + 1e-06": "differs where an edge is off by exactly the tolerance",
    "return (edges[:-1] >= start - 1e-6) & (edges[1:] <= end + 1e-6) | edges[:-1] >= start - 1e-06 -> "
    "edges[:-1] > start - 1e-06": "the same",
    "error = sum(torch.where(fixed[m], z_next[m] - shown[m], 0).square().sum() for m in z0) | 0 -> 1": "adds a constant, which has no gradient",
    "clean = {m: torch.where(fixed[m], z0[m], 0) for m in z0} | 0 -> 1": "what lies there is never used",
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
    """All mutants: name -> source. A name is its line and what changed in it, which outlives a change of other lines."""
    tree, lines, found = ast.parse(source), source.splitlines(), {}
    for node, attribute, value in list(places(tree)):
        kept, before = getattr(node, attribute), ast.unparse(node)
        setattr(node, attribute, value)
        name = f"{lines[node.lineno - 1].strip()} | {before} -> {ast.unparse(node)}"
        found[name + " (again)" * sum(known.startswith(name) for known in found)] = ast.unparse(tree)
        setattr(node, attribute, kept)
    return found


def fate(name, source):
    """Run the fast tests on a mutant of a module, in a child process that has torch already -> "killed", "survived"."""
    child = os.fork()
    if not child:
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
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *FAST[name]])
        finally:
            os._exit(status)
    return "killed" if os.waitpid(child, 0)[1] else "survived"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("`")[0])
    parser.add_argument("--count", type=int, default=300, help="places to change (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/mutants.csv"), help="results (default runs/mutants.csv)")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)  # threads do not outlive a fork
    source = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in FAST}
    for name, text in source.items():
        if fate(name, text) != "survived":
            sys.exit(f"the tests of {name}.py fail as it stands")
    every = {key: ("avdit", text) for key, text in mutants(source["avdit"]).items()}
    sampled = random.Random(args.seed).sample(sorted(every), min(args.count, len(every)))
    by_hand = {}
    for name, old, new in HAND:
        if source[name].count(old) != 1:
            sys.exit(f"not once in {name}.py: {old}")
        by_hand[f"{name}: {old} -> {new}"] = (name, source[name].replace(old, new))
    known = dict(csv.reader(args.out.open())) if args.out.exists() else {}
    for key in [*by_hand, *sampled]:
        if key not in known:
            known[key] = fate(*{**by_hand, **every}[key])
            with args.out.open("a", newline="") as file:
                csv.writer(file).writerow([key, known[key]])
            print(f"{known[key]:8} {key}", flush=True)
    worst = 1
    for title, keys in (("by hand", by_hand), ("sampled", sampled)):
        alive = [key for key in keys if known[key] == "survived" and key not in EQUIVALENT]
        equivalent = sum(key in EQUIVALENT for key in keys)
        share = 1 - len(alive) / (len(keys) - equivalent)
        print(f"{title}: {len(keys)} mutants, {equivalent} equivalent, {share:.1%} of the others killed")
        print("".join(f"  alive: {key}\n" for key in alive), end="")
        worst = min(worst, share)
    return worst < 0.95


if __name__ == "__main__":
    sys.exit(main())
