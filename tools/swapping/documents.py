"""The documents of packed rows, by the arguments with which the collators of transformers keep them apart."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...blocks.documents import expect_documents
from ...blocks.observers import active
from ...kernels.documents import Documents
from .adapter import Arguments, SwapError, signature
from .padding import Mask, attended, mask_tensor
from .site import Site

CARRIERS = ("position_ids", "cu_seq_lens_q", "seq_idx", "attention_mask")
"""The arguments that say where documents begin."""
SEVERAL = "several documents in one row (packing)"
ONE_DOCUMENT = "Give one document a row, with padding (packing=False, padding_free=False in TRL)"
BY_MASK = "give attention_mask as a block-diagonal mask [batch, 1, time, time]"


class PackedRows:
    """The documents of the rows of one call of a model."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        """The document of each token, ``[rows, time]``; ``None`` if every row is one."""
        self._known = False
        self._model: Any = None
        """The outermost model of transformers."""
        self._masks: list[Tensor] = []
        """Masks of scores that keep the documents apart."""
        self._made: list[tuple[Tensor | None, Documents]] = []
        """By the mask that they were made with."""

    def begin(self, arguments: Arguments, past: int | None) -> Arguments:
        """A call inside the call of the model has begun. Returns the arguments that keep documents apart.

        The outermost model of transformers, or call with one of ``CARRIERS``, says where documents begin. ``past``: the
        number of tokens in its cache, ``None`` without one. Raises ``SwapError`` for documents that are not known, or
        that attention would not keep apart.
        """
        module, named, where = arguments.module, arguments.named, type(arguments.module).__name__
        if not self._known:
            if not (is_pretrained(module) or any(named.get(name) is not None for name in CARRIERS)):
                return arguments
            self._known = True
            self.ids = find_documents(named, past, where)
        if self.ids is None:
            return arguments
        if past is not None or named.get("use_cache") is True:
            raise SwapError(f"{where}: {SEVERAL}, and a cache: its states are of one document. {ONE_DOCUMENT}")
        if self._model is None:
            if is_pretrained(module):
                self._model = module
            return self.again(arguments)
        if not self._keeps_apart(arguments, past, where):
            raise SwapError(f"{where}: {SEVERAL}, which the model does not keep apart in attention: {BY_MASK}")
        return arguments

    def _keeps_apart(self, arguments: Arguments, past: int | None, where: str) -> bool:
        """Whether a module in the model is called with a mask that hides the documents from each other, if it is known.

        Kernels in half precision may be told by ``position_ids``, and recurrent layers by ``seq_idx``.
        """
        named, mask, ids = arguments.named, mask_tensor(arguments.named), self.ids
        if mask is not None and mask.dim() == 4 and not any(mask is known for known in self._masks):
            self._masks.append(mask)
            if ids is None or mask.shape[2] != ids.shape[1]:
                return True
            found = find_documents({"attention_mask": mask}, past, where)
            return found is not None and bool((found.to(ids.device) == ids).all())
        x = named.get(arguments.first)
        if "attention_mask" not in named or named["attention_mask"] is not None or not isinstance(x, Tensor):
            return True
        if is_pretrained(arguments.module) or self._model is None:
            return True
        kinds = getattr(self._model.config.get_text_config(), "layer_types", None) or ()
        recurrent = any(kind not in ("full_attention", "sliding_attention", "chunked_attention") for kind in kinds)
        return recurrent or (x.device.type != "cpu" and x.dtype in (torch.float16, torch.bfloat16))

    def again(self, arguments: Arguments) -> Arguments:
        """As ``begin``, for a call that is run again by gradient checkpointing."""
        if self.ids is None or arguments.module is not self._model:
            return arguments
        return with_documents(arguments, self.ids)

    def documents(self, site: Site, x: Tensor, mask: Tensor | None) -> Documents | None:
        """The documents of ``x`` [rows, time, dim], which the block of ``site`` reads.

        Raises ``SwapError`` if they are of other tokens, and ``ValueError`` if the block is observed.
        """
        if self.ids is None:
            return None
        rows, time, _ = x.shape
        if self.ids.shape[1] != time or self.ids.shape[0] not in (1, rows):
            raise SwapError(
                f"{site.path}: reads {rows} rows of {time} tokens, and the call has rows of several documents for "
                f"{list(self.ids.shape)} tokens: where they begin here is unknown"
            )
        for known, made in self._made:
            if known is mask and made.device == x.device and not active:
                return made
        made = expect_documents(site.block, self.ids.expand(rows, time).to(x.device), None, x, mask, None)
        self._made.append((mask, made))
        return made


def find_documents(named: Mapping[str, Any], past: int | None, where: str) -> Tensor | None:
    """The document of each token, int64 ``[rows, time]``, or ``None`` if every row is one document.

    Documents begin where ``position_ids`` start again or jump, which is transformers' own rule; at the boundaries
    ``cu_seq_lens_q``; where ``seq_idx`` changes; and where a mask ``[batch, 1, time, time so far]`` does not let a
    token attend to the one before. Padding belongs to no document. With an ``attention_mask``, positions must start
    again: others are those of padding. ``past``: the number of tokens read before, if known.

    Raises ``SwapError`` if the arguments contradict each other, or if a mask is not block-diagonal.
    """
    mask = mask_tensor(named)
    lengths, numbers, positions = (named.get(name) for name in ("cu_seq_lens_q", "seq_idx", "position_ids"))
    if isinstance(positions, Tensor) and positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]  # of the text; the other three are of images
    if mask is not None and mask.dim() == 2 and not mask.is_floating_point() and bool((mask > 1).any()):
        raise SwapError(f"{where}: attention_mask has numbers of documents, expected 1 or 0: give position_ids")
    rows, time, device = _tokens(named, mask, lengths, numbers, positions)
    shape = rows, time
    if time < 2:
        return None
    real = None if mask is None else Mask(mask, marks_padding=False).real_tokens(rows, time, past, where)
    # the real token before each, -1 if there is none
    places = torch.arange(time, device=device if mask is None else mask.device).expand(rows, time)
    before = pad((places if real is None else places.masked_fill(~real, -1).cummax(1).values)[:, :-1], (1, 0), value=-1)
    follows = before >= 0 if real is None else real & (before >= 0)

    def starts(ids: Tensor) -> Tensor:
        ids = ids.to(before.device).expand(rows, time)
        return follows & (ids != ids.gather(1, before.clamp(min=0)))

    found: dict[str, Tensor] = {}
    if mask is not None and mask.dim() == 4 and mask.shape[2] == time:
        found["attention_mask"] = _mask_starts(mask, shape, past, before, real, where)
    if isinstance(lengths, Tensor) and int((lengths.diff() > 0).sum()) > 1:
        if int(lengths[0]) != 0 or int(lengths[-1]) != rows * time or bool((lengths.diff() < 0).any()):
            raise SwapError(
                f"{where}: cu_seq_lens_q: expected boundaries from 0 to the number of tokens, {rows * time}, that do "
                f"not decrease, got {lengths.tolist() if len(lengths) < 12 else [*lengths[:11].tolist(), '...']}"
            )
        ids = torch.arange(len(lengths) - 1, device=lengths.device).repeat_interleave(lengths.diff().long())
        found["cu_seq_lens_q"] = starts(ids.view(rows, time))
    if isinstance(numbers, Tensor) and numbers.dim() == 2:
        found["seq_idx"] = starts(_fit(numbers, shape, "seq_idx", where))
    if isinstance(positions, Tensor) and positions.dim() == 2:
        positions = _fit(positions, shape, "position_ids", where).to(before.device).expand(rows, time)
        again = follows & (positions <= positions.gather(1, before.clamp(min=0)))
        if mask is None or (mask.dim() == 2 and real is None and bool(again.any())):
            again = pad(positions.diff() != 1, (1, 0))
        if "attention_mask" not in found or bool((again & ~found["attention_mask"]).any()):
            found["position_ids"] = again
    several = [name for name, begins in found.items() if bool(begins.any())]
    if not several:
        return None
    for name, begins in found.items():
        if not torch.equal(begins.to(before.device), found[several[0]].to(before.device)):
            raise SwapError(f"{where}: {several[0]} and {name} have different documents in a row")
    return found[several[0]].cumsum(1)


def _tokens(
    named: Mapping[str, Any], mask: Tensor | None, lengths: Any, *ids: Any
) -> tuple[int, int, torch.device | None]:
    """The numbers of rows and of tokens in each, and their device. Zeros if nothing says where documents begin."""
    known = [x for x in ids if isinstance(x, Tensor) and x.dim() == 2]
    if not known and not isinstance(lengths, Tensor) and (mask is None or mask.dim() == 2):
        return 0, 0, None
    inputs = (named.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
    read = next((x for x in inputs if isinstance(x, Tensor) and x.dim() > 1), None)
    if read is not None:
        return read.shape[0], read.shape[1], read.device
    if mask is not None and mask.dim() == 4:
        return mask.shape[0], mask.shape[2], mask.device
    rows = max((len(x) for x in (mask, *known) if x is not None), default=1)
    if known:
        return rows, known[0].shape[1], known[0].device
    return rows, int(lengths[-1]) // rows, lengths.device


def _fit(x: Tensor, shape: tuple[int, int], name: str, where: str) -> Tensor:
    if x.shape not in (shape, (1, shape[1])):
        raise SwapError(f"{where}: {name}: expected [batch, time] = {list(shape)}, got {list(x.shape)}")
    return x


def _mask_starts(
    mask: Tensor, shape: tuple[int, int], past: int | None, before: Tensor, real: Tensor | None, where: str
) -> Tensor:
    """Where documents begin by a mask of scores, which must hide them from each other."""
    rows, time = shape
    size = mask.shape[3]
    real = torch.ones_like(before, dtype=torch.bool) if real is None else real
    first = past if past is not None and past + time <= size else size - time
    within = attended(mask).any(dim=1)[:, :, first : first + time].expand(rows, time, time)
    begins = real & (before >= 0) & ~within.gather(2, before.clamp(min=0).unsqueeze(2)).squeeze(2)
    if bool(begins.any()):
        ids = begins.cumsum(1)
        across = within & (ids.unsqueeze(2) != ids.unsqueeze(1)) & real.unsqueeze(2) & real.unsqueeze(1)
        if bool(across.any()):
            row, here, there = across.nonzero()[0].tolist()
            raise SwapError(
                f"{where}: the attention mask {list(mask.shape)} is not block-diagonal: in row {row}, token {here} "
                f"attends to token {there} and not to the one before it. {ONE_DOCUMENT}"
            )
    return begins


def with_documents(arguments: Arguments, documents: Tensor) -> Arguments:
    """The call of a model with packed rows, in which its own attention keeps the documents apart.

    Attention of transformers does this by ``position_ids``, without a cache and without an ``attention_mask``, or by a
    mask of scores. Raises ``SwapError`` if it would not.
    """
    named, names = arguments.named, signature(arguments.module).names
    where = f"{type(arguments.module).__name__}: {SEVERAL}"
    mask, positions = mask_tensor(named), named.get("position_ids")
    changes: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if mask is not None and mask.dim() == 4:
        if mask.dtype == torch.bool:  # eager attention of transformers adds a mask to the scores, as it is
            dtype: Any = arguments.module.dtype
            scores = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            changes["attention_mask"] = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return arguments.changed(changes)
    if mask is not None and not bool((mask != 0).all()):
        raise SwapError(
            f"{where}, and an attention_mask with padding, with which attention does not keep documents apart: leave "
            "it out (tokens of padding, with position 0, are documents of their own)"
        )
    if "attention_mask" in named:
        changes["attention_mask"] = None
    if isinstance(positions, Tensor) and (positions.dim() == 2 or len(positions) == 4):
        return arguments.changed(changes)
    if isinstance(positions, Tensor) or not {"position_ids", "cu_seq_lens_q", "seq_idx"}.intersection(names):
        raise SwapError(f"{where}, and no position_ids [batch, time] that tell attention: {BY_MASK}")
    if "position_ids" in names:
        places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
        begins = pad(documents.diff() != 0, (1, 0), value=True)
        changes["position_ids"] = places - places.masked_fill(~begins, 0).cummax(1).values
    return arguments.changed(changes)


def is_pretrained(module: Any) -> bool:
    """Whether ``module`` is a model of transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)
