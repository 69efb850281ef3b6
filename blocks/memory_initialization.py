"""The initial parameters of a memory block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def initialize_memory(memory: Any) -> None:
    """Initialize all parameters of ``memory``, a ``NeuralMemory``, in place.

    ===========  =========================================================================================
    projections  normal, std 1 / sqrt(dim); output half of it, to change the residual stream little
    convolution  normal, std 1 / sqrt(taps), plus 1 at the current token; from taps near zero, training
                 takes long to use the previous token
    theta        bias -3: 0.05 of max_step. Gradients of the outer training pass through every update;
                 from about 0.1 on they grow with the length and overflow by 4,096 tokens
    eta          bias 1: a momentum decay of 0.73
    alpha        bias -4 to -8 over the heads: half-lives of about 40 to 2,000 tokens; the same for each channel
    others       gamma bias 2: weights in a window of 0.88; a parameter of the objective: 1
    network      normal, std 1 / sqrt(in). Under LayerNorm, a step moves the output by step / |output|^2, so
                 the std is larger: 1 in the first and last layer, 1.5 / sqrt(in) in the others.
    features     the coefficients of a Taylor series
    gains        1
    ===========  =========================================================================================
    """
    for layer, std in ((memory.qkv, 1.0), (memory.output_gate, 1.0), (memory.output, 0.5), (memory.controls, 0.1)):
        nn.init.normal_(layer.weight, std=std * memory.dim**-0.5)
    if memory.gates == "constant":
        memory.controls.weight.zero_()
    heads, sizes = memory.heads, memory.gate_sizes
    forgetting = torch.linspace(-4, -8, heads) if heads > 1 else torch.tensor([-6.0])
    biases = {
        "theta": torch.full((heads,), -3.0).repeat(sizes["theta"]),
        "eta": torch.ones(heads),
        "alpha": forgetting.repeat_interleave(sizes.get("alpha", 1)),
        "gamma": torch.full((heads,), 2.0),
        "parameter": torch.full((heads,), math.log(math.expm1(1.0))),
    }
    bias = torch.cat([biases[name] for name in sizes])
    if memory.gating == "hard_sigmoid":  # the values and slopes of the sigmoid; its own slope is 1 / 6
        open_ = torch.sigmoid(bias)
        bias = 6 * (open_ - 0.5)
        memory.controls.weight.mul_((6 * open_ * (1 - open_)).unsqueeze(-1))
    memory.controls.bias.copy_(bias)
    if memory.convolution is not None:
        nn.init.normal_(memory.convolution, std=memory.conv**-0.5)
        memory.convolution[:, -1] += 1
    last_layer = len(memory.shapes) - 1
    for i, weight in enumerate(memory.initial_weights):
        std = weight.shape[-1] ** -0.5
        if memory.norm_gain is not None:
            std = 1.5 * std if 0 < i < last_layer else 1.0
        nn.init.normal_(weight, std=std)
    if memory.coefficients is not None:
        memory.coefficients.copy_(torch.tensor(memory.rule.features.initial()))
    for momentum in memory.initial_momentum:
        nn.init.normal_(momentum, std=0.02 * momentum.shape[-1] ** -0.5)
    for gain in (memory.norm_gain, memory.output_gain):
        if gain is not None:
            nn.init.ones_(gain)
