"""ID3 in a plain loop: train, save what changed, put it on a fresh base, take it off again."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import unmask

torch.manual_seed(0)

# Two classes that a linear model can't tell apart: is the point inside the circle?
points = 2 * torch.rand(2_000, 2) - 1
inside = (points.square().sum(1) < 0.6).long()
hidden = nn.Linear(256, 256)
base = nn.Sequential(nn.Linear(2, 256), nn.ReLU(), hidden, nn.ReLU(), nn.Linear(256, 2))


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return (model(points).argmax(1) == inside).float().mean().item()


model = copy.deepcopy(base)
print(f"before training: accuracy {accuracy(model):.3f}")

epochs, batch_size = 4, 50
tuner = unmask.attach(model, unmask.id3(budget=0.01), steps=epochs * len(points) // batch_size)
optimizer = tuner.optimizer(torch.optim.AdamW, lr=3e-3)
for _ in range(epochs):
    for chosen in torch.randperm(len(points)).split(batch_size):
        loss = cross_entropy(model(points[chosen]), inside[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

after = accuracy(model)
total = sum(parameter.numel() for parameter in model.parameters())
print(f"after training {tuner.active:,} of {total:,} scalars: accuracy {after:.3f}")
assert after > 0.9

delta = tuner.delta()
delta.save("circle")
print(f"saved {delta} to ./circle")

# Anyone with the same base gets the same model, and gets the base back.
fresh = copy.deepcopy(base)
undo = unmask.Delta.load("circle").apply(fresh)
assert torch.equal(fresh(points), model(points))
undo.apply(fresh)
assert torch.equal(fresh(points), base(points))
print("applied to a fresh base: the same outputs, bit for bit; and undone")
