"""A training loop of your own, emulated: `emulate` before it, `step` after every step of the optimizer.

    python examples/own_loop.py

A network of five layers learns the 8x8 digits of scikit-learn, with weights and activations in e4m3fn, gradients in
e5m2 pruned to 80 % zeros, first and last layer in float32 (`fpsim presets fp8-training`). Any nn.Module will do that
calls its layers as modules and is float32; turn autocast off. `step` comes before `zero_grad`, so that the weights'
gradients are still there to be recorded.
"""

import torch
from sklearn.datasets import load_digits

import fpsim

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16 - 0.5).float(), torch.tensor(labels)
torch.manual_seed(0)
layers = [torch.nn.Linear(64, 128), *(torch.nn.Linear(128, 128) for _ in range(3)), torch.nn.Linear(128, 10)]
model = torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.ReLU())))[:-1]
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

emulator = fpsim.emulate(model, "fp8-training", optimizer=optimizer)
for _ in range(8):
    emulator.next_epoch()
    for batch in torch.randperm(1500).split(100):
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        emulator.step()
        optimizer.zero_grad()

model.eval()
with torch.no_grad():
    accuracy = float((model(x[1500:]).argmax(1) == y[1500:]).float().mean())
print(f"accuracy on the last {len(y) - 1500} digits: {100 * accuracy:.1f} %")
for row in emulator.statistics:
    print(f"layer {row['layer']}: {100 * row['achieved_sparsity']:.1f} % of the gradient is zero")
traffic = emulator.ledger.traffic_bits_per_step()["total"]
print(f"traffic of a step: {traffic['fp32'] / traffic['encoded']:.2f} times less than float32")
emulator.detach()
