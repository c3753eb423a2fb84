"""Training finds the best denoiser. On Gaussian data that denoiser is known, and so is the loss that it leaves."""

import math

import torch
from test_exact import AB, SCHEDULE, SEGMENT, WORLD, E, Oracle

from avdit import MONL, AVDiT, sample_timesteps, training_loss
from train import make_optimizers


def test_training_on_gaussian_data_approaches_the_oracles_loss():
    """One model is trained on all four strategies with the toy preset's optimizer. For each strategy its loss is within
    7 % of the oracle's. From the best denoiser that sees each element alone, it is more than half way there."""
    torch.manual_seed(0)
    g, oracle, steps = torch.Generator().manual_seed(0), Oracle(), 400
    root = torch.linalg.cholesky(oracle.cov).float()
    alone = Oracle()
    alone.cov = torch.diag(oracle.cov.diagonal())  # it does not know what elements tell about each other

    def draw(n, mixture):
        z0 = oracle.mean.float() + torch.randn(n, E, generator=g) @ root.T
        return z0, sample_timesteps(mixture, WORLD, n, 1000, g), torch.randn(n, E, generator=g)

    model = AVDiT(WORLD, dim=48, depth=2, heads=4)
    optimizers = make_optimizers("muon", model).values()
    for step in range(steps):
        lr = 6e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        model.zero_grad()
        training_loss(model, SCHEDULE, WORLD, *draw(128, "monl"))[0].backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            optimizer.step()
    print()
    for strategy in MONL:
        z0, t, eps = draw(2000, strategy)
        ab = torch.tensor(AB).float()[t[:, SEGMENT]]
        z = ab.sqrt() * z0 + (1 - ab).sqrt() * eps
        with torch.no_grad():
            best, blind, own = (f(z, t) for f in (oracle, alone, model))
        least, blind, loss, distance = ((x - y).square().mean().item()
                                        for x, y in ((best, eps), (blind, eps), (own, eps), (own, best)))  # fmt: skip
        excess, most = loss - least, blind - least
        print(f"{strategy:8} oracle {least:.4f}, excess of the model {excess:.4f}, of each alone {most:.4f}")
        assert excess < 0.07 * least and excess < 0.5 * most
        # The loss is the oracle's plus the squared distance to the oracle, up to the sampling error.
        assert abs(excess - distance) < 0.2 * distance + 0.002
