"""The fields of a memory block in a recipe: their types, and what they mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from ..kernels.memory.learner.parts import FEATURES, NETWORKS, OBJECTIVES, OPTIMIZERS, RETENTIONS
from ..registry import Added, PartOf, SameFunction, SameWeights

Heads: TypeAlias = Annotated[int, Field(ge=1, description="number of heads, each a memory of width dim / heads")]
Depth: TypeAlias = Annotated[int, Field(ge=1, le=16, description="number of layers of the memory network")]
Expansion: TypeAlias = Annotated[int, Field(ge=1, le=64, description="relative hidden width of the memory network")]
Chunk: TypeAlias = Annotated[
    int, SameWeights(), Field(ge=1, le=65536, description="tokens whose gradients are taken at the weights before them")
]
Activation: TypeAlias = Annotated[
    Literal["identity", "silu", "gelu", "relu"], Field(description="activation of the memory network")
]
Norm: TypeAlias = Annotated[bool, Field(description="M(x) = x + LayerNorm(net(x)) rather than net(x)")]
Conv: TypeAlias = Annotated[int, Field(ge=0, le=64, description="width of the causal convolution on q, k, v; 0: none")]
Momentum: TypeAlias = Annotated[bool, Field(description="momentum with decay eta")]
Forgetting: TypeAlias = Annotated[bool, Field(description="weight decay: weights decay by 1 - alpha per token")]
Gates: TypeAlias = Annotated[
    Literal["token", "chunk", "constant"],
    Field(description="gates of each token, of the first token of each chunk, or the same for all tokens"),
]
Gating: TypeAlias = Annotated[
    Literal["sigmoid", "hard_sigmoid"],
    Field(description="activation of the gates; hard_sigmoid is linear and clamps to exactly 0 and 1"),
]
MaxStep: TypeAlias = Annotated[float, SameWeights(), Field(gt=0, description="maximum of the step size theta")]
Clip: TypeAlias = Annotated[
    float | None, SameWeights(), Field(gt=0, description="maximum gradient norm of one token; null: none")
]
Network: TypeAlias = Annotated[Any, PartOf(NETWORKS), Added(), Field(description="the memory network")]
Objective: TypeAlias = Annotated[Any, PartOf(OBJECTIVES), Added(), Field(description="what a step decreases")]
Optimizer: TypeAlias = Annotated[
    Any, PartOf(OPTIMIZERS, optional=True), Added(), Field(description="null: momentum, or step without momentum")
]
Retention: TypeAlias = Annotated[
    Any, PartOf(RETENTIONS, optional=True), Added(), Field(description="null: scalar, or none without forgetting")
]
Window: TypeAlias = Annotated[
    int, Added(), SameWeights(), Field(ge=1, description="tokens whose gradients are in a step")
]
Features: TypeAlias = Annotated[
    Any, PartOf(FEATURES, optional=True), Added(), Field(description="features of queries and keys; null: none")
]
Keys: TypeAlias = Annotated[
    int, Added(), Field(ge=1, le=16, description="keys and values, and so writes, of each token")
]
Reset: TypeAlias = Annotated[
    int | None,
    Added(),
    SameWeights(),
    Field(ge=1, description="tokens after which the memory begins anew; null: never"),
]
Query: TypeAlias = Annotated[
    Literal["projected"] | None, Added(), Field(description="project queries on the keys since the reset; null: do not")
]
Steps: TypeAlias = Annotated[
    Literal["one", "each"], Added(), Field(description="one step size for all matrices, or one for each")
]
Threshold: TypeAlias = Annotated[
    float | None, SameWeights(), Field(gt=0, description="gradient norm below which a token neither writes nor decays")
]
Retrieve: TypeAlias = Annotated[
    Literal["after", "before", "anchor"],
    SameWeights(),
    Field(description="read after a token is written, before, or at the weights at its chunk's start"),
]
Read: TypeAlias = Annotated[
    Literal["after", "before", "anchor"] | None,
    Added(),
    SameWeights(),
    Field(description="another name of retrieve; null: as it says"),
]
Use: TypeAlias = Annotated[
    Literal["both", "read", "write"],
    SameWeights(),
    Field(description="write and read, only read, or only write (outputs zero)"),
]
LearnMomentum: TypeAlias = Annotated[bool, Field(description="learn the initial momentum; zero otherwise")]
Keep: TypeAlias = Annotated[
    int | None, SameFunction(), Field(ge=1, description="chunks between states kept for backward; null: automatic")
]
