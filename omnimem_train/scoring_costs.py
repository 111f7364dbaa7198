"""What choosing the tokens that stay costs a layer, by selector; and `Work`, the unit of all counts.

With the package's kernels a choice is mostly inner products; in plain torch it is mostly passes over float32 maps
(queries x candidates, candidates x candidates). Passes were counted on the code with a dispatch mode.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from omnimem_train.memory.perturbation import Perturbation
from omnimem_train.memory.selector import BLOCK_NUMBERS, Selector
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.shape import DecoderShape

KERNEL_WIDTHS = (64, 128)  # head widths that the kernels take
ATTENTION_PASSES = 8.3  # over attention of probes on candidates: product, scale, mask, softmax, sum
CHANGE_PASSES = 36.3  # the same for leave-one-out, with the distances of values
VALUE_PASSES = 13  # over values expanded to all query heads in float32
PAIR_PASSES = 10  # over cosines of pairs of keys
WIDE_PASSES = 12  # over layer inputs compared with their neighbours, counted in float32 numbers
FEWER_PASSES = 4  # the same with the package's kernels, layer inputs joined and moved included
ALIKE = 0.7  # share of pairs that are of one modality, with 4.5 visual tokens for one of sound
SAVED_LAUNCHES = 30  # fewer kernels where one does the choosing


@dataclass(frozen=True)
class Work:
    """Operations by the unit that does them, and bytes moved.

    Attributes:
        matrix: operations of products in the model's precision.
        attention, attention_back: of attention, forward and backward.
        split, split_back: the same where memory and chunk go through cuDNN apart (`omnimem_train.models.split`).
        kernel: of products inside the package's own kernels.
        single: of products in float32.
        traffic: bytes read and written by elementwise operations.
        maps: the same for the maps of scoring, which are read in less orderly ways.
        launches: kernels started.
    """

    matrix: float = 0.0
    attention: float = 0.0
    attention_back: float = 0.0
    split: float = 0.0
    split_back: float = 0.0
    kernel: float = 0.0
    single: float = 0.0
    traffic: float = 0.0
    maps: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __rmul__(self, factor: float) -> Work:
        return Work(*(factor * getattr(self, f.name) for f in fields(self)))

    @property
    def operations(self) -> float:
        """All operations; traffic is not counted."""
        attention = self.attention + self.attention_back + self.split + self.split_back
        return self.matrix + attention + self.kernel + self.single


def n_probes(selector: Selector, n: int) -> int:
    """Queries of a chunk of `n` tokens that `selector` looks at."""
    probes = selector.probes()
    return {"none": 0, "all": n}.get(probes.kind, min(probes.count, n))


def _kernels_take(shape: DecoderShape, itemsize: int) -> bool:
    return itemsize == 2 and shape.head_dim in KERNEL_WIDTHS


def _exact(selector: Selector) -> bool:
    return isinstance(selector, Perturbation) and not selector.approximate


def scoring(
    spec: MemorySpec,
    shape: DecoderShape,
    itemsize: int,
    n: int,
    candidates: float,
    kernels: bool = True,
    known_sums: bool = False,
) -> Work:
    """Scoring and selection of one layer.

    Args:
        n: tokens of the chunk.
        candidates: memory and chunk together, S.
        kernels: whether the package's kernels run where they can.
        known_sums: whether the layer's attention leaves the sums of exponentials of all its queries.
    """
    selector, s = spec.make_selector(), candidates
    h, g, d, e = shape.heads, shape.kv_heads, shape.head_dim, shape.hidden
    kernels, found, p = kernels and _kernels_take(shape, itemsize), Work(), n_probes(selector, n)
    pairs = h * p * (s - n / 2 if p == n else s)
    if p and _exact(selector):
        group = isinstance(selector, Perturbation) and selector.group_norm == "sum"
        if kernels and not group:
            found += Work(kernel=12 * pairs * d + 2 * h * s * d * d, launches=4)
        else:
            maps = 4 * h * s * (CHANGE_PASSES * p + VALUE_PASSES * d)
            found += Work(single=4 * h * s * d * (p + d), maps=maps * (h // g if group else 1), launches=40)
    elif p and kernels:
        found += Work(kernel=(2 if known_sums and p == n else 4) * pairs * d, launches=2)
    elif p:
        found += Work(matrix=2 * h * p * s * d, maps=4 * h * p * s * ATTENTION_PASSES, launches=10)
    if "output_weight" in selector.needs and not _exact(selector):  # the L1 norm of every projected value
        found += Work(matrix=2 * h * s * d * e, maps=4 * h * s * e * 3, launches=4 * h)
    if getattr(selector, "redundancy", "none") == "later_key":
        if kernels:
            found += Work(kernel=ALIKE * g * s * s * d, launches=3)
        else:
            found += Work(matrix=g * s * s * d, maps=2 * g * s * s * PAIR_PASSES, launches=16)
    if "hidden" in selector.needs:
        found += Work(traffic=4 * (FEWER_PASSES if kernels else WIDE_PASSES) * s * e, launches=30)
    return found + Work(launches=-SAVED_LAUNCHES if kernels else 0)


def scoring_bytes(
    spec: MemorySpec, shape: DecoderShape, itemsize: int, n: int, candidates: float, kernels: bool = True
) -> float:
    """Bytes that scoring a layer needs for a moment; the kernels need next to none."""
    if spec.unlimited or (kernels and _kernels_take(shape, itemsize)):
        return 0
    selector = spec.make_selector()
    maps = 4 * min(BLOCK_NUMBERS, shape.heads * n_probes(selector, n) * candidates)
    values = 12 * shape.heads * candidates * shape.head_dim if _exact(selector) else 0
    pairs = getattr(selector, "redundancy", "none") == "later_key"
    return max(6 * maps + values, 16 * min(BLOCK_NUMBERS, shape.kv_heads * candidates**2) if pairs else 0)
