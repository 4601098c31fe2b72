"""Why runs part: a table of causes, each with how it is recognised and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from distrain.config.schema import Config
from distrain.verification.probe import LossFindings, ModuleFindings
from distrain.verification.recorder import RankRecord


@dataclass
class Evidence:
    """What is known of a parting.

    Attributes:
        config: The user's configuration.
        precision: Of the runs that part.
        quantity: What differs first.
        where: The tensor, metric or sample.
        only_in: Who alone has it; empty if both runs do.
        module: What experiments say of the module where the runs part, if one is known.
        module_is_batchnorm: It is a BatchNorm layer, or holds the differing buffer of one.
        loss: What experiments say of the loss.
        serial: The serial run.
        asked: The asked run, of all its ranks.
        float64_equal: In float64 the runs are equal; ``None`` if that was not compared.
        same_again: The serial run gives the same again.
        content_same_again: A sample gives the same when it is read again in the same process.
        order_matters: What the order of samples in a batch changes in one process; empty if nothing.
        equal_without_compression: The run is equal without the compressor; ``None`` if that was not tried.
    """

    config: Config
    precision: str
    quantity: str
    where: str
    serial: RankRecord
    asked: Sequence[RankRecord]
    module: ModuleFindings | None = None
    module_is_batchnorm: bool = False
    loss: LossFindings = field(default_factory=LossFindings)
    float64_equal: bool | None = None
    same_again: bool = True
    content_same_again: bool = True
    order_matters: str = ""
    equal_without_compression: bool | None = None
    only_in: str = ""


@dataclass(frozen=True)
class Cause:
    """One row of the table.

    Attributes:
        name: Short name.
        recognise: Whether the evidence speaks for it.
        advice: What happens, and what to do.
    """

    name: str
    recognise: Callable[[Evidence], bool]
    advice: str


def _untied(evidence: Evidence) -> bool:
    """Whether a parameter that has several names in one process is several parameters on some rank."""
    for names in evidence.serial.tied:
        for rank in evidence.asked:
            present = [name for name in names if name in rank.parameters]
            if len(present) > 1 and not any(set(present) <= set(group) for group in rank.tied):
                return True
    return False


def _module(check: Callable[[ModuleFindings], bool]) -> Callable[[Evidence], bool]:
    return lambda evidence: evidence.module is not None and check(evidence.module)


#: In the order in which they are tried: what explains the others comes first.
CAUSES: tuple[Cause, ...] = (
    Cause(
        "randomness in the data set",
        lambda e: e.quantity == "sample content" and not e.content_same_again,
        "a sample is another one each time it is read; let its random numbers depend on its index (and the epoch) "
        "alone, or use data.augment",
    ),
    Cause(
        "order of a set",
        lambda e: e.quantity in ("sample content", "sample order") and not e.only_in,
        "processes disagree about a sample, though each reads it the same twice; something goes through a set or a "
        "folder in an order of its own: sort it (Python's order of strings in a set differs between processes)",
    ),
    Cause(
        "not repeatable",
        lambda e: not e.same_again or (e.module is not None and not e.module.repeats),
        "one process doesn't give the same twice: a kernel that is not deterministic, or numbers that no seed governs; "
        "trainer.deterministic=true refuses such kernels by name",
    ),
    Cause(
        "tied parameters",
        _untied,
        "a parameter that is used under several names is several parameters on the ranks, and each gets a part of the "
        "gradient; tie them in the strategy too, or keep both uses in one part of the model",
    ),
    Cause(
        "BatchNorm",
        lambda e: e.module_is_batchnorm,
        "its statistics are those of the samples that run at once on a rank; strategy=ddp with strategy.batchnorm=sync "
        "and without trainer.micro_batch_size is equal, and so is a layer like GroupNorm",
    ),
    Cause(
        "dropout",
        _module(lambda module: module.draws),
        "the layer draws random numbers, and each rank draws its own for its share; set its rate to 0 to compare",
    ),
    Cause(
        "mean of means",
        lambda e: e.loss.is_mean,
        "the loss of a batch is the mean over the samples that it gets, so samples of smaller shares weigh more; "
        "return the sum and the count, or a number for each sample",
    ),
    Cause(
        "loss that mixes samples",
        lambda e: not e.loss.additive,
        "a sample's loss depends on the other samples that it gets, as a contrastive loss does, and a rank has only "
        "its share; no division of the batch can be equal",
    ),
    Cause(
        "buffer that counts",
        lambda e: (e.quantity == "buffers" and not e.only_in) or (e.module is not None and bool(e.module.buffers)),
        "a forward pass changes a buffer, by its own samples or by being called, and ranks have other samples and "
        "other numbers of calls; change it outside of forward, or compute it from what is the same on all ranks",
    ),
    Cause(
        "module that mixes samples",
        _module(lambda module: module.mixes),
        "a sample's output depends on the samples beside it or on their number, and a rank has only its share; compute "
        "it for each sample by itself",
    ),
    Cause(
        "backward that depends on the batch",
        _module(lambda module: module.backward_depends),
        "its gradient depends on how many samples run at once, as in an autograd function that divides by the size of "
        "its input; gradients are sums over samples here: don't divide",
    ),
    Cause(
        "compressor",
        lambda e: e.equal_without_compression is True,
        "without the compressor the runs are equal: what it sends is not what it got",
    ),
    Cause(
        "order of the samples",
        lambda e: bool(e.order_matters),
        "in one process too, another order of the samples in a batch changes more than rounding does; something "
        "depends on the place of a sample in its batch",
    ),
    Cause(
        "rounding of the format",
        lambda e: e.float64_equal is True,
        "in float64 the runs are equal, so the computation is the same; this number format rounds by more than the "
        "limit; a wider tolerance, or trainer.precision=fp32",
    ),
)


def find(evidence: Evidence) -> Cause | None:
    """The first cause that the evidence speaks for."""
    return next((cause for cause in CAUSES if cause.recognise(evidence)), None)
