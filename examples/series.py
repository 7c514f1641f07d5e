"""One run, several models: ID3 grows its set, so a delta can be kept at every budget on the way."""

import copy

import torch
from torch import nn
from torch.nn.functional import mse_loss

import unmask

torch.manual_seed(0)

x = torch.linspace(-3, 3, 400).unsqueeze(1)
y = torch.sin(2 * x)
hidden = nn.Linear(128, 128)
base = nn.Sequential(nn.Linear(1, 128), nn.Tanh(), hidden, nn.Tanh(), nn.Linear(128, 1))

steps, levels = 400, (0.1, 0.25, 0.5, 1.0)
model = copy.deepcopy(base)
tuner = unmask.attach(model, unmask.id3(budget=800), steps=steps)
optimizer = tuner.optimizer(torch.optim.AdamW, lr=3e-3)
reached = 0
for _ in range(steps):
    mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    while reached < len(levels) and tuner.active >= levels[reached] * tuner.budget:
        tuner.delta().save(f"series/{levels[reached]:.0%}")
        reached += 1

losses = [mse_loss(base(x), y).item()]
print(f"before training: loss {losses[0]:.4f}")
for level in levels:
    delta = unmask.Delta.load(f"series/{level:.0%}")
    fresh = copy.deepcopy(base)
    delta.apply(fresh)
    losses.append(mse_loss(fresh(x), y).item())
    print(f"{level:>4.0%} of the budget: {delta.active:>3} scalars, loss {losses[-1]:.4f}")
assert losses == sorted(losses, reverse=True)
